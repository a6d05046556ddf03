"""Nodes of a Ray test cluster on this machine are emptied under load before their deadline, and end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import run_program

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_nodes_are_emptied_in_time_and_nobody_notices(six_layers: Path) -> None:
    lines = run_program("drained_nodes.py", six_layers, timeout_s=180)
    assert "same" in lines  # Ray tells there, too, that a node has died
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(records) == 2
    # The one that somebody named, and the one that Ray said it would take away.
    for record in records:
        assert record["state"] == "empty"
        assert record["early_s"] > 0, "it took longer than the 20 s that there were"
        assert record["num_stages_there"] == 0
        assert set(record["outcomes"]) <= {"done", "aborted"}
        assert record["outcomes"][-1] == "done"
