"""How fast a snapshot may be sent so that the steps beside it are not felt to slow down: a controller that measures."""

from __future__ import annotations

from statistics import median

_QUIET_STEPS = 16
"""Steps without a snapshot message, to be compared with the _LOUD_STEPS that follow."""
_LOUD_STEPS = 32
_START_SHARE = 0.25
LEAST_SHARE = 0.1
"""Of the limit: less would make a copy take too long for what it saves. What a copy can be counted on to do."""
_ALLOWED_SLOWDOWN = 0.01
_LITTLE_SLOWDOWN = 0.005
_WEIGHT = 0.2
"""Of the newest comparison: single ones are mostly noise."""
_FASTER, _SLOWER = 1.25, 0.5
_IDLE_S = 0.5
"""So long without a step: nobody waits for tokens."""
_PATIENCE = 2
"""Times the steps of a spell: where they differ too much to be compared it ends all the same."""
_OUTLIER = 2.0
"""Times the median; a longer step is counted as so long."""


class CopyRate:
    """Bytes a second for the snapshots that one stage sends, at most a limit.

    Spells of steps with and without snapshot messages alternate. Where steps come later in the loud ones the rate is
    halved, where they do not it grows; without steps the limit alone holds. The times between steps are compared, not
    the stage's own: whoever is kept waiting on the cores that the copy takes, the next step comes later.

    Args:
        max_bytes_per_s: the limit.
    """

    def __init__(self, *, max_bytes_per_s: float) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._bytes_per_s = _START_SHARE * max_bytes_per_s
        self._not_before = float("-inf")
        self._last_step: tuple[float, int] | None = None
        self._is_quiet = True
        self._num_steps = 0
        """Of this spell."""
        self._seconds: list[float] = []
        """Between those of them that can be compared."""
        self._quiet_seconds = 0.0
        """Of a step in the last quiet spell; 0: it cannot be compared."""
        self.slowdown = 0.0
        """Of steps by snapshot messages, smoothed: 0.01 is a hundredth."""

    def bytes_per_s(self, now: float) -> float:
        """The rate at the moment."""
        return self._max_bytes_per_s if self._is_idle(now) else self._bytes_per_s

    def ready_at(self, now: float) -> float:
        """When the next message may go, ``now`` at the earliest, if no step comes before."""
        if self._is_idle(now):
            return now
        assert self._last_step is not None
        idle_at = self._last_step[0] + _IDLE_S
        return idle_at if self._is_quiet else max(now, min(self._not_before, idle_at))

    def on_sent(self, num_bytes: int, *, now: float) -> None:
        """A message went."""
        self._not_before = now + num_bytes / self.bytes_per_s(now)

    def on_step(self, now: float, *, num_tokens: int) -> None:
        """A step of so many tokens was over at ``now``. Times between steps of one size are compared."""
        last, self._last_step = self._last_step, (now, num_tokens)
        if last is None or now - last[0] > _IDLE_S:
            self._begin(is_quiet=True)
            return
        self._num_steps += 1
        if num_tokens == last[1]:
            self._seconds.append(now - last[0])
        wanted = _QUIET_STEPS if self._is_quiet else _LOUD_STEPS
        if len(self._seconds) >= wanted:
            self._compare()
            self._begin(is_quiet=not self._is_quiet)
        elif self._num_steps >= _PATIENCE * wanted:
            self._quiet_seconds = 0.0
            self._begin(is_quiet=not self._is_quiet)

    def _compare(self) -> None:
        most = _OUTLIER * median(self._seconds)
        seconds = sum(min(each, most) for each in self._seconds) / len(self._seconds)
        if self._is_quiet:
            self._quiet_seconds = seconds
        elif self._quiet_seconds > 0:
            self.slowdown += _WEIGHT * (seconds / self._quiet_seconds - 1 - self.slowdown)
            self._adapt()

    def _adapt(self) -> None:
        if self.slowdown > _ALLOWED_SLOWDOWN:
            wanted = _SLOWER * self._bytes_per_s
        elif self.slowdown < _LITTLE_SLOWDOWN:
            wanted = _FASTER * self._bytes_per_s
        else:
            return
        self._bytes_per_s = min(max(wanted, LEAST_SHARE * self._max_bytes_per_s), self._max_bytes_per_s)

    def _begin(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._num_steps = 0
        self._seconds = []

    def _is_idle(self, now: float) -> bool:
        return self._last_step is None or now - self._last_step[0] >= _IDLE_S
