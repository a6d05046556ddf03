"""How long a step takes on a split: stages on one compute take turns, others work at the same time. Pure code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from flexpipe_serve.planner.memory import num_kv_tokens, pipelines_of, slices_of
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import SchedulerLimits, Split

_DEFAULT_LIMITS = SchedulerLimits()


class _Work(NamedTuple):
    """What some stages compute in a step, in units of the profiled device's time."""

    fixed: float
    """Seconds, whatever the step holds."""
    layers: float
    """Layers of scale 1."""
    embeddings: float
    heads: float

    def __add__(self, other: tuple[float, ...]) -> _Work:  # type: ignore[override]
        return _Work(*(a + b for a, b in zip(self, other, strict=True)))


_NOTHING = _Work(0.0, 0.0, 0.0, 0.0)


class StepTimes:
    """Times of steps on one of a split's pipelines, on the slowest where they differ; and the KV that it has room for.

    Where several pipelines have stages on one compute, each gets its share of it.

    Args:
        limits: of what a step holds.
    """

    depth: int
    """Steps in flight: as many as computes."""

    def __init__(self, profile: ModelProfile, split: Split, limits: SchedulerLimits = _DEFAULT_LIMITS) -> None:
        self.profile = profile
        self.split = split
        self.limits = limits
        self.num_kv_tokens = num_kv_tokens(profile, split)
        slices = slices_of(split.boundaries, profile.num_layers)
        pipelines = pipelines_of(split)
        num_sharing: dict[str, int] = defaultdict(int)
        for devices in pipelines:
            for compute in {device.compute for device in devices}:
                num_sharing[compute] += 1
        work = [sum(profile.layer_scale[start:stop]) for start, stop in slices]
        computes: list[_Work] = []
        passes: list[_Work] = []
        depths = []
        for devices in pipelines:
            by_compute: dict[str, _Work] = {}
            for i, (device, layers) in enumerate(zip(devices, work, strict=True)):
                share = num_sharing[device.compute] / device.speed
                of_stage = _Work(
                    profile.stage_s * share,
                    layers * share,
                    share if i == 0 else 0.0,
                    share if i == len(work) - 1 else 0.0,
                )
                before = by_compute.get(device.compute)
                by_compute[device.compute] = of_stage if before is None else before + of_stage
            computes += by_compute.values()
            passes.append(sum(by_compute.values(), _NOTHING))
            depths.append(len(by_compute))
        self.depth = min(depths)
        self._messages_s = len(work) * profile.hop_s + profile.step_s
        self._computes = _undominated(computes)
        self._passes = _undominated(passes)

    def at(self, shape: StepShape) -> tuple[float, float]:
        """Seconds of one pass through an idle pipeline with hops and the Router's part, and of the busiest compute (or
        the Router) in it, which is how far apart steps can follow each other."""
        profile = self.profile
        layer_s = profile.layer_seconds(shape)
        embedding_s = profile.embedding.at(shape.num_tokens)
        head_s = profile.head.at(shape.num_samples)
        pass_s = busiest_s = 0.0
        for fixed, layers, embeddings, heads in self._computes:
            busiest_s = max(busiest_s, fixed + layers * layer_s + embeddings * embedding_s + heads * head_s)
        for fixed, layers, embeddings, heads in self._passes:
            pass_s = max(pass_s, fixed + layers * layer_s + embeddings * embedding_s + heads * head_s)
        compute = profile.compute_factor.at(shape.num_tokens)
        messages = profile.message_factor.at(shape.num_samples)
        return compute * pass_s + messages * self._messages_s, max(compute * busiest_s, messages * profile.step_s)


def _undominated(works: Iterable[_Work]) -> list[_Work]:
    """Those that can be the largest for some step."""
    kept: list[_Work] = []
    for work in sorted(set(works), reverse=True):
        if not any(all(a >= b for a, b in zip(other, work, strict=True)) for other in kept):
            kept.append(work)
    return kept
