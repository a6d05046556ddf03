"""Layouts without the nodes that are to be emptied, and where stages are placed: properties."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe_serve.errors import InvalidRequestError
from flexpipe_serve.pipeline.layout import Layout, make_layout
from flexpipe_serve.placement.drain_options import DrainOption, drain_options
from flexpipe_serve.placement.nodes import find_node, mark_draining, usable_nodes
from flexpipe_serve.placement.placing import place_stages
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology
from flexpipe_serve.refactor.moves import moves_between, name_stages
from flexpipe_serve.refactor.record import RefactorRequest

NODES = ("n0", "n1", "n2", "n3")


@st.composite
def placed_layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, str], tuple[str, ...]]:
    """A layout, the node of each of its stages, and the nodes that may still be used."""
    num_layers = draw(st.integers(1, 12))
    boundaries = sorted(draw(st.sets(st.integers(1, 11).filter(lambda b: b < num_layers), max_size=4)))
    layout = make_layout(num_layers=num_layers, boundaries=boundaries)
    node_of = {name: draw(st.sampled_from(NODES)) for name in layout.stages}
    usable = tuple(draw(st.lists(st.sampled_from(NODES), unique=True, min_size=1)))
    return layout, node_of, usable


@settings(deadline=None)
@given(placed_layouts())
def test_every_option_stands_where_it_may_and_is_a_split_of_the_model(
    case: tuple[Layout, dict[str, str], tuple[str, ...]],
) -> None:
    layout, node_of, usable = case
    options = drain_options(layout, node_of=node_of, usable=usable)
    assert options
    assert len(set(options)) == len(options)
    for option in options:
        made = make_layout(num_layers=layout.num_layers, boundaries=option.boundaries)
        assert made.num_stages == len(option.nodes)
        assert set(option.nodes) <= set(usable)


@settings(deadline=None)
@given(placed_layouts())
def test_the_first_option_changes_nothing_but_what_has_to_go(
    case: tuple[Layout, dict[str, str], tuple[str, ...]],
) -> None:
    layout, node_of, usable = case
    first = drain_options(layout, node_of=node_of, usable=usable)[0]
    assert first.boundaries == layout.boundaries
    for name, node in zip(layout.stages, first.nodes, strict=True):
        assert node == node_of[name] or node_of[name] not in usable
    placed = place_stages(layout, first.boundaries, nodes=first.nodes, node_of=node_of, spare=(), usable=usable)
    gone = {layer for part in layout.slices if node_of[part.stage] not in usable for layer in part.layers}
    assert {layer for move in moves_between(layout, placed.layout) for layer in move.layers} == gone


@settings(deadline=None)
@given(placed_layouts())
def test_merged_options_need_no_new_stage(case: tuple[Layout, dict[str, str], tuple[str, ...]]) -> None:
    layout, node_of, usable = case
    staying = [name for name in layout.stages if node_of[name] in usable]
    assume(staying)
    merged = tuple(node_of[name] for name in staying)
    options = [o for o in drain_options(layout, node_of=node_of, usable=usable) if o.nodes == merged]
    assert options
    for option in options:
        placed = place_stages(layout, option.boundaries, nodes=option.nodes, node_of=node_of, spare=(), usable=usable)
        assert set(placed.layout.stages) == set(staying)


def test_what_has_to_go_is_spread_then_gathered_then_merged() -> None:
    layout = make_layout(num_layers=10, boundaries=[2, 4, 8])
    node_of = {"stage-0": "n0", "stage-1": "n3", "stage-2": "n3", "stage-3": "n1"}
    options = drain_options(layout, node_of=node_of, usable=("n0", "n1"))
    assert options == (
        DrainOption((2, 4, 8), ("n0", "n0", "n1", "n1")),
        DrainOption((2, 4, 8), ("n0", "n0", "n0", "n1")),
        DrainOption((2, 4, 8), ("n0", "n1", "n1", "n1")),
        DrainOption((5,), ("n0", "n1")),
        DrainOption((), ("n0",)),
        DrainOption((), ("n1",)),
    )
    assert drain_options(layout, node_of=node_of, usable=()) == ()


def test_a_thousand_nodes_make_no_thousand_options() -> None:
    layout = make_layout(num_layers=30, boundaries=[15])
    node_of = {"stage-0": "here", "stage-1": "gone"}
    usable = ("here", *(f"n{i}" for i in range(1000)))
    assert len(drain_options(layout, node_of=node_of, usable=usable)) <= 12


@settings(deadline=None)
@given(placed_layouts(), st.integers(1, 5))
def test_stages_are_placed_where_they_may_stand(
    case: tuple[Layout, dict[str, str], tuple[str, ...]], num_stages: int
) -> None:
    layout, node_of, usable = case
    boundaries = range(1, min(num_stages, layout.num_layers))
    placed = place_stages(layout, boundaries, nodes=None, node_of=node_of, spare=(), usable=usable)
    assert placed.layout.boundaries == tuple(boundaries)
    assert set(placed.node_of) == set(placed.layout.stages)
    for name in placed.layout.stages:
        assert placed.node_of[name] in usable
        assert placed.node_of[name] == node_of.get(name, placed.node_of[name])  # a stage cannot change its node
    if set(node_of.values()) <= set(usable):
        assert placed.layout == name_stages(layout, tuple(boundaries), num_layers=layout.num_layers)
        new = [name for name in placed.layout.stages if name not in layout.stages]
        assert {placed.node_of[name] for name in new} <= {node_of[layout.stages[0]]}


def test_a_spare_stage_on_a_node_to_be_left_is_no_help() -> None:
    layout = make_layout(num_layers=4, boundaries=[])
    node_of = {"stage-0": "n0", "stage-1": "n1"}
    placed = place_stages(layout, (2,), nodes=None, node_of=node_of, spare=["stage-1"], usable=("n0",))
    assert placed.node_of == {"stage-0": "n0", "stage-2": "n0"}
    placed = place_stages(layout, (2,), nodes=None, node_of=node_of, spare=["stage-1"], usable=("n0", "n1"))
    assert placed.node_of == {"stage-0": "n0", "stage-1": "n1"}


def topology(*nodes: Node) -> Topology:
    devices = [
        Device(
            name=node.name, node=node.name, kind=DeviceKind.CPU, compute=node.name, domain=node.name, total_bytes=1,
            free_bytes=1,
        )
        for node in nodes
        if node.is_alive
    ]  # fmt: skip
    return Topology(nodes=nodes, devices=tuple(devices))


def test_nodes_are_found_by_id_its_beginning_or_address() -> None:
    found = topology(
        Node(name="abcd11", address="10.0.0.1"),
        Node(name="abcd22", address="10.0.0.2"),
        Node(name="ffff33", address="10.0.0.2"),
        Node(name="dead44", address="10.0.0.4", is_alive=False),
    )
    assert find_node("abcd11", found, param="node").name == "abcd11"
    assert find_node("abcd2", found, param="node").name == "abcd22"
    assert find_node("10.0.0.1", found, param="node").name == "abcd11"
    for text, why in (
        ("abcd", "2 nodes"),
        ("10.0.0.2", "2 nodes"),
        ("fff", "No node"),
        ("dead44", "No node"),
        ("", "No"),
    ):
        with pytest.raises(InvalidRequestError, match=why) as raised:
            find_node(text, found, param="nodes")
        assert raised.value.param == "nodes"
        assert "abcd11 (10.0.0.1)" in str(raised.value)


def test_nodes_to_be_left_and_dead_ones_take_no_stage() -> None:
    found = topology(Node(name="a"), Node(name="b", is_draining=True), Node(name="c", is_alive=False), Node(name="d"))
    assert usable_nodes(found) == ("a", "d")
    assert usable_nodes(mark_draining(found, {"a", "unknown"})) == ("d",)


def test_a_request_names_one_node_for_each_stage() -> None:
    assert RefactorRequest(boundaries=(2,), nodes=("a", "b")).nodes == ("a", "b")
    assert RefactorRequest(stages=1, nodes=("a",)).nodes == ("a",)
    for split in ({"boundaries": (2,)}, {"stages": 2}):
        with pytest.raises(InvalidRequestError, match="nodes names 3 for 2 stages") as raised:
            RefactorRequest(**split, nodes=("a", "b", "c"))
        assert raised.value.param == "nodes"
