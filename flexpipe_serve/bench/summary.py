"""Latency and throughput figures of recorded waves: pure."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpipe_serve.bench.wave import RequestRecord, Wave


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of some durations, in milliseconds; all ``None`` where there were none."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of_seconds(cls, durations_s: Iterable[float]) -> "Quantiles":
        """Linearly interpolated quantiles, as NumPy's default."""
        ms = np.fromiter(durations_s, dtype=np.float64) * 1e3
        if ms.size == 0:
            return cls(0, None, None, None, None, None)
        p50, p90, p99 = (float(q) for q in np.quantile(ms, (0.5, 0.9, 0.99)))
        return cls(int(ms.size), float(ms.mean()), p50, p90, p99, float(ms.max()))

    @classmethod
    def of_weighted(cls, durations_s: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> "Quantiles":
        """Likewise, where each stands for ``weights`` of its kind; those of weight 0 count for nothing."""
        is_some = weights > 0
        ms, weights = durations_s[is_some] * 1e3, weights[is_some]
        if ms.size == 0:
            return cls(0, None, None, None, None, None)
        order = np.argsort(ms)
        ms, weights = ms[order], weights[order]
        places = (np.cumsum(weights) - weights / 2) / weights.sum()
        p50, p90, p99 = (float(q) for q in np.interp((0.5, 0.9, 0.99), places, ms))
        return cls(int(ms.size), float(np.average(ms, weights=weights)), p50, p90, p99, float(ms[-1]))


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one wave, or of several of one target pooled.

    Args:
        num_requests: sent, failed ones included.
        num_errors: failed.
        errors: reason and how often, most frequent first.
        num_output_tokens: delivered by the requests that succeeded; only these count in every figure below.
        num_short: requests that ended before the tokens asked for (the server stopped at an end token).
        num_wrong_prompts: requests whose prompt the server counted differently than asked for.
        duration_s: from the first request's start to the last one's end; summed over waves.
        output_tokens_per_s: throughput over that duration.
        requests_per_s: completed requests over that duration.
        ttft_ms: start to first piece of text.
        tpot_ms: of each request with at least two tokens, (last - first) / (tokens - 1).
        gap_ms: between successive pieces of text, over all requests.
        e2e_ms: start to the last byte.
        send_lag_ms: how late the client was in sending; large values mean the client, not the server, was the limit.
        client_cpu_us_per_token: CPU the client used.
    """

    num_requests: int
    num_errors: int
    errors: dict[str, int]
    num_output_tokens: int
    num_short: int
    num_wrong_prompts: int
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    gap_ms: Quantiles
    e2e_ms: Quantiles
    send_lag_ms: Quantiles
    client_cpu_us_per_token: float | None


def summarize(waves: Sequence[Wave]) -> Summary:
    """Figures over all requests of some waves of one target. ``waves`` holds at least one request."""
    requests = [request for wave in waves for request in wave.requests]
    good = [request for request in requests if request.error is None]
    num_tokens = sum(request.num_output_tokens for request in good)
    duration_s = sum(_duration_s(wave.requests) for wave in waves)
    return Summary(
        num_requests=len(requests),
        num_errors=len(requests) - len(good),
        errors=dict(Counter(request.error for request in requests if request.error is not None).most_common()),
        num_output_tokens=num_tokens,
        num_short=sum(request.finish_reason == "stop" for request in good),
        num_wrong_prompts=sum(
            request.server_prompt_tokens not in (None, request.num_prompt_tokens) for request in good
        ),
        duration_s=duration_s,
        output_tokens_per_s=num_tokens / duration_s,
        requests_per_s=len(good) / duration_s,
        ttft_ms=Quantiles.of_seconds(ttft_s(request) for request in good),
        tpot_ms=Quantiles.of_seconds(tpot for request in good if (tpot := tpot_s(request)) is not None),
        gap_ms=Quantiles.of_seconds(gap for request in good for gap in gaps_s(request)),
        e2e_ms=Quantiles.of_seconds(request.end_s - request.start_s for request in good),
        send_lag_ms=Quantiles.of_seconds(request.sent_s - request.start_s for request in requests),
        client_cpu_us_per_token=sum(wave.client_cpu_s for wave in waves) / num_tokens * 1e6 if num_tokens else None,
    )


def ttft_s(request: RequestRecord) -> float:
    """Time to first token of a successful request."""
    return request.token_times_s[0] - request.start_s


def tpot_s(request: RequestRecord) -> float | None:
    """Mean time per output token after the first of a successful request; ``None`` with fewer than two tokens."""
    if request.num_output_tokens < 2:
        return None
    return (request.token_times_s[-1] - request.token_times_s[0]) / (request.num_output_tokens - 1)


def gaps_s(request: RequestRecord) -> list[float]:
    """Times between successive pieces of text of a successful request."""
    return [later - earlier for earlier, later in itertools.pairwise(request.token_times_s)]


def _duration_s(requests: Sequence[RequestRecord]) -> float:
    return max(request.end_s for request in requests) - min(request.start_s for request in requests)


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the rounds of a run."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Median and range of the values that exist; ``None`` if none does."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        return cls(float(np.median(present)), min(present), max(present))
