"""From measured steps to the times of a profile: a fit that is linear in everything it looks for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape

_Column = npt.NDArray[np.float64]
_MAX_ROUNDS = 10
_TOLERANCE = 1e-10


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
    of the relative errors, with no time below zero, and none that falls with more tokens or samples: what seems so was
    disturbed.

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
            work[:, None] * _rises(layer_points, tokens),
            firsts[:, None] * _rises(embedding_points, tokens),
            lasts[:, None] * _rises(head_points, samples),
        ]
    )
    seconds = np.array([step.seconds for step in steps])
    found = _non_negative_least_squares(columns / seconds[:, None], np.ones(len(steps)))
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


def _rises(points: _Column, at: _Column) -> _Column:
    """Weights [len(at), len(points)] in ``Curve.at`` of the first point's seconds, and of what each later point has
    more than the one before."""
    if len(points) == 1:
        return np.ones((len(at), 1))
    right = np.clip(np.searchsorted(points, at, side="right"), 1, len(points) - 1)
    share = np.maximum((at - points[right - 1]) / (points[right] - points[right - 1]), 0.0)
    weights = np.zeros((len(at), len(points)))
    rows = np.arange(len(at))
    weights[rows, right - 1] = 1.0 - share
    weights[rows, right] = share
    rises: _Column = weights @ np.tri(len(points))
    return rises


def _non_negative_least_squares(columns: _Column, target: _Column) -> _Column:
    """Lawson and Hanson's method: the least squares solution of those that are nowhere negative."""
    # All of similar size, or the smallest would be taken for noise.
    scale = np.maximum(np.abs(columns).max(axis=0), np.finfo(float).tiny)
    columns = columns / scale
    found = np.zeros(columns.shape[1])
    used = np.zeros(columns.shape[1], bool)
    for _ in range(_MAX_ROUNDS * columns.shape[1]):
        gain = np.where(used, 0.0, columns.T @ (target - columns @ found))
        if gain.max() <= _TOLERANCE:
            break
        used[gain.argmax()] = True
        while True:
            free = np.zeros_like(found)
            free[used] = np.linalg.lstsq(columns[:, used], target, rcond=None)[0]
            below = used & (free <= 0)
            if not below.any():
                break
            # As far as the first of them comes to zero, which leaves that one out.
            part = (found[below] / (found[below] - free[below])).min()
            found = found + part * (free - found)
            used &= found > _TOLERANCE
            found[~used] = 0.0
        found = free
    times: _Column = found / scale
    return times


def _curve(points: _Column, rises: _Column) -> Curve:
    return Curve(counts=tuple(points.tolist()), seconds=tuple(np.cumsum(rises).tolist()))
