"""Which stage takes which slice: as few layers as possible move, stages stay on their nodes, no process is wasted."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.placement.assignment import assign
from flexpipe_serve.placement.matching import match_stages
from flexpipe_serve.refactor.moves import name_stages

NODES = ["a", "b", "c"]


@given(st.integers(0, 4), st.integers(0, 2), st.data())
def test_no_assignment_is_cheaper(num_rows, num_more, data):
    num_columns = num_rows + num_more
    cost = st.integers(-5, 20)
    costs = data.draw(st.lists(st.lists(cost, min_size=num_columns, max_size=num_columns), min_size=num_rows,
                               max_size=num_rows))  # fmt: skip
    columns = assign(costs)
    assert len(set(columns)) == num_rows
    least = min(sum(costs[i][j] for i, j in enumerate(p)) for p in permutations(range(num_columns), num_rows))
    assert sum(costs[i][j] for i, j in enumerate(columns)) == least


def cuts(draw, num_layers, max_stages):
    return sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=max_stages - 1))) if num_layers > 1 else []


@st.composite
def cases(draw, with_nodes=True):
    num_layers = draw(st.integers(1, 12))
    boundaries = cuts(draw, num_layers, 4)
    pool = draw(st.permutations([f"stage-{i}" for i in range(7)]))
    old = make_layout(num_layers=num_layers, boundaries=boundaries, stages=pool[: len(boundaries) + 1])
    spare = pool[5 : 5 + draw(st.integers(0, 2))]
    node_of = {name: draw(st.sampled_from(NODES)) for name in (*old.stages, *spare)}
    new = cuts(draw, num_layers, 4)
    wanted = st.one_of(st.none(), st.sampled_from(NODES)) if with_nodes else st.none()
    return old, new, [draw(wanted) for _ in range(len(new) + 1)], node_of, spare


def match(case):
    old, new, nodes, node_of, spare = case
    return match_stages(old, new, num_layers=old.num_layers, nodes=nodes, node_of=node_of, spare=spare)


def owners(layout):
    return [part.stage for part in layout.slices for _ in part.layers]


def cost(layout, case):
    """(layers that change their stage, stages to launch, layers that change their node, spare stages used)."""
    old, _, nodes, node_of, spare = case
    near = {node: set() for node in [None, *NODES]}
    for part in old.slices:
        near[node_of[part.stage]].update(part.layers)
    stand = [node_of.get(name, node) for name, node in zip(layout.stages, nodes, strict=True)]
    away = sum(len(set(part.layers) - near[node]) for part, node in zip(layout.slices, stand, strict=True))
    moved = sum(a != b for a, b in zip(owners(old), owners(layout), strict=True))
    return moved, sum(s not in node_of for s in layout.stages), away, sum(s in spare for s in layout.stages)


@given(cases())
def test_no_other_matching_is_better(case):
    old, new, nodes, node_of, _ = case
    chosen = match(case)
    assert chosen.boundaries == tuple(new)
    candidates = [*node_of, *(f"launched-{i}" for i in range(len(nodes)))]
    costs = []
    for names in permutations(candidates, len(nodes)):
        launched = [name for name in names if name not in node_of]
        if launched != candidates[len(node_of) : len(node_of) + len(launched)]:
            continue  # the same as another, but for the names of launched stages
        if all(node in (None, node_of.get(name, node)) for name, node in zip(names, nodes, strict=True)):
            costs.append(cost(make_layout(num_layers=old.num_layers, boundaries=new, stages=names), case))
    assert cost(chosen, case) == min(costs)


@given(cases())
def test_stages_stay_on_their_nodes_and_launched_ones_get_the_lowest_free_names(case):
    _, _, nodes, node_of, _ = case
    chosen = match(case)
    for name, node in zip(chosen.stages, nodes, strict=True):
        assert node in (None, node_of.get(name, node))
    launched = [name for name in chosen.stages if name not in node_of]
    lowest = (f"stage-{i}" for i in range(30) if f"stage-{i}" not in node_of)
    assert launched == [next(lowest) for _ in launched]


@given(cases(with_nodes=False))
def test_without_nodes_it_moves_as_much_as_naming_in_order(case):
    old, new, _, node_of, spare = case
    named = name_stages(old, new, num_layers=old.num_layers, spare=spare)
    chosen = match(case)
    before = owners(old)
    assert sum(map(str.__eq__, before, owners(chosen))) == sum(map(str.__eq__, before, owners(named)))
    # It launches as few, and takes as few from the pool.
    assert sum(s in node_of for s in chosen.stages) == sum(s in node_of for s in named.stages)


def test_same_boundaries_on_another_node_are_new_stages():
    old = make_layout(num_layers=8, boundaries=[4])
    node_of = {"stage-0": "a", "stage-1": "b", "warm": "c"}
    new = match_stages(old, [4], num_layers=8, nodes=["a", "c"], node_of=node_of, spare=["warm"])
    assert new.stages == ("stage-0", "warm")
    new = match_stages(old, [4], num_layers=8, nodes=["c", "c"], node_of=node_of, spare=["warm"])
    assert new.stages in (("warm", "stage-2"), ("stage-2", "warm"))


def test_slices_cross_when_their_nodes_do():
    old = make_layout(num_layers=8, boundaries=[4])
    new = match_stages(old, [4], num_layers=8, nodes=["b", "a"], node_of={"stage-0": "a", "stage-1": "b"})
    assert new.stages == ("stage-1", "stage-0")


def test_a_stage_of_unknown_node_takes_only_slices_without_one():
    old = make_layout(num_layers=8, boundaries=[])
    assert match_stages(old, [], num_layers=8, nodes=["a"], node_of={}).stages == ("stage-1",)
    assert match_stages(old, [], num_layers=8, nodes=[None], node_of={}).stages == ("stage-0",)


def test_one_node_for_each_slice():
    with pytest.raises(ConfigError, match="1 nodes for 2 stages"):
        match_stages(make_layout(num_layers=8, boundaries=[]), [4], num_layers=8, nodes=["a"], node_of={})
