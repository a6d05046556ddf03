"""What the profile leaves out, learnt from the steps that a pipeline makes: pure code.

The profile is measured on an idle machine, at some hour. Under load clients, proxy and Router take turns with the
stages on the same cores, short steps suffer more of it than long ones, and a machine's speed is not the same every
day. So computing is corrected by a factor that may depend on the size of the step, and so are messages. Whatever the
factors are, they hold for all of a step, so that no cut and no candidate is favoured by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from flexpipe_serve.planner.memory import slices_of
from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape
from flexpipe_serve.planner.types import Calibration, Split

_NUM_KINDS = 14
"""Steps of about 1, 2, 4, ... 8192 tokens are of a kind each; larger ones are of the last."""
_LEVEL = 0.4
"""Belief about a factor's logarithm: the deviation of what all kinds of steps have in common ..."""
_SHAPE = 0.2
"""... of what each has beside that, ..."""
_REACH = 3.0
"""... and over how many kinds that is much the same."""
_NOISE = 0.8
"""Deviation of the logarithm that a single step tells. Steps vary by less, yet those of one moment vary together."""
_MODEL_ERROR = 0.05
"""The same of any number of steps of a kind: they differ in more than their size."""
_MEMORY = 50.0
"""Steps of its kind that one counts among, ..."""
_FADING = 1000.0
"""... and steps of any kind after which it is as good as forgotten."""
_MOST = 3.0
"""A step that took more times what was expected, or less, was disturbed and counts as if it had taken so many times."""
_MOVED = 0.04
"""By which the computing of some steps must have changed before predictions do: candidates are kept meanwhile."""
_MESSAGES_MOVED = 0.2
"""The same of messages, which vary more and are less of a step."""


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that the pipeline made."""

    shape: StepShape
    compute_s: float
    """The stages' computing, added up."""
    outside_s: float | None = None
    """What it took beside that: the Router's part and all messages. None where other steps were in flight."""


class StepCalibration:
    """Compares steps with what the profile says of them. One model; splits may change meanwhile."""

    _calibrated: ModelProfile
    _applied: Calibration
    _num_steps: int
    _compute: _Factors
    _messages: _Factors

    def __init__(self) -> None:
        self._profile: ModelProfile | None = None
        self._forget()

    @property
    def applied(self) -> Calibration:
        """What the profile is corrected by at present."""
        return self._applied

    def note(self, profile: ModelProfile, split: Split, steps: Iterable[MeasuredStep]) -> None:
        """Steps that a pipeline of ``split`` made, the first of its pipelines if it has several.

        Args:
            profile: as measured.
        """
        self._begin(profile)
        devices = split.devices[: split.num_stages]
        slices = slices_of(split.boundaries, profile.num_layers)
        messages_s = len(slices) * profile.hop_s + profile.step_s
        for step in steps:
            compute_s = sum(
                profile.stage_seconds(start, stop, step.shape, speed=device.speed)
                for device, (start, stop) in zip(devices, slices, strict=True)
            )
            self._compute.note(step.shape.num_tokens, compute_s, step.compute_s)
            if step.outside_s is not None:
                self._messages.note(step.shape.num_samples, messages_s, step.outside_s)
            self._num_steps += 1
        self._compute.solve()
        self._messages.solve()

    def calibrated(self, profile: ModelProfile) -> ModelProfile:
        """The profile with the corrections; the same object until they have moved."""
        self._begin(profile)
        if self._compute.moved > _MOVED or self._messages.moved > _MESSAGES_MOVED:
            compute, messages = self._compute.tell(), self._messages.tell()
            self._applied = Calibration(compute=compute, messages=messages, num_steps=self._num_steps)
            self._calibrated = apply(self._applied, profile)
        return self._calibrated

    def _begin(self, profile: ModelProfile) -> None:
        if profile is not self._profile:
            self._profile = self._calibrated = profile
            self._forget()

    def _forget(self) -> None:
        self._applied, self._num_steps = Calibration(), 0
        self._compute, self._messages = _Factors(), _Factors()


def apply(calibration: Calibration, profile: ModelProfile) -> ModelProfile:
    """The profile of a pipeline under such conditions.

    Args:
        profile: as measured.
    """
    return msgspec.structs.replace(profile, compute_factor=calibration.compute, message_factor=calibration.messages)


def _covariance() -> npt.NDArray[np.float64]:
    kinds = np.arange(_NUM_KINDS)
    distance = np.abs(kinds[:, None] - kinds)
    covariance: npt.NDArray[np.float64] = _LEVEL**2 + _SHAPE**2 * np.exp(-distance / _REACH)
    return covariance


class _Factors:
    """How many times longer than expected steps take, by kind: Gaussian process regression over the logarithms.

    Each kind has the mean of its latest steps. The fewer and older they are, the more is taken from its neighbours, and
    where there is nothing from the belief that the profile is right.
    """

    _BELIEF = _covariance()

    def __init__(self) -> None:
        self._weights = np.zeros(_NUM_KINDS)
        self._expected_s = np.zeros(_NUM_KINDS)
        self._seen_s = np.zeros(_NUM_KINDS)
        self._logs = np.zeros(_NUM_KINDS)
        self._told = np.zeros(_NUM_KINDS)

    def note(self, count: float, expected_s: float, seen_s: float) -> None:
        """A step of ``count`` tokens or samples."""
        kind = min(_NUM_KINDS - 1, round(math.log2(max(1.0, count))))
        likely_s = expected_s * math.exp(self._logs[kind])
        seen_s = min(max(seen_s, likely_s / _MOST), likely_s * _MOST)
        self._weights *= 1 - 1 / _FADING
        weight = self._weights[kind] = min(self._weights[kind] + 1, _MEMORY)
        self._expected_s[kind] += (expected_s - self._expected_s[kind]) / weight
        self._seen_s[kind] += (seen_s - self._seen_s[kind]) / weight

    def solve(self) -> None:
        """Take in what was noted."""
        seen = np.flatnonzero(self._weights)
        if not len(seen):
            return
        errors = np.diag(_NOISE**2 / self._weights[seen] + _MODEL_ERROR**2)
        logs = np.log(self._seen_s[seen] / self._expected_s[seen])
        covariance = self._BELIEF[np.ix_(seen, seen)]
        self._logs = self._BELIEF[:, seen] @ np.linalg.solve(covariance + errors, logs)

    @property
    def moved(self) -> float:
        """By which the factor of some kind differs from what was told last, as a logarithm."""
        return float(np.abs(self._logs - self._told).max())

    def tell(self) -> Curve:
        """The factors."""
        self._told = self._logs
        return _curve(np.exp(self._logs))


def _curve(factors: npt.NDArray[np.float64]) -> Curve:
    """Level behind the last kind."""
    counts = tuple(2.0**kind for kind in range(_NUM_KINDS + 1))
    values = tuple(round(float(factor), 4) for factor in factors)
    return Curve(counts=counts, seconds=(*values, values[-1]))
