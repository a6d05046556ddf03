"""How bursty a trace is, and how long its requests are: pure code."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

_MIN_ARRIVALS = 10
"""In a window, for its CV to count."""
_PERCENTILES = (5, 50, 90, 95, 99)

_Floats = npt.NDArray[np.float64]


class WindowStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of the aligned windows of one length."""

    window_s: float
    num_windows: int
    """Those with at least 10 arrivals; the CVs are theirs."""
    cv_median: float
    cv_p90: float
    cv_max: float
    busiest: float
    """Most arrivals of a window, in units of the mean. The last window, which the trace ends in, is left out."""
    count_cv: float
    """CV of the number of arrivals in a window; the last is left out."""


class LengthStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of prompts or outputs, tokens."""

    p5: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: int
    mean: float


class TraceStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one trace. A Poisson process has a CV of gaps of 1."""

    num_requests: int
    span_s: float
    """To the last arrival."""
    rate: float
    """Requests a second."""
    gap_cv: float
    """Of the whole."""
    windows: tuple[WindowStatistics, ...]
    """Without those longer than the span."""
    zero_gap_share: float
    """Of arrivals at the same instant as the one before."""
    prompt_tokens: LengthStatistics
    output_tokens: LengthStatistics


def trace_statistics(
    arrivals_s: Sequence[float],
    num_prompt_tokens: Sequence[int],
    num_output_tokens: Sequence[int],
    *,
    windows_s: Sequence[float] = (15.0, 180.0, 18_000.0),
) -> TraceStatistics:
    """Statistics of at least two requests in order of arrival, the first at 0 s or later.

    A gap belongs to a window where both of its arrivals do. Windows begin at 0 s, one after the other.
    """
    times = np.asarray(arrivals_s, float)
    gaps = np.diff(times)
    span_s = float(times[-1])
    return TraceStatistics(
        num_requests=len(times),
        span_s=span_s,
        rate=len(times) / span_s,
        gap_cv=_cv(gaps),
        windows=tuple(_window_statistics(times, window_s) for window_s in windows_s if window_s <= span_s),
        zero_gap_share=float(np.mean(gaps == 0)),
        prompt_tokens=_length_statistics(num_prompt_tokens),
        output_tokens=_length_statistics(num_output_tokens),
    )


def _window_statistics(times: _Floats, window_s: float) -> WindowStatistics:
    numbers = np.floor(times / window_s).astype(int)
    counts = np.bincount(numbers)
    whole = counts[: int(times[-1] // window_s)].astype(float)
    edges = np.concatenate([[0], np.cumsum(counts)])
    cvs = [_cv(np.diff(times[edges[i] : edges[i + 1]])) for i in range(len(counts)) if counts[i] >= _MIN_ARRIVALS]
    return WindowStatistics(
        window_s=window_s,
        num_windows=len(cvs),
        cv_median=float(np.median(cvs)) if cvs else float("nan"),
        cv_p90=float(np.percentile(cvs, 90)) if cvs else float("nan"),
        cv_max=max(cvs, default=float("nan")),
        busiest=float(whole.max() / whole.mean()),
        count_cv=_cv(whole),
    )


def _length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    p5, p50, p90, p95, p99 = (float(value) for value in np.percentile(lengths, _PERCENTILES))
    return LengthStatistics(
        p5=p5, p50=p50, p90=p90, p95=p95, p99=p99, max=int(max(lengths)), mean=float(np.mean(lengths))
    )


def _cv(values: _Floats) -> float:
    mean = float(np.mean(values))
    return float(np.std(values)) / mean if mean > 0 else 0.0
