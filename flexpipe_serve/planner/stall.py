"""When requests take longer than they should (F23): pure code."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_BEGINS_ABOVE = 1.5
_ENDS_WITHIN = 1.2
_NUM_RECENT = 16
_NUM_NORMAL = 256
_MIN_NORMAL = 32


class StallDetector:
    """FlexPipe's definition: a stall begins when latencies exceed 1.5 times the P25 latency of normal operation, and
    ends when they are within 1.2 times.

    Requests differ in length, so a single latency says little: like is compared with like, the P25 of the last 16 with
    that of the last 256 outside of stalls.

    Args:
        give_up_after_s: what lasts longer is no stall but the new normal, such as longer outputs.
    """

    def __init__(self, *, give_up_after_s: float) -> None:
        self._give_up_after_s = give_up_after_s
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)
        self._normal: deque[float] = deque()
        self._sorted: list[float] = []
        """The values of ``_normal``."""
        self._stalled_since: float | None = None

    @property
    def is_stalled(self) -> bool:
        """Whether a stall has begun and not ended."""
        return self._stalled_since is not None

    @property
    def baseline_s(self) -> float | None:
        """P25 latency of normal operation; None before there are enough."""
        return _quartile(self._sorted) if len(self._sorted) >= _MIN_NORMAL else None

    def add(self, at: float, latency_s: float) -> None:
        """A request has ended; ``at`` never falls."""
        self._recent.append(latency_s)
        if self._stalled_since is None:
            self._add_normal(latency_s)
        baseline_s = self.baseline_s
        if baseline_s is None:
            return
        lately_s = _quartile(sorted(self._recent))
        if self._stalled_since is None:
            if lately_s > _BEGINS_ABOVE * baseline_s:
                self._stalled_since = at
        elif lately_s <= _ENDS_WITHIN * baseline_s:
            self._stalled_since = None
        elif at - self._stalled_since > self._give_up_after_s:
            self._stalled_since = None
            self._normal.clear()
            self._sorted.clear()

    def _add_normal(self, latency_s: float) -> None:
        self._normal.append(latency_s)
        insort(self._sorted, latency_s)
        if len(self._normal) > _NUM_NORMAL:
            del self._sorted[bisect_left(self._sorted, self._normal.popleft())]


def _quartile(values: list[float]) -> float:
    """The first quartile of sorted values."""
    return values[(len(values) - 1) // 4]
