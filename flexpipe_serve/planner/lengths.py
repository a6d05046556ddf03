"""How long outputs are, told before they have ended: the mean under right-censoring. Pure code."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_WINDOWS_S = (180.0, 60.0, 15.0, 5.0)
_ENOUGH = 30
"""Ends in a window, before it is taken instead of a longer one."""
_FEW = 5
"""Ends that say little by themselves."""
_MAX_ENDED = 256
"""The latest, that are remembered."""
_NUM_DEVIATIONS = 3.0
"""By which a window must contradict the longer ones to be taken with fewer ends."""


class _Counts(NamedTuple):
    """Since the start."""

    num_tokens: int
    num_ended: int
    num_ended_tokens: int
    """Of those that ended, also what they got before."""


class Lengths(NamedTuple):
    """What is told of outputs."""

    mean: float = 0.0
    cv: float = 0.0


class OutputLengths:
    """Mean and CV of output lengths, also from requests that run.

    Of those only so much is known as that they are longer than what they have by now: both are of the Kaplan-Meier
    estimate of their lengths' distribution, which counts each as long as it was seen. Lengths nobody has reached yet
    are in no estimate, so while none has ended the mean is what they have got.

    When lengths change, short windows show it first: of 5 to 180 s the longest is believed until a shorter one has
    enough ends, or other ends than could be by chance: then what was before is forgotten. Many ends at once may also be
    those of requests that came at once; outputs have become shorter only where those that ended are.

    Constant time a token; memory for 180 s.
    """

    def __init__(self) -> None:
        self._seconds: deque[int] = deque()
        """Those in which something happened, rising."""
        self._before: deque[_Counts] = deque()
        """What had happened before each."""
        self._num_tokens = self._num_ended = self._num_ended_tokens = 0
        self._running: Counter[int] = Counter()
        """Requests by tokens that they have."""
        self._ended: deque[tuple[float, int]] = deque(maxlen=_MAX_ENDED)
        """When, and how many tokens it had."""
        self._since = -math.inf
        """Lengths have changed then; what was before is not looked at."""
        self._least = 0.0
        """They have become longer than that."""
        self._known = Lengths()

    def generated(self, at: float, num_tokens: int, *, num_before: int) -> None:
        """Some request got so many tokens, after ``num_before``. Times of calls never fall."""
        self._note(at)
        self._num_tokens += num_tokens
        self.left(num_before)
        self._running[num_before + num_tokens] += 1

    def ended(self, at: float, num_tokens: int) -> None:
        """A request came to its own end with so many tokens in all, which were told of as they came."""
        self._note(at)
        self._num_ended += 1
        self._num_ended_tokens += num_tokens
        self.left(num_tokens)
        self._ended.append((at, num_tokens))

    def left(self, num_tokens: int) -> None:
        """A request that had so many tokens runs no more: it failed or was given up."""
        if self._running[num_tokens] > 1:
            self._running[num_tokens] -= 1
        else:
            del self._running[num_tokens]

    def told(self, at: float) -> Lengths:
        """As of ``at``; what was told last where nothing has happened for long, 0 before anything has."""
        longest, *shorter = (self._window(at, window_s) for window_s in _WINDOWS_S)
        if not longest.num_tokens:
            return self._known
        known = self._lengths_since(at - _WINDOWS_S[0])
        for window_s, window in zip(_WINDOWS_S[1:], shorter, strict=True):
            if _are_longer(window, known.mean):
                self._since, self._least = at, known.mean  # those that ended were still short
                known = self._lengths_since(at)
                break
            is_new = _are_shorter(window, known.mean)
            if is_new:
                self._since, self._least = max(self._since, at - window_s), 0.0
            if is_new or window.num_ended >= _ENOUGH:
                known = self._lengths_since(at - window_s)
        self._known = known
        return known

    def _lengths_since(self, begin: float) -> Lengths:
        ended = [num_tokens for at, num_tokens in self._ended if at > max(begin, self._since)]
        mean, cv = _surviving(ended, self._running)
        return Lengths(mean if len(ended) >= _FEW else max(mean, self._least), cv)

    def _window(self, at: float, window_s: float) -> _Counts:
        index = bisect_right(self._seconds, max(at - window_s, self._since))
        if index == len(self._seconds):
            return _Counts(0, 0, 0)
        before = self._before[index]
        return _Counts(
            self._num_tokens - before.num_tokens,
            self._num_ended - before.num_ended,
            self._num_ended_tokens - before.num_ended_tokens,
        )

    def _note(self, at: float) -> None:
        second = math.floor(at)
        if self._seconds and self._seconds[-1] == second:
            return
        self._seconds.append(second)
        self._before.append(_Counts(self._num_tokens, self._num_ended, self._num_ended_tokens))
        while self._seconds[0] < second - _WINDOWS_S[0]:
            self._seconds.popleft()
            self._before.popleft()


def _are_longer(window: _Counts, known: float) -> bool:
    """Whether fewer have ended than could be by chance, were the mean ``known``."""
    expected = window.num_tokens / max(1.0, known)
    return expected - window.num_ended > _NUM_DEVIATIONS * math.sqrt(max(expected, window.num_ended))


def _are_shorter(window: _Counts, known: float) -> bool:
    """Whether those that ended are shorter than could be by chance, were the mean ``known``: by the likelihood ratio of
    exponential lengths. And whether no more is generated than ended, or the long ones are still to come."""
    if not window.num_ended:
        return False
    ratio = max(window.num_tokens, window.num_ended_tokens, 1) / (window.num_ended * max(1.0, known))
    return ratio < 1 and 2 * window.num_ended * (ratio - 1 - math.log(ratio)) > _NUM_DEVIATIONS**2


def _surviving(ended: Sequence[int], running: Mapping[int, int]) -> Lengths:
    """Mean and CV by the Kaplan-Meier estimate: areas under it.

    Args:
        ended: lengths.
        running: requests that have so much, and will have more.
    """
    ends = Counter(ended)
    num_left = len(ended) + sum(running.values())
    survival, mean, mean_of_squares, before = 1.0, 0.0, 0.0, 0
    for num_tokens in sorted({*ends, *running}):
        mean += survival * (num_tokens - before)
        mean_of_squares += survival * (num_tokens**2 - before**2)
        before = num_tokens
        survival *= 1 - ends[num_tokens] / num_left
        num_left -= ends[num_tokens] + running.get(num_tokens, 0)
    return Lengths(mean, math.sqrt(max(0.0, mean_of_squares - mean**2)) / mean if mean > 0 else 0.0)
