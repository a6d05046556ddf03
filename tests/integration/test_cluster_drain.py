"""Nodes of a Ray test cluster on this machine are emptied under load before their deadline, and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
HERE = Path(__file__).parent


def test_nodes_are_emptied_in_time_and_nobody_notices(six_layers: Path) -> None:
    program = [sys.executable, str(HERE / "drained_nodes.py"), str(six_layers)]
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "unit")))
    done = subprocess.run(
        program,
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # Ray tells there, too, that a node has died
    assert "same" in lines
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(records) == 2
    # The one that somebody named, and the one that Ray said it would take away.
    for record in records:
        assert record["state"] == "empty"
        assert record["early_s"] > 0, "it took longer than the 20 s that there were"
        assert record["num_stages_there"] == 0
        assert set(record["outcomes"]) <= {"done", "aborted"}
        assert record["outcomes"][-1] == "done"
