"""Refactorings over several nodes: a Ray test cluster on this machine, stages reached by TCP with CURVE keys."""

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


def test_layers_move_between_nodes_and_no_bit_differs(six_layers: Path) -> None:
    program = [sys.executable, str(HERE / "several_nodes.py"), str(six_layers)]
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "unit")))
    done = subprocess.run(
        program,
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "same"
    shift, split, merge = map(json.loads, lines)
    assert [(record["outcome"], record["error"]) for record in (shift, split, merge)] == [("done", None)] * 3
    # What crosses nodes is copied; the stage that is started stands with the one whose layers it takes.
    assert shift["shared"] == [False]
    assert shift["here"] == {"stage-0": True, "stage-1": False}
    assert split["here"] == {"stage-0": True, "stage-1": False, "stage-2": False}
    assert all(record["snapshot_bytes"] > 0 for record in (shift, split, merge))
