"""What has to move to get from one split to another: weights, KV, processes. Pure code."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from flexpipe_serve.planner.memory import pipelines_of, slices_of
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Split, StageDevice


class _Slice(NamedTuple):
    device: StageDevice
    start: int
    stop: int

    def num_shared(self, other: _Slice) -> int:
        """Layers that both have."""
        return max(0, min(self.stop, other.stop) - max(self.start, other.start))


class Transition:
    """From one split to another: all that does not depend on the demand.

    Pipelines keep their order, and stages keep as many layers as they can without leaving their device. While the
    refactoring runs both splits are held: weights count in each stage, a layer's KV once in each domain.
    """

    num_bytes: int
    """Weights to load, in all."""
    load_s: float
    """Of the stage that loads longest on a compute that serves nobody yet; stages load at the same time."""
    busy_load_s: float
    """The same on computes that serve, if nobody wanted them meanwhile."""
    num_started: int
    """Stages that need a process of their own to be started."""
    num_copied_layers: int
    """Whose KV goes from one domain to another."""
    share_replayed: float
    """Of the running sequences, those whose pipeline ends: another one computes them again."""
    num_kv_tokens: int
    """Room for KV meanwhile, in each pipeline."""

    def __init__(self, profile: ModelProfile, old: Split, new: Split) -> None:
        before, after = _slices(profile, old), _slices(profile, new)
        load_rate = profile.cached_load_bytes_per_s or profile.load_bytes_per_s
        loaded: dict[str, int] = defaultdict(int)
        serving = {stage.device.compute for stages in before for stage in stages}
        self.load_s = self.busy_load_s = 0.0
        self.num_copied_layers = 0
        for i, stages in enumerate(after):
            present = before[i] if i < len(before) else []
            kept = _kept(present, stages)
            for j, stage in enumerate(stages):
                num_bytes = profile.stage_bytes(stage.start, stage.stop)
                if j in kept:
                    num_bytes -= _held_bytes(profile, present[kept[j]], stage)
                loaded[stage.device.domain] += num_bytes
                seconds = num_bytes / (load_rate * stage.device.speed)
                if stage.device.compute in serving:
                    self.busy_load_s = max(self.busy_load_s, seconds)
                else:
                    self.load_s = max(self.load_s, seconds)
            self.num_copied_layers += sum(
                a.num_shared(b) for a in present for b in stages if a.device.domain != b.device.domain
            )
        self.num_bytes = sum(loaded.values())
        self.num_started = (_num_stages(after) - _num_stages(before)).total()
        self.share_replayed = max(0, old.num_pipelines - new.num_pipelines) / old.num_pipelines
        self.num_kv_tokens = _num_kv_tokens(profile, before, after, loaded)


def _slices(profile: ModelProfile, split: Split) -> list[list[_Slice]]:
    """Of each pipeline."""
    cuts = slices_of(split.boundaries, profile.num_layers)
    return [
        [_Slice(device, start, stop) for device, (start, stop) in zip(devices, cuts, strict=True)]
        for devices in pipelines_of(split)
    ]


def _num_stages(pipelines: list[list[_Slice]]) -> Counter[str]:
    """By device."""
    return Counter(stage.device.name for stages in pipelines for stage in stages)


def _held_bytes(profile: ModelProfile, old: _Slice, new: _Slice) -> int:
    """Weights of ``new`` that a stage has which holds ``old``."""
    num_bytes = sum(profile.layer_bytes[max(old.start, new.start) : min(old.stop, new.stop)])
    if old.start == new.start == 0:
        num_bytes += profile.embedding_bytes
    if old.stop == new.stop == profile.num_layers:
        num_bytes += profile.head_bytes
    return num_bytes


def _kept(before: list[_Slice], after: list[_Slice]) -> dict[int, int]:
    """For slices of ``after`` the one of ``before`` whose stage takes it, so that the most layers stay where they are.
    Those that nobody keeps a layer of are left out."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        pairs.append((i, j))
        stop = before[i].stop
        i += stop <= after[j].stop
        j += after[j].stop <= stop
    # Two overlapping pairs never cross, so this is choosing among intervals: best[k] is of the first k pairs.
    best = [0]
    fitting: list[int] = []
    for k, (i, j) in enumerate(pairs):
        fits = k
        while fits and (pairs[fits - 1][0] == i or pairs[fits - 1][1] == j):
            fits -= 1
        fitting.append(fits)
        num_kept = before[i].num_shared(after[j]) if before[i].device.name == after[j].device.name else 0
        best.append(max(best[k], best[fits] + num_kept))
    kept: dict[int, int] = {}
    k = len(pairs)
    while k:
        if best[k] == best[k - 1]:
            k -= 1
        else:
            i, j = pairs[k - 1]
            kept[j] = i
            k = fitting[k - 1]
    return kept


def _num_kv_tokens(
    profile: ModelProfile, before: list[list[_Slice]], after: list[list[_Slice]], loaded: dict[str, int]
) -> int:
    """Tokens of KV that fit while both are held."""
    num_layers: dict[str, int] = defaultdict(int)
    for i in range(max(len(before), len(after))):
        held: dict[str, set[int]] = defaultdict(set)
        for stage in (*(before[i] if i < len(before) else ()), *(after[i] if i < len(after) else ())):
            held[stage.device.domain].update(range(stage.start, stage.stop))
        for domain, layers in held.items():
            num_layers[domain] += len(layers)
    taken = Counter(loaded)
    for stages in before:
        for stage in stages:
            taken[stage.device.domain] += profile.stage_bytes(stage.start, stage.stop)
    devices = {stage.device.name: stage.device for stages in (*before, *after) for stage in stages}
    for name, count in (_num_stages(before) | _num_stages(after)).items():
        taken[devices[name].domain] += devices[name].overhead_bytes * count
    memory = {device.domain: device.memory_bytes for device in devices.values()}
    return max(0, min((memory[d] - taken[d]) // (num_layers[d] * profile.kv_bytes_per_token) for d in num_layers))
