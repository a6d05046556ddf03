"""Stages find their nodes by themselves on a Ray test cluster on this machine."""

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


def test_stages_stay_in_a_rack_and_a_further_pipeline_goes_where_nobody_is(six_layers: Path) -> None:
    program = [sys.executable, str(HERE / "placed_nodes.py"), str(six_layers)]
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "unit")))
    done = subprocess.run(
        program,
        env=clean_environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    (first,) = answer["started"]
    assert sorted(first) == ["here", "near"], "two nodes of one rack"
    assert answer["scaled"] == [first, ["far"]], "the node that nobody uses"
    assert answer["error"] is None
    stages, others = answer["refactored"]
    assert others == ["far"]
    assert sorted(stages) in (["here", "here", "near"], ["here", "near", "near"])
    assert "placement_refused" not in answer["events"]
    assert len(answer["tokens"][0]) == 8
    assert answer["tokens"][0] == answer["tokens"][1]
