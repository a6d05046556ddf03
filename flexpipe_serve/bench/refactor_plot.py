"""Timelines of refactorings: every token a dot, phases as bands, the switch as a line."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flexpipe_serve.bench.refactor_run import Section
from flexpipe_serve.bench.trial import Trial
from flexpipe_serve.refactor.record import Phase

_COLORS = {phase: f"C{index}" for index, phase in enumerate(Phase)}
_MARGIN_S = 2.0


def save_timelines(sections: Sequence[Section], path: Path) -> None:
    """Writes a PNG: a row for each domain and mode, a column for each refactoring of the first round."""
    first = [section for section in sections if section.round == 0 and section.trials]
    if not first:
        return
    num_columns = max(len(section.trials) for section in first)
    figure = Figure(figsize=(4.2 * num_columns + 1, 2.2 * len(first) + 1), layout="constrained")
    grid = figure.subplots(len(first), num_columns, squeeze=False)
    for section, axes in zip(first, grid, strict=True):
        for axis in axes[len(section.trials) :]:
            axis.set_axis_off()
        for trial, axis in zip(section.trials, axes, strict=False):
            _timeline(axis, section, trial)
    bands = [Patch(color=color, alpha=0.3, label=phase.value) for phase, color in _COLORS.items()]
    figure.legend(handles=bands, loc="outside upper center", ncols=len(bands))
    figure.savefig(path, dpi=90)


def _timeline(axis: Axes, section: Section, trial: Trial) -> None:
    zero = trial.requested_s
    low, high = trial.window.start_s - _MARGIN_S, trial.window.end_s + _MARGIN_S
    for phase in trial.record.phases:
        axis.axvspan(phase.start_s, phase.start_s + phase.seconds, color=_COLORS[phase.phase], alpha=0.3, linewidth=0)
    if trial.switched_s is not None:
        axis.axvline(trial.switched_s - zero, color="black", linewidth=0.8)
    points = [
        (at_s - zero, stream.slot) for stream in section.streams for at_s in stream.token_times_s if low <= at_s <= high
    ]
    if points:
        axis.plot(*zip(*points, strict=True), ".", color="black", markersize=2)
    axis.set_title(f"{trial.domain}, {trial.mode}: {trial.step.kind}", fontsize=9)
    axis.set(xlim=(low - zero, high - zero), yticks=[], xlabel="s")
