"""Which devices are given back (F31): those that nothing has needed for a window, down to an always-on floor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

WINDOW_S = 300.0
FLOOR_SHARE = 0.3
PEAK_WINDOW_S = 86_400.0


class ElasticDevices:
    """Follows the use of devices. They are taken at once and given back late, so a load that comes and goes within the
    window changes nothing. Times are seconds on the caller's clock and must not fall.

    Args:
        window_s: a device is given back when it has been idle for so long.
        floor_share: share of the peak that is always kept.
        peak_window_s: the peak is the most devices used at once within the last so many seconds; a day, because load
            repeats daily.
    """

    def __init__(
        self,
        *,
        window_s: float = WINDOW_S,
        floor_share: float = FLOOR_SHARE,
        peak_window_s: float = PEAK_WINDOW_S,
    ) -> None:
        self._window_s = window_s
        self._floor_share = floor_share
        self._peak_window_s = peak_window_s
        self._idle_since: dict[str, float] = {}
        """Of held devices that nothing uses."""
        self._peaks: deque[tuple[float, int]] = deque()
        """(last seen, number used), falling in number: the first is the peak, the others follow when it is too old."""

    @property
    def peak(self) -> int:
        """Most devices used at once within the peak window."""
        return self._peaks[0][1] if self._peaks else 0

    @property
    def floor(self) -> int:
        """Devices that are kept whatever the load."""
        return math.ceil(self._floor_share * self.peak)

    def update(self, at: float, *, held: Collection[str], in_use: Collection[str]) -> tuple[str, ...]:
        """Say how things stand; call it about once a second, and whenever the use changes.

        Args:
            held: all devices that we have.
            in_use: those of them that hold a stage with layers, or are planned to.

        Returns:
            The devices to give back now, the longest idle first. They are named again until ``held`` lacks them.
        """
        self._note_peak(at, len(set(in_use)))
        idle = [device for device in held if device not in in_use]
        self._idle_since = {device: self._idle_since.get(device, at) for device in idle}
        expired = [device for device in idle if at - self._idle_since[device] >= self._window_s]
        expired.sort(key=lambda device: (self._idle_since[device], device))
        return tuple(expired[: max(0, len(set(held)) - self.floor)])

    def _note_peak(self, at: float, num_used: int) -> None:
        while self._peaks and self._peaks[-1][1] <= num_used:
            self._peaks.pop()
        self._peaks.append((at, num_used))
        while at - self._peaks[0][0] > self._peak_window_s:
            self._peaks.popleft()
