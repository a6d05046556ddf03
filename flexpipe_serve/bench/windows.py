"""What the tokens' arrival times say about stretches of time: pure.

Which gap belongs to which window decides what a benchmark finds, so it is said here once:

* A gap is the time between two successive pieces of text of one stream; what a user sees.
* A window at rest has the gaps that lie in it as a whole.
* A refactoring's window has every gap that it touches: those that end in it, and the last one of each stream that began
  in it and ends after it. So no late token is charged to nobody.
* While a prompt is computed all streams wait for the load's own work, more or less of it in one window than in another
  by chance: such moments count nowhere, neither their gaps nor their tokens nor their time.
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
        left_out: moments that do not count.
    """

    def __init__(self, streams: Iterable[Sequence[float]], *, left_out: Iterable[Window] = ()) -> None:
        arrays = [np.asarray(times, dtype=np.float64) for times in streams]
        self._out_starts, self._out_ends = _union(left_out)
        every = np.sort(np.concatenate([np.empty(0), *arrays]))
        self._all = every[~self._is_out(every, every)]
        earlier = np.concatenate([np.empty(0), *(times[:-1] for times in arrays)])
        later = np.concatenate([np.empty(0), *(times[1:] for times in arrays)])
        order = np.argsort(later, kind="stable")
        order = order[~self._is_out(earlier[order], later[order])]
        self._earlier, self._later = earlier[order], later[order]

    def count(self, window: Window) -> int:
        """Tokens that arrived in the window: after its start, up to its end."""
        first, last = np.searchsorted(self._all, (window.start_s, window.end_s), side="right")
        return int(last - first)

    def rate(self, windows: Iterable[Window]) -> float:
        """Tokens a second over several windows; 0 where these have no length."""
        windows = list(windows)
        seconds = sum(self.seconds(window) for window in windows)
        return sum(self.count(window) for window in windows) / seconds if seconds > 0 else 0.0

    def seconds(self, window: Window) -> float:
        """Of a window, those that count."""
        starts = np.clip(self._out_starts, window.start_s, window.end_s)
        ends = np.clip(self._out_ends, window.start_s, window.end_s)
        return window.seconds - float((ends - starts).sum())

    def gaps_within(self, window: Window) -> _Floats:
        """Seconds of the gaps that lie in the window as a whole."""
        chosen = (self._earlier >= window.start_s) & (self._later <= window.end_s)
        gaps: _Floats = (self._later - self._earlier)[chosen]
        return gaps

    def gaps_touching(self, window: Window) -> _Floats:
        """Seconds of the gaps that overlap the window in any instant, in the order of their ends."""
        gaps: _Floats = (self._later - self._earlier)[self._touching(window)]
        return gaps

    def num_touching(self, window: Window, *, until_s: float) -> int:
        """How many of ``gaps_touching`` end by ``until_s``."""
        return int((self._touching(window) & (self._later <= until_s)).sum())

    def _touching(self, window: Window) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = (self._later >= window.start_s) & (self._earlier <= window.end_s)
        return chosen

    def _is_out(self, starts: _Floats, ends: _Floats) -> npt.NDArray[np.bool_]:
        """Which of these stretches overlap a moment that does not count."""
        index = np.searchsorted(self._out_ends, starts, side="left")  # the first that ends behind the start
        is_out: npt.NDArray[np.bool_] = np.append(self._out_starts, np.inf)[index] <= ends
        return is_out


def _union(windows: Iterable[Window]) -> tuple[_Floats, _Floats]:
    """Starts and ends of the windows' union, ascending and disjoint."""
    starts: list[float] = []
    ends: list[float] = []
    for window in sorted(windows):
        if ends and window.start_s <= ends[-1]:
            ends[-1] = max(ends[-1], window.end_s)
        else:
            starts.append(window.start_s)
            ends.append(window.end_s)
    return np.array(starts, dtype=np.float64), np.array(ends, dtype=np.float64)


def split(window: Window, at_s: float | None) -> tuple[Window, Window]:
    """The parts before and behind a moment, which is moved into the window if need be; None: all lies before."""
    at_s = window.end_s if at_s is None else min(max(at_s, window.start_s), window.end_s)
    return Window(window.start_s, at_s), Window(at_s, window.end_s)


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``; None where either is missing or the base is 0."""
    return None if value is None or not base else value / base
