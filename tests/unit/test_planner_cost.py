"""What has to move between two splits, and what it costs."""

from __future__ import annotations

from itertools import permutations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import MIB, even_split, make_demand, make_device, make_profile, make_state

from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.planner.cost import GENTLE, HURRIED, transition_cost
from flexpipe_serve.planner.latency import SplitModel
from flexpipe_serve.planner.memory import num_kv_tokens
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.transition import Transition
from flexpipe_serve.planner.types import Split
from flexpipe_serve.refactor.moves import held_layers, moves_between, name_stages

NUM_LAYERS = 8
SMALL = make_profile(num_layers=NUM_LAYERS)
LAYER, END = 14_000_000, 113_000_000
CUTS = st.lists(st.integers(1, NUM_LAYERS - 1), unique=True, max_size=4).map(sorted).map(tuple)


def split_on(boundaries: tuple[int, ...], names: list[int]) -> Split:
    return Split(boundaries=boundaries, devices=tuple(make_device(i) for i in names))


def least_loaded(profile: ModelProfile, old: Split, new: Split) -> int:
    """By trying every way to give old stages to new slices."""

    def parts(split: Split) -> list[tuple[str, int, int]]:
        edges = (0, *split.boundaries, profile.num_layers)
        return [(d.name, a, b) for d, a, b in zip(split.devices, edges[:-1], edges[1:], strict=True)]

    def kept_layers(stage: tuple[str, int, int], part: tuple[str, int, int]) -> int:
        return max(0, min(stage[2], part[2]) - max(stage[1], part[1])) if stage[0] == part[0] else 0

    olds, news = parts(old), parts(new)
    slots: list[int | None] = [*range(len(olds)), *[None] * len(news)]
    best = 0
    for order in set(permutations(slots, len(news))):
        best = max(best, sum(kept_layers(olds[i], part) for i, part in zip(order, news, strict=True) if i is not None))
    return profile.num_layers - best


