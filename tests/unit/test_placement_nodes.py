"""Where stages stand that nobody names a node for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.placement.allocation import Refusal, StageDemand
from flexpipe_serve.placement.node_choice import choose_nodes
from flexpipe_serve.placement.placements import Placements
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology

GIB = 2**30
AT = 1000.0


def topology(sizes, *, draining=(), racks=None):
    """Nodes with as many GiB each."""
    racks = racks or {}
    return Topology(
        nodes=tuple(Node(name=n, rack=racks.get(n, ""), is_draining=n in draining) for n in sizes),
        devices=tuple(
            Device(
                name=n, node=n, kind=DeviceKind.CPU, compute=n, domain=n,
                total_bytes=size * GIB, free_bytes=size * GIB,
            )
            for n, size in sizes.items()
        ),
    )  # fmt: skip


def stages(*sizes):
    return [StageDemand(name=f"stage-{i}", model="m", memory_bytes=int(size * GIB)) for i, size in enumerate(sizes)]


def choose(demands, nodes, *, current=None, placements=None, pipeline="p0", at=AT, home=""):
    placements = placements or Placements()
    return choose_nodes(
        demands,
        nodes,
        at=at,
        current=current or {},
        num_others=placements.num_stages_of_others(pipeline),
        hostings=placements.hostings(nodes),
        graph=placements.graph(),
        home=home,
    )


def test_stages_have_devices_of_their_own_where_there_are_enough() -> None:
    assert set(choose(stages(1, 1), topology({"a": 8, "b": 8}))) == {"a", "b"}


def test_else_they_share_one_node_if_it_holds_them() -> None:
    assert choose(stages(1, 1, 1), topology({"a": 8, "b": 4})) == ("a", "a", "a")
    assert len(set(choose(stages(1, 1, 1), topology({"a": 2, "b": 2})))) == 2


def test_the_roomiest_node_comes_first_and_then_the_router_s() -> None:
    assert choose(stages(1), topology({"a": 4, "b": 8, "c": 4})) == ("b",)
    assert choose(stages(1), topology({"a": 8, "b": 8, "c": 8}), home="c") == ("c",)


def test_a_rack_is_not_left_without_need() -> None:
    racks = {"a": "1", "b": "2", "c": "2"}
    assert set(choose(stages(1, 1), topology({"a": 9, "b": 8, "c": 8}, racks=racks))) == {"b", "c"}


def test_what_is_drained_is_left_out() -> None:
    assert choose(stages(1, 1), topology({"a": 8, "b": 2}, draining={"a"})) == ("b", "b")


def test_what_runs_stays_and_what_is_added_comes_near_while_there_is_room() -> None:
    nodes = topology({"a": 8, "b": 8})
    together = {"stage-0": "a", "stage-1": "a"}
    assert choose(stages(1, 1, 1), nodes, current=together) == ("a", "a", "a")
    assert choose(stages(4, 4, 4), nodes, current=together) == ("a", "a", "b")
    apart = {"stage-0": "b", "stage-1": "a"}
    assert choose(stages(1, 1, 1), topology({"a": 8, "b": 8, "c": 8}), current=apart) == ("b", "a", "c")
    assert choose(stages(9, 1), topology({"a": 8, "b": 16}), current=together) == ("b", "a"), "it does not fit there"


def test_no_room_is_a_refusal_with_numbers() -> None:
    answer = choose(stages(9), topology({"a": 8, "b": 4}))
    assert isinstance(answer, Refusal)
    assert "9.00 GiB" in answer.reason
    assert "8.00 GiB" in answer.reason


def test_a_further_pipeline_gets_nodes_of_its_own_and_shares_the_emptiest_where_it_must() -> None:
    placements = Placements()
    placements.note("p0", {"stage-0": "a", "stage-1": "b"}, at=AT)
    assert choose(stages(1), topology({"a": 8, "b": 8, "c": 4}), placements=placements, pipeline="p1") == ("c",)
    assert choose(stages(1, 1), topology({"a": 8, "b": 8, "c": 4}), placements=placements, pipeline="p1") == ("c", "c")
    # Its own stages keep nothing away.
    assert choose(stages(1), topology({"a": 8, "b": 8, "c": 4}), placements=placements) in (("a",), ("b",))
    placements.note("p0", {"stage-0": "a", "stage-1": "b", "stage-2": "a"}, at=AT)
    late = AT + 1e4  # what is of late has faded
    two = topology({"a": 8, "b": 8})
    assert choose(stages(1), two, placements=placements, pipeline="p1", at=late) == ("b",)
    placements.note("p0", {}, at=AT)
    assert placements.num_stages_of_others("p1") == {}


def test_two_that_start_at_once_keep_out_of_each_other_s_way() -> None:
    nodes, placements = topology({"a": 8, "b": 8, "c": 8}), Placements()
    placements.mark(nodes, ["a"], at=AT)
    assert choose(stages(1), nodes, placements=placements) == ("b",)
    placements.mark(nodes, ["b"], at=AT)
    assert choose(stages(1), nodes, placements=placements) == ("c",)
    busy = placements.congestion(nodes, at=AT)
    assert busy["a"] == pytest.approx(busy["b"])
    assert busy["a"] > busy["c"] > 0
    assert choose(stages(1), nodes, placements=placements, at=AT + 3600) == ("a",)


def test_a_node_that_served_the_model_lately_and_kept_its_layers_is_preferred() -> None:
    nodes, placements = topology({"a": 9, "b": 8}), Placements()
    placements.note("p0", {"stage-0": "b"}, at=AT, cached_shares={"b": 1.0})
    placements.note("p0", {}, at=AT)
    assert choose(stages(1), nodes, placements=placements, at=AT + 60) == ("b",)
    placements.note("p1", {}, at=AT + 1e5)  # forgotten
    assert choose(stages(1), nodes, placements=placements, at=AT + 1e5) == ("a",)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    needs=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    draining=st.sets(st.integers(0, 3), max_size=2),
    homes=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
)
def test_memory_suffices_and_drained_nodes_are_empty(sizes, needs, draining, homes) -> None:
    names = [f"node-{i}" for i in range(len(sizes))]
    out = {f"node-{i}" for i in draining}
    nodes = topology(dict(zip(names, sizes, strict=True)), draining=out)
    current = {
        f"stage-{i}": names[home] for i, home in enumerate(homes[: len(needs)]) if 0 <= home < len(names)
    }  # fmt: skip
    answer = choose(stages(*needs), nodes, current=current)
    largest = max((size for name, size in zip(names, sizes, strict=True) if name not in out), default=0)
    if isinstance(answer, Refusal):
        assert sum(needs) > largest, "one node would have held them all"
        return
    assert not out.intersection(answer)
    for name, size in zip(names, sizes, strict=True):
        assert sum(need for need, node in zip(needs, answer, strict=True) if node == name) <= size
    as_it_is = [current.get(f"stage-{i}") for i in range(len(needs))]
    if None not in as_it_is and not out.intersection(as_it_is):
        held = {name: sum(n for n, node in zip(needs, as_it_is, strict=True) if node == name) for name in names}
        if all(held[name] <= size for name, size in zip(names, sizes, strict=True)):
            assert list(answer) == as_it_is
