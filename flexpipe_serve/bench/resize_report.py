"""What the resize experiment found: table, JSON, picture."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.report import machine, notes, spread_text
from flexpipe_serve.bench.resize_plan import ResizePlan
from flexpipe_serve.bench.resize_run import Calibration, ResizeRun
from flexpipe_serve.bench.summary import Spread, Summary, summarize, ttft_s
from flexpipe_serve.bench.windows import ratio

_NAMES = {True: "resizing on", False: "resizing off"}


def summary_of(run: ResizeRun, *, after_step: bool) -> Summary | None:
    """Figures of all requests, or of those that came after the rate stepped up; None where there are none."""
    requests = tuple(r for r in run.wave.requests if not after_step or r.start_s >= run.step_s)
    return summarize([replace(run.wave, requests=requests)]) if requests else None


def mean_ttft_ratio(runs: Sequence[ResizeRun], *, after_step: bool) -> Spread | None:
    """Mean TTFT without resizing over that with it, of each round that has both."""
    means: dict[tuple[int, bool], float | None] = {}
    for run in runs:
        summary = summary_of(run, after_step=after_step)
        means[run.round, run.resize_kv] = None if summary is None else summary.ttft_ms.mean
    rounds = sorted({run.round for run in runs})
    return Spread.of(ratio(means.get((index, False)), means.get((index, True))) for index in rounds)


def render(runs: Sequence[ResizeRun]) -> Group:
    """The tables, the ratio, and what a reader must know."""
    parts: list[Table | str] = []
    for after_step in (False, True):
        which = "requests after the step" if after_step else "all requests"
        parts.append(_table(runs, after_step=after_step, title=f"{which}: median \\[range] over rounds"))
        found = spread_text(mean_ttft_ratio(runs, after_step=after_step), digits=2)
        parts.append(f"mean TTFT of {which}, off / on: [bold]{found}[/]\n")
    for run in runs:
        where = f"{_NAMES[run.resize_kv]}, round {run.round + 1}"
        summary = summarize([run.wave])
        parts += [f"[yellow]{where}: {note}[/]" for note in notes(summary)]
        parts += [f"[red]{where}: {count} failed: {escape(reason)}[/]" for reason, count in summary.errors.items()]
        if run.record.error is not None:
            parts.append(f"[red]{where}: the refactoring was {run.record.outcome}: {escape(run.record.error)}[/]")
    return Group(*parts)


def _table(runs: Sequence[ResizeRun], *, after_step: bool, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    kinds = [kind for kind in (True, False) if any(run.resize_kv is kind for run in runs)]
    for kind in kinds:
        table.add_column(_NAMES[kind], justify="right")

    def add(label: str, value: Callable[[ResizeRun, Summary], float | None], digits: int = 0) -> None:
        cells = []
        for kind in kinds:
            pairs = [(run, summary_of(run, after_step=after_step)) for run in runs if run.resize_kv is kind]
            found = Spread.of(value(run, summary) for run, summary in pairs if summary is not None)
            cells.append(spread_text(found, digits=digits))
        table.add_row(label, *cells)

    add("requests", lambda _, s: s.num_requests)
    add("refused or failed", lambda _, s: s.num_errors)
    add("TTFT mean ms", lambda _, s: s.ttft_ms.mean)
    add("TTFT p50 ms", lambda _, s: s.ttft_ms.p50)
    add("TTFT p99 ms", lambda _, s: s.ttft_ms.p99)
    add("TPOT mean ms", lambda _, s: s.tpot_ms.mean, digits=1)
    add("TPOT p50 ms", lambda _, s: s.tpot_ms.p50, digits=1)
    add("TPOT p99 ms", lambda _, s: s.tpot_ms.p99, digits=1)
    add("output tokens/s", lambda _, s: s.output_tokens_per_s, digits=1)
    add("KV blocks before", lambda r, _: r.record.plan.num_blocks_before)
    add("KV blocks after", lambda r, _: r.record.num_blocks)
    if not after_step:
        add("preemptions", lambda r, _: r.num_preemptions)
        add("refactoring s", lambda r, _: r.record.seconds, digits=2)
        add("stop ms", lambda r, _: r.record.stop_seconds * 1e3, digits=2)
    return table


def to_json(
    runs: Sequence[ResizeRun], *, plan: ResizePlan, calibration: Calibration, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything measured, ready for ``json.dump``."""

    def ratio_of(after_step: bool) -> dict[str, float] | None:
        found = mean_ttft_ratio(runs, after_step=after_step)
        return None if found is None else asdict(found)

    return {
        "version": 1,
        "settings": settings,
        "machine": machine(),
        "plan": asdict(plan),
        "calibration": asdict(calibration),
        "mean_ttft_ratio": {"all": ratio_of(False), "after_step": ratio_of(True)},
        "runs": [
            {
                "resize_kv": run.resize_kv,
                "round": run.round,
                "step_s": run.step_s,
                "num_preemptions": run.num_preemptions,
                "all": asdict(summarize([run.wave])),
                "after_step": None if (after := summary_of(run, after_step=True)) is None else asdict(after),
                "record": msgspec.to_builtins(run.record),
                "kv": [asdict(sample) for sample in run.samples],
                "requests": [asdict(request) | {"pieces": len(request.pieces)} for request in run.wave.requests],
            }
            for run in runs
        ],
    }


def save_picture(runs: Sequence[ResizeRun], path: Path) -> None:
    """Writes a PNG: each request's TTFT over its arrival, and the KV capacity as a step line."""
    from matplotlib.figure import Figure  # only now: matplotlib takes its time to import

    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for run in runs:
        color = "C0" if run.resize_kv else "C1"
        label = _NAMES[run.resize_kv] if run.round == 0 else None
        good = [request for request in run.wave.requests if request.error is None]
        upper.plot([r.start_s for r in good], [ttft_s(r) for r in good], "o", color=color, label=label, markersize=4)
        times = [sample.at_s for sample in run.samples]
        lower.step(times, [sample.num_blocks for sample in run.samples], where="post", color=color, label=label)
        lower.plot(times, [sample.num_used_blocks for sample in run.samples], color=color, alpha=0.4, linewidth=0.8)
    for axis in (upper, lower):
        axis.axvline(runs[0].step_s, color="black", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    upper.set(title="Time to first token; the rate steps up, and the layout changes, at the dashed line", ylabel="s")
    upper.set_ylim(bottom=0)
    lower.set(xlabel="arrival, s", ylabel="KV blocks:\ncapacity, used")
    upper.legend()
    figure.savefig(path, dpi=110)
