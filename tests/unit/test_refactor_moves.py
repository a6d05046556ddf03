"""Moves and stage names: all layers arrive, as few as possible move, no name is used twice."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import Layout, make_layout, stage_prefix
from flexpipe_serve.refactor.moves import Move, held_layers, moves_between, name_stages


@st.composite
def cuts(draw, num_layers, max_stages):
    inner = st.integers(1, num_layers - 1) if num_layers > 1 else st.nothing()
    return sorted(draw(st.sets(inner, max_size=max_stages - 1))) if num_layers > 1 else []


@st.composite
def cases(draw, max_layers=12, max_stages=5):
    num_layers = draw(st.integers(1, max_layers))
    boundaries = draw(cuts(num_layers, max_stages))
    pool = draw(st.permutations([f"stage-{i}" for i in range(8)]))
    old = make_layout(num_layers=num_layers, boundaries=boundaries, stages=pool[: len(boundaries) + 1])
    spare = draw(st.lists(st.sampled_from(pool[5:]), unique=True, max_size=2))
    return old, draw(cuts(num_layers, max_stages)), [name for name in spare if name not in old.stages]


def owners(layout: Layout) -> list[str]:
    return [part.stage for part in layout.slices for _ in part.layers]


def num_moved(old: Layout, new: Layout) -> int:
    return sum(a != b for a, b in zip(owners(old), owners(new), strict=True))


@given(cases())
def test_moves_turn_the_old_layout_into_the_new_one(case):
    old, boundaries, spare = case
    new = name_stages(old, boundaries, num_layers=old.num_layers, spare=spare)
    moves = moves_between(old, new)
    owner = owners(old)
    for move in moves:
        assert move.layers == tuple(range(move.layers[0], move.layers[-1] + 1))
        for layer in move.layers:
            assert owner[layer] == move.source != move.target
            owner[layer] = move.target
    assert owner == owners(new)
    assert len({(m.source, m.target) for m in moves}) == len(moves)
    for stage, layers in held_layers(old, new).items():
        assert layers == {i for i, pair in enumerate(zip(owners(old), owners(new), strict=True)) if stage in pair}


@given(cases(max_stages=4))
def test_no_other_naming_moves_fewer_layers(case):
    old, boundaries, spare = case
    new = name_stages(old, boundaries, num_layers=old.num_layers, spare=spare)
    names = [*old.stages, *(f"new-{i}" for i in range(len(boundaries) + 1))]
    fewest = min(
        num_moved(old, make_layout(num_layers=old.num_layers, boundaries=boundaries, stages=stages))
        for stages in permutations(names, len(boundaries) + 1)
    )
    assert num_moved(old, new) == fewest


@given(cases())
def test_new_names_come_from_stages_that_run_then_the_lowest_free_ones(case):
    old, boundaries, spare = case
    new = name_stages(old, boundaries, num_layers=old.num_layers, spare=spare)
    assert new.boundaries == tuple(boundaries)
    run = [*old.stages, *spare]
    made = [name for name in new.stages if name not in run]
    assert len(made) == max(0, new.num_stages - len(run))
    assert [name for name in spare if name in new.stages] == spare[: max(0, new.num_stages - old.num_stages)]
    lowest = (f"stage-{i}" for i in range(20) if f"stage-{i}" not in run)
    assert made == [next(lowest) for _ in made]


def test_every_kind_of_move():
    old = make_layout(num_layers=8, boundaries=[4])

    def change(*boundaries, **options):
        new = name_stages(old, boundaries, num_layers=8, **options)
        return new.stages, moves_between(old, new)

    assert change(4) == (("stage-0", "stage-1"), ())
    assert change(2) == (("stage-0", "stage-1"), (Move("stage-0", "stage-1", (2, 3)),))
    assert change() == (("stage-0",), (Move("stage-1", "stage-0", (4, 5, 6, 7)),))
    assert change(3, 4) == (("stage-0", "stage-2", "stage-1"), (Move("stage-0", "stage-2", (3,)),))
    assert change(3, 5, spare=["warm"]) == (
        ("stage-0", "warm", "stage-1"),
        (Move("stage-0", "warm", (3,)), Move("stage-1", "warm", (4,))),
    )


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="boundary 8"):
        name_stages(make_layout(num_layers=8, boundaries=[4]), [8], num_layers=8)


def test_new_stages_of_another_pipeline_are_named_like_its_own():
    old = make_layout(num_layers=6, boundaries=[3], prefix=stage_prefix(2))
    assert old.stages == ("p2-stage-0", "p2-stage-1")
    assert name_stages(old, [1, 2, 4], num_layers=6, spare=["p2-stage-2"]).prefix == "p2-"
    new = name_stages(old, [1, 2, 4, 5], num_layers=6, spare=["p2-stage-2"])
    assert sorted(new.stages) == [f"p2-stage-{i}" for i in range(5)]
