"""Metrics in Prometheus' text format, for who asks the server itself; Ray has the same in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True)
class Sample:
    """One value of a metric.

    Attributes:
        suffix: behind the metric's name, such as ``_bucket``.
    """

    labels: Mapping[str, str]
    value: float
    suffix: str = ""


@dataclass(frozen=True)
class Family:
    """A metric with all its values."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    samples: Sequence[Sample]


def histogram_samples(
    labels: Mapping[str, str], *, bounds: Sequence[float], counts: Sequence[int], total: float
) -> list[Sample]:
    """The values of one histogram.

    Args:
        bounds: upper ends of the buckets, included; the last bucket has none.
        counts: observations in each bucket, one more than ``bounds``.
        total: sum of all observations.
    """
    ends = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    below = list(accumulate(counts))
    buckets = [Sample({**labels, "le": end}, count, "_bucket") for end, count in zip(ends, below, strict=True)]
    return [*buckets, Sample(labels, total, "_sum"), Sample(labels, below[-1], "_count")]


def render(families: Iterable[Family]) -> str:
    """The text; families of the same name, of several pipelines, become one."""
    by_name: dict[str, list[Family]] = {}
    for family in families:
        by_name.setdefault(family.name, []).append(family)
    lines: list[str] = []
    for name, same in by_name.items():
        lines += [f"# HELP {name} {same[0].description}", f"# TYPE {name} {same[0].kind}"]
        lines += [_line(name, sample) for family in same for sample in family.samples]
    return "\n".join(lines) + "\n"


def _line(name: str, sample: Sample) -> str:
    labels = ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in sample.labels.items())
    return f"{name}{sample.suffix}{{{labels}}} {sample.value:.17g}"
