"""Profiles, devices and demands for the planner's tests, and a tiny step-by-step simulation of one pipeline."""

from __future__ import annotations

import heapq
import math
import random

from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape
from flexpipe_serve.planner.types import Demand, PlannerState, SchedulerLimits, Split, StageDevice, Trigger

MIB = 2**20
MAX_NUM_SEQS, TOKEN_BUDGET = SchedulerLimits().max_num_seqs, SchedulerLimits().max_num_batched_tokens


def make_profile(
    *,
    num_layers: int = 30,
    layer_ms: tuple[float, ...] = (0.5, 0.55, 0.7, 0.9, 1.3, 4.5, 17.0),
    hop_s: float = 0.0005,
    step_s: float = 0.0005,
    stage_s: float = 0.0002,
    kv_bytes_per_token: int = 1536,
    load_bytes_per_s: float = 5e8,
    layer_bytes: int = 14_000_000,
) -> ModelProfile:
    """Much like the demo model on two cores."""
    return ModelProfile(
        model="test",
        dtype="float32",
        device="test",
        num_threads=1,
        versions={},
        layer=Curve(counts=(1, 4, 8, 16, 32, 128, 512), seconds=tuple(ms / 1000 for ms in layer_ms)),
        layer_scale=(1.0,) * num_layers,
        context_token_s=2e-8,
        pair_s=1e-8,
        embedding=Curve(counts=(1, 512), seconds=(1e-5, 1e-4)),
        head=Curve(counts=(1, 16, 64), seconds=(0.004, 0.006, 0.012)),
        stage_s=stage_s,
        hop_s=hop_s,
        step_s=step_s,
        layer_bytes=(layer_bytes,) * num_layers,
        embedding_bytes=113_000_000,
        head_bytes=113_000_000,
        kv_bytes_per_token=kv_bytes_per_token,
        activation_bytes_per_token=2304,
        load_bytes_per_s=load_bytes_per_s,
    )


def make_device(
    index: int = 0,
    *,
    memory_mib: int = 8192,
    speed: float = 1.0,
    compute: str | None = None,
    domain: str | None = None,
) -> StageDevice:
    """A device with a node, a compute and a domain of its own, unless told otherwise."""
    return StageDevice(
        name=f"device-{index}",
        node=f"node-{index}",
        compute=compute or f"compute-{index}",
        domain=domain or f"domain-{index}",
        memory_bytes=memory_mib * MIB,
        overhead_bytes=100 * MIB,
        speed=speed,
    )


