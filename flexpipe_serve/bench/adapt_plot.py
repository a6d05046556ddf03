"""The pictures of the adaptation benchmark: what came, how long it took, and through how many stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexpipe_serve.bench.adapt_report import TraceResult
from flexpipe_serve.bench.adapt_run import AdaptRun

_NUM_BINS = 40


def save_plot(result: TraceResult, path: Path) -> None:
    """Writes a PNG of a trace's first repetition: the rate of arrivals, latency over arrival (a dot a request, a line
    the mean over a tenth of the time), and stages over time (where there are always two: the first one's layers)."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    rate, latency, stages = figure.subplots(3, 1, sharex=True, height_ratios=(1, 3, 1.2))
    end_s = result.lead_in_s + result.duration_s
    times = [arrival.at_s for arrival in result.workload]
    counts, edges = np.histogram(times, bins=_NUM_BINS, range=(0, end_s))
    rate.stairs(counts * _NUM_BINS / end_s, edges, fill=True, color="0.6")
    has_two = all(len(look.boundaries) == look.num_pipelines == 1 for run in result.runs for look in run.looks)
    for index, variant in enumerate(result.variants):
        first = result.runs_of(variant)[0]
        _latency(latency, first, color=f"C{index}", end_s=end_s)
        times_s = [look.at_s for look in first.looks]
        shown = [look.boundaries[0] if has_two else look.num_stages for look in first.looks]
        # A little apart, so that equal ones are seen.
        stages.step(times_s, np.array(shown) * (1 + 0.01 * index), where="post", color=f"C{index}")
        for at_s, _ in first.switches:
            stages.axvline(at_s, color=f"C{index}", linewidth=0.8, alpha=0.5)
    for axis in (rate, latency, stages):
        axis.axvline(result.lead_in_s, color="black", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    rate.set(title=f"{result.name}: arrivals (from the dashed line on they count)", ylabel="requests/s")
    latency.set(ylabel="latency, s", yscale="log")
    latency.legend(ncols=3)
    stages.set(xlabel="s", ylabel="layers of the\nfirst stage" if has_two else "stages", ylim=(0, None))
    figure.savefig(path, dpi=110)


def _latency(axis: Axes, run: AdaptRun, *, color: str, end_s: float) -> None:
    good = [request for request in run.wave.requests if request.error is None]
    starts = np.array([request.start_s for request in good])
    latencies = np.array([request.end_s - request.start_s for request in good])
    axis.plot(starts, latencies, ".", color=color, markersize=3, alpha=0.6)
    edges = np.linspace(0, end_s, _NUM_BINS // 4 + 1)
    slots = np.clip(np.digitize(starts, edges) - 1, 0, len(edges) - 2)
    busy = np.unique(slots)
    means = [latencies[slots == slot].mean() for slot in busy]
    axis.plot((edges[busy] + edges[busy + 1]) / 2, means, "-o", color=color, label=run.variant.name, markersize=4)
