"""The latency model: its own laws, the profile's times at its edges, and a step-by-step simulation in between."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import even_split, make_demand, make_device, make_profile, simulate

from flexpipe_serve.planner.latency import SplitModel, predict
from flexpipe_serve.planner.memory import num_kv_tokens
from flexpipe_serve.planner.profile import StepShape
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import Demand, Prediction, SchedulerLimits, Split

PROFILE = make_profile()
SPLITS = st.builds(even_split, st.integers(1, 6), shared=st.booleans())
LENGTHS = st.tuples(st.integers(1, 1500), st.integers(1, 300))


def capacity(split: Split, lengths: tuple[int, int]) -> float:
    return predict(PROFILE, split, of_lengths(1e-9, lengths)).max_rate


def of_lengths(rate: float, lengths: tuple[int, int], *, cv: float = 1.0) -> Demand:
    return make_demand(rate, cv=cv, prompt_tokens=lengths[0], output_tokens=lengths[1])


def is_no_better(a: Prediction, b: Prediction) -> bool:
    """Up to rounding."""
    return all(x >= y * (1 - 1e-9) for x, y in ((a.ttft_s, b.ttft_s), (a.tpot_s, b.tpot_s), (a.latency_s, b.latency_s)))


@settings(max_examples=60, deadline=None)
@given(SPLITS, LENGTHS, st.floats(0.3, 8), st.floats(0.001, 1.3), st.floats(0.001, 1.3))
def test_more_requests_make_each_slower(
    split: Split, lengths: tuple[int, int], cv: float, load: float, other: float
) -> None:
    less, more = sorted((load, other))
    most = capacity(split, lengths)
    a, b = (predict(PROFILE, split, of_lengths(x * most, lengths, cv=cv)) for x in (more, less))
    assert is_no_better(a, b)
    assert a.max_rate == b.max_rate == most


@settings(max_examples=60, deadline=None)
@given(SPLITS, LENGTHS, st.floats(0.01, 0.95), st.floats(0, 8), st.floats(0, 8))
def test_burstier_arrivals_make_each_slower(
    split: Split, lengths: tuple[int, int], load: float, cv: float, other: float
) -> None:
    rate = load * capacity(split, lengths)
    a, b = (predict(PROFILE, split, of_lengths(rate, lengths, cv=x)) for x in (max(cv, other), min(cv, other)))
    assert is_no_better(a, b)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.booleans(), LENGTHS, st.floats(0.01, 0.95), st.floats(1.01, 4))
def test_faster_devices_make_each_faster(
    num_stages: int, shared: bool, lengths: tuple[int, int], load: float, speed: float
) -> None:
    slow, fast = (even_split(num_stages, shared=shared, speed=x) for x in (1.0, speed))
    demand = of_lengths(load * capacity(slow, lengths), lengths)
    a, b = predict(PROFILE, slow, demand), predict(PROFILE, fast, demand)
    assert is_no_better(a, b)
    assert b.max_rate > a.max_rate


@settings(max_examples=50, deadline=None)
@given(SPLITS, LENGTHS, st.floats(0.3, 4))
def test_latency_grows_beyond_all_bounds_towards_capacity_and_is_infinite_from_there(
    split: Split, lengths: tuple[int, int], cv: float
) -> None:
    most = capacity(split, lengths)
    calm = predict(PROFILE, split, of_lengths(0.5 * most, lengths, cv=cv))
    near, nearer = (predict(PROFILE, split, of_lengths((1 - gap) * most, lengths, cv=cv)) for gap in (1e-4, 1e-7))
    assert calm.latency_s < near.latency_s < nearer.latency_s < math.inf
    assert nearer.latency_s > 100 / most * cv**2
    beyond = predict(PROFILE, split, of_lengths(most * 1.001, lengths, cv=cv))
    assert beyond.latency_s == beyond.ttft_s == beyond.tpot_s == math.inf
    assert beyond.utilisation > 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), LENGTHS, st.floats(0.01, 0.9), st.booleans())
def test_equal_pipelines_share_the_rate(
    num_stages: int, num_pipelines: int, lengths: tuple[int, int], load: float, named: bool
) -> None:
    one = even_split(num_stages)
    devices = tuple(make_device(i) for i in range(num_stages * (num_pipelines if named else 1)))
    many = Split(boundaries=one.boundaries, devices=devices, num_pipelines=num_pipelines)
    rate = load * capacity(one, lengths)
    alone = predict(PROFILE, one, of_lengths(rate, lengths))
    together = predict(PROFILE, many, of_lengths(num_pipelines * rate, lengths))
    assert together.latency_s == pytest.approx(alone.latency_s)
    assert together.ttft_s == pytest.approx(alone.ttft_s)
    assert together.max_rate == pytest.approx(num_pipelines * alone.max_rate)


def test_pipelines_on_the_same_computes_gain_nothing() -> None:
    one = even_split(1)
    two = Split(boundaries=(), devices=one.devices * 2, num_pipelines=2)
    demand = make_demand(1.0)
    assert predict(PROFILE, two, demand).max_rate <= predict(PROFILE, one, demand).max_rate * 1.01  # hops overlap
    # The weights are there twice, and what is left is for both.
    assert num_kv_tokens(PROFILE, two) < num_kv_tokens(PROFILE, one) / 2


def test_one_stage_alone_takes_the_times_of_the_profile() -> None:
    profile = make_profile(hop_s=0.0, step_s=0.0)
    p = predict(profile, even_split(1), make_demand(1e-9, prompt_tokens=100, output_tokens=21))
    decode = StepShape(num_tokens=1, num_samples=1, num_context_tokens=110)
    prefill = StepShape(num_tokens=100, num_samples=1, num_pairs=5000)
    # A step has a little less than one decoding sequence on average: one in 21 has the prompt.
    assert p.tpot_s == pytest.approx(profile.stage_seconds(0, 30, decode), rel=1e-3)
    assert p.ttft_s == pytest.approx(profile.stage_seconds(0, 30, prefill), rel=0.02)
    assert p.latency_s == pytest.approx(p.ttft_s + 20 * p.tpot_s)


def test_hops_and_stages_lengthen_a_pass_by_what_they_cost() -> None:
    demand = make_demand(1e-9)
    one, three = (predict(PROFILE, even_split(n), demand) for n in (1, 3))
    assert three.tpot_s - one.tpot_s == pytest.approx(2 * (PROFILE.hop_s + PROFILE.stage_s))


def test_stages_on_one_compute_take_turns_and_others_overlap() -> None:
    demand = make_demand(0.1, prompt_tokens=16, output_tokens=256)
    one, shared, apart = (
        predict(PROFILE, split, demand).max_rate for split in (even_split(1), even_split(3, shared=True), even_split(3))
    )
    assert 0.95 * one < shared < one
    assert apart > 1.3 * one


@pytest.mark.parametrize("num_stages", [1, 2])
def test_less_memory_means_fewer_places_and_less_capacity(num_stages: int) -> None:
    def at(memory_mib: int) -> Prediction:
        devices = tuple(make_device(i, memory_mib=memory_mib) for i in range(num_stages))
        split = Split(boundaries=even_split(num_stages).boundaries, devices=devices)
        return predict(PROFILE, split, make_demand(0.1))

    sizes = [at(mib) for mib in (8192, 800, 760, 400)] if num_stages == 1 else [at(m) for m in (8192, 450, 435, 300)]
    rates = [p.max_rate for p in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[1] > rates[2] > 0
    assert rates[3] == 0
    assert sizes[3].num_kv_tokens == 0
    assert sizes[3].latency_s == math.inf == sizes[3].utilisation


def test_stages_of_one_domain_share_its_memory() -> None:
    apart, shared = num_kv_tokens(PROFILE, even_split(2)), num_kv_tokens(PROFILE, even_split(2, shared=True))
    mib = 2**20
    weights = 30 * 14_000_000 + 2 * 113_000_000
    assert shared == (8192 * mib - weights - 2 * 100 * mib) // (30 * 1536)
    assert apart == (8192 * mib - weights // 2 - 100 * mib) // (15 * 1536)


def test_cached_prompts_cost_no_time_but_their_kv() -> None:
    cold = make_demand(1.0, prompt_tokens=512)
    warm = Demand(
        **{f: getattr(cold, f) for f in cold.__struct_fields__ if f != "prefix_hit_share"}, prefix_hit_share=0.75
    )
    a, b = (predict(PROFILE, even_split(1), demand) for demand in (cold, warm))
    assert b.ttft_s < 0.5 * a.ttft_s
    assert b.max_rate > 1.5 * a.max_rate
    assert a.num_kv_tokens == b.num_kv_tokens


@settings(max_examples=50, deadline=None)
@given(SPLITS, LENGTHS, st.floats(0.01, 3), st.floats(0.3, 8), st.integers(0, 200), st.floats(5, 300))
def test_over_a_horizon_latency_is_finite_and_no_less_with_a_queue(
    split: Split, lengths: tuple[int, int], load: float, cv: float, num_waiting: int, horizon_s: float
) -> None:
    rate = load * capacity(split, lengths)
    steps = StepTimes(PROFILE, split)
    empty = of_lengths(rate, lengths, cv=cv)
    queued = Demand(
        **{f: getattr(empty, f) for f in empty.__struct_fields__ if f != "num_waiting"}, num_waiting=num_waiting
    )
    calm, busy = (SplitModel(steps, demand).latency_over(horizon_s) for demand in (empty, queued))
    assert 0 < calm <= busy * (1 + 1e-9)
    assert busy < math.inf
    if load < 0.8:
        assert calm <= SplitModel(steps, empty).predict().latency_s * 1.02  # the burst is not that exact


def test_beyond_capacity_the_queue_grows_with_the_horizon() -> None:
    split = even_split(1)
    most = capacity(split, (128, 32))
    model = SplitModel(StepTimes(PROFILE, split), make_demand(2 * most))
    minute, two = model.latency_over(60), model.latency_over(120)
    # On average half the horizon's surplus, which is as much as is served in that time, and all places before it.
    assert 30 <= minute <= 55
    assert two - minute == pytest.approx(30, rel=0.1)


def test_a_queue_is_worked_off() -> None:
    split = even_split(1)
    most = capacity(split, (128, 32))
    demand = make_demand(0.5 * most, num_waiting=round(10 * most))
    model = SplitModel(StepTimes(PROFILE, split), demand)
    # Ten seconds' work that shrinks by half a second each second: five seconds on average while it lasts.
    assert model.latency_over(20) == pytest.approx(5, rel=0.4)
    assert model.latency_over(200) == pytest.approx(0.1 * 5 + 0.9 * model.predict().latency_s, rel=0.4)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(128, 32), (64, 128)])
@pytest.mark.parametrize(("load", "low", "high"), [(0.05, 0.9, 1.1), (0.4, 0.8, 1.25), (0.7, 0.7, 1.4)])
def test_poisson_arrivals_take_what_a_simulation_says(
    num_stages: int, lengths: tuple[int, int], load: float, low: float, high: float
) -> None:
    split = even_split(num_stages)
    demand = of_lengths(load * capacity(split, lengths), lengths)
    num_requests, seeds = (60, (7,)) if load < 0.1 else (250, (7, 8))
    runs = [simulate(PROFILE, split, demand, num_requests=num_requests, seed=seed) for seed in seeds]
    ttft_s, tpot_s, latency_s = (sum(column) / len(runs) for column in zip(*runs, strict=True))
    p = predict(PROFILE, split, demand)
    assert low <= p.latency_s / latency_s <= high
    assert low <= p.tpot_s / tpot_s <= high
    assert 0.7 * low <= p.ttft_s / ttft_s <= 1.3 * high


@pytest.mark.parametrize("num_stages", [1, 2])
def test_bursts_take_about_what_a_simulation_says(num_stages: int) -> None:
    split = even_split(num_stages)
    demand = of_lengths(0.3 * capacity(split, (128, 32)), (128, 32), cv=4)
    runs = [simulate(PROFILE, split, demand, num_requests=300, seed=seed) for seed in range(3)]
    p = predict(PROFILE, split, demand)
    for predicted, measured in zip((p.ttft_s, p.tpot_s, p.latency_s), zip(*runs, strict=True), strict=True):
        assert 0.5 <= predicted / (sum(measured) / 3) <= 2


def test_a_pipeline_beyond_its_predicted_capacity_falls_behind_in_a_simulation_too() -> None:
    split = even_split(2)
    most = capacity(split, (128, 32))
    calm, full = (
        simulate(PROFILE, split, of_lengths(x * most, (128, 32)), num_requests=400, seed=1) for x in (0.6, 1.3)
    )
    assert full[0] > 10 * calm[0]


def test_the_schedulers_own_limits_count() -> None:
    demand = make_demand(1e-9, prompt_tokens=512.0)
    usual, few, long_chunks = (
        predict(PROFILE, even_split(1), demand, limits=limits)
        for limits in (
            SchedulerLimits(),
            SchedulerLimits(max_num_seqs=2),
            SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=128),
        )
    )
    # Two sequences share a step's fixed cost worse than 64 do; a prompt in four chunks pays it four times.
    assert few.max_rate < 0.8 * usual.max_rate
    assert few.ttft_s == pytest.approx(usual.ttft_s)
    assert long_chunks.ttft_s > few.ttft_s
    assert SplitModel(StepTimes(PROFILE, even_split(1), SchedulerLimits(max_num_seqs=7)), demand).num_places == 7
