"""The picture of a benchmark run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexpipe_serve.bench.report import waves_by_target
from flexpipe_serve.bench.summary import gaps_s, tpot_s, ttft_s
from flexpipe_serve.bench.wave import Wave


def save_plot(waves: Sequence[Wave], path: Path) -> None:
    """Writes a PNG: distributions of TTFT, TPOT and gaps, and tokens over time, one colour a target."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic([["ttft", "tpot", "gap"], ["timeline"] * 3])
    for index, (name, own) in enumerate(waves_by_target(waves).items()):
        good = [request for wave in own for request in wave.requests if request.error is None]
        style: dict[str, Any] = {"color": f"C{index}", "label": name}
        _distribution(axes["ttft"], [ttft_s(request) for request in good], style)
        _distribution(axes["tpot"], [tpot for request in good if (tpot := tpot_s(request)) is not None], style)
        _distribution(axes["gap"], [gap for request in good for gap in gaps_s(request)], style)
        for round_index, wave in enumerate(own):
            _timeline(axes["timeline"], wave, {"color": f"C{index}", "label": name if round_index == 0 else None})
    for key, title in (
        ("ttft", "Time to first token"),
        ("tpot", "Time per output token"),
        ("gap", "Gap between tokens"),
    ):
        axes[key].set(title=title, xlabel="ms", ylabel="share of requests", ylim=(0, 1.02))
    axes["gap"].set(xscale="log", ylabel="share of gaps")
    axes["timeline"].set(title="Output over time, each round from its start", xlabel="s", ylabel="pieces of text per s")
    axes["timeline"].set_ylim(bottom=0)
    axes["timeline"].legend()
    for axis in axes.values():
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _distribution(axis: Axes, durations_s: Sequence[float], style: dict[str, Any]) -> None:
    if durations_s:
        axis.ecdf(np.asarray(durations_s) * 1e3, **style)


def _timeline(axis: Axes, wave: Wave, style: dict[str, Any]) -> None:
    times = np.sort([at_s for request in wave.requests for at_s in request.token_times_s])
    if times.size == 0:
        return
    # About 60 points over the wave, but no bin so narrow that it shows single tokens.
    width = max(times[-1] / 60, 0.25)
    counts, edges = np.histogram(times, bins=np.arange(0, times[-1] + width, width))
    axis.plot(edges[:-1] + width / 2, counts / width, alpha=0.8, **style)
