"""Granularities whose coarse cuts are unions of fine ones (F6): from one to the next a stage is split in two, or two
neighbours become one, and every other stage keeps its layers. Pure code."""

from __future__ import annotations

from itertools import pairwise

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.partition import best_boundaries
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import StageDevice


def nested_ladder(profile: ModelProfile, shape: StepShape, *, max_stages: int) -> tuple[tuple[int, ...], ...]:
    """Boundaries of 1, 2, ... ``max_stages`` stages for equal devices, each a subset of the next.

    The finest is the best there is. From the coarsest on, each splits the slowest stage of the one before it, at that
    cut of the finest that makes the most even halves: so 2, 4 and 8 stages of 8 are even, while of four equal ones
    three become 2 : 1 : 1, 1.5 times as slow as thirds. In turn no layer moves but those of the stage that is split.

    Args:
        shape: the step that the splits are to be good at.

    Raises:
        ConfigError: more stages than layers.
    """
    if not 1 <= max_stages <= profile.num_layers:
        raise ConfigError(
            f"a ladder of {max_stages} stages for {profile.num_layers} layers; give at least 1 and at most one stage"
            " for each layer."
        )
    finest = best_boundaries(profile, [_device(i) for i in range(max_stages)], shape)
    assert finest is not None  # memory is no matter
    rungs: list[tuple[int, ...]] = [()]
    while len(rungs) < max_stages:
        edges = (0, *rungs[-1], profile.num_layers)
        splits = [
            (profile.stage_seconds(a, b, shape), a, b) for a, b in pairwise(edges) if any(a < cut < b for cut in finest)
        ]
        _, start, stop = max(splits)
        cut = min(
            (cut for cut in finest if start < cut < stop),
            key=lambda cut: max(profile.stage_seconds(start, cut, shape), profile.stage_seconds(cut, stop, shape)),
        )
        rungs.append(tuple(sorted((*rungs[-1], cut))))
    return tuple(rungs)


def _device(index: int) -> StageDevice:
    name = f"device-{index}"
    return StageDevice(name=name, node=name, compute=name, domain=name, memory_bytes=2**62)
