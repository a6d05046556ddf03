"""Stages find their nodes by themselves on a Ray test cluster on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import run_program

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_stages_stay_in_a_rack_and_a_further_pipeline_goes_where_nobody_is(six_layers: Path) -> None:
    lines = run_program("placed_nodes.py", six_layers, timeout_s=150)
    answer = json.loads(lines[-1])
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
