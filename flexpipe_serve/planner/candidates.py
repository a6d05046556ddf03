"""Splits worth weighing: numbers of stages and pipelines, devices, boundaries. Pure code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from flexpipe_serve.planner.latency import SplitModel
from flexpipe_serve.planner.memory import pipelines_of
from flexpipe_serve.planner.partition import best_boundaries
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.request_times import RequestTimes
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.transition import Transition
from flexpipe_serve.planner.types import (
    Demand,
    PlannerState,
    PlannerWeights,
    SchedulerLimits,
    Split,
    StageDevice,
)

_FINE = 8
"""More stages than this are looked at with one choice of devices and in wide steps."""
_LEVEL_STEP = 1.4
"""From one level of KV to the next."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
_CLOSE = 1.25
"""Times that differ by less than this factor ask for the same cuts."""
_CLOSE_KV = 2.0
"""The same for KV, which goes with the number of sequences and varies more."""
_NUM_KNOWN = 4
"""Demands that candidates are remembered for: one that goes to and fro asks for no new cuts."""
_NUM_LENGTHS = 64
"""Lengths of requests that a candidate remembers the times of."""
_SLACK = 0.02
"""Of a device's memory: what processes take varies by so much."""


class Candidate:
    """A split with what is known of it."""

    def __init__(self, profile: ModelProfile, split: Split, *, present: Split, limits: SchedulerLimits) -> None:
        self.split = split
        self.key = split_key(split)
        self.steps = StepTimes(profile, split, limits)
        self.transition = Transition(profile, present, split)
        """From the present split."""
        self._requests: dict[tuple[float, float, float], RequestTimes] = {}

    @property
    def place(self) -> tuple[object, ...]:
        """Its devices and number of pipelines."""
        return self.key[1:]

    def under(self, demand: Demand) -> SplitModel:
        """What it does under ``demand``; quick where the lengths are those of a while ago."""
        lengths = demand.prompt_tokens, demand.output_tokens, demand.prefix_hit_share
        requests = self._requests.get(lengths)
        if requests is None:
            if len(self._requests) == _NUM_LENGTHS:
                self._requests.clear()
            requests = RequestTimes(self.steps, demand, num_kv_tokens=self.steps.num_kv_tokens)
            self._requests[lengths] = requests
        return SplitModel(self.steps, demand, requests=requests)


class _Needs(NamedTuple):
    """What cuts depend on."""

    layer_s: float
    embedding_s: float
    head_s: float
    num_kv_tokens: float

    def is_close(self, other: _Needs) -> bool:
        factors = (_CLOSE, _CLOSE, _CLOSE, _CLOSE_KV)
        return all(a <= f * b and b <= f * a for a, b, f in zip(self, other, factors, strict=True))


class CandidateMaker:
    """Finds candidates, and keeps them as long as devices, present split and demand stay much the same: cutting anew
    takes milliseconds."""

    def __init__(self, weights: PlannerWeights) -> None:
        self._weights = weights
        self._made_for: tuple[ModelProfile, PlannerState] | None = None
        self._present: Candidate
        self._known: list[tuple[_Needs, list[Candidate]]] = []
        """What was found lately, the latest used first."""

    def candidates(self, profile: ModelProfile, state: PlannerState, demand: Demand) -> list[Candidate]:
        """The present split, then others.

        Args:
            demand: that is expected; boundaries are best for its steps.
        """
        if self._made_for is None or not is_same_place(*self._made_for, profile, state):
            self._made_for = (profile, state)
            self._known.clear()
            self._present = Candidate(profile, state.current, present=state.current, limits=state.limits)
        present = self._present.under(demand)
        shape = present.mean_shape()
        num_needed = max(1.0, demand.num_running + demand.num_waiting, present.num_present)
        num_kv_tokens = num_needed * (demand.prompt_tokens + demand.output_tokens)
        needs = _Needs(
            profile.layer_seconds(shape),
            profile.embedding.at(shape.num_tokens),
            profile.head.at(shape.num_samples),
            num_kv_tokens,
        )
        index = next((i for i, (known, _) in enumerate(self._known) if needs.is_close(known)), None)
        if index is None:
            splits = self._splits(profile, state, demand, shape, int(num_kv_tokens))
            others = [Candidate(profile, split, present=state.current, limits=state.limits) for split in splits]
            self._known = [(needs, others), *self._known[: _NUM_KNOWN - 1]]
        elif index:
            self._known.insert(0, self._known.pop(index))
        return [self._present, *self._known[0][1]]

    def _splits(
        self, profile: ModelProfile, state: PlannerState, demand: Demand, shape: StepShape, num_kv_tokens: int
    ) -> list[Split]:
        found = {split_key(state.current)}
        splits = []
        least = int(demand.prompt_tokens + demand.output_tokens) + 1
        levels = (least, max(least, num_kv_tokens), state.limits.max_num_seqs * least)
        for groups in device_choices(state, self._weights):
            slowest = max(groups, key=lambda devices: sum(1 / device.speed for device in devices))
            for boundaries in _cuts(profile, slowest, shape, levels):
                split = Split(
                    boundaries=boundaries,
                    devices=tuple(device for devices in groups for device in devices),
                    num_pipelines=len(groups),
                )
                if split_key(split) not in found:
                    found.add(split_key(split))
                    splits.append(split)
        return splits


