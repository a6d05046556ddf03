"""The gated policy on devices of unequal speed and memory: where it cuts."""

from __future__ import annotations

from planner_cases import make_demand, make_device, make_profile, make_state

from flexpipe_serve.planner.gate import NUM_AGREEING
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.policy import make_policy
from flexpipe_serve.planner.types import Demand, PlannerWeights, Split


def test_a_mix_that_shifts_moves_the_cut() -> None:
    """PipeLive's experiment: a fast device with little memory, a slow one with much."""
    profile = make_profile(kv_bytes_per_token=24_576, layer_bytes=100_000_000)
    fast, slow = make_device(0, memory_mib=2700), make_device(1, memory_mib=3100, speed=0.6)
    weights = PlannerWeights(max_stages=2, margin=0.02)

    def best(current: Split, demand: Demand) -> Split:
        """Where it comes to rest: the first steps on the way may be cheap ones."""
        chosen: Split | None = current
        while chosen is not None:
            current = chosen
            policy = make_policy("gated", weights)
            state = make_state(current, demand, devices=(fast, slow))
            chosens = [policy.decide(profile, state).chosen for _ in range(NUM_AGREEING)]
            chosen = next(filter(None, chosens), None)
        return current

    start = Split(boundaries=(13,), devices=(fast, slow))
    prefill_heavy = make_demand(0.8, prompt_tokens=512, output_tokens=8)
    decode_heavy = make_demand(0.35, prompt_tokens=64, output_tokens=512, num_running=5)
    for_prefill = best(start, prefill_heavy)
    for_decode = best(for_prefill, decode_heavy)
    assert for_prefill.devices[0] == for_decode.devices[0] == fast
    assert for_prefill.num_stages == for_decode.num_stages == 2
    # Prompts want the fast device, sequences that decode want the room of the other one.
    assert for_prefill.boundaries[0] > for_decode.boundaries[0]
    before, after = (predict(profile, split, decode_heavy) for split in (for_prefill, for_decode))
    assert after.num_kv_tokens > before.num_kv_tokens
    assert best(for_decode, prefill_heavy).boundaries[0] > for_decode.boundaries[0]
