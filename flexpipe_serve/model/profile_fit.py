"""From measured steps to the times of a profile: a fit that is linear in everything it looks for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape

_Column = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """What a stage took for a step."""

    start: int
    stop: int
    """Its layers."""
    is_first: bool
    """With the embedding."""
    is_last: bool
    """With head and sampling."""
    shape: StepShape
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The part of a ModelProfile that is fitted; see there."""

    layer: Curve
    context_token_s: float
    pair_s: float
    embedding: Curve
    head: Curve
    stage_s: float


@dataclass(frozen=True, kw_only=True)
class FitError:
    """How far predictions are from measured steps, relative to these."""

    num_steps: int
    mean: float
    """Of the absolutes."""
    max: float


def fit_times(steps: Sequence[MeasuredStep], *, layer_scale: Sequence[float]) -> StepTimes:
    """The times that come nearest to the measured steps, as ``ModelProfile.stage_seconds`` adds them up: least squares
    of the relative errors, with no time below zero.

    Every count of tokens (with layers, with an embedding) or of samples (with a head) that occurs becomes a point of
    the curve.

    Args:
        steps: some with layers, with an embedding alone, with a head alone, and with nothing.
        layer_scale: of each layer.
    """
    work = np.array([sum(layer_scale[step.start : step.stop]) for step in steps])
    firsts = np.array([step.is_first for step in steps], float)
    lasts = np.array([step.is_last for step in steps], float)
    tokens = np.array([step.shape.num_tokens for step in steps], float)
    samples = np.array([step.shape.num_samples for step in steps], float)
    context = np.array([step.shape.num_context_tokens for step in steps], float)
    pairs = np.array([step.shape.num_pairs for step in steps], float)

    layer_points = np.unique(tokens[work > 0])
    embedding_points = np.unique(tokens[firsts > 0])
    head_points = np.unique(samples[lasts > 0])
    columns = np.column_stack(
        [
            np.ones(len(steps)),
            work * context,
            work * pairs,
            work[:, None] * _hats(layer_points, tokens),
            firsts[:, None] * _hats(embedding_points, tokens),
            lasts[:, None] * _hats(head_points, samples),
        ]
    )
    found = _least_squares(columns, np.array([step.seconds for step in steps]))
    ends = 3 + np.cumsum([len(layer_points), len(embedding_points)])
    layer, embedding, head = np.split(found[3:], ends - 3)
    return StepTimes(
        layer=_curve(layer_points, layer),
        context_token_s=float(found[1]),
        pair_s=float(found[2]),
        embedding=_curve(embedding_points, embedding),
        head=_curve(head_points, head),
        stage_s=float(found[0]),
    )


def fit_error(profile: ModelProfile, steps: Sequence[MeasuredStep]) -> FitError:
    """The error on steps that were not fitted.

    Args:
        profile: of a model whose first layer has the embedding and whose last one has the head, as in ``steps``.
        steps: at least one.
    """
    errors = [abs(profile.stage_seconds(step.start, step.stop, step.shape) / step.seconds - 1.0) for step in steps]
    return FitError(num_steps=len(steps), mean=float(np.mean(errors)), max=max(errors))


def _hats(points: _Column, at: _Column) -> _Column:
    """Weights [len(at), len(points)] of the points in ``Curve.at``: of the two around, of the last two beyond."""
    if len(points) == 1:
        return np.ones((len(at), 1))
    right = np.clip(np.searchsorted(points, at, side="right"), 1, len(points) - 1)
    share = np.maximum((at - points[right - 1]) / (points[right] - points[right - 1]), 0.0)
    weights = np.zeros((len(at), len(points)))
    rows = np.arange(len(at))
    weights[rows, right - 1] = 1.0 - share
    weights[rows, right] = share
    return weights


def _least_squares(columns: _Column, seconds: _Column) -> _Column:
    """Non-negative; what would be negative is left out, until nothing is."""
    relative = columns / seconds[:, None]
    # All of similar size, or the smallest would be taken for noise.
    scale = np.maximum(np.abs(relative).max(axis=0), np.finfo(float).tiny)
    relative /= scale
    active = np.ones(columns.shape[1], bool)
    while True:
        found = np.zeros(columns.shape[1])
        found[active] = np.linalg.lstsq(relative[:, active], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            times: _Column = found / scale
            return times
        active &= found >= 0


def _curve(points: _Column, seconds: _Column) -> Curve:
    return Curve(counts=tuple(points.tolist()), seconds=tuple(seconds.tolist()))