def is_same_place(old_profile: ModelProfile, old: PlannerState, profile: ModelProfile, new: PlannerState) -> bool:
    """Whether the same splits are to be had as before, and from the same one; memory may have changed a little."""
    return (
        old_profile == profile
        and old.limits == new.limits
        and split_key(old.current) == split_key(new.current)
        and len(old.devices) == len(new.devices)
        and all(a == b or _is_alike(a, b) for a, b in zip(old.devices, new.devices, strict=True))
    )


def _is_alike(a: StageDevice, b: StageDevice) -> bool:
    slack = _SLACK * b.memory_bytes
    return (
        (a.name, a.node, a.compute, a.domain, a.speed) == (b.name, b.node, b.compute, b.domain, b.speed)
        and abs(a.memory_bytes - b.memory_bytes) <= slack
        and abs(a.overhead_bytes - b.overhead_bytes) <= slack
    )


def stage_counts(*, max_stages: int, present: int) -> list[int]:
    """Numbers of stages to look at: all small ones, wide steps among large ones, and the neighbours of ``present``."""
    counts = {*(count for count in _COUNTS if count <= max_stages), max_stages, present - 1, present, present + 1}
    return sorted(count for count in counts if 1 <= count <= max_stages)


def device_choices(state: PlannerState, weights: PlannerWeights) -> Iterator[list[tuple[StageDevice, ...]]]:
    """Devices of each pipeline, in their stages' order; several pipelines only where each has computes of its own.

    Of equals, the ones in use come first. A device takes a second stage when all computes have one.
    """
    present = {device.name: i for i, device in reversed(list(enumerate(state.current.devices)))}
    rankings: list[Callable[[StageDevice], tuple[float, ...]]] = [
        lambda device: (-device.speed, device.name not in present, present.get(device.name, 0)),
        lambda device: (device.name not in present, -device.speed, present.get(device.name, 0)),
        lambda device: (-device.memory_bytes, device.name not in present, present.get(device.name, 0)),
    ]
    for num_pipelines in range(1, weights.max_pipelines + 1):
        pools = _pools(state, num_pipelines)
        for count in stage_counts(max_stages=weights.max_stages, present=state.current.num_stages):
            chosen: list[list[tuple[StageDevice, ...]]] = []
            for rank in rankings if count <= _FINE else rankings[:1]:
                groups = [_in_order(_choose(pool, count, rank), present) for pool in pools]
                if groups and groups not in chosen:
                    chosen.append(groups)
            yield from chosen


def _pools(state: PlannerState, num_pipelines: int) -> list[list[StageDevice]]:
    """The devices that each pipeline may take: those of whole computes. Present pipelines keep theirs; empty where
    there are too few computes."""
    computes: dict[str, list[StageDevice]] = {}
    for device in state.devices:
        computes.setdefault(device.compute, []).append(device)
    if num_pipelines == 1:
        return [list(state.devices)]
    if len(computes) < num_pipelines:
        return []
    pools: list[list[StageDevice]] = [[] for _ in range(num_pipelines)]
    home = {}
    present = pipelines_of(state.current)
    if len(present) == num_pipelines:
        home = {device.compute: i for i, devices in enumerate(present) for device in devices}
    by_speed = sorted(computes, key=lambda name: -max(device.speed for device in computes[name]))
    for name in sorted(by_speed, key=lambda name: name not in home):
        poorest = min(range(num_pipelines), key=lambda i: sum(device.speed for device in pools[i]))
        pools[home.get(name, poorest)] += computes[name]
    return pools if all(pools) else []


