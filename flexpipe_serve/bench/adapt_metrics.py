"""What the adaptation benchmark makes of a run: latency, goodput, stalls, devices held, and the verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.summary import Quantiles, Spread, tpot_s, ttft_s
from flexpipe_serve.bench.wave import RequestRecord

STALL_FACTOR = 1.5
"""A stall begins with a response that is slower than the baseline by this (FlexPipe's definition, F23)."""
RECOVERY_FACTOR = 1.2
"""It ends with one that is within this."""
TOLERANCE = 1.02
"""An adaptive policy may be so much slower than the best static layout."""
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t, by degrees of freedom from 1 on; beyond the last it is taken, which is a little too
wide."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Latency of a request that has the server to itself: seconds for each token of its prompt and of its output."""

    prompt_token_s: float
    output_token_s: float

    @classmethod
    def fit(cls, measured: Sequence[tuple[Arrival, float]]) -> Alone:
        """The least squares over measured (request, latency) pairs; neither is below 0."""
        counts = np.array([(arrival.num_prompt_tokens, arrival.num_output_tokens) for arrival, _ in measured], float)
        seconds = np.array([latency_s for _, latency_s in measured])
        both = np.linalg.lstsq(counts, seconds, rcond=None)[0]
        if both.min() < 0:  # then one of them alone explains it best
            one = int(np.argmax(both))
            both = np.zeros(2)
            both[one] = counts[:, one] @ seconds / (counts[:, one] @ counts[:, one])
        return cls(float(both[0]), float(both[1]))

    def seconds(self, request: Arrival) -> float:
        """Of one request."""
        return self.prompt_token_s * request.num_prompt_tokens + self.output_token_s * request.num_output_tokens


def sustained_rate(requests: Sequence[RequestRecord]) -> float:
    """Requests a second that a closed loop finished while all its places were taken: until the last one was sent."""
    full_s = max(request.start_s for request in requests)
    num_ended = sum(request.end_s <= full_s for request in requests)
    if num_ended:
        return num_ended / full_s
    return len(requests) / max(request.end_s for request in requests)  # all were sent at once


@dataclass(frozen=True, slots=True)
class Stall:
    """From a response that took too long to the first good one. Seconds after the wave's start.

    Args:
        is_over: whether a good response came; else ``end_s`` is that of the last response.
    """

    start_s: float
    end_s: float
    is_over: bool

    @property
    def seconds(self) -> float:
        """Until recovery."""
        return self.end_s - self.start_s


def find_stalls(responses: Iterable[tuple[float, float]], *, baseline: float) -> list[Stall]:
    """Stalls among responses.

    Args:
        responses: (time, latency) of each; latencies in the unit of ``baseline``.
        baseline: latency in normal operation.
    """
    stalls: list[Stall] = []
    start_s: float | None = None
    last_s = 0.0
    for last_s, latency in sorted(responses):
        if start_s is None and latency > STALL_FACTOR * baseline:
            start_s = last_s
        elif start_s is not None and latency <= RECOVERY_FACTOR * baseline:
            stalls.append(Stall(start_s, last_s, is_over=True))
            start_s = None
    if start_s is not None:
        stalls.append(Stall(start_s, last_s, is_over=False))
    return stalls


@dataclass(frozen=True, slots=True)
class Look:
    """The server at one moment.

    Args:
        at_s: seconds after the wave's start.
        num_stages: with layers, of all pipelines.
        num_devices: different ones among what they compute with.
        num_pipelines: that serve.
        boundaries: of the first pipeline.
        num_running: sequences.
        num_waiting: sequences.
        num_blocks: of KV, of the first pipeline.
    """

    at_s: float
    num_stages: int
    num_devices: int
    num_pipelines: int
    boundaries: tuple[int, ...]
    num_running: int
    num_waiting: int
    num_blocks: int


def held_seconds(times_s: Sequence[float], counts: Sequence[int], *, start_s: float, end_s: float) -> float:
    """How long so many things were held, summed over them, between two moments: each count holds until the next."""
    edges = np.clip([*times_s, max(end_s, *times_s)] if times_s else [], start_s, end_s)
    # What was seen first was there before.
    edges[:1] = start_s
    return float(sum(count * (later - now) for count, (now, later) in zip(counts, pairwise(edges), strict=True)))


@dataclass(frozen=True, slots=True)
class Judged:
    """One request of a run, with what it is measured by.

    Args:
        request: what became of it.
        alone_s: its latency on an idle server.
        target_s: its latency shall be no more.
    """

    request: RequestRecord
    alone_s: float
    target_s: float

    @property
    def latency_s(self) -> float:
        """From its due time to its last byte."""
        return self.request.end_s - self.request.start_s

    @property
    def slowdown(self) -> float:
        """Its latency in units of that on an idle server."""
        return self.latency_s / self.alone_s

    @property
    def is_good(self) -> bool:
        """Whether it was answered in time."""
        return self.request.error is None and self.latency_s <= self.target_s


def baseline_of(judged: Iterable[Judged]) -> float | None:
    """The 25th percentile of the slowdowns of requests that were answered; None where none was."""
    slowdowns = [each.slowdown for each in judged if each.request.error is None]
    return float(np.quantile(slowdowns, 0.25)) if slowdowns else None


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run, over the requests that count.

    Args:
        num_requests: that were due.
        num_lost: that failed.
        latency_ms: due time to last byte.
        ttft_ms: to the first piece of text.
        tpot_ms: see Summary.
        goodput_per_s: requests answered in time, a second of load.
        good_share: of all requests.
        num_stalls: see ``find_stalls``.
        recovery_s: their median length; None without one.
        stalled_share: of the time.
        device_s: what computes, summed over the time it held layers.
        stage_s: stages with layers, summed over time.
        num_switches: changes of the layout that came into force.
    """

    num_requests: int
    num_lost: int
    latency_ms: Quantiles
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    goodput_per_s: float
    good_share: float
    num_stalls: int
    recovery_s: float | None
    stalled_share: float
    device_s: float
    stage_s: float
    num_switches: int


def assess(
    judged: Sequence[Judged],
    looks: Sequence[Look],
    switches_s: Iterable[float],
    *,
    baseline: float | None,
    start_s: float,
    load_s: float,
) -> Figures:
    """Figures of one run.

    Args:
        judged: its requests that count; at least one.
        looks: at the server, in order.
        switches_s: when new layouts came into force.
        baseline: slowdown in normal operation, the same for all runs that are compared.
        start_s: from when on requests count.
        load_s: for how long requests came since.
    """
    good = [each for each in judged if each.request.error is None]
    end_s = max(each.request.end_s for each in judged)
    stalls = [] if baseline is None else find_stalls([(g.request.end_s, g.slowdown) for g in good], baseline=baseline)
    num_good = sum(each.is_good for each in judged)
    times_s = [look.at_s for look in looks]
    return Figures(
        num_requests=len(judged),
        num_lost=len(judged) - len(good),
        latency_ms=Quantiles.of_seconds(each.latency_s for each in good),
        ttft_ms=Quantiles.of_seconds(ttft_s(each.request) for each in good),
        tpot_ms=Quantiles.of_seconds(tpot for each in good if (tpot := tpot_s(each.request)) is not None),
        goodput_per_s=num_good / load_s,
        good_share=num_good / len(judged),
        num_stalls=len(stalls),
        recovery_s=float(np.median([stall.seconds for stall in stalls])) if stalls else None,
        stalled_share=sum(stall.seconds for stall in stalls) / (end_s - start_s),
        device_s=held_seconds(times_s, [look.num_devices for look in looks], start_s=start_s, end_s=end_s),
        stage_s=held_seconds(times_s, [look.num_stages for look in looks], start_s=start_s, end_s=end_s),
        num_switches=sum(start_s <= at_s <= end_s for at_s in switches_s),
    )


@dataclass(frozen=True, slots=True)
class Paired:
    """How much longer requests took than the same ones under another variant in the same repetition, as a share of the
    latter's latency.

    Args:
        mean: over repetitions; below 0 they were faster.
        low: end of the 95 % confidence interval (Student's t over repetitions); None with a single one.
        high: its other end.
        num_repeats: repetitions.
    """

    mean: float
    low: float | None
    high: float | None
    num_repeats: int

    @classmethod
    def of(cls, repeats: Sequence[Sequence[tuple[float, float]]]) -> Paired | None:
        """From the latencies of each request, its own and the other's, by repetition; None where there are none.

        Requests of one repetition wait for each other and so are no independent samples: repetitions are.
        """
        shares = [
            sum(own - other for own, other in pairs) / sum(other for _, other in pairs) for pairs in repeats if pairs
        ]
        if not shares:
            return None
        mean, num_repeats = float(np.mean(shares)), len(shares)
        if num_repeats == 1:
            return cls(mean, None, None, num_repeats)
        quantile = _STUDENT[min(num_repeats - 1, len(_STUDENT)) - 1]
        half = quantile * float(np.std(shares, ddof=1)) / math.sqrt(num_repeats)
        return cls(mean, mean - half, mean + half, num_repeats)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An adaptive policy against the best static layout, which is known only in hindsight.

    Args:
        policy: its name.
        best: the static layout with the lowest mean latency (median over repeats).
        policy_ms: mean latency over repeats.
        best_ms: likewise.
        ratio: of the medians; below 1 the policy is faster.
        limit: the ratio that is allowed: 2 % more, or the slowest repeat of the static layout where that is more.
        by_static: the ratio against each static layout.
        paired: request by request against the best static layout.
        same_as: the static layout that the policy began with and never left, so that both ran in the same
            configuration and differ by the machine's noise alone; None where it moved.
    """

    policy: str
    best: str
    policy_ms: Spread
    best_ms: Spread
    ratio: float
    limit: float
    by_static: dict[str, float]
    paired: Paired | None
    same_as: str | None

    @property
    def is_met(self) -> bool:
        """Whether it is no slower than allowed, or is the best static layout itself."""
        return self.ratio <= self.limit or self.same_as == self.best


def judge(
    policy: str,
    policy_ms: Spread,
    static_ms: dict[str, Spread],
    *,
    paired: Mapping[str, Paired | None],
    same_as: str | None,
) -> Verdict:
    """The verdict on mean latencies; ``static_ms`` has at least one layout, ``paired`` the same ones."""
    best = min(static_ms, key=lambda name: static_ms[name].median)
    best_ms = static_ms[best]
    return Verdict(
        policy=policy,
        best=best,
        policy_ms=policy_ms,
        best_ms=best_ms,
        ratio=policy_ms.median / best_ms.median,
        limit=max(TOLERANCE, best_ms.high / best_ms.median),
        by_static={name: policy_ms.median / spread.median for name, spread in static_ms.items()},
        paired=paired[best],
        same_as=same_as,
    )
