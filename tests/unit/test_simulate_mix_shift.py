"""PipeLive's mix shift in the simulator: two stages of unequal speed and memory, prompts first, then long outputs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from planner_cases import MIB, make_demand, make_device, make_profile

from flexpipe_serve.bench.mix_shift_plan import Mix, shifting_arrivals
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.policy import make_policy
from flexpipe_serve.planner.types import PlannerWeights, Split
from flexpipe_serve.simulate.result import SimulationResult
from flexpipe_serve.simulate.simulation import Simulation

PROFILE = make_profile(load_bytes_per_s=3e9)  # from the host cache
PHASE_S = 40.0
BALANCED = 15
PROMPTS, OUTPUTS = Mix("128+2", 128, 2), Mix("32+160", 32, 160)
# The slow stage has room; the fast one has 192 tokens of KV where it holds all layers from 11 on.
SLOW = make_device(0, memory_mib=620, speed=0.25)
FAST = make_device(
    1,
    memory_mib=(19 * 14_000_000 + 113_000_000 + 19 * 1536 * 192) // MIB + 105,
    speed=0.5,
)
ARRIVALS = shifting_arrivals([(PROMPTS, 2.6, PHASE_S), (OUTPUTS, 1.0, PHASE_S)], cv=0.1, seed=1)


def split_of(boundary: int) -> Split:
    return Split(boundaries=(boundary,), devices=(SLOW, FAST))


@functools.cache
def run(boundary: int, policy: str | None = None) -> SimulationResult:
    chooser = None if policy is None else make_policy("gated", PlannerWeights(max_stages=2))
    return Simulation(PROFILE, ARRIVALS, split=split_of(boundary), devices=(SLOW, FAST), policy=chooser).run()


def latency_s(result: SimulationResult) -> float:
    return float(np.mean([request.latency_s for request in result.requests]))


@pytest.mark.parametrize("boundary", [13, 15, 17])
def test_unequal_stages_are_predicted_as_they_are_simulated(boundary: int) -> None:
    requests = run(boundary).requests
    for mix, rate, begin in ((PROMPTS, 2.6, 0.0), (OUTPUTS, 1.0, PHASE_S)):
        demand = make_demand(rate, cv=0.1, prompt_tokens=mix.num_prompt_tokens, output_tokens=mix.num_output_tokens)
        seen = np.mean([r.latency_s for r in requests if begin <= r.arrived_at < begin + PHASE_S])
        assert predict(PROFILE, split_of(boundary), demand).latency_s == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize("boundary", [12, BALANCED])
def test_layers_leave_the_stage_without_room_when_outputs_get_long(boundary: int) -> None:
    """A planner that sees the new lengths late moves them there: it looks as if requests were few and short."""
    result = run(boundary, "gated")
    late = [decision for decision in result.decisions if decision.at > PHASE_S]
    assert late
    assert late[0].at < PHASE_S + 12
    for decision in late:
        assert decision.chosen is not None
        assert decision.chosen.boundaries > decision.current.split.boundaries
    assert latency_s(result) < 0.9 * latency_s(run(12))  # the best static split of the first kind
