"""Workloads of the adaptation benchmark: arrival patterns, scaled to what the machine can do. Pure, seeded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals, read_trace
from flexpipe_serve.errors import ConfigError

LONGEST = 4
"""Longer prompts and outputs are cut to so many times the mean."""
_FORM = "give gamma:CV, or a CSV file as FILE, FILE@START or FILE@START+SECONDS"
_NUM_SLOTS = 10


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """Where the pattern of arrivals comes from.

    Args:
        name: in reports.
        cv: of Gamma distributed gaps; None for a recorded trace.
        path: of a recorded trace.
        start_s: where in the recorded trace to begin.
        window_s: how much of it; None: as many requests in a row as are needed.
    """

    name: str
    cv: float | None = None
    path: Path | None = None
    start_s: float = 0.0
    window_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> TraceSpec:
        """``gamma:CV``, or ``FILE``, ``FILE@START`` or ``FILE@START+SECONDS`` of a CSV file.

        Raises:
            ConfigError: it is none of these.
        """
        if text.startswith("gamma:"):
            try:
                cv = float(text.removeprefix("gamma:"))
            except ValueError:
                cv = -1.0
            if not 0 <= cv < 100:
                raise ConfigError(f"the trace is {text!r}; {_FORM}, with a CV of 0 to 100")
            return cls(f"gamma, CV {cv:g}", cv=cv)
        number = r"(\d+(?:\.\d+)?)"
        match = re.fullmatch(rf"(.+?)(?:@{number}(?:\+{number})?)?", text)
        if match is None:
            raise ConfigError(f"the trace is {text!r}; {_FORM}")
        start_s, window_s = float(match[2] or 0), float(match[3]) if match[3] else None
        if window_s == 0:
            raise ConfigError(f"the window of {text!r} has 0 s; give a longer one")
        path = Path(match[1])
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        return cls(name + text[len(match[1]) :], path=path, start_s=start_s, window_s=window_s)


def make_workload(
    spec: TraceSpec, num_requests: int, *, duration_s: float, mean_prompt: int, mean_output: int, seed: int
) -> list[Arrival]:
    """``num_requests`` requests over ``duration_s`` seconds, whose lengths have the given means.

    Gaps between arrivals are those of the trace in another unit of time, so their CV stays. Where a window of the trace
    is given, its changes of rate stay, and requests are left out at random if it has too many: that makes bursts
    smaller. Lengths are scaled alike, and cut to four times the mean.

    Args:
        mean_prompt: tokens.
        mean_output: tokens.
        seed: of Gamma distributed gaps, and of what is left out.

    Raises:
        ConfigError: the trace has too few requests there.
    """
    rng = np.random.default_rng([seed, 7])
    if spec.cv is not None:
        # One more: where the last gap ends, the workload does.
        drawn = gamma_arrivals(
            num_requests + 1, rate=1.0, cv=spec.cv, num_prompt_tokens=mean_prompt, num_output_tokens=mean_output,
            seed=(seed, 8),
        )  # fmt: skip
        times = np.array([arrival.at_s for arrival in drawn])
        times *= duration_s / times[-1]
        return [Arrival(float(at_s), mean_prompt, mean_output) for at_s in times[:-1]]
    assert spec.path is not None
    rows = [row for row in read_trace(spec.path) if row.at_s >= spec.start_s]
    if spec.window_s is None:
        rows, start_s = rows[: num_requests + 1], spec.start_s
        scale = duration_s / max(rows[-1].at_s - start_s, 1e-9) if rows else 1.0
        if len(rows) <= num_requests:
            raise ConfigError(f"{spec.name} has {len(rows)} requests, {num_requests + 1} are needed; begin earlier")
        rows = rows[:-1]
    else:
        rows = [row for row in rows if row.at_s < spec.start_s + spec.window_s]
        if len(rows) < num_requests:
            raise ConfigError(f"{spec.name} has {len(rows)} requests, {num_requests} are needed; give a longer window")
        chosen = np.sort(rng.choice(len(rows), num_requests, replace=False))
        rows, start_s, scale = [rows[i] for i in chosen], spec.start_s, duration_s / spec.window_s
    prompts = _scaled([row.num_prompt_tokens for row in rows], mean=mean_prompt)
    outputs = _scaled([row.num_output_tokens for row in rows], mean=mean_output)
    return [
        Arrival((row.at_s - start_s) * scale, prompt, output)
        for row, prompt, output in zip(rows, prompts, outputs, strict=True)
    ]


def _scaled(lengths: Sequence[int], *, mean: int) -> list[int]:
    """Lengths of 1 to ``LONGEST * mean`` tokens, in proportion to ``lengths``, with that mean as far as can be."""
    given = np.array(lengths, dtype=float)
    low, high = 0.0, LONGEST * mean / max(given.min(), 1.0)
    for _ in range(60):  # the mean rises with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if _cut(given * factor, mean).mean() < mean else (low, factor)
    return [int(length) for length in _cut(given * high, mean)]


def _cut(lengths: NDArray[np.float64], mean: int) -> NDArray[np.float64]:
    return np.rint(lengths).clip(1, LONGEST * mean)


@dataclass(frozen=True, slots=True)
class WorkloadFacts:
    """What a workload is like.

    Args:
        num_requests: in all.
        rate: requests a second.
        cv: of the gaps between arrivals; None with fewer than three requests.
        peak: requests in the busiest tenth of the time, in units of a tenth of all.
        mean_prompt: tokens.
        mean_output: tokens.
    """

    num_requests: int
    rate: float
    cv: float | None
    peak: float
    mean_prompt: float
    mean_output: float

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], *, duration_s: float) -> WorkloadFacts:
        """Of at least one request."""
        times = np.array([arrival.at_s for arrival in arrivals])
        gaps = np.diff(times)
        slots = np.histogram(times, bins=_NUM_SLOTS, range=(0, duration_s))[0]
        return cls(
            num_requests=len(arrivals),
            rate=len(arrivals) / duration_s,
            cv=float(gaps.std() / gaps.mean()) if gaps.size > 1 and gaps.mean() > 0 else None,
            peak=float(slots.max() * _NUM_SLOTS / len(arrivals)),
            mean_prompt=float(np.mean([arrival.num_prompt_tokens for arrival in arrivals])),
            mean_output=float(np.mean([arrival.num_output_tokens for arrival in arrivals])),
        )