@settings(max_examples=60, deadline=None)
@given(st.data(), CUTS, CUTS)
def test_as_many_layers_stay_as_can(data: st.DataObject, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    before, after = before[:2], after[:2]
    names = st.integers(0, 2)
    old, new = (split_on(cuts, [data.draw(names) for _ in range(len(cuts) + 1)]) for cuts in (before, after))
    # Ends aside: profile without them.
    profile = msgspec.structs.replace(SMALL, embedding_bytes=0, head_bytes=0)
    assert Transition(profile, old, new).num_bytes == least_loaded(profile, old, new) * LAYER


@settings(max_examples=100, deadline=None)
@given(CUTS, CUTS)
def test_on_one_device_it_loads_what_the_refactoring_itself_would(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    old = make_layout(num_layers=NUM_LAYERS, boundaries=before)
    new = name_stages(old, after, num_layers=NUM_LAYERS)
    held = held_layers(old)
    num_moved = sum(len(move.layers) for move in moves_between(old, new))
    splits = [split_on(cuts, [0] * (len(cuts) + 1)) for cuts in (before, after)]
    profile = msgspec.structs.replace(SMALL, embedding_bytes=0, head_bytes=0)
    transition = Transition(profile, *splits)
    assert transition.num_bytes == num_moved * LAYER
    assert transition.num_started == max(0, len(new.slices) - len(held))
    assert transition.num_copied_layers == 0


def test_nothing_moves_where_nothing_changes() -> None:
    split = even_split(3)
    transition = Transition(make_profile(), split, split)
    assert transition.num_bytes == transition.num_copied_layers == transition.num_started == 0
    assert transition.load_s == transition.busy_load_s == transition.share_replayed == 0
    assert transition.num_kv_tokens == num_kv_tokens(make_profile(), split)


def test_a_shift_moves_layers_kv_and_no_process() -> None:
    old, new = split_on((4,), [0, 1]), split_on((6,), [0, 1])
    transition = Transition(SMALL, old, new)
    assert transition.num_bytes == 2 * LAYER
    assert transition.num_copied_layers == 2
    assert transition.num_started == 0
    assert transition.busy_load_s == pytest.approx(2 * LAYER / 5e8)
    assert transition.load_s == 0


def test_a_new_device_loads_its_slice_with_the_head_and_starts_a_stage() -> None:
    transition = Transition(SMALL, split_on((), [0]), split_on((4,), [0, 1]))
    assert transition.num_bytes == 4 * LAYER + END
    assert transition.num_copied_layers == 4
    assert transition.num_started == 1
    assert transition.load_s == pytest.approx((4 * LAYER + END) / 5e8)


def test_both_splits_are_held_meanwhile() -> None:
    old, new = split_on((4,), [0, 1]), split_on((6,), [0, 1])
    during = Transition(SMALL, old, new).num_kv_tokens
    # Device 0 goes from 4 to 6 layers, device 1 keeps its 4 with the head until the end.
    free = 8192 * MIB - 100 * MIB
    assert during == min((free - 6 * LAYER - END) // (6 * 1536), (free - 4 * LAYER - END) // (4 * 1536))
    # Stages of one domain hold a moving layer's weights twice, its KV once.
    shared = Transition(SMALL, split_on((4,), [0, 0]), split_on((6,), [0, 0])).num_kv_tokens
    assert shared == (8192 * MIB - 200 * MIB - 10 * LAYER - 2 * END) // (8 * 1536)


def test_fewer_pipelines_compute_their_sequences_again() -> None:
    one = split_on((), [0])
    three = Split(boundaries=(), devices=tuple(make_device(i) for i in range(3)), num_pipelines=3)
    assert Transition(SMALL, three, one).share_replayed == pytest.approx(2 / 3)
    more = Transition(SMALL, one, three)
    assert (more.num_bytes, more.num_started, more.share_replayed) == (2 * (8 * LAYER + 2 * END), 2, 0)


def test_the_cost_is_a_slowdown_of_all_who_are_there_meanwhile() -> None:
    old, new = split_on((4,), [0, 1]), split_on((6,), [0, 1])
    demand = make_demand(0.5)
    transition = Transition(SMALL, old, new)
    present = SplitModel(StepTimes(SMALL, old), demand)
    state = make_state(old, demand, num_kv_tokens_in_use=10_000)
    cost_s, duration_s, hurried_s = transition_cost(
        transition, state, demand, present=present, latency_s=2.0, pace=GENTLE
    )
    # Always somebody there: loading has its share of a core. And 2 layers' KV at 40 MB/s.
    load_s, copy_s = 2 * LAYER / 5e8, 2 * 1536 * 10_000 / 4e7
    assert duration_s == pytest.approx(load_s / GENTLE.share + copy_s)
    assert cost_s == pytest.approx(GENTLE.slowdown * 2.0 * 0.5 * duration_s)
    calm, _, _ = transition_cost(transition, state, make_demand(0.01), present=present, latency_s=2.0, pace=GENTLE)
    assert calm < 0.01 * cost_s
    hurried = transition_cost(transition, state, demand, present=present, latency_s=2.0, pace=HURRIED)
    assert hurried.duration_s == hurried_s == pytest.approx(load_s / HURRIED.share + copy_s)
    slower_s = HURRIED.slowdown * load_s / HURRIED.share + GENTLE.slowdown * copy_s
    assert hurried.cost_s == pytest.approx(slower_s * 2.0 * 0.5)


def test_less_room_meanwhile_costs_more() -> None:
    # Room for few sequences while both splits are held, for many before.
    devices = [make_device(i, memory_mib=330 + 100 * i) for i in range(2)]
    old, new = (Split(boundaries=cuts, devices=tuple(devices)) for cuts in ((4,), (6,)))
    demand = make_demand(3.0, output_tokens=256)
    present = SplitModel(StepTimes(SMALL, old), demand)
    transition = Transition(SMALL, old, new)
    assert 0 < transition.num_kv_tokens < present.num_kv_tokens
    state = make_state(old, demand)
    crowded = transition_cost(transition, state, demand, present=present, latency_s=2.0, pace=GENTLE)
    transition.num_kv_tokens = present.num_kv_tokens
    roomy = transition_cost(transition, state, demand, present=present, latency_s=2.0, pace=GENTLE)
    assert crowded.duration_s == roomy.duration_s
    assert crowded.cost_s > roomy.cost_s
