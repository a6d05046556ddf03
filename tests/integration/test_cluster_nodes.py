"""A Ray test cluster of several nodes on this machine: copies between them, stages that find their nodes, drains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import run_program

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def said(six_layers: Path) -> dict[str, list[str]]:
    """The lines of each part."""
    parts: dict[str, list[str]] = {}
    for line in run_program("ray_nodes.py", six_layers, timeout_s=540):
        if line.startswith("part "):
            parts[line.removeprefix("part ")] = lines = []
        elif line == "same" or line.startswith("{"):  # Ray tells here, too, that a node has died
            lines.append(line)
    return parts


def test_layers_move_between_nodes_and_no_bit_differs(said: dict[str, list[str]]) -> None:
    """Over TCP with CURVE keys."""
    *lines, last = said["several"]
    assert last == "same"
    shift, split, merge = map(json.loads, lines)
    assert [(record["outcome"], record["error"]) for record in (shift, split, merge)] == [("done", None)] * 3
    # What crosses nodes is copied; the stage that is started stands with the one whose layers it takes.
    assert shift["shared"] == [False]
    assert shift["here"] == {"stage-0": True, "stage-1": False}
    assert split["here"] == {"stage-0": True, "stage-1": False, "stage-2": False}
    assert all(record["snapshot_bytes"] > 0 for record in (shift, split, merge))


def test_stages_stay_in_a_rack_and_a_further_pipeline_goes_where_nobody_is(said: dict[str, list[str]]) -> None:
    answer = json.loads(said["placed"][-1])
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


def test_nodes_are_emptied_in_time_and_nobody_notices(said: dict[str, list[str]]) -> None:
    """The one that somebody named, and the one that Ray said it would take away."""
    *lines, last = said["drained"]
    assert last == "same"
    records = list(map(json.loads, lines))
    assert len(records) == 2
    for record in records:
        assert record["state"] == "empty"
        assert record["early_s"] > 0
        assert record["num_stages_there"] == 0
        assert set(record["outcomes"]) <= {"done", "aborted"}
        assert record["outcomes"][-1] == "done"
