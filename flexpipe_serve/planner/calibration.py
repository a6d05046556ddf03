"""What the profile leaves out, learnt from the steps that a pipeline makes: pure code.

The profile is measured on an idle machine. Under load clients, proxy and Router take turns with the stages on the same
cores, and stages wake each other up later. What is learnt goes into the profile, and so into every candidate's
prediction alike: what belongs to a message is paid for each message, what belongs to a stage for each stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from flexpipe_serve.planner.memory import slices_of
from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape
from flexpipe_serve.planner.types import Calibration, Split

_KEPT = 0.995
"""Of the weight of what was seen, at each further step: the last 200 count."""
_NOISE = 0.15
"""Of a step's time, by which it varies for no reason."""
_MOST = 2.0
"""A step that took more times what was expected, or less, was disturbed and counts as if it had taken so many times."""
_MOVED = 0.04
"""Of a step's time, by which predictions must have moved before they are made anew: candidates are kept meanwhile."""


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that the pipeline made."""

    shape: StepShape
    compute_s: float
    """The stages' computing, added up."""
    outside_s: float | None = None
    """What it took beside that: the Router's part and all messages. None where other steps were in flight."""


class StepCalibration:
    """Compares steps with what the profile says of them. One model; splits may change meanwhile."""

    def __init__(self) -> None:
        self._profile: ModelProfile | None = None
        self._calibrated: ModelProfile | None = None
        self._applied = Calibration()
        self._num_steps = 0

    @property
    def applied(self) -> Calibration:
        """What the profile is corrected by at present."""
        return self._applied

    def note(self, profile: ModelProfile, split: Split, steps: Sequence[MeasuredStep]) -> None:
        """Steps that a pipeline of ``split`` made.

        Args:
            profile: as measured.
        """
        if profile is not self._profile:
            self._begin(profile)
        devices = split.devices[: split.num_stages]
        slices = slices_of(split.boundaries, profile.num_layers)
        per_stage_s = sum(1 / device.speed for device in devices) * self._stage_unit_s
        per_sample_s = self._sample_unit_s / devices[-1].speed
        for step in steps:
            compute_s = sum(
                profile.stage_seconds(start, stop, step.shape, speed=device.speed)
                for device, (start, stop) in zip(devices, slices, strict=True)
            )
            self._compute.note((compute_s, per_stage_s, per_sample_s * step.shape.num_samples), step.compute_s)
            if step.outside_s is not None:
                self._outside.note((len(slices) * profile.hop_s, profile.step_s), step.outside_s)
        self._num_steps += len(steps)

    def calibrated(self, profile: ModelProfile) -> ModelProfile:
        """The profile with the corrections; the same object until they have moved."""
        if profile is not self._profile:
            self._begin(profile)
        found = self._found()
        if self._calibrated is None or self._has_moved(found):
            self._applied = found
            self._calibrated = apply(found, profile)
        return self._calibrated

    def _begin(self, profile: ModelProfile) -> None:
        self._profile, self._calibrated, self._num_steps = profile, None, 0
        # The belief is of this size; a share of what a step takes beside its layers.
        self._stage_unit_s = profile.stage_s + profile.hop_s + 1e-9
        self._sample_unit_s = profile.step_s / 2 + 1e-9
        self._compute = _Fit(means=(1.0, 0.0, 0.0), deviations=(1.0, 1.0, 1.0))
        self._outside = _Fit(means=(1.0, 1.0), deviations=(3.0, 3.0))

    def _found(self) -> Calibration:
        compute, per_stage, per_sample = (float(factor) for factor in self._compute.factors)
        hop, router = (float(factor) for factor in self._outside.factors)
        return Calibration(
            compute=compute,
            stage_s=per_stage * self._stage_unit_s,
            sample_s=per_sample * self._sample_unit_s,
            hop=hop,
            router=router,
            num_steps=self._num_steps,
        )

    def _has_moved(self, found: Calibration) -> bool:
        old = self._applied
        compute_s, stages, samples = self._compute.mean_parts / (1.0, self._stage_unit_s, self._sample_unit_s)
        hops_s, router_s = self._outside.mean_parts
        moved_s = (
            abs(found.compute - old.compute) * compute_s
            + abs(found.stage_s - old.stage_s) * stages
            + abs(found.sample_s - old.sample_s) * samples
            + abs(found.hop - old.hop) * hops_s
            + abs(found.router - old.router) * router_s
        )
        return bool(moved_s > _MOVED * (old.compute * compute_s + old.hop * hops_s + old.router * router_s))


def apply(calibration: Calibration, profile: ModelProfile) -> ModelProfile:
    """The profile of a pipeline under such conditions."""
    factor = calibration.compute
    return msgspec.structs.replace(
        profile,
        layer=_scaled(profile.layer, factor),
        context_token_s=profile.context_token_s * factor,
        pair_s=profile.pair_s * factor,
        embedding=_scaled(profile.embedding, factor),
        head=_scaled(profile.head, factor, slope_s=calibration.sample_s),
        stage_s=profile.stage_s * factor + calibration.stage_s,
        hop_s=profile.hop_s * calibration.hop,
        step_s=profile.step_s * calibration.router,
    )


def _scaled(curve: Curve, factor: float, *, slope_s: float = 0.0) -> Curve:
    counts = curve.counts
    if slope_s and len(counts) == 1:
        counts = (counts[0], counts[0] + 1)
    return Curve(counts=counts, seconds=tuple(factor * curve.at(count) + slope_s * count for count in counts))


class _Fit:
    """Factors of the parts that a time is made of, by least squares over relative times with older ones counting less
    and less. It starts from a belief, which is left where steps say otherwise; what they cannot tell apart goes where
    the belief allows most. No factor is negative.

    Args:
        means: of the belief.
        deviations: of the belief.
    """

    factors: npt.NDArray[np.float64]
    mean_parts: npt.NDArray[np.float64]
    """Seconds, over the steps seen."""

    def __init__(self, *, means: Sequence[float], deviations: Sequence[float]) -> None:
        self._means = np.array(means)
        self._squares = self._belief = np.diag(1 / np.square(deviations))
        self._products = self._belief @ self._means
        self._weight = 0.0
        self.factors = self._means
        self.mean_parts = np.zeros(len(means))

    def note(self, parts: Sequence[float], seconds: float) -> None:
        """A time, and its parts in seconds, to be multiplied by the factors."""
        row = np.array(parts)
        believed_s = float(row @ self._means)
        if believed_s <= 0:
            return
        self._weight = _KEPT * self._weight + 1
        self.mean_parts = self.mean_parts + (row - self.mean_parts) / self._weight
        row /= believed_s
        expected = float(row @ self.factors)
        seen = min(max(seconds / believed_s, expected / _MOST), expected * _MOST)
        # What is forgotten goes back to the belief.
        self._squares = _KEPT * self._squares + (1 - _KEPT) * self._belief + np.outer(row, row) / _NOISE**2
        self._products = _KEPT * self._products + (1 - _KEPT) * (self._belief @ self._means) + row * (seen / _NOISE**2)
        self.factors = self._solve()

    def _solve(self) -> npt.NDArray[np.float64]:
        kept = np.arange(len(self._means))
        while True:
            factors = np.zeros(len(self._means))
            factors[kept] = np.linalg.solve(self._squares[np.ix_(kept, kept)], self._products[kept])
            if (factors >= 0).all():
                return factors
            kept = kept[factors[kept] > 0]