def _choose(
    pool: Sequence[StageDevice], count: int, rank: Callable[[StageDevice], tuple[float, ...]]
) -> list[StageDevice]:
    num_on_compute: Counter[str] = Counter()
    num_on_device: Counter[str] = Counter()
    chosen = []
    ranked = sorted(pool, key=rank)
    for _ in range(count):
        device = min(ranked, key=lambda d: (num_on_compute[d.compute], num_on_device[d.name]))
        num_on_compute[device.compute] += 1
        num_on_device[device.name] += 1
        chosen.append(device)
    return chosen


def _in_order(devices: list[StageDevice], present: dict[str, int]) -> tuple[StageDevice, ...]:
    """Those in use in their present order, stages of a node next to each other, so that few hops leave a node."""

    def place(device: StageDevice) -> int:
        return present.get(device.name, len(present))

    first_of_node: dict[str, int] = {}
    for device in devices:
        first_of_node[device.node] = min(first_of_node.get(device.node, len(present)), place(device))
    return tuple(sorted(devices, key=lambda d: (first_of_node[d.node], d.node, place(d), d.name)))


def _cuts(
    profile: ModelProfile, devices: tuple[StageDevice, ...], shape: StepShape, levels: tuple[int, int, int]
) -> Iterator[tuple[int, ...]]:
    """The fastest cuts with room for ever more KV, up to the one with the most room: how much room is worth how much
    speed is for the latency model to say. Of many stages only those for the levels given.

    Args:
        levels: tokens of KV, rising; the first is the least there must be, the last is always enough.
    """
    least, _, most = levels
    ladder = set(levels)
    if len(devices) <= _FINE:
        ladder.update(int(least * _LEVEL_STEP**i) for i in range(math.ceil(math.log(most / least, _LEVEL_STEP))))
    room = 0
    for level in sorted(ladder):
        if level <= room:
            continue  # the last cut is the fastest with so much room too
        boundaries = best_boundaries(profile, devices, shape, num_kv_tokens=level)
        if boundaries is None:
            if room and len(devices) <= _FINE:
                yield from _roomiest(profile, devices, shape, room=room, beyond=level)
            return
        room = StepTimes(profile, Split(boundaries=boundaries, devices=devices)).num_kv_tokens
        yield boundaries


def _roomiest(
    profile: ModelProfile, devices: tuple[StageDevice, ...], shape: StepShape, *, room: int, beyond: int
) -> Iterator[tuple[int, ...]]:
    """The fastest cut with the most room, within 5 %; nothing where that is hardly more than ``room``.

    Args:
        room: tokens of KV that some cut has.
        beyond: more than any has.
    """
    roomiest = None
    while beyond > 1.05 * room:
        middle = (room + beyond) // 2
        boundaries = best_boundaries(profile, devices, shape, num_kv_tokens=middle)
        if boundaries is None:
            beyond = middle
        else:
            room, roomiest = middle, boundaries
    if roomiest is not None:
        yield roomiest


def refusal(candidate: Candidate, state: PlannerState, demand: Demand, *, present: Candidate) -> str | None:
    """Why memory rules a candidate out, with the numbers; None where it does not. What ``present`` has no room for need
    not have room before the change is made."""
    num_in_use = state.num_kv_tokens_in_use
    num_of_request = math.ceil(demand.prompt_tokens + demand.output_tokens)
    num_after, needed = candidate.steps.num_kv_tokens, max(num_in_use, num_of_request)
    if num_after < needed:
        return f"room for {num_after} tokens of KV, but {needed} are needed"
    num_during = candidate.transition.num_kv_tokens
    needed = max(num_in_use, min(num_of_request, present.steps.num_kv_tokens))
    if num_during < needed:
        return f"room for {num_during} tokens of KV while both splits are held, but {needed} are needed"
    return None


def split_key(split: Split) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """Equal for splits that differ in what was measured of their devices only."""
    return split.boundaries, tuple(device.name for device in split.devices), split.num_pipelines
