"""PipeLive's mix shift in the simulator, as ``flexpipe bench mix-shift`` has it: two stages of unequal speed and
memory, prompts first, then long outputs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from planner_cases import make_demand, make_device, make_profile

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.mix_shift_plan import Mix, Totals, scores_of, shifting_arrivals
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.policy import Policy, make_policy
from flexpipe_serve.planner.types import PlannerWeights, Split, StageDevice
from flexpipe_serve.simulate.result import SimulationResult
from flexpipe_serve.simulate.simulation import Simulation, SimulationConfig

PROFILE = make_profile(
    load_bytes_per_s=3e9,  # from the host cache
    layer_bytes=2_660_000,
    layer_ms=(0.17, 0.22, 0.33, 0.6, 1.07, 3.6, 14.4),
)
LOW, BALANCED = 13, 15
PROMPTS, OUTPUTS = Mix("96+4", 96, 4), Mix("32+160", 32, 160)
NUM_REQUESTS, LEAD_IN_S = 40, 4.0
RATES = (2.9, 0.65)
SHIFT_S = LEAD_IN_S + NUM_REQUESTS / RATES[0]
# The slow stage has room; the fast one has KV for one of the longest requests where it holds all layers from LOW on.
_KV_BYTES = (PROFILE.num_layers - LOW) * PROFILE.kv_bytes_per_token * OUTPUTS.num_tokens


def _device(index: int, *, memory_bytes: int, speed: float) -> StageDevice:
    plain = make_device(index, speed=speed)
    return StageDevice(
        name=plain.name, node=plain.node, compute=plain.compute, domain=plain.domain,
        memory_bytes=memory_bytes + plain.overhead_bytes, overhead_bytes=plain.overhead_bytes, speed=speed,
    )  # fmt: skip


SLOW = _device(0, memory_bytes=10**9, speed=0.2)
FAST = _device(1, memory_bytes=PROFILE.stage_bytes(LOW, PROFILE.num_layers) + _KV_BYTES, speed=0.4)


def arrivals(rates: tuple[float, float]) -> list[Arrival]:
    first_s, second_s = LEAD_IN_S + NUM_REQUESTS / rates[0], NUM_REQUESTS / rates[1]
    return shifting_arrivals([(PROMPTS, rates[0], first_s), (OUTPUTS, rates[1], second_s)], cv=0.1, seed=1)


def split_of(boundary: int) -> Split:
    return Split(boundaries=(boundary,), devices=(SLOW, FAST))


@functools.cache
def run(boundary: int, policy: str | None = None, *, rates: tuple[float, float] = RATES) -> SimulationResult:
    chooser = None if policy is None else make_policy("gated", PlannerWeights(max_stages=2, cool_down_s=5.0))
    return Simulation(
        PROFILE,
        arrivals(rates),
        split=split_of(boundary),
        devices=(SLOW, FAST),
        policy=chooser,
        config=SimulationConfig(interval_s=0.5),
    ).run()


def latency_s(result: SimulationResult) -> float:
    return float(np.mean([request.latency_s for request in result.requests]))


def totals(result: SimulationResult) -> Totals:
    counted = [request for request in result.requests if request.arrived_at >= LEAD_IN_S]
    return Totals(
        ttft_s=float(np.mean([r.first_token_at - r.arrived_at for r in counted])),
        tpot_s=float(np.mean([(r.finished_at - r.first_token_at) / (r.num_output_tokens - 1) for r in counted])),
        tokens_per_s=sum(r.num_prompt_tokens + r.num_output_tokens for r in counted)
        / (max(r.finished_at for r in counted) - counted[0].arrived_at),
    )


@pytest.mark.parametrize("boundary", [18, 21])
def test_unequal_stages_are_predicted_as_they_are_simulated(boundary: int) -> None:
    requests = run(boundary).requests
    demand = make_demand(RATES[1], cv=0.1, prompt_tokens=32, output_tokens=160)
    seen = np.mean([r.latency_s for r in requests if r.arrived_at >= SHIFT_S + 10])
    assert predict(PROFILE, split_of(boundary), demand).latency_s == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize("boundary", [BALANCED, 17, 20])
@pytest.mark.parametrize("num_output_tokens", [100, 160])
def test_what_is_sustained_where_kv_is_short_has_its_preemptions(boundary: int, num_output_tokens: int) -> None:
    """Without them it was a quarter too much, and the planner saw no reason to leave."""
    mix = Mix("burst", 32, num_output_tokens)
    result = Simulation(PROFILE, mix.requests(60), split=split_of(boundary), devices=(SLOW, FAST)).run()
    assert result.num_preemptions > 20
    demand = make_demand(1.0, cv=0.1, prompt_tokens=32, output_tokens=num_output_tokens)
    sustained = 60 / result.duration_s
    assert predict(PROFILE, split_of(boundary), demand).max_rate == pytest.approx(sustained, rel=0.12)


@pytest.mark.parametrize("boundary", [14, BALANCED])
def test_layers_leave_the_stage_without_room_when_outputs_get_long(boundary: int) -> None:
    """A planner that sees the new lengths late moves them there: it looks as if requests were few and short."""
    late = [decision for decision in run(boundary, "gated").decisions if decision.at > SHIFT_S]
    assert late
    assert late[0].at < SHIFT_S + 12
    assert late[0].chosen is not None
    assert late[0].chosen.boundaries > late[0].current.split.boundaries


def test_moving_beats_the_balanced_split_as_in_the_paper() -> None:
    """And is about as good as the best of all splits, which nobody knows beforehand."""
    gated = run(BALANCED, "gated")
    scores = scores_of({"balanced": totals(run(BALANCED)), "gated": totals(gated)})
    assert scores["gated"].composite > 1.36 * scores["balanced"].composite
    assert latency_s(gated) < 0.6 * latency_s(run(BALANCED))
    assert latency_s(gated) < 1.1 * min(latency_s(run(boundary)) for boundary in range(BALANCED, 20))


@pytest.mark.parametrize("rate", [0.4, 0.5, 0.6])
def test_below_the_balanced_splits_capacity_nothing_is_lost(rate: float) -> None:
    """Loads that took half a minute and a demand that was told of too high made it 13 to 26 % slower."""
    rates = (3.0, rate)
    gated, balanced = run(BALANCED, "gated", rates=rates), run(BALANCED, rates=rates)
    assert latency_s(gated) < 1.1 * latency_s(balanced)
    assert len(gated.changes) <= 6


def test_a_slow_cut_is_no_way_out_where_the_queue_costs_less() -> None:
    """Beyond every quick cut's capacity it went to a cut that sustained the load at four times the latency."""
    slow = _device(0, memory_bytes=10**9, speed=0.16)
    fast = _device(1, memory_bytes=PROFILE.stage_bytes(LOW, PROFILE.num_layers) + _KV_BYTES, speed=0.32)
    num_requests, (first, second) = 30, (4.2, 0.85)
    phases = [(PROMPTS, first, LEAD_IN_S + num_requests / first), (OUTPUTS, second, num_requests / second)]
    load = shifting_arrivals(phases, cv=0.1, seed=2)

    def simulate(boundary: int, policy: Policy | None = None) -> float:
        split = Split(boundaries=(boundary,), devices=(slow, fast))
        config = SimulationConfig(interval_s=0.5)
        return latency_s(
            Simulation(PROFILE, load, split=split, devices=(slow, fast), policy=policy, config=config).run()
        )

    policy = make_policy("gated", PlannerWeights(max_stages=2, cool_down_s=5.0))
    assert simulate(BALANCED, policy) < 1.1 * simulate(18)
