"""One refactoring as the client and the server saw it, and what follows from both: pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt

from flexpipe_serve.bench.memory import Sample, peak_extra_bytes
from flexpipe_serve.bench.summary import Quantiles
from flexpipe_serve.bench.tour import Step
from flexpipe_serve.bench.windows import TokenTimes, Window, ratio, split
from flexpipe_serve.refactor.record import Outcome, RefactorRecord


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured refactoring. Times are of the client's clock.

    Args:
        domain: where the layers' KV lives: ``shared``, ``private``, or ``url`` for a server that was there.
        mode: of the refactoring.
        round: which repetition.
        step: the layouts.
        record: the server's.
        window: from when the server began to the end.
        asked_s: when the request was sent.
        requested_s: when the server began to count.
        before: at rest on the old layout.
        after: at rest on the new one.
    """

    domain: str
    mode: str
    round: int
    step: Step
    record: RefactorRecord
    window: Window
    asked_s: float
    before: Window
    after: Window

    @property
    def requested_s(self) -> float:
        """When the server began."""
        return self.window.start_s

    @property
    def switched_s(self) -> float | None:
        """When the new layout began to be used; None where it never was."""
        if self.record.switched_at is None:
            return None
        return self.requested_s + self.record.switched_at - self.record.requested_at

    @property
    def is_done(self) -> bool:
        """Whether it came to the end that was asked for."""
        return self.record.outcome is Outcome.DONE


def refactoring_window(record: RefactorRecord, *, asked_s: float, answered_s: float, clock_offset_s: float) -> Window:
    """The refactoring's window on the client's clock.

    The request was received between being sent and being answered; so a server whose clock differs from ours is
    mistaken by no more than that.

    Args:
        record: of a refactoring that is over.
        asked_s: client's clock before the request.
        answered_s: client's clock after its answer.
        clock_offset_s: Unix time minus the client's clock.
    """
    requested_s = min(max(record.requested_at - clock_offset_s, asked_s), answered_s)
    return Window(requested_s, requested_s + record.seconds)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one refactoring cost, or several pooled.

    Args:
        num: refactorings.
        num_done: those that came to the end asked for.
        gaps_ms: of all streams, in the refactorings' windows.
        idle_gaps_ms: at rest; of the old and the new layout so many as there are gaps before and behind the switch, so
            that two layouts of different speed, or long windows and short ones, do not make a difference by themselves.
        p50_ratio: of the gaps to those at rest.
        p99_ratio: likewise.
        max_ratio: likewise.
        seconds: of the windows, summed.
        num_tokens: that came in the windows.
        expected_tokens: that would have come at the rates at rest.
        loss: share of the expected ones that did not come.
    """

    num: int
    num_done: int
    gaps_ms: Quantiles
    idle_gaps_ms: Quantiles
    p50_ratio: float | None
    p99_ratio: float | None
    max_ratio: float | None
    seconds: float
    num_tokens: int
    expected_tokens: float
    loss: float | None


def assess(trials: Sequence[Trial], times: TokenTimes) -> Figures:
    """Figures of some trials, gaps and tokens pooled."""
    gaps = np.concatenate([np.empty(0), *(times.gaps_touching(trial.window) for trial in trials)])
    gaps_ms = Quantiles.of_weighted(gaps, np.ones(len(gaps)))
    idle_ms = _gaps_at_rest(trials, times)
    num_tokens = sum(times.count(trial.window) for trial in trials)
    expected = sum(_expected_tokens(trial, times) for trial in trials)
    return Figures(
        num=len(trials),
        num_done=sum(trial.is_done for trial in trials),
        gaps_ms=gaps_ms,
        idle_gaps_ms=idle_ms,
        p50_ratio=ratio(gaps_ms.p50, idle_ms.p50),
        p99_ratio=ratio(gaps_ms.p99, idle_ms.p99),
        max_ratio=ratio(gaps_ms.max, idle_ms.max),
        seconds=sum(trial.window.seconds for trial in trials),
        num_tokens=num_tokens,
        expected_tokens=expected,
        loss=1 - num_tokens / expected if expected else None,
    )


def at_rest(trials: Sequence[Trial]) -> list[Trial]:
    """As many trials as there are windows at rest, in which nothing happens: the middle of such a window against its
    first and last quarter. What they show is how far the figures go up and down by themselves."""
    quiet = []
    rests = {window: each for each in trials for window in (each.before, each.after)}
    for rest, trial in rests.items():
        first, middle, last = (rest.start_s + share * rest.seconds for share in (0.25, 0.5, 0.75))
        record = msgspec.structs.replace(trial.record, requested_at=first, switched_at=middle)
        quiet.append(
            replace(
                trial,
                record=record,
                window=Window(first, last),
                before=Window(rest.start_s, first),
                after=Window(last, rest.end_s),
            )
        )
    return quiet


def _gaps_at_rest(trials: Sequence[Trial], times: TokenTimes) -> Quantiles:
    gaps: dict[Window, npt.NDArray[np.float64]] = {}
    weights: dict[Window, float] = {}
    for trial in trials:
        for rest in (trial.before, trial.after):
            gaps.setdefault(rest, times.gaps_within(rest))
            weights.setdefault(rest, 0.0)
        num_old, num_new = _num_gaps(trial, times)
        for rest, num, other in ((trial.before, num_old, trial.after), (trial.after, num_new, trial.before)):
            weights[rest if len(gaps[rest]) else other] += num
    each = [np.full(len(gaps[rest]), weights[rest] / max(1, len(gaps[rest]))) for rest in gaps]
    return Quantiles.of_weighted(np.concatenate([np.empty(0), *gaps.values()]), np.concatenate([np.empty(0), *each]))


def _num_gaps(trial: Trial, times: TokenTimes) -> tuple[int, int]:
    """Gaps of the window that are to be like those before and like those after: they end before or behind the switch.
    Without a switch both are of the one layout, and count as many as they are."""
    num = len(times.gaps_touching(trial.window))
    if trial.switched_s is None:
        num_before, num_after = (len(times.gaps_within(rest)) for rest in (trial.before, trial.after))
        num_old = round(num * num_before / max(1, num_before + num_after))
    else:
        num_old = times.num_touching(trial.window, until_s=trial.switched_s)
    return num_old, num - num_old


def _expected_tokens(trial: Trial, times: TokenTimes) -> float:
    """Tokens that the window would have brought at the rates at rest: the old layout's up to the switch, then the new
    one's; the old one's alone where there was no switch."""
    old, new = split(trial.window, trial.switched_s)
    return times.rate([trial.before]) * times.seconds(old) + times.rate([trial.after]) * times.seconds(new)


def extra_memory(trial: Trial, samples: Iterable[Sample]) -> int | None:
    """Bytes above those before, at the peak of the refactoring; None where nobody looked."""
    return peak_extra_bytes(samples, before=trial.before, during=trial.window)
