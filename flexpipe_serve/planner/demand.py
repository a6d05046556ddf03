"""What clients ask for, told incrementally: constant time a request, bounded memory (F8, F16). Pure code: the caller's
clock comes in."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.lengths import Lengths, OutputLengths
from flexpipe_serve.planner.stall import StallDetector
from flexpipe_serve.planner.types import Demand, Trigger
from flexpipe_serve.planner.windows import NUM_DEVIATIONS, ArrivalWindow, Moments, RecentMoments, covered_s, pooled_cv

_MIN_ARRIVALS = 10
"""In a window, before its CV says anything."""
_MIN_ARRIVALS_OF_RATE = 20
"""In a window, before its rate is taken instead of a longer window's."""
_GLANCE_S = 5.0
"""A window beside the others that is believed only where it contradicts them: a shift shows there first."""
_MIN_PROMPTS = 30
"""In a window, before their length is taken instead of a longer window's."""
_SURGE = 0.5
_MOST_ALIKE = 256
"""Gaps between arrivals that are told apart when the rate has changed."""


def trigger_of(demand: Demand, *, is_stalled: bool, horizon_s: float) -> Trigger:
    """Why a decision is due at its time: a stall, a rate that would grow by half over the horizon (F16), or neither."""
    if is_stalled:
        return Trigger.STALL
    surges = demand.rate_gradient * horizon_s > _SURGE * demand.rate > 0
    return Trigger.GRADIENT if surges else Trigger.INTERVAL