def even_split(num_stages: int, *, num_layers: int = 30, shared: bool = False, speed: float = 1.0) -> Split:
    """Stages with equally many layers, each on a device of its own or all on one."""
    return Split(
        boundaries=tuple(i * num_layers // num_stages for i in range(1, num_stages)),
        devices=tuple(make_device(0 if shared else i, speed=speed) for i in range(num_stages)),
    )


def make_demand(
    rate: float,
    *,
    cv: float = 1.0,
    at: float = 0.0,
    prompt_tokens: float = 128.0,
    output_tokens: float = 32.0,
    rate_gradient: float = 0.0,
    num_waiting: int = 0,
    num_running: int = 0,
    service_cv: float = 0.0,
) -> Demand:
    """Of which enough was seen."""
    return Demand(
        at=at,
        rate=rate,
        rate_gradient=rate_gradient,
        cv=cv,
        cv_by_window={"15s": cv},
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        service_cv=service_cv,
        num_waiting=num_waiting,
        num_running=num_running,
        num_arrived=1000,
        num_alike=1000,
    )


def make_state(
    current: Split,
    demand: Demand,
    *,
    devices: tuple[StageDevice, ...] | None = None,
    trigger: Trigger = Trigger.INTERVAL,
    last_change_at: float | None = None,
    num_kv_tokens_in_use: int = 0,
) -> PlannerState:
    """At the time of the demand, with the devices of the split by default."""
    return PlannerState(
        now=demand.at,
        demand=demand,
        current=current,
        devices=devices or tuple({d.name: d for d in current.devices}.values()),
        trigger=trigger,
        last_change_at=last_change_at,
        num_kv_tokens_in_use=num_kv_tokens_in_use,
    )


class _Sequence:
    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.num_computed = 0
        self.num_tokens = 0
        self.first_at = 0.0


def simulate(
    profile: ModelProfile, split: Split, demand: Demand, *, num_requests: int, seed: int
) -> tuple[float, float, float]:
    """Mean TTFT, time between tokens and latency of requests of equal lengths, step by step: decodes first, then
    chunks; as many steps in flight as computes, each with its share of the sequences."""
    rng = random.Random(seed)
    shape_parameter = 1 / demand.cv**2
    num_prompt, num_output = round(demand.prompt_tokens), round(demand.output_tokens)
    arrivals = []
    now = 0.0
    for _ in range(num_requests):
        now += rng.gammavariate(shape_parameter, 1 / (shape_parameter * demand.rate))
        arrivals.append(_Sequence(now))
    depth = len({device.compute for device in split.devices})
    edges = (0, *split.boundaries, profile.num_layers)
    free_at = dict.fromkeys((device.compute for device in split.devices), 0.0)
    waiting, ready, num_present = list(reversed(arrivals)), [], 0
    landing: list[tuple[float, int, list[tuple[_Sequence, int]]]] = []
    ended: list[tuple[float, float, float]] = []
    now, num_steps = 0.0, 0
    while len(ended) < num_requests:
        num_arrived = sum(1 for _ in _arrived(waiting, now, MAX_NUM_SEQS - num_present))
        if len(landing) < depth and (ready or num_arrived):
            runnable = num_present + num_arrived
            rows = _take(ready, waiting, num_prompt, max_rows=math.ceil(runnable / depth), num_new=num_arrived)
            num_present += sum(1 for seq, _ in rows if seq.num_computed == 0)
            decodes = [seq for seq, count in rows if count == 1]
            shape = StepShape(
                num_tokens=sum(count for _, count in rows),
                num_samples=sum(1 for seq, count in rows if seq.num_computed + count >= num_prompt),
                num_context_tokens=sum(seq.num_computed for seq in decodes),
                num_pairs=sum(c * (s.num_computed + c / 2) for s, c in rows if c > 1),
            )
            at = now + profile.step_s
            for i, device in enumerate(split.devices):
                at = max(at + profile.hop_s, free_at[device.compute])
                at += profile.stage_seconds(edges[i], edges[i + 1], shape, speed=device.speed)
                free_at[device.compute] = at
            num_steps += 1
            heapq.heappush(landing, (at, num_steps, rows))
            continue
        next_arrival = waiting[-1].arrived if waiting and num_present < MAX_NUM_SEQS else math.inf
        if len(landing) < depth and next_arrival > now and next_arrival < (landing[0][0] if landing else math.inf):
            now = next_arrival
            continue
        now, _, rows = heapq.heappop(landing)
        for seq, count in rows:
            seq.num_computed += count
            if seq.num_computed >= num_prompt:
                seq.num_tokens += 1
                seq.first_at = seq.first_at or now
            if seq.num_tokens == num_output:
                num_present -= 1
                token_s = (now - seq.first_at) / max(1, num_output - 1)
                ended.append((seq.first_at - seq.arrived, token_s, now - seq.arrived))
            else:
                ready.append(seq)
    # The start from empty is left out.
    ended = ended[num_requests // 10 :]
    ttft, token, latency = (sum(column) / len(ended) for column in zip(*ended, strict=True))
    return ttft, token, latency


def _arrived(waiting: list[_Sequence], now: float, num_places: int) -> list[_Sequence]:
    found = []
    for seq in reversed(waiting):
        if seq.arrived > now or len(found) == num_places:
            break
        found.append(seq)
    return found


def _take(
    ready: list[_Sequence], waiting: list[_Sequence], num_prompt: int, *, max_rows: int, num_new: int
) -> list[tuple[_Sequence, int]]:
    """Rows of the next step; those taken leave their list."""
    budget = TOKEN_BUDGET
    ready.sort(key=lambda seq: (seq.num_computed < num_prompt, seq.arrived))
    rows: list[tuple[_Sequence, int]] = []
    for seq in list(ready):
        count = min(budget, max(1, num_prompt - seq.num_computed))
        if len(rows) == max_rows or not count:
            break
        rows.append((seq, count))
        ready.remove(seq)
        budget -= count
    while num_new and budget and len(rows) < max_rows:
        seq = waiting.pop()
        rows.append((seq, min(budget, num_prompt)))
        budget -= rows[-1][1]
        num_new -= 1
    return rows
