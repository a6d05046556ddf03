"""Moments of what happened in the last seconds: constant time and memory however much happens. Pure code."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_NUM_SLOTS = 15
_MIN_COVERED_S = 5.0
_FEW = 5
"""Fewer values contradict nothing."""
_LEAST_OWN = 0.7
_LEAST_CV = 0.5
_ROUNDING = 1e-6
NUM_DEVIATIONS = 3.0
"""By which a change must stand out from chance."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of some values."""

    count: int = 0
    sum: float = 0.0
    sum_of_squares: float = 0.0

    @staticmethod
    def of(values: Iterable[float]) -> Moments:
        """Of these values."""
        return functools.reduce(Moments.with_value, values, Moments())

    def with_value(self, value: float) -> Moments:
        """With one more."""
        return Moments(self.count + 1, self.sum + value, self.sum_of_squares + value * value)

    def without(self, other: Moments) -> Moments:
        """Of the rest, where others are among them."""
        return Moments(self.count - other.count, self.sum - other.sum, self.sum_of_squares - other.sum_of_squares)

    @property
    def mean(self) -> float:
        """0 where there are none."""
        return self.sum / self.count if self.count > 0 else 0.0

    @property
    def cv(self) -> float:
        """Standard deviation over mean; 0 where there are none."""
        mean = self.mean
        return math.sqrt(max(0.0, self.sum_of_squares / self.count - mean * mean)) / mean if mean > 0 else 0.0


def pooled_cv(parts: Iterable[Moments]) -> float:
    """CV of values of which each part has a mean of its own; 0 where there are none."""
    told = [(part.count, part.cv) for part in parts if part.count > 0]
    return math.sqrt(sum(count * cv * cv for count, cv in told) / max(1, sum(count for count, _ in told)))


@dataclass(slots=True)
class _Slot:
    """What fell into one slot's time: the first value, and sums over the others."""

    number: int
    first: float
    num_others: int = 0
    sum: float = 0.0
    sum_of_squares: float = 0.0


class MomentWindow:
    """Count, mean and CV of values over the last ``window_s`` seconds.

    The window is 15 slots, of which the youngest is still filling: a value leaves when its slot does, and what is
    covered is 14 to 15 fifteenths of the nominal length.
    """

    def __init__(self, window_s: float) -> None:
        self.slot_s = window_s / _NUM_SLOTS
        self._slots: deque[_Slot] = deque()

    def add(self, at: float, value: float) -> None:
        """Take a value in; ``at`` never falls."""
        self._drop_old(at)
        number = math.floor(at / self.slot_s)
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(_Slot(number, value))
            return
        slot = self._slots[-1]
        slot.num_others += 1
        slot.sum += value
        slot.sum_of_squares += value * value

    def moments(self, at: float, *, without_oldest: bool = False) -> Moments:
        """As of ``at``.

        Args:
            without_oldest: leave out the oldest value in the window.
        """
        self._drop_old(at)
        firsts = [slot.first for slot in self._slots][1 if without_oldest else 0 :]
        return Moments(
            len(firsts) + sum(slot.num_others for slot in self._slots),
            sum(firsts) + sum(slot.sum for slot in self._slots),
            sum(first * first for first in firsts) + sum(slot.sum_of_squares for slot in self._slots),
        )

    def forget(self, before: float) -> None:
        """Drop what was before a time, and up to a slot more."""
        while self._slots and self._slots[0].number * self.slot_s < before - _ROUNDING:
            self._slots.popleft()

    def count(self, at: float) -> int:
        """Values in the window as of ``at``."""
        self._drop_old(at)
        return len(self._slots) + sum(slot.num_others for slot in self._slots)

    def begin(self, at: float) -> float:
        """Where the window as of ``at`` begins."""
        return (math.floor(at / self.slot_s) - _NUM_SLOTS + 1) * self.slot_s

    def counts(self, at: float) -> Iterator[tuple[float, float, int]]:
        """Begin, end and number of values of each slot with any, oldest first."""
        self._drop_old(at)
        for slot in self._slots:
            yield slot.number * self.slot_s, (slot.number + 1) * self.slot_s, 1 + slot.num_others

    def _drop_old(self, at: float) -> None:
        oldest = math.floor(at / self.slot_s) - _NUM_SLOTS + 1
        while self._slots and self._slots[0].number < oldest:
            self._slots.popleft()


def _contradicts(moments: Moments, longer: Moments, *, least_own: float = _LEAST_OWN) -> bool:
    """Whether values have changed. What few are alike for may be chance: of the longer window's deviation a part is
    taken for theirs, whatever they look like."""
    if moments.count < _FEW or not longer.count:
        return False
    deviation = longer.cv * longer.mean
    own = max(least_own * deviation, moments.cv * moments.mean)
    chance = NUM_DEVIATIONS * math.hypot(own / math.sqrt(moments.count), deviation / math.sqrt(longer.count))
    return abs(moments.mean - longer.mean) > chance + _ROUNDING * longer.mean


