"""The layouts a benchmark goes through, and whether streams are told apart."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.bench.identity import find_difference
from flexpipe_serve.bench.tour import KINDS, random_steps, tour
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.refactor.moves import moves_between, name_stages


@pytest.mark.parametrize("num_layers", [6, 7, 12, 30, 31, 80])
def test_the_tour_is_closed_and_each_step_is_of_its_kind(num_layers: int) -> None:
    steps = tour(num_layers)
    assert [step.kind for step in steps] == list(KINDS)
    for earlier, later in itertools.pairwise([*steps, steps[0]]):
        assert earlier.new == later.old
    num_stages = {step.kind: (len(step.old) + 1, len(step.new) + 1) for step in steps}
    assert num_stages == {
        "shift": (2, 2), "split": (2, 3), "both-ways": (3, 3), "merge": (3, 2), "scale-in": (2, 1), "scale-out": (1, 2),
    }  # fmt: skip
    for step in steps:
        old = make_layout(num_layers=num_layers, boundaries=step.old)
        moves = moves_between(old, name_stages(old, step.new, num_layers=num_layers))
        assert moves, step
        if step.kind == "both-ways":
            order = {name: i for i, name in enumerate(old.stages)}
            assert {order[move.source] < order[move.target] for move in moves} == {True, False}


def test_some_kinds_only() -> None:
    assert [step.kind for step in tour(30, kinds=["merge", "shift"])] == ["shift", "merge"]
    with pytest.raises(ConfigError, match="no kind 'spilt'"):
        tour(30, kinds=["spilt"])
    with pytest.raises(ConfigError, match="5 layers"):
        tour(5)


@given(
    num_steps=st.integers(0, 20),
    num_layers=st.integers(3, 40),
    max_stages=st.integers(2, 5),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_random_steps(num_steps: int, num_layers: int, max_stages: int, seed: int, data: st.DataObject) -> None:
    start = tuple(sorted(data.draw(st.sets(st.integers(1, num_layers - 1), max_size=3))))

    def steps() -> list:
        rng = np.random.default_rng(seed)
        return list(random_steps(num_steps, start=start, num_layers=num_layers, max_stages=max_stages, rng=rng))

    found = steps()
    assert found == steps()
    assert len(found) == num_steps
    assert all(len(step.new) < max_stages for step in found[:-1])
    for step in found[:-1]:
        by = len(step.new) - len(step.old)
        if step.kind in ("shift", "both-ways") and len(step.old) < max_stages:
            assert by == 0
            assert sum(abs(a - b) for a, b in zip(step.old, step.new, strict=True)) <= 6
    assert all(step.old != step.new for step in found)
    for step in found:
        make_layout(num_layers=num_layers, boundaries=step.new)
    layouts = [start, *(step.new for step in found)]
    assert [step.old for step in found] == layouts[:-1]
    assert (layouts[-1] == start) == (num_steps != 1)  # one step cannot lead back


def test_random_steps_need_a_choice() -> None:
    with pytest.raises(ConfigError, match="max stages is 1"):
        next(random_steps(3, start=(), num_layers=30, max_stages=1, rng=np.random.default_rng(0)))


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(0, 99))
def test_a_stream_cut_short_is_no_difference(reference: list[str], length: int) -> None:
    assert find_difference(0, reference[:length], reference) is None


@given(st.lists(st.sampled_from(["a", "bc", "d"]), min_size=1), st.integers(0, 99))
def test_any_other_piece_is_found_where_it_is(reference: list[str], at: int) -> None:
    at %= len(reference)
    found = find_difference(7, [*reference[:at], "X", *reference[at + 1 :]], reference)
    assert found is not None
    assert (found.prompt, found.piece, found.num_pieces) == (7, at, 1)
    assert found.char == len("".join(reference[:at]))
    assert found.found.startswith("X")


def test_a_stream_that_ends_amid_a_character() -> None:
    assert find_difference(0, ["ab", "\ufffd"], ["ab", "é"]) is None
    found = find_difference(0, ["ab", "c", "d"], ["ab"])
    assert found is not None
    assert (found.char, found.piece, found.num_pieces) == (2, 1, 2)
