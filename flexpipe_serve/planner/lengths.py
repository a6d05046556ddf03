"""How long outputs are, told before they have ended: the mean under right-censoring. Pure code."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

_WINDOWS_S = (180.0, 60.0, 15.0, 5.0)
_ENOUGH = 30
"""Ends in a window, before it is taken instead of a longer one."""
_PRIOR_WEIGHT = 4.0
"""Ends that what the longer windows say counts for in a shorter one."""
_NUM_DEVIATIONS = 3.0
"""By which a window must contradict the longer ones to be taken with fewer ends."""


class _Counts(NamedTuple):
    """Since the start."""

    num_tokens: int
    num_ended: int
    num_arrived: int
    num_ended_tokens: int
    """Of those that ended, also what they got before."""


class OutputLengths:
    """Mean output length from all tokens generated, also by requests that run or were given up.

    Of a length of which so much is done and the end unknown, the maximum-likelihood mean is tokens generated over
    requests ended, where every token is as likely to be the last (an exponential length under right-censoring). In a
    window of time that is right for any lengths in a steady flow. When lengths change, short windows show it first: of
    5 to 180 s the longest is believed until a shorter one has enough ends, or other ends than could be by chance: then
    what was before is forgotten. Many ends at once may also be those of requests that came at once; outputs have become
    shorter only where those that ended are.

    Constant time a token; memory for 180 s.
    """

    def __init__(self) -> None:
        self._seconds: deque[int] = deque()
        """Those in which something happened, rising."""
        self._before: deque[_Counts] = deque()
        """What had happened before each."""
        self._num_tokens = self._num_ended = self._num_arrived = self._num_ended_tokens = 0
        self._since = -math.inf
        """Lengths have changed then; what was before is not looked at."""
        self._known = 0.0

    def arrived(self, at: float) -> None:
        """A request came. Times of calls never fall."""
        self._note(at)
        self._num_arrived += 1

    def generated(self, at: float, num_tokens: int) -> None:
        """Some request got so many tokens."""
        self._note(at)
        self._num_tokens += num_tokens

    def ended(self, at: float, num_tokens: int) -> None:
        """A request came to its own end with so many tokens in all, which were told of as they came; one that failed or
        was given up did not."""
        self._note(at)
        self._num_ended += 1
        self._num_ended_tokens += num_tokens

    def mean(self, at: float) -> float:
        """As of ``at``; what was told last where nothing has happened for long, 0 before anything has."""
        longest, *shorter = (self._window(at, window_s) for window_s in _WINDOWS_S)
        if not longest.num_tokens:
            return self._known
        # Where hardly any has ended, what each request has got by now says more than the ends.
        so_far = longest.num_tokens / max(1, longest.num_arrived, longest.num_ended)
        known = _blend(longest, so_far)
        for window_s, window in zip(_WINDOWS_S[1:], shorter, strict=True):
            if _are_shorter(window, known):
                self._since = max(self._since, at - window_s)
                known = max(window.num_tokens, window.num_ended_tokens) / window.num_ended
            elif _are_longer(window, known):
                self._since = max(self._since, at - window_s)
                known = _blend(window, known)
            elif window.num_ended >= _ENOUGH:
                known = _blend(window, known)
        self._known = known
        return known

    def _window(self, at: float, window_s: float) -> _Counts:
        index = bisect_right(self._seconds, max(at - window_s, self._since))
        if index == len(self._seconds):
            return _Counts(0, 0, 0, 0)
        before = self._before[index]
        return _Counts(
            self._num_tokens - before.num_tokens,
            self._num_ended - before.num_ended,
            self._num_arrived - before.num_arrived,
            self._num_ended_tokens - before.num_ended_tokens,
        )

    def _note(self, at: float) -> None:
        second = math.floor(at)
        if self._seconds and self._seconds[-1] == second:
            return
        self._seconds.append(second)
        self._before.append(_Counts(self._num_tokens, self._num_ended, self._num_arrived, self._num_ended_tokens))
        while self._seconds[0] < second - _WINDOWS_S[0]:
            self._seconds.popleft()
            self._before.popleft()


def _are_longer(window: _Counts, known: float) -> bool:
    """Whether fewer have ended than could be by chance, were the mean ``known``."""
    expected = window.num_tokens / known
    return expected - window.num_ended > _NUM_DEVIATIONS * math.sqrt(max(expected, window.num_ended))


def _are_shorter(window: _Counts, known: float) -> bool:
    """Whether those that ended are shorter than could be by chance, were the mean ``known``: by the likelihood ratio of
    exponential lengths. And whether no more is generated than ended, or the long ones are still to come."""
    if not window.num_ended:
        return False
    ratio = max(window.num_tokens, window.num_ended_tokens, 1) / (window.num_ended * known)
    return ratio < 1 and 2 * window.num_ended * (ratio - 1 - math.log(ratio)) > _NUM_DEVIATIONS**2


def _blend(window: _Counts, prior: float) -> float:
    """Requests that began before the window and end in it together would seem short by its tokens alone."""
    num_tokens = max(window.num_tokens, window.num_ended_tokens)
    return (num_tokens + _PRIOR_WEIGHT * prior) / (window.num_ended + _PRIOR_WEIGHT)