class RecentMoments:
    """Moments of the shortest of several windows that is to be believed: it holds enough values, or contradicts the
    longer ones by more than chance; then what was before is forgotten. The last few are one too, for values that come
    seldom.

    Args:
        windows_s: lengths, rising.
        min_count: enough.
    """

    def __init__(self, windows_s: Sequence[float], *, min_count: int) -> None:
        self._windows = [MomentWindow(window_s) for window_s in reversed(windows_s)]
        self._min_count = min_count
        self._last: deque[tuple[float, float]] = deque(maxlen=_FEW)
        """When, and the value."""
        self._known = Moments()

    def add(self, at: float, value: float) -> None:
        """Take a value in; ``at`` never falls."""
        for window in self._windows:
            window.add(at, value)
        self._last.append((at, value))

    def moments(self, at: float) -> Moments:
        """As of ``at``: of the longest window where no other is believed; what was told last where that is empty."""
        known = self._windows[0].moments(at)
        for index, window in enumerate(self._windows[1:], start=1):
            moments = window.moments(at)
            is_new = _contradicts(moments, known)
            if is_new:
                for longer in self._windows[:index]:
                    longer.forget(window.begin(at))
            if is_new or moments.count >= self._min_count or not known.count:
                known = moments
        last = Moments.of(value for _, value in self._last)
        # A look at each value finds chance more often than one at each window's end.
        if _contradicts(last, known, least_own=1.0):
            for window in self._windows:
                window.forget(self._last[0][0])
            known = last
        if known.count:
            self._known = known
        return self._known


def covered_s(at: float, *, since: float) -> float:
    """What arrivals are divided by for a rate: at least 5 s, for a burst at the start is no rate."""
    return max(at - since, _MIN_COVERED_S)


class ArrivalWindow:
    """Rate of arrivals over the last ``window_s`` seconds, its change, and the CV of the gaps between them."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._gaps = MomentWindow(window_s)
        """Each at its later arrival; of the first arrival a 0 that is never looked at."""
        self._first_at: float | None = None
        self._last_at = 0.0

    def add(self, at: float) -> None:
        """An arrival; ``at`` never falls."""
        if self._first_at is None:
            self._first_at = self._last_at = at
        self._gaps.add(at, at - self._last_at)
        self._last_at = at

    def num_arrivals(self, at: float) -> int:
        """As of ``at``."""
        return self._gaps.count(at)

    def gaps(self, at: float) -> Moments:
        """Of those that lie in the window as a whole."""
        return self._gaps.moments(at, without_oldest=True)

    def rate(self, at: float) -> float:
        """Arrivals a second in what the window covers by now."""
        return self.num_arrivals(at) / self._covered_s(at)

    def contradicts(self, at: float, rate: float, *, cv: float) -> bool:
        """Whether there have been more or fewer arrivals than a steady rate with gaps of this CV would bring."""
        expected = rate * self._covered_s(at)
        return abs(self.num_arrivals(at) - expected) > NUM_DEVIATIONS * max(_LEAST_CV, cv) * math.sqrt(
            max(1.0, expected)
        )

    def change(self, at: float, rate: float) -> tuple[float, int]:
        """When in the window the rate has most likely changed from ``rate``, by the likelihood of what came since; and
        how many that is."""
        best = (-math.inf, self.begin(at), self.num_arrivals(at))
        num_since = 0
        for begin, _, count in reversed(list(self._gaps.counts(at))):
            num_since += count
            # Either side of a slot with arrivals: with them a rise begins, without them a fall.
            for since, num in ((begin, num_since), (begin + self._gaps.slot_s, num_since - count)):
                if self.begin(at) <= since < at:
                    excess = rate * (at - since) - num
                    likelihood = excess + (num * math.log(num / (num + excess)) if num else 0.0)
                    best = max(best, (likelihood, since, num))
        return best[1:]

    def _covered_s(self, at: float) -> float:
        return covered_s(at, since=self.begin(at))

    def gradient(self, at: float, *, num_deviations: float) -> float:
        """By how much the rate changes each second, from the older to the younger half of the window.

        A burst is no trend: 0 where the two halves differ by less than ``num_deviations`` standard deviations of what a
        steady rate with gaps of this CV would bring.
        """
        begin = self.begin(at)
        if at - begin < _MIN_COVERED_S:
            return 0.0
        middle = (begin + at) / 2
        older = total = 0.0
        for slot_begin, slot_end, count in self._gaps.counts(at):
            start, stop = max(begin, slot_begin), min(at, slot_end)
            share = (middle - start) / (stop - start) if stop > start else 1.0
            older += count * min(1.0, max(0.0, share))
            total += count
        difference = total - 2 * older
        if abs(difference) < num_deviations * math.sqrt(total) * max(1.0, self.gaps(at).cv):
            return 0.0
        return difference / (middle - begin) ** 2

    def begin(self, at: float) -> float:
        """Of what the window covers: not before the first arrival."""
        return at if self._first_at is None else max(self._first_at, self._gaps.begin(at))