class DemandMonitor:
    """Watches arrivals and ends of requests.

    Everything but the CVs is of the shortest window that has enough arrivals to go by, or that contradicts the longer
    ones, so that it follows fast under load and does not jump about without. The CV that planners go by is of the
    window in the middle: the shortest sees no more of a burst than its inside.

    Args:
        windows_s: lengths, rising.
        prompt_token_work: of a prompt's token, in units of an output token's. The profile tells; it matters only for
            ``service_cv``.

    Raises:
        ConfigError: the windows do not rise.
    """

    def __init__(self, windows_s: Sequence[float] = (15.0, 60.0, 180.0), *, prompt_token_work: float = 0.1) -> None:
        if not windows_s or sorted(set(windows_s)) != list(windows_s) or windows_s[0] <= 0:
            raise ConfigError(f"windows {tuple(windows_s)} must be positive and rise, such as (15, 60, 180) seconds.")
        self._arrivals = [ArrivalWindow(window_s) for window_s in windows_s]
        self._planning = self._arrivals[len(windows_s) // 2 :]
        self._glance = ArrivalWindow(_GLANCE_S)
        self._prompt_tokens = RecentMoments((_GLANCE_S, *windows_s), min_count=_MIN_PROMPTS)
        self._output_tokens = OutputLengths()
        self._prompt_token_work = prompt_token_work
        self._num_arrived = 0
        self._since = -math.inf
        """The rate has changed then."""
        self._num_before = 0
        """Arrivals before that."""
        self._gaps_since = Moments()
        """Between arrivals after that."""
        self._gap_between = Moments()
        """The one from before to after, if it is over."""
        self._last_gaps: deque[float] = deque(maxlen=_MOST_ALIKE)
        self._last_at: float | None = None
        self._stalls = StallDetector(give_up_after_s=windows_s[-1])

    def arrived(self, at: float, *, num_prompt_tokens: int) -> None:
        """A request came. Times of calls never fall."""
        self._num_arrived += 1
        if self._last_at is not None:
            self._last_gaps.append(at - self._last_at)
            self._gaps_since = self._gaps_since.with_value(at - self._last_at)
        self._last_at = at
        for window in (self._glance, *self._arrivals):
            window.add(at)
        self._prompt_tokens.add(at, num_prompt_tokens)

    def generated(self, at: float, *, num_tokens: int, num_before: int) -> None:
        """A request that had ``num_before`` tokens got some more."""
        self._output_tokens.generated(at, num_tokens, num_before=num_before)

    def left(self, *, num_output_tokens: int) -> None:
        """A request failed or was given up with so many tokens."""
        self._output_tokens.left(num_output_tokens)

    def finished(self, at: float, *, num_output_tokens: int, latency_s: float) -> None:
        """A request ended well, ``latency_s`` after it came; its tokens were told of as they came."""
        self._output_tokens.ended(at, num_output_tokens)
        self._stalls.add(at, latency_s)

    def demand(self, at: float, *, num_waiting: int, num_running: int, prefix_hit_share: float = 0.0) -> Demand:
        """As of ``at``. With no request yet all is 0, and a CV that is not known is 1 (Poisson)."""
        cvs = {w: w.gaps(at).cv for w in self._arrivals if w.num_arrivals(at) >= _MIN_ARRIVALS}
        cv = next((self._cv(at, window) for window in self._planning if window in cvs), 1.0)
        prompt = self._prompt_tokens.moments(at)
        output = self._output_tokens.told(at)
        rate = self._rate(at, cv)
        return Demand(
            at=at,
            rate=rate,
            rate_gradient=self._gradient(at),
            cv=cv,
            cv_by_window={f"{w.window_s:g}s": cv for w, cv in cvs.items()},
            prompt_tokens=prompt.mean,
            output_tokens=output.mean,
            service_cv=self._service_cv(prompt, output),
            prefix_hit_share=prefix_hit_share,
            num_waiting=num_waiting,
            num_running=num_running,
            num_arrived=self._num_arrived,
            num_alike=self._num_arrived - self._num_before,
        )

    def _cv(self, at: float, window: ArrivalWindow) -> float:
        """Of the gaps in a window. Where the rate has changed within it, gaps before and since are told by their own
        means: two steady rates are no burst."""
        gaps = window.gaps(at)
        if self._since < window.begin(at):
            return gaps.cv
        return pooled_cv((gaps.without(self._gaps_since).without(self._gap_between), self._gaps_since))

    def _rate(self, at: float, cv: float) -> float:
        """Of the shortest window that is to be believed; where one contradicts the longer ones, what was before is
        forgotten."""
        rate = self._arrivals[-1].rate(at)
        if self._since > self._arrivals[-1].begin(at):
            rate = (self._num_arrived - self._num_before) / covered_s(at, since=self._since)
        for window in (*reversed(self._arrivals[:-1]), self._glance):
            if window.begin(at) < self._since:
                continue
            is_new = window.contradicts(at, rate, cv=cv)
            if is_new:
                self._since, num_alike = window.change(at, rate)
                self._num_before = self._num_arrived - num_alike
                alike = list(self._last_gaps)[-num_alike:] if num_alike else []
                self._gap_between, self._gaps_since = Moments.of(alike[:1]), Moments.of(alike[1:])
                rate = num_alike / covered_s(at, since=self._since)
            elif window is not self._glance and window.num_arrivals(at) >= _MIN_ARRIVALS_OF_RATE:
                rate = window.rate(at)
        return rate

    def _gradient(self, at: float) -> float:
        """Of the shortest window that shows any: a steep rise soon, a slow one when it stands out."""
        gradients = (window.gradient(at, num_deviations=NUM_DEVIATIONS) for window in self._arrivals)
        return next((gradient for gradient in gradients if gradient), 0.0)

    @property
    def is_stalled(self) -> bool:
        """Whether requests take longer than they should (F23), see :class:`StallDetector`."""
        return self._stalls.is_stalled

    @property
    def baseline_latency_s(self) -> float | None:
        """P25 latency of normal operation; None before there are enough requests."""
        return self._stalls.baseline_s

    def _service_cv(self, prompt: Moments, output: Lengths) -> float:
        """Prompt and output lengths taken as independent."""
        prompt_work = prompt.mean * self._prompt_token_work
        work = prompt_work + output.mean
        return math.hypot(prompt.cv * prompt_work, output.cv * output.mean) / work if work > 0 else 0.0
