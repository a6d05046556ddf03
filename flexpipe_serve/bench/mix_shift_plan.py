"""Requests of the mix-shift experiment, and the composite score. Pure, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals
from flexpipe_serve.bench.summary import tpot_s, ttft_s
from flexpipe_serve.bench.wave import RequestRecord

BALANCED = "balanced"
"""Name of the even split, which composites are compared with."""


@dataclass(frozen=True, slots=True)
class Mix:
    """One kind of request.

    Args:
        name: in reports.
        num_prompt_tokens: of each.
        num_output_tokens: of each.
    """

    name: str
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        """That its KV holds in the end."""
        return self.num_prompt_tokens + self.num_output_tokens

    def requests(self, num_requests: int) -> list[Arrival]:
        """So many, all at once."""
        return [Arrival(0.0, self.num_prompt_tokens, self.num_output_tokens)] * num_requests


def shifting_arrivals(phases: Sequence[tuple[Mix, float, float]], *, cv: float, seed: int) -> list[Arrival]:
    """Phases of different requests, one after the other.

    Args:
        phases: kind, requests a second and seconds of each.
        cv: of the gaps.
        seed: of the gaps.
    """
    arrivals: list[Arrival] = []
    begin_s = 0.0
    for index, (mix, rate, seconds) in enumerate(phases):
        num_requests = max(1, round(rate * seconds))
        # One more: where the last gap ends, the phase does.
        drawn = gamma_arrivals(
            num_requests + 1, rate=1.0, cv=cv, num_prompt_tokens=mix.num_prompt_tokens,
            num_output_tokens=mix.num_output_tokens, seed=(seed, index),
        )  # fmt: skip
        scale = seconds / drawn[-1].at_s
        arrivals += [
            Arrival(begin_s + each.at_s * scale, each.num_prompt_tokens, each.num_output_tokens) for each in drawn[:-1]
        ]
        begin_s += seconds
    return arrivals


@dataclass(frozen=True, slots=True)
class Totals:
    """PipeLive's three metrics of one run.

    Args:
        ttft_s: mean over requests.
        tpot_s: mean over requests of at least two tokens.
        tokens_per_s: of prompts and outputs, from the first request's due time to the last one's end.
    """

    ttft_s: float
    tpot_s: float
    tokens_per_s: float

    @classmethod
    def of(cls, requests: Sequence[RequestRecord]) -> Totals | None:
        """Of the requests that were answered; None where none was."""
        good = [request for request in requests if request.error is None]
        tpots = [tpot for request in good if (tpot := tpot_s(request)) is not None]
        if not tpots:
            return None
        seconds = max(request.end_s for request in good) - min(request.start_s for request in requests)
        num_tokens = sum(request.num_prompt_tokens + request.num_output_tokens for request in good)
        return cls(
            ttft_s=sum(ttft_s(request) for request in good) / len(good),
            tpot_s=sum(tpots) / len(tpots),
            tokens_per_s=num_tokens / seconds,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Totals in units of the best variant's: 1 is the best, smaller is worse."""

    ttft: float
    tpot: float
    throughput: float

    @property
    def composite(self) -> float:
        """PipeLive's ``(s_TTFT + s_TPOT + s_TP) / 3``."""
        return (self.ttft + self.tpot + self.throughput) / 3


def scores_of(totals: Mapping[str, Totals]) -> dict[str, Scores]:
    """Scores of each variant. How PipeLive normalises is not known in detail: here each metric is divided by the best
    variant's (times the other way round), so that all scores are above 0 and at most 1."""
    ttft_s = min(each.ttft_s for each in totals.values())
    tpot = min(each.tpot_s for each in totals.values())
    tokens_per_s = max(each.tokens_per_s for each in totals.values())
    return {
        name: Scores(ttft_s / each.ttft_s, tpot / each.tpot_s, each.tokens_per_s / tokens_per_s)
        for name, each in totals.items()
    }


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """What one static split can do, in a closed loop.

    Args:
        boundary: first layer of the second stage.
        num_blocks: of KV.
        per_s: requests a second, by the kind's name.
    """

    boundary: int
    num_blocks: int
    per_s: dict[str, float]


def best_boundary(points: Sequence[SweepPoint], mix: Mix) -> int:
    """Where the most requests of a kind are served."""
    return max(points, key=lambda point: point.per_s[mix.name]).boundary
