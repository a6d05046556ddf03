"""The picture of a replay: demand, what came of it, and what the policy did about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexpipe_serve.simulate.result import SimulationResult


def save_replay_plot(result: SimulationResult, path: Path, *, title: str) -> None:
    """Writes a PNG: arrival rate and CV, queue, latencies, granularity and decisions over virtual time."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    demand, queue, latency, granularity = figure.subplots(4, 1, sharex=True)
    figure.suptitle(f"{title} (simulated)")
    times = [sample.demand.at for sample in result.samples]
    _draw_demand(demand, times, result)
    queue.plot(times, [sample.demand.num_waiting for sample in result.samples], label="waiting")
    queue.plot(times, [sample.demand.num_running for sample in result.samples], label="running")
    queue.set(ylabel="requests")
    queue.legend(loc="upper left")
    arrived = [request.arrived_at for request in result.requests]
    latencies = [request.latency_s for request in result.requests]
    latency.plot(arrived, latencies, ".", color="C7", markersize=2, alpha=0.5)
    latency.plot(*_running_mean(arrived, latencies), color="C3", label="mean")
    latency.set(ylabel="latency, s")
    latency.legend(loc="upper left")
    granularity.step(times, [sample.num_stages for sample in result.samples], where="post", label="stages")
    granularity.step(
        times, [sample.num_pipelines for sample in result.samples], where="post", label="pipelines", linestyle="--"
    )
    at = [decision.at for decision in result.decisions]
    targets = [decision.chosen.num_stages for decision in result.decisions if decision.chosen is not None]
    granularity.plot(at, targets, "v", color="C3", label="decided to move")
    highest = max((sample.num_stages for sample in result.samples), default=1)
    granularity.set(ylabel="granularity", xlabel="s", ylim=(0, highest + 2))  # room for the legend
    granularity.yaxis.get_major_locator().set_params(integer=True)
    granularity.legend(loc="upper left")
    for axis in (demand, queue, latency, granularity):
        axis.grid(alpha=0.3)
        for change in result.changes:
            if change.switched_at is not None:
                axis.axvspan(change.asked_at, change.switched_at, color="C1", alpha=0.25, linewidth=0)
    figure.savefig(path, dpi=100)


def _draw_demand(axis: Axes, times: Sequence[float], result: SimulationResult) -> None:
    axis.plot(times, [sample.demand.rate for sample in result.samples], label="rate")
    axis.set(ylabel="requests/s", ylim=(0, None))
    cv = axis.twinx()
    cv.plot(times, [sample.demand.cv for sample in result.samples], color="C2", alpha=0.7, label="CV of gaps")
    cv.set(ylabel="CV", ylim=(0, None))
    lines = [*axis.get_lines(), *cv.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper left")


def _running_mean(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of about 100 equal spans of time, at their middles."""
    if not times:
        return [], []
    edges = np.linspace(0, max(times) + 1e-9, 101)
    numbers = np.digitize(times, edges)
    present = sorted(set(numbers.tolist()))
    middles = [(edges[i - 1] + edges[i]) / 2 for i in present]
    return middles, [float(np.mean(np.asarray(values)[numbers == i])) for i in present]
