"""What ``flexpipe bench model`` found: table, JSON, picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.model_points import METRICS, Point, mean_error
from flexpipe_serve.bench.report import machine, notes
from flexpipe_serve.planner.profile import ModelProfile


def render(points: Sequence[Point]) -> Group:
    """Table, mean errors, and what a reader must know."""
    table = Table(
        title="measured, predicted, error; means over the requests", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for heading in ("stages", "requests/s", "n", "of capacity"):
        table.add_column(heading, justify="right")
    for heading in ("TTFT ms", "TPOT ms", "latency ms"):
        table.add_column(heading, justify="right")
    table.add_column("throughput\nrequests/s", justify="right")
    for point in points:
        rate = "at once" if point.rate is None else f"{point.demand.rate:.2f}"
        load = "" if point.rate is None else f"{point.prediction.utilisation:.0%}"
        cells = [_cell(point, name, unit=1.0 if name == "requests_per_s" else 1e3) for name in METRICS]
        table.add_row(str(point.num_stages), rate, str(len(point.wave.requests)), load, *cells)
    parts: list[Table | str] = [table, f"mean relative error: [bold]{_mean_errors(points)}[/]"]
    settled = [point for point in points if point.is_settled]
    if settled and len(settled) < len(points):
        parts.append(f"of waves that were long enough to settle: [bold]{_mean_errors(settled)}[/]")
    if any(point.hindsight != point.prediction for point in points):
        parts.append(
            f"with what the server learnt from the waves themselves: {_mean_errors(points, in_hindsight=True)}"
        )
    for point in points:
        where = f"{point.num_stages} stages, {'at once' if point.rate is None else f'{point.rate:.2f} requests/s'}"
        summary = point.summary
        if not point.is_settled:
            parts.append(
                f"[yellow]{where}: predicted is the long run, which a pipeline at {point.hindsight.utilisation:.0%} of"
                f" its capacity comes to in about {point.settling_s:.0f} s; the wave took {summary.duration_s:.0f} s[/]"
            )
        parts += [f"[yellow]{where}: {note}[/]" for note in notes(summary)]
        parts += [f"[red]{where}: {count} failed: {escape(reason)}[/]" for reason, count in summary.errors.items()]
    return Group(*parts)


def to_json(points: Sequence[Point], *, profile: ModelProfile, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, ready for ``json.dump``; null for what is infinite."""
    return {
        "version": 1,
        "settings": settings,
        "machine": machine(),
        "profile": msgspec.to_builtins(profile),
        "mean_errors": {name: _finite(mean_error(points, name)) for name in METRICS},
        "mean_errors_in_hindsight": {name: _finite(mean_error(points, name, in_hindsight=True)) for name in METRICS},
        "points": [
            {
                "num_stages": point.num_stages,
                "boundaries": list(point.boundaries),
                "rate": point.rate,
                "demand": msgspec.to_builtins(point.demand),
                "measured": point.measured,
                "predicted": {name: _finite(value) for name, value in point.predicted.items()},
                "errors": {name: _finite(value) for name, value in point.errors.items()},
                "errors_in_hindsight": {name: _finite(value) for name, value in point.errors_in_hindsight.items()},
                "utilisation": _finite(point.prediction.utilisation),
                "max_rate": point.prediction.max_rate,
                "is_settled": point.is_settled,
                "calibration": msgspec.to_builtins(point.calibration),
                "summary": asdict(point.summary),
            }
            for point in points
        ],
    }


def save_picture(points: Sequence[Point], path: Path) -> None:
    """Writes a PNG: latencies by rate, and the capacity, dots measured and lines predicted, one colour a split."""
    from matplotlib.figure import Figure  # only now: matplotlib takes its time to import

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = dict(zip(METRICS, figure.subplots(2, 2).flat, strict=True))
    for index, num_stages in enumerate(sorted({point.num_stages for point in points})):
        own = sorted((p for p in points if p.num_stages == num_stages), key=lambda point: point.demand.rate)
        color, label = f"C{index}", f"{num_stages} {'stage' if num_stages == 1 else 'stages'}"
        for name, axis in axes.items():
            shown = [point for point in own if name in point.measured]
            is_capacity = name == "requests_per_s"
            unit = 1.0 if is_capacity else 1e3
            at = [float(num_stages) if is_capacity else point.demand.rate for point in shown]
            axis.plot(at, [unit * point.measured[name] for point in shown], "o", color=color, label=label)
            # What is infinite leaves a gap.
            predicted = [unit * p.predicted[name] if math.isfinite(p.predicted[name]) else np.nan for p in shown]
            axis.plot(at, predicted, marker="_", markersize=24, color=color)
    for name, axis in axes.items():
        axis.set(title=METRICS[name], xlabel="requests/s", ylabel="ms")
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    axes["requests_per_s"].set(title="capacity: all requests at once", xlabel="stages", ylabel="requests/s")
    axes["requests_per_s"].locator_params(axis="x", integer=True)
    axes["ttft_s"].legend(title="dots measured, lines predicted")
    figure.savefig(path, dpi=110)


def _mean_errors(points: Sequence[Point], *, in_hindsight: bool = False) -> str:
    found = {label: mean_error(points, name, in_hindsight=in_hindsight) for name, label in METRICS.items()}
    return ", ".join(f"{label} {_percent(error)}" for label, error in found.items() if error is not None)


def _cell(point: Point, name: str, *, unit: float) -> str:
    measured = point.measured.get(name)
    if measured is None:
        return ""
    digits = 2 if unit == 1.0 else 0
    predicted = point.predicted[name]
    text = "∞" if math.isinf(predicted) else f"{unit * predicted:.{digits}f}"
    return f"{unit * measured:.{digits}f}  {text}  {_percent(point.errors[name], signed=True)}"


def _percent(error: float, *, signed: bool = False) -> str:
    if math.isinf(error):
        return "∞"
    return f"{error:+.0%}" if signed else f"{error:.1%}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
