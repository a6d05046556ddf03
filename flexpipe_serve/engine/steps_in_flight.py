"""The steps that were sent and not answered, of all epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexpipe_serve.pipeline.messages import FailureHeader, ResultHeader, StepBatch


@dataclass(frozen=True)
class SentStep:
    """A step on its way."""

    batch: StepBatch
    time: float
    """When it was sent."""
    begun_at: float | None
    """When the Router began its part of it; None where other steps were in flight."""


class StepsInFlight:
    """By number. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._sent: dict[int, SentStep] = {}
        self._last_sent: dict[int, int] = {}
        """By epoch."""
        self._last_taken: dict[int, int] = {}
        """By epoch: the steps of one end in the order sent."""

    def __len__(self) -> int:
        return len(self._sent)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sent)

    def num_of(self, epoch: int) -> int:
        """How many are of ``epoch``."""
        return sum(sent.batch.header.epoch == epoch for sent in self._sent.values())

    def last_sent(self, epoch: int) -> int:
        """The newest step sent in an epoch; 0: none."""
        return self._last_sent.get(epoch, 0)

    def last_taken(self, epoch: int) -> int:
        """The newest step of an epoch whose result was taken; 0: none."""
        return self._last_taken.get(epoch, 0)

    def add(self, sent: SentStep) -> None:
        """A step is being sent."""
        header = sent.batch.header
        self._sent[header.step] = sent
        self._last_sent[header.epoch] = header.step

    def take(self, header: ResultHeader | FailureHeader) -> SentStep | None:
        """An answer has come. The step, now out of flight; None for a void one."""
        sent = self._sent.get(header.step)
        if sent is None or sent.batch.header.epoch != header.epoch:
            return None
        del self._sent[header.step]
        self._last_taken[header.epoch] = header.step
        return sent

    def void(self) -> None:
        """Answers to those in flight count no more."""
        self._sent.clear()

    def forget_old_epochs(self) -> None:
        """Of the newest and last steps keep only those of the newest epoch."""
        for steps in (self._last_sent, self._last_taken):
            for epoch in sorted(steps)[:-1]:
                del steps[epoch]
