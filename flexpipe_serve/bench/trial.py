"""One refactoring as the client and the server saw it, and what follows from both: pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flexpipe_serve.bench.memory import Sample, peak_extra_bytes
from flexpipe_serve.bench.summary import Quantiles
from flexpipe_serve.bench.tour import Step
from flexpipe_serve.bench.windows import TokenTimes, Window, expected_tokens, ratio
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
        idle_gaps_ms: at rest, on the old and the new layouts together.
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
    """Figures of some trials, gaps and tokens pooled. A window at rest between two trials counts once."""
    gaps = [times.gaps_touching(trial.window) for trial in trials]
    rest = sorted({window for trial in trials for window in (trial.before, trial.after)})
    idle = [times.gaps_within(window) for window in rest]
    gaps_ms = Quantiles.of_seconds(np.concatenate([np.empty(0), *gaps]))
    idle_ms = Quantiles.of_seconds(np.concatenate([np.empty(0), *idle]))
    num_tokens = sum(times.count(trial.window) for trial in trials)
    expected = sum(
        expected_tokens(
            trial.window,
            switched_s=trial.switched_s,
            rate_before=times.rate([trial.before]),
            rate_after=times.rate([trial.after]),
        )
        for trial in trials
    )
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


def extra_memory(trial: Trial, samples: Iterable[Sample]) -> int | None:
    """Bytes above those before, at the peak of the refactoring; None where nobody looked."""
    return peak_extra_bytes(samples, before=trial.before, during=trial.window)
