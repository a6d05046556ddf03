"""What the tokens' arrival times say about stretches of time: pure.

Which gap belongs to which window decides what a benchmark finds, so it is said here once:

* A gap is the time between two successive pieces of text of one stream; what a user sees.
* A window at rest has the gaps that lie in it as a whole.
* A refactoring's window has every gap that it touches: those that end in it, and the last one of each stream that began
  in it and ends after it. So no late token is charged to nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A stretch of time, in seconds of one clock."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


class TokenTimes:
    """Arrival times of the tokens of some streams.

    Args:
        streams: of each stream the times of its tokens, ascending.
    """

    def __init__(self, streams: Iterable[Sequence[float]]) -> None:
        arrays = [np.asarray(times, dtype=np.float64) for times in streams]
        self._all = np.sort(np.concatenate([np.empty(0), *arrays]))
        earlier = np.concatenate([np.empty(0), *(times[:-1] for times in arrays)])
        later = np.concatenate([np.empty(0), *(times[1:] for times in arrays)])
        order = np.argsort(later, kind="stable")
        self._earlier, self._later = earlier[order], later[order]

    def count(self, window: Window) -> int:
        """Tokens that arrived in the window: after its start, up to its end."""
        first, last = np.searchsorted(self._all, (window.start_s, window.end_s), side="right")
        return int(last - first)

    def rate(self, windows: Iterable[Window]) -> float:
        """Tokens a second over several windows; 0 where these have no length."""
        windows = list(windows)
        seconds = sum(window.seconds for window in windows)
        return sum(self.count(window) for window in windows) / seconds if seconds > 0 else 0.0

    def gaps_within(self, window: Window) -> _Floats:
        """Seconds of the gaps that lie in the window as a whole."""
        chosen = (self._earlier >= window.start_s) & (self._later <= window.end_s)
        gaps: _Floats = (self._later - self._earlier)[chosen]
        return gaps

    def gaps_touching(self, window: Window) -> _Floats:
        """Seconds of the gaps that overlap the window in any instant."""
        chosen = (self._later >= window.start_s) & (self._earlier <= window.end_s)
        gaps: _Floats = (self._later - self._earlier)[chosen]
        return gaps


def expected_tokens(window: Window, *, switched_s: float | None, rate_before: float, rate_after: float) -> float:
    """Tokens that the window would have brought at the rates at rest: the old layout's up to the switch, then the new
    one's; the old one's alone where there was no switch."""
    switch_s = window.end_s if switched_s is None else min(max(switched_s, window.start_s), window.end_s)
    return rate_before * (switch_s - window.start_s) + rate_after * (window.end_s - switch_s)


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``; None where either is missing or the base is 0."""
    return None if value is None or not base else value / base
