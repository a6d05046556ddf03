"""What it may cost to have given capacity away: demand that was there once may return. Pure code."""

from __future__ import annotations

import math
from collections import deque

from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Demand

_STEP = 1.05
"""Peaks are kept in steps of so much."""
_MEMORY_S = 3600.0


class Peaks:
    """The highest loads of late: each the last of its height. Bounded, whatever comes."""

    def __init__(self) -> None:
        self._peaks: deque[tuple[float, float]] = deque()
        """(when, load), falling in load and rising in time."""

    def note(self, at: float, load: float) -> None:
        """A load that is there now, in layer seconds a second."""
        if load <= 0:
            return
        load = math.pow(_STEP, round(math.log(load, _STEP)))
        while self._peaks and self._peaks[-1][1] <= load:
            self._peaks.pop()
        self._peaks.append((at, load))
        while self._peaks[0][0] < at - _MEMORY_S:
            self._peaks.popleft()

    def risk_s(
        self, *, now: float, work: float, max_rate: float, present_rate: float, duration_s: float, horizon_s: float
    ) -> float:
        """Seconds of request latency to be expected within the horizon when a peak comes back that a split with less
        capacity than the present one cannot sustain: what piles up until the present split is back, and then drains.

        A peak is taken to come back as often as it has been away, so the longer it is gone the less it counts.

        Args:
            work: of a request, layer seconds.
            max_rate: of the split with less capacity.
            present_rate: that of the present one.
            duration_s: to get back.
        """
        worst_s = 0.0
        for at, load in self._peaks:
            rate = min(load / work, present_rate)
            num_queued = (rate - max_rate) * duration_s
            if num_queued <= 0:
                break
            spare = present_rate - rate
            drain_s = min(horizon_s, num_queued / spare) if spare > 0 else horizon_s
            chance = min(1.0, horizon_s / max(now - at, 1e-9))
            worst_s = max(worst_s, chance * num_queued * (duration_s + drain_s) / 2)
        return worst_s


def work_of(profile: ModelProfile, demand: Demand) -> float:
    """Layer seconds of a request in well-filled steps: so that loads of different lengths compare."""
    new_tokens = demand.prompt_tokens * (1 - demand.prefix_hit_share)
    return new_tokens * profile.layer.at(256) / 256 + max(1.0, demand.output_tokens) * profile.layer.at(16) / 16
