"""The latest steps of a pipeline, for the planner to learn from what they took."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

from flexpipe_serve.pipeline.messages import ResultHeader, StepBatch
from flexpipe_serve.planner.calibration import MeasuredStep
from flexpipe_serve.planner.profile import StepShape

_MOST = 32
"""Kept of steps of about the same size: many short ones do not push out what few long ones tell."""


class _Sample(NamedTuple):
    batch: StepBatch
    header: ResultHeader
    outside_s: float | None


class StepSamples:
    """Noted by the engine thread, taken by another one."""

    def __init__(self) -> None:
        self._samples = _no_samples()

    def note(self, batch: StepBatch, header: ResultHeader, *, seconds: float | None) -> None:
        """A step is through.

        Args:
            seconds: what it took in all, with the Router's part; None where other steps were in flight.
        """
        if header.held_seconds or batch.header.copies:
            return  # it waited for a refactoring
        outside_s = None if seconds is None else max(0.0, seconds - sum(header.stage_seconds))
        self._samples[batch.header.num_tokens.bit_length()].append(_Sample(batch, header, outside_s))

    def take(self, *, epoch: int) -> list[MeasuredStep]:
        """Those of ``epoch`` since the last call, in the order made; the others are forgotten."""
        taken, self._samples = self._samples, _no_samples()
        # Copies, as the engine thread may still be noting one.
        samples = sorted((s for kind in list(taken.values()) for s in list(kind)), key=lambda s: s.header.step)
        return [
            MeasuredStep(shape=step_shape(s.batch), compute_s=sum(s.header.stage_seconds), outside_s=s.outside_s)
            for s in samples
            if s.header.epoch == epoch
        ]


def _no_samples() -> defaultdict[int, deque[_Sample]]:
    return defaultdict(lambda: deque(maxlen=_MOST))


def step_shape(batch: StepBatch) -> StepShape:
    """What of a step its time depends on."""
    new = batch.num_new.astype(float)
    computed = batch.num_computed.astype(float)
    decodes = batch.num_new == 1
    chunks = ~decodes
    return StepShape(
        num_tokens=float(new.sum()),
        num_samples=len(batch.header.samples),
        num_context_tokens=float((computed + 1)[decodes].sum()),
        num_pairs=float((new * computed + new * (new + 1) / 2)[chunks].sum()),
    )
