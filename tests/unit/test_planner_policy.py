"""The gated policy: what it weighs, when it moves, when it does not, and that it says why."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import even_split, make_demand, make_device, make_profile, make_state

from flexpipe_serve.planner.gate import NUM_AGREEING, expected_demand
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.policy import Policy, make_policy
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import (
    Decision,
    PlannerState,
    PlannerWeights,
    Split,
    Trigger,
    Verdict,
)

# Hops that cost: few requests are served best by one stage, many by several.
CHATTY = make_profile(hop_s=0.008)
DEVICES = tuple(make_device(i) for i in range(4))
WEIGHTS = PlannerWeights(horizon_s=60, margin=0.1, cool_down_s=30)
CAPACITY = predict(CHATTY, even_split(1), make_demand(1e-9)).max_rate


def gated(weights: PlannerWeights = WEIGHTS) -> Policy:
    return make_policy("gated", weights)


def settle(policy: Policy, state: PlannerState) -> Decision:
    """The decision when the demand has been the same for a while."""
    decisions = [policy.decide(CHATTY, state) for _ in range(NUM_AGREEING)]
    assert all(d.verdict is Verdict.STAY for d in decisions[:-1])
    return decisions[-1]


def follow(
    policy: Policy, rates: list[float], *, current: Split, profile: ModelProfile = CHATTY
) -> list[tuple[int, int]]:
    """A second for each rate; changes are made at once. When there was a change, and to how many stages."""
    changes: list[tuple[int, int]] = []
    for second, rate in enumerate(rates):
        last = float(changes[-1][0]) if changes else None
        demand = make_demand(rate, at=float(second))
        decision = policy.decide(profile, make_state(current, demand, devices=DEVICES, last_change_at=last))
        if decision.chosen is not None:
            current = decision.chosen
            changes.append((second, current.num_stages))
    return changes


# ------------------------------------------------------------------ decisions


def test_few_requests_are_served_by_one_stage_and_many_by_several() -> None:
    calm = settle(gated(), make_state(even_split(3), make_demand(0.3), devices=DEVICES))
    assert calm.chosen is not None
    assert calm.chosen.num_stages == 1
    busy = settle(gated(), make_state(even_split(1), make_demand(0.95 * CAPACITY), devices=DEVICES))
    assert busy.chosen is not None
    assert busy.chosen.num_stages > 1
    assert busy.candidates[0].gain_s > busy.candidates[0].cost_s > 0


def test_a_decision_is_a_record_with_inputs_scores_and_reasons() -> None:
    state = make_state(even_split(2), make_demand(1.0, at=17.0), devices=DEVICES)
    decision = gated().decide(CHATTY, state)
    assert (decision.at, decision.policy, decision.trigger) == (17.0, "gated", Trigger.INTERVAL)
    assert decision.demand == state.demand
    assert decision.current.split == state.current
    assert decision.current.score == decision.current.gain_s == 0
    allowed = [c for c in decision.candidates if c.refused is None]
    assert [c.score for c in allowed] == sorted((c.score for c in allowed), reverse=True)
    assert all(c.score == pytest.approx(c.gain_s - c.cost_s) for c in decision.candidates)
    assert state.current in [c.split for c in decision.candidates]
    assert {c.split.num_stages for c in decision.candidates} == {1, 2, 3, 4}
    assert decision.sentence.startswith("Stay with 2 stages (cut at 15): 1 stage on device-0 would save ")
    assert decision.decision_s == 0
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 15),
    st.floats(0, 8),
    st.integers(1, 2000),
    st.integers(1, 500),
    st.integers(0, 300),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["gated", "flexpipe"]),
    st.sampled_from(list(Trigger)),
)
def test_every_decision_explains_itself_whatever_is_asked_for(
    rate: float,
    cv: float,
    prompt_tokens: int,
    output_tokens: int,
    num_waiting: int,
    num_stages: int,
    shared: bool,
    name: str,
    trigger: Trigger,
) -> None:
    current = even_split(num_stages, shared=shared)
    demand = make_demand(rate, cv=cv, prompt_tokens=prompt_tokens, output_tokens=output_tokens, num_waiting=num_waiting)
    policy = make_policy("gated" if name == "gated" else "flexpipe", PlannerWeights(max_pipelines=2))
    decision = policy.decide(CHATTY, make_state(current, demand, devices=DEVICES, trigger=trigger))
    assert decision.sentence.endswith(".")
    assert (decision.chosen is None) == (decision.verdict is Verdict.STAY)
    for score in decision.candidates:
        assert math.isfinite(score.score)
        assert math.isfinite(score.gain_s)
        assert math.isfinite(score.cost_s)
        assert len(score.split.devices) == score.split.num_stages * score.split.num_pipelines
    if decision.chosen is not None:
        assert decision.chosen != current
        assert next(c for c in decision.candidates if c.split == decision.chosen).refused is None


def test_no_requests_or_too_few_are_no_reason() -> None:
    nobody = gated().decide(CHATTY, make_state(even_split(3), make_demand(0.0), devices=DEVICES))
    assert nobody.verdict is Verdict.STAY
    assert "nobody" in nobody.sentence
    first = msgspec.structs.replace(make_demand(1.0), num_arrived=3)
    decision = gated().decide(CHATTY, make_state(even_split(3), first, devices=DEVICES, trigger=Trigger.STALL))
    assert decision.verdict is Verdict.STAY
    assert "3 requests so far" in decision.sentence


def test_a_demand_that_has_just_changed_moves_nothing_while_nobody_waits() -> None:
    """The first requests after a change look like a mixture of both."""
    demand = msgspec.structs.replace(make_demand(1.3 * CAPACITY), num_alike=4)
    policy = gated()
    decisions = [policy.decide(CHATTY, make_state(even_split(1), demand, devices=DEVICES)) for _ in range(5)]
    assert {d.verdict for d in decisions} == {Verdict.STAY}
    assert "has just changed, 4 requests since" in decisions[0].sentence
    crowded = msgspec.structs.replace(demand, num_waiting=5)
    assert gated().decide(CHATTY, make_state(even_split(1), crowded, devices=DEVICES)).verdict is Verdict.MOVE


# ------------------------------------------------------------------ the gate


def test_a_small_gain_is_not_worth_it() -> None:
    state = make_state(even_split(3), make_demand(0.3), devices=DEVICES)
    for weights in (msgspec.structs.replace(WEIGHTS, margin=0.9), msgspec.structs.replace(WEIGHTS, horizon_s=0.5)):
        policy = gated(weights)
        decisions = [policy.decide(CHATTY, state) for _ in range(5)]
        assert {d.verdict for d in decisions} == {Verdict.STAY}


def test_a_small_gain_that_lasts_is_taken_in_time_and_a_tiny_one_never() -> None:
    state = make_state(even_split(3), make_demand(0.3), devices=DEVICES)
    first = gated().decide(CHATTY, state)
    best = first.candidates[0]
    share = best.gain_s / (first.current.prediction.latency_s * 0.3 * WEIGHTS.horizon_s)
    for factor, is_taken in ((0.9, True), (2.0, True), (4.0, False)):
        policy = gated(msgspec.structs.replace(WEIGHTS, margin=factor * share))
        changes = follow(policy, [0.3] * 600, current=even_split(3))
        assert bool(changes) == is_taken
        if changes:
            assert (changes[0][0] < 60) == (factor < 1)


def test_a_winner_must_win_several_times_in_a_row() -> None:
    policy = gated()
    calm = make_state(even_split(3), make_demand(0.3), devices=DEVICES)
    busy = make_state(even_split(3), make_demand(0.95 * CAPACITY), devices=DEVICES)
    for _ in range(NUM_AGREEING - 1):
        assert policy.decide(CHATTY, calm).verdict is Verdict.STAY
    assert policy.decide(CHATTY, busy).verdict is Verdict.STAY
    for i in range(1, NUM_AGREEING):
        decision = policy.decide(CHATTY, calm)
        assert decision.verdict is Verdict.STAY
        assert f"seen {i} times in a row" in decision.sentence
    assert policy.decide(CHATTY, calm).verdict is Verdict.MOVE


@pytest.mark.parametrize("trigger", [Trigger.STALL, Trigger.ASKED])
def test_a_stall_or_a_dry_run_waits_for_no_agreement(trigger: Trigger) -> None:
    state = make_state(even_split(3), make_demand(0.3), devices=DEVICES, trigger=trigger)
    assert gated().decide(CHATTY, state).verdict is Verdict.MOVE


def test_a_dry_run_leaves_no_trace() -> None:
    plain, asked = gated(), gated()
    state = make_state(even_split(3), make_demand(0.3), devices=DEVICES)
    dry = msgspec.structs.replace(state, trigger=Trigger.ASKED)
    for _ in range(NUM_AGREEING):
        asked.decide(CHATTY, dry)
        assert asked.decide(CHATTY, state) == plain.decide(CHATTY, state)


def test_after_a_change_it_rests() -> None:
    policy = gated()
    for second in (10.0, 20.0, 29.0):
        demand = make_demand(0.3, at=second)
        decision = policy.decide(CHATTY, make_state(even_split(3), demand, devices=DEVICES, last_change_at=0.0))
        assert decision.verdict is Verdict.STAY
        assert f"{second:g} s ago" in decision.sentence
    demand = make_demand(0.3, at=30.0)
    state = make_state(even_split(3), demand, devices=DEVICES, last_change_at=0.0)
    assert policy.decide(CHATTY, state).verdict is Verdict.MOVE


def test_saturation_overrides_margin_and_agreement() -> None:
    weights = msgspec.structs.replace(WEIGHTS, margin=1000.0)
    demand = make_demand(1.3 * CAPACITY, num_waiting=3)
    decision = gated(weights).decide(CHATTY, make_state(even_split(1), demand, devices=DEVICES))
    assert decision.verdict is Verdict.MOVE
    assert decision.current.prediction.utilisation > 1 > decision.candidates[0].prediction.utilisation
    assert "requests/s instead of" in decision.sentence
    # Where nobody waits yet it is seen a few times first.
    assert settle(gated(weights), make_state(even_split(1), make_demand(1.3 * CAPACITY), devices=DEVICES)).chosen


def test_saturation_ends_the_rest_after_a_shrink_but_not_after_a_growth() -> None:
    def after(before: Split, current: Split) -> Verdict:
        policy = gated()
        # Seen before the change, and after it when little is asked for.
        policy.decide(CHATTY, make_state(before, make_demand(0.3), devices=DEVICES))
        demand = make_demand(1.6 * CAPACITY, at=10.0, num_waiting=1)
        return policy.decide(CHATTY, make_state(current, demand, devices=DEVICES, last_change_at=5.0)).verdict

    big = predict(CHATTY, even_split(2), make_demand(1.6 * CAPACITY))
    assert big.utilisation > 1  # there is reason to go on after one to two
    assert after(even_split(3), even_split(1)) is Verdict.MOVE
    assert after(even_split(1), even_split(2)) is Verdict.STAY


def test_a_change_that_is_not_carried_out_is_not_asked_for_every_second() -> None:
    policy = gated()
    demand = make_demand(1.3 * CAPACITY, num_waiting=1)
    assert policy.decide(CHATTY, make_state(even_split(1), demand, devices=DEVICES)).verdict is Verdict.MOVE
    later = msgspec.structs.replace(demand, at=1.0)
    again = policy.decide(CHATTY, make_state(even_split(1), later, devices=DEVICES, last_change_at=0.0))
    assert again.verdict is Verdict.STAY


def test_what_the_current_memory_cannot_hold_is_left() -> None:
    small = Split(boundaries=(), devices=(make_device(0, memory_mib=740),))
    devices = (*small.devices, make_device(1), make_device(2))
    demand = make_demand(0.5, prompt_tokens=900, output_tokens=100, num_waiting=1)
    decision = gated().decide(CHATTY, make_state(small, demand, devices=devices))
    assert decision.current.prediction.max_rate == 0
    assert decision.verdict is Verdict.MOVE
    assert math.isfinite(decision.candidates[0].gain_s)


def test_what_has_no_room_is_refused_with_numbers() -> None:
    # Each device has room for its half of the weights, but not for both halves while it takes the other's place.
    devices = tuple(make_device(i, memory_mib=900) for i in range(2))
    current = Split(boundaries=(10,), devices=devices)
    demand = make_demand(0.5)
    state = make_state(current, demand, devices=devices, num_kv_tokens_in_use=15_000)
    refused = [c.refused for c in gated().decide(CHATTY, state).candidates if c.refused is not None]
    assert refused
    assert all("tokens of KV" in reason and "15000 are needed" in reason for reason in refused)


# ------------------------------------------------------------------ triggers


def test_a_rising_rate_moves_it_before_there_is_a_queue() -> None:
    level = make_demand(0.7 * CAPACITY)
    rising = make_demand(0.7 * CAPACITY, rate_gradient=0.2 * CAPACITY / 10)
    state = make_state(even_split(1), level, devices=DEVICES)
    assert state.demand.num_waiting == 0
    assert gated().decide(CHATTY, state).current.prediction.utilisation < 1
    decision = settle(gated(), make_state(even_split(1), rising, devices=DEVICES, trigger=Trigger.GRADIENT))
    assert decision.current.prediction.utilisation > 1
    assert decision.verdict is Verdict.MOVE


@given(st.floats(0.01, 20), st.floats(-5, 5), st.floats(0, 8), st.floats(1, 300))
def test_what_is_expected_follows_a_rise_within_bounds_and_no_fall(
    rate: float, gradient: float, cv: float, horizon_s: float
) -> None:
    demand = make_demand(rate, cv=cv, rate_gradient=gradient)
    expected = expected_demand(demand, horizon_s).rate
    assert rate <= expected <= 2 * rate
    # A fall that is still seen in a long window has been there already: the rate tells of it.
    assert gradient > 0 or expected == rate
    # What chance makes is no change.
    by_chance = make_demand(rate, cv=8.0, rate_gradient=math.copysign(min(abs(gradient), rate / 100), gradient))
    assert expected_demand(by_chance, min(horizon_s, 30.0)).rate == pytest.approx(rate, rel=0.25)


# ------------------------------------------------------------------ over time


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.25))
def test_noise_around_the_break_even_point_does_not_make_it_flap(seed: int, noise: float) -> None:
    rng = random.Random(seed)
    # One and two stages are equally fast here.
    rates = [BREAK_EVEN * max(0.1, rng.gauss(1, noise)) for _ in range(150)]
    assert len(follow(gated(), rates, current=even_split(1))) <= 2


def _break_even() -> float:
    low, high = 0.1, CAPACITY
    for _ in range(30):
        rate = (low + high) / 2
        one, two = (predict(CHATTY, even_split(n), make_demand(rate)).latency_s for n in (1, 2))
        low, high = (rate, high) if one < two else (low, rate)
    return low


BREAK_EVEN = _break_even()


def test_a_demand_that_swings_more_slowly_than_the_horizon_is_followed() -> None:
    period_s, num_periods = 300, 2
    rates = [
        CAPACITY * (0.65 + 0.6 * math.sin(2 * math.pi * second / period_s)) for second in range(period_s * num_periods)
    ]
    # Where loading takes no time: see the next test.
    changes = follow(gated(), rates, current=even_split(1), profile=make_profile(hop_s=0.008, load_bytes_per_s=1e12))
    grown = [second for (second, n), (_, before) in zip(changes, [(0, 1), *changes], strict=False) if n > before]
    back = [second for second, n in changes if n == 1]
    assert len(back) == num_periods
    assert num_periods <= len(grown) <= 3 * num_periods
    assert all(b - a >= WEIGHTS.cool_down_s for (a, _), (b, _) in pairwise(changes))
    # It never was saturated for longer than it takes to see it.
    current, by_second = 1, dict(changes)
    num_saturated = 0
    for second, rate in enumerate(rates):
        current = by_second.get(second, current)
        num_saturated += predict(CHATTY, even_split(current), make_demand(rate)).utilisation >= 1
    assert num_saturated <= 5 * num_periods


def test_capacity_is_not_given_away_while_a_peak_may_return() -> None:
    """Loading takes half a minute also in a hurry: what would queue up meanwhile outweighs what one stage saves when
    little is asked for, until the peak is long gone."""
    profile = make_profile(hop_s=0.008, load_bytes_per_s=4e7)
    calm, peak = [0.3 * CAPACITY] * 150, [1.3 * CAPACITY] * 100
    counts = [n for _, n in follow(gated(), calm + peak + calm + peak, current=even_split(1), profile=profile)]
    assert counts
    assert min(counts) > 1
    policy = gated()
    policy.decide(profile, make_state(even_split(2), make_demand(1.3 * CAPACITY), devices=DEVICES))
    soon, late = (make_state(even_split(2), make_demand(0.3, at=at), devices=DEVICES) for at in (300.0, 4000.0))
    decisions = [policy.decide(profile, soon) for _ in range(NUM_AGREEING)]
    assert {d.verdict for d in decisions} == {Verdict.STAY}
    assert [d.candidates[0].split for d in decisions] == [even_split(2)] * NUM_AGREEING
    assert [policy.decide(profile, late) for _ in range(NUM_AGREEING)][-1].verdict is Verdict.MOVE


def test_a_change_is_in_a_hurry_only_beyond_capacity() -> None:
    busy, crowded = (settle(gated(), make_state(even_split(1), make_demand(share * CAPACITY), devices=DEVICES))
                     for share in (0.95, 1.3))  # fmt: skip
    assert (busy.verdict, busy.hurry) == (Verdict.MOVE, False)
    assert (crowded.verdict, crowded.hurry) == (Verdict.MOVE, True)
    assert "in a hurry" in crowded.sentence
    calm = gated().decide(CHATTY, make_state(even_split(1), make_demand(0.1), devices=DEVICES))
    assert not calm.hurry


def test_what_takes_longer_than_the_horizon_pays_where_demand_lasts() -> None:
    slow = make_profile(hop_s=0.008, load_bytes_per_s=3e6)  # over a minute
    rate = 0.85 * CAPACITY
    policy = gated()
    first = policy.decide(slow, make_state(even_split(1), make_demand(rate), devices=DEVICES))
    assert all(c.gain_s == 0 for c in first.candidates if c.prediction.latency_s < first.current.prediction.latency_s)
    changes = follow(gated(), [rate] * 400, current=even_split(1), profile=slow)
    assert len(changes) == 1
    assert changes[0][0] > WEIGHTS.horizon_s
    assert changes[0][1] > 1


def test_the_same_history_gives_the_same_decisions() -> None:
    rates = [CAPACITY * (0.2 + 0.9 * (second // 40 % 2)) for second in range(200)]
    assert follow(gated(), rates, current=even_split(1)) == follow(gated(), rates, current=even_split(1)) != []
