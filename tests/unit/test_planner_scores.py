"""FlexPipe's formulas, and the policy made of them (F7, F9-F11, F24, F25)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import even_split, make_demand, make_device, make_profile, make_state

from flexpipe_serve.planner.flexpipe_policy import FlexPipePolicy
from flexpipe_serve.planner.flexpipe_scores import (
    FlexPipeWeights,
    best_cv,
    granularity_score,
    meets_deadline,
    num_replicas,
    num_stages_for_cv,
    queueing_score,
    scaling_stages,
    sharing_penalty,
)
from flexpipe_serve.planner.types import Decision, PlannerWeights, Split, Trigger, Verdict

WEIGHTS = FlexPipeWeights()
PROFILE = make_profile()
DEVICES = tuple(make_device(i) for i in range(4))


# ------------------------------------------------------------------ formulas


def test_eq1_is_the_papers_formula() -> None:
    # rho = 2 / 4; 0.5^2 / (2! * 0.5) * (1 + 0.25) / 2 + 2 / (4 - 2) + 2 / (5 - 2)
    score = queueing_score(rate=2.0, service_rates=[4.0, 5.0], arrival_cv=1.0, service_cv=0.5)
    assert score == pytest.approx(0.25 * 0.625 + 1 + 2 / 3)
    assert queueing_score(rate=4.0, service_rates=[4.0, 5.0], arrival_cv=1.0, service_cv=0.5) == math.inf
    assert queueing_score(rate=0.0, service_rates=[4.0], arrival_cv=1.0, service_cv=0.5) == 0


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.98), st.integers(1, 32), st.floats(0, 8), st.floats(0, 8))
def test_eq1_rises_with_arrivals_cv(rho: float, num_stages: int, cv: float, other: float) -> None:
    low, high = (
        queueing_score(rate=rho, service_rates=[1.0] * num_stages, arrival_cv=x, service_cv=0.0)
        for x in sorted((cv, other))
    )
    assert low <= high


def test_stages_go_with_the_root_of_cv() -> None:
    counts = [num_stages_for_cv(cv, coarsest=4, max_stages=32) for cv in (0.1, 1, 4, 16, 1000)]
    assert counts == [4, 4, 8, 16, 32]
    # The CV that a granularity is best at is the same rule the other way round.
    assert [best_cv(n, coarsest=4) for n in (4, 8, 16)] == [1, 4, 16]


def test_eq4_weighs_throughput_against_latency_and_falls_off_with_the_distance_in_cv() -> None:
    best = {"throughput": 2.0, "max_throughput": 2.0, "latency": 3.0, "min_latency": 3.0, "weights": WEIGHTS}
    assert granularity_score(**best, cv=4.0, best_cv=4.0) == 1
    assert granularity_score(**best, cv=2.0, best_cv=4.0) == pytest.approx(math.exp(-1))
    slow = best | {"throughput": 1.0, "latency": 6.0}
    assert granularity_score(**slow, cv=4.0, best_cv=4.0) == pytest.approx(0.5)
    only_latency = best | {"throughput": 0.1, "weights": WEIGHTS._replace(alpha=0.0)}
    assert granularity_score(**only_latency, cv=4.0, best_cv=4.0) == 1


@pytest.mark.parametrize(("rate", "wanted"), [(0.1, 1), (1.9, 1), (2.0, 2), (3.9, 3), (100.0, 4)])
def test_eq5_counts_replicas(rate: float, wanted: int) -> None:
    weights = WEIGHTS._replace(beta1=0.5, beta2=0.25)  # two stages: mu_k is T_k
    count = num_replicas(total_rate=rate, throughput=1.0, num_stages=2, max_replicas=4, weights=weights)
    assert count == wanted


def test_eq9_grows_with_the_square_of_cv() -> None:
    calm, two, four = (sharing_penalty(cv, WEIGHTS) for cv in (0.0, 2.0, 4.0))
    assert calm == WEIGHTS.gamma0
    assert (four - calm) == pytest.approx(4 * (two - calm))


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 8), st.floats(0, 8), st.integers(0, 200), st.integers(0, 200), st.integers(1, 32), st.integers(1, 8)
)
def test_eq11_is_monotone_and_within_bounds(
    cv: float, other_cv: float, waiting: int, other_waiting: int, max_stages: int, coarsest: int
) -> None:
    coarsest = min(coarsest, max_stages)

    def stages(cv: float, num_waiting: int) -> int:
        return scaling_stages(cv=cv, num_waiting=num_waiting, max_stages=max_stages, coarsest=coarsest, weights=WEIGHTS)

    low, high = sorted((cv, other_cv))
    few, many = sorted((waiting, other_waiting))
    assert coarsest <= stages(low, few) <= stages(high, many) <= max_stages
    assert stages(cv, 0) == coarsest


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(-1, 1))
def test_eq11_does_not_swing_under_noise(num_waiting: int, noise: int) -> None:
    a, b = (
        scaling_stages(cv=2.0, num_waiting=max(0, n), max_stages=8, coarsest=1, weights=WEIGHTS)
        for n in (num_waiting, num_waiting + noise)
    )
    assert abs(a - b) <= 1


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 100), st.floats(0, 100), st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.floats(0, 500))
def test_eq12_is_capacity_by_the_deadline(deadline_s: float, init_s: float, rates: list[float], due: float) -> None:
    meets = meets_deadline(deadline_s=deadline_s, init_s=init_s, rates=rates, num_due=due)
    if init_s >= deadline_s:
        assert meets == (due == 0)
    if meets:  # then sooner, with more and for less, too
        assert meets_deadline(deadline_s=deadline_s, init_s=init_s / 2, rates=[*rates, 1.0], num_due=due / 2)


# ------------------------------------------------------------------ the policy


def decide(
    policy: FlexPipePolicy, current: Split, *, cv: float, rate: float = 1.0, at: float = 0.0, **more: object
) -> Decision:
    num_waiting = int(more.pop("num_waiting", 0))  # type: ignore[call-overload]
    demand = make_demand(rate, cv=cv, at=at, num_waiting=num_waiting)
    return policy.decide(PROFILE, make_state(current, demand, devices=DEVICES, **more))  # type: ignore[arg-type]


def test_finer_as_cv_rises_and_back_as_it_falls() -> None:
    policy = FlexPipePolicy(PlannerWeights(cool_down_s=0))
    current = even_split(1)
    path = []
    for i, cv in enumerate([0.5, 1, 2, 4, 6, 8, 6, 4, 2, 1, 0.5]):
        decision = decide(policy, current, cv=cv, at=float(i))
        current = decision.chosen or current
        path.append(current.num_stages)
    rising, falling = path[:6], path[5:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert path[0] == path[-1] == 1
    assert path[5] >= 3


def test_cuts_are_nested_and_fixed_whatever_is_asked_for() -> None:
    policy = FlexPipePolicy(PlannerWeights(max_stages=4))
    cuts: dict[int, set[int]] = {}
    for prompt_tokens in (16, 1024):
        demand = make_demand(1.0, prompt_tokens=prompt_tokens)
        decision = policy.decide(PROFILE, make_state(even_split(1), demand, devices=DEVICES))
        for score in decision.candidates:
            seen = cuts.setdefault(score.split.num_stages, set(score.split.boundaries))
            assert seen == set(score.split.boundaries)
    assert sorted(cuts) == [1, 2, 3, 4]
    assert all(cuts[n] <= cuts[4] for n in cuts)


def test_a_queue_asks_for_finer_stages() -> None:
    calm = decide(FlexPipePolicy(PlannerWeights()), even_split(1), cv=2.5)
    full = decide(FlexPipePolicy(PlannerWeights()), even_split(1), cv=2.5, num_waiting=64)
    assert full.chosen is not None
    assert full.chosen.num_stages > (calm.chosen or even_split(1)).num_stages
    assert "Eq 11" in (full.current.refused or "")


def test_what_comes_too_late_is_rejected() -> None:
    # Loading takes longer than the horizon.
    slow = make_profile(load_bytes_per_s=1e6)
    policy = FlexPipePolicy(PlannerWeights(horizon_s=30))
    demand = make_demand(3.0, cv=4.0)
    decision = policy.decide(slow, make_state(even_split(1), demand, devices=DEVICES))
    assert decision.verdict is Verdict.STAY
    assert all("Eq 12" in (c.refused or "") for c in decision.candidates if c.split.num_stages > 1)
    assert policy.decide(PROFILE, make_state(even_split(1), demand, devices=DEVICES)).verdict is Verdict.MOVE


def test_several_pipelines_where_one_is_not_enough() -> None:
    policy = FlexPipePolicy(PlannerWeights(max_stages=1, max_pipelines=4))
    capacity = decide(policy, even_split(1), cv=1.0).current.prediction.max_rate
    decision = decide(policy, even_split(1), cv=1.0, rate=3.2 * capacity)
    assert decision.chosen is not None
    assert decision.chosen.num_pipelines == 3
    assert len({device.compute for device in decision.chosen.devices}) == 3


def test_the_cool_down_is_its_interval_and_few_requests_tell_nothing() -> None:
    policy = FlexPipePolicy(PlannerWeights(cool_down_s=30))
    early = decide(policy, even_split(1), cv=6.0, at=29.0, last_change_at=0.0)
    late = decide(policy, even_split(1), cv=6.0, at=30.0, last_change_at=0.0)
    assert (early.verdict, late.verdict) == (Verdict.STAY, Verdict.MOVE)
    assert "29 s ago" in early.sentence
    nobody = decide(policy, even_split(1), cv=6.0, rate=0.0)
    assert nobody.verdict is Verdict.STAY
    assert nobody.policy == "flexpipe"
    assert nobody.trigger is Trigger.INTERVAL


def test_stages_that_share_a_compute_score_less() -> None:
    policy = FlexPipePolicy(PlannerWeights(max_stages=2))
    apart = decide(policy, even_split(2), cv=4.0).current.score
    demand = make_demand(1.0, cv=4.0)
    shared = policy.decide(PROFILE, make_state(even_split(2, shared=True), demand, devices=DEVICES)).current.score
    assert shared < apart
