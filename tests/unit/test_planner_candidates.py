"""Which splits are worth weighing."""

from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import even_split, make_demand, make_device, make_profile, make_state

from flexpipe_serve.planner.candidates import CandidateMaker, device_choices, stage_counts
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.types import (
    PlannerState,
    PlannerWeights,
    Split,
    StageDevice,
)

CHATTY = make_profile(hop_s=0.008)
DEVICES = tuple(make_device(i) for i in range(4))
WEIGHTS = PlannerWeights(horizon_s=60, margin=0.1, cool_down_s=30)


def devices_like(*computes: str) -> tuple[StageDevice, ...]:
    return tuple(make_device(i, compute=name) for i, name in enumerate(computes))


def test_devices_of_their_own_compute_first_then_the_fast_then_those_in_use() -> None:
    devices = (
        make_device(0, compute="a"),
        make_device(1, compute="a"),
        make_device(2, compute="b", speed=2.0),
        make_device(3, compute="c"),
    )
    state = make_state(Split(boundaries=(15,), devices=(devices[3], devices[0])), make_demand(1.0), devices=devices)
    choices = list(device_choices(state, PlannerWeights(max_stages=4)))
    names = {n: [[d.name for d in c[0]] for c in choices if len(c[0]) == n] for n in (1, 2, 3, 4)}
    assert names[1][0] == ["device-2"]
    assert ["device-3", "device-0"] in names[2]  # nothing changes place
    assert sorted(names[3][0]) == ["device-0", "device-2", "device-3"]
    assert sorted(names[4][0]) == ["device-0", "device-1", "device-2", "device-3"]


def test_one_device_takes_all_stages_and_no_second_pipeline() -> None:
    state = make_state(even_split(2, shared=True), make_demand(1.0))
    choices = list(device_choices(state, PlannerWeights(max_stages=3, max_pipelines=2)))
    assert [[d.name for d in groups[0]] for groups in choices] == [["device-0"] * n for n in (1, 2, 3)]
    assert all(len(groups) == 1 for groups in choices)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)
)
def test_pipelines_share_no_compute(computes: list[str], num_stages: int, max_pipelines: int, present: int) -> None:
    devices = devices_like(*computes)
    current = Split(
        boundaries=tuple(range(1, min(present, 3))),
        devices=tuple(devices[i % len(devices)] for i in range(min(present, 3))),
    )
    state = make_state(current, make_demand(1.0), devices=devices)
    for groups in device_choices(state, PlannerWeights(max_stages=num_stages, max_pipelines=max_pipelines)):
        used = [{d.compute for d in group} for group in groups]
        assert sum(map(len, used)) == len(set().union(*used))
        assert len({len(group) for group in groups}) == 1
        # Stages stand next to their like: no node is left and entered again.
        for group in groups:
            nodes = [d.node for d in group]
            assert len(dict.fromkeys(nodes)) == 1 + sum(a != b for a, b in pairwise(nodes))


@given(st.integers(1, 64), st.integers(1, 64))
def test_numbers_of_stages_are_a_dozen_or_so_and_have_the_neighbours(max_stages: int, present: int) -> None:
    counts = stage_counts(max_stages=max_stages, present=present)
    assert counts == sorted(set(counts))
    assert set(counts) <= set(range(1, max_stages + 1))
    assert {1, max_stages} <= set(counts)
    assert {n for n in (present - 1, present, present + 1) if 1 <= n <= max_stages} <= set(counts)
    assert len(counts) <= 16


def test_candidates_are_kept_until_demand_or_devices_change() -> None:
    maker = CandidateMaker(WEIGHTS)

    def found(state: PlannerState) -> list[int]:
        return [id(candidate) for candidate in maker.candidates(CHATTY, state, state.demand)]

    state = make_state(even_split(2), make_demand(1.0), devices=DEVICES)
    first = found(state)
    assert found(make_state(even_split(2), make_demand(1.03), devices=DEVICES)) == first
    # What processes take varies a little all the time.
    varied = tuple(msgspec.structs.replace(d, overhead_bytes=d.overhead_bytes + 2**20) for d in DEVICES)
    assert found(msgspec.structs.replace(state, devices=varied)) == first
    assert found(make_state(even_split(2), make_demand(6.0), devices=DEVICES)) != first
    assert found(make_state(even_split(2), make_demand(1.0), devices=DEVICES[:3])) != first
    assert found(make_state(even_split(3), make_demand(1.0), devices=DEVICES)) != first


@settings(max_examples=25, deadline=None)
@given(
    st.integers(10, 20),
    st.integers(1, 4),
    st.sampled_from([0.3, 0.5, 0.8]),
    st.sampled_from([(128, 2), (96, 4), (64, 64), (32, 160), (256, 256)]),
)
def test_where_room_is_scarce_some_candidate_sustains_as_much_as_any_cut(
    low: int, num_fitting: int, speed: float, lengths: tuple[int, int]
) -> None:
    """The fast stage has room for few requests from layer ``low`` on, the slow one for all."""
    prompt_tokens, output_tokens = lengths
    num_layers = CHATTY.num_layers - low
    kv_bytes = num_layers * CHATTY.kv_bytes_per_token * num_fitting * (prompt_tokens + output_tokens)
    fast = msgspec.structs.replace(
        make_device(1), memory_bytes=CHATTY.stage_bytes(low, 30) + kv_bytes + make_device(1).overhead_bytes
    )
    devices = (make_device(0, speed=speed), fast)
    demand = make_demand(0.5, prompt_tokens=prompt_tokens, output_tokens=output_tokens, num_running=20)
    state = make_state(Split(boundaries=(low,), devices=devices), demand, devices=devices)
    found = CandidateMaker(msgspec.structs.replace(WEIGHTS, max_stages=2)).candidates(CHATTY, state, demand)
    best = max(c.under(demand).max_rate for c in found if c.split.devices == devices)
    every = [Split(boundaries=(boundary,), devices=devices) for boundary in range(low, 30)]
    assert best >= 0.93 * max(predict(CHATTY, split, demand).max_rate for split in every)
    assert len(found) < 40
