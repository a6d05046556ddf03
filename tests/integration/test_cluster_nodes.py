"""Refactorings over several nodes: a Ray test cluster on this machine, stages reached by TCP with CURVE keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import run_program

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_layers_move_between_nodes_and_no_bit_differs(six_layers: Path) -> None:
    lines = run_program("several_nodes.py", six_layers, timeout_s=120)
    *lines, last = lines
    assert last == "same"
    shift, split, merge = map(json.loads, lines)
    assert [(record["outcome"], record["error"]) for record in (shift, split, merge)] == [("done", None)] * 3
    # What crosses nodes is copied; the stage that is started stands with the one whose layers it takes.
    assert shift["shared"] == [False]
    assert shift["here"] == {"stage-0": True, "stage-1": False}
    assert split["here"] == {"stage-0": True, "stage-1": False, "stage-2": False}
    assert all(record["snapshot_bytes"] > 0 for record in (shift, split, merge))
