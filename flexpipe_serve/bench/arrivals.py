"""When requests arrive and how long they are: pure, seeded."""

import csv
import gzip
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexpipe_serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload.

    Args:
        at_s: seconds after the start of the wave at which it is sent; ignored in a closed loop.
        num_prompt_tokens: length of the prompt.
        num_output_tokens: tokens asked for.
    """

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def gamma_arrivals(
    num_requests: int, *, rate: float, cv: float, num_prompt_tokens: int, num_output_tokens: int, seed: Iterable[int]
) -> list[Arrival]:
    """Arrivals whose gaps are Gamma distributed with mean ``1 / rate`` seconds.

    Args:
        num_requests: how many.
        rate: requests per second, above 0; ``inf`` sends all at once.
        cv: coefficient of variation of the gaps: 1 is Poisson, 0 is a metronome, above 1 is bursty.
        num_prompt_tokens: length of every prompt.
        num_output_tokens: tokens every request asks for.
        seed: equal seeds give equal arrivals.

    Raises:
        ConfigError: the rate is not positive or the CV is negative.
    """
    if not rate > 0:
        raise ConfigError(f"rate is {rate} requests/s; give a number above 0")
    if not 0 <= cv < math.inf:
        raise ConfigError(f"cv is {cv}; give 0 (evenly spaced), 1 (Poisson) or more (bursty)")
    if math.isinf(rate):
        gaps = np.zeros(num_requests)
    elif cv == 0:
        gaps = np.full(num_requests, 1 / rate)
    else:
        shape = cv**-2
        gaps = np.random.default_rng(list(seed)).gamma(shape, 1 / (rate * shape), num_requests)
    return [Arrival(float(at_s), num_prompt_tokens, num_output_tokens) for at_s in np.cumsum(gaps)]


def read_trace(
    path: Path,
    *,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_requests: int | None = None,
) -> list[Arrival]:
    """Arrivals recorded in a CSV file (``.gz`` too) with the columns ``arrival_s, prompt_tokens, output_tokens``.

    Args:
        path: the file; rows ascend in ``arrival_s``.
        time_scale: every arrival time is multiplied by it: 2 halves the rate.
        length_scale: every prompt and output length is multiplied by it (at least one token remains).
        max_prompt_tokens: longer prompts are cut to it, after scaling.
        max_output_tokens: longer outputs are cut to it, after scaling.
        max_requests: only the first so many rows.

    Raises:
        ConfigError: the file is missing or not such a trace, or a scale is not positive.
    """
    for name, scale in (("time scale", time_scale), ("length scale", length_scale)):
        if not 0 < scale < math.inf:
            raise ConfigError(f"{name} is {scale}; give a finite number above 0")

    def length(text: str, limit: int | None) -> int:
        scaled = max(1, round(int(text) * length_scale))
        return scaled if limit is None else min(scaled, limit)

    arrivals: list[Arrival] = []
    try:
        with _open_text(path) as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                if max_requests is not None and number > max_requests:
                    break
                try:
                    arrival = Arrival(
                        float(row["arrival_s"]) * time_scale,
                        length(row["prompt_tokens"], max_prompt_tokens),
                        length(row["output_tokens"], max_output_tokens),
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise ConfigError(
                        f"{path}, row {number}: {error!r}; a trace needs the columns "
                        "arrival_s (seconds), prompt_tokens and output_tokens (whole numbers)"
                    ) from error
                if not arrival.at_s >= (arrivals[-1].at_s if arrivals else 0):
                    raise ConfigError(f"{path}, row {number}: arrival_s must be ascending and not negative")
                arrivals.append(arrival)
    except OSError as error:
        raise ConfigError(f"the trace cannot be read: {error}") from error
    if not arrivals:
        raise ConfigError(f"{path} holds no request")
    return arrivals


def _open_text(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
