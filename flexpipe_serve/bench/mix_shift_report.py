"""What the mix-shift experiment found: tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from flexpipe_serve.bench import adapt_report
from flexpipe_serve.bench.adapt_report import TraceResult
from flexpipe_serve.bench.mix_shift_plan import BALANCED, Mix, Scores, SweepPoint, Totals, best_boundary, scores_of
from flexpipe_serve.bench.report import spread_text
from flexpipe_serve.bench.summary import Spread

PUBLISHED_GAIN = 0.36
"""PipeLive's composite over its balanced split, Llama on two unequal GPUs."""


def sweep_table(points: Sequence[SweepPoint], mixes: Sequence[Mix]) -> Table:
    """Static splits under both kinds of request; the best of each is bold."""
    table = Table(title="static splits, requests/s in a closed loop", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("boundary", justify="right")
    table.add_column("KV blocks", justify="right")
    for mix in mixes:
        table.add_column(mix.name, justify="right")
    best = {mix.name: best_boundary(points, mix) for mix in mixes}
    for point in points:
        cells = [
            f"[bold]{point.per_s[mix.name]:.3f}[/]"
            if point.boundary == best[mix.name]
            else f"{point.per_s[mix.name]:.3f}"
            for mix in mixes
        ]
        table.add_row(str(point.boundary), str(point.num_blocks), *cells)
    return table


def scored(result: TraceResult) -> list[tuple[dict[str, Totals], dict[str, Scores]]]:
    """Totals and scores of each repetition that all variants have, by variant; over the requests that count."""
    found = []
    for repeat in sorted({run.repeat for run in result.runs}):
        totals = {
            run.variant.name: each
            for run in result.runs
            if run.repeat == repeat and (each := Totals.of([j.request for j in result.judged(run)])) is not None
        }
        if len(totals) == len(result.variants):
            found.append((totals, scores_of(totals)))
    return found


def render(result: TraceResult, *, shift_s: float) -> Group:
    """The composite, TTFT and TPOT of both phases, and what ``bench adapt`` says of a trace."""
    rounds = scored(result)
    parts: list[Any] = [adapt_report.render(result)]
    if rounds:
        parts += [_composite_table(result, rounds), _phase_table(result, shift_s=shift_s)]
        parts += [line for name in result.variants if (line := _gain_line(rounds, name)) is not None]
    return Group(*parts)


def gain(rounds: Sequence[tuple[dict[str, Totals], dict[str, Scores]]], variant: str) -> Spread | None:
    """Composite over that of the balanced split, less 1."""
    return Spread.of(scores[variant].composite / scores[BALANCED].composite - 1 for _, scores in rounds)


def _gain_line(rounds: Sequence[tuple[dict[str, Totals], dict[str, Scores]]], variant: str) -> str | None:
    found = gain(rounds, variant)
    if variant == BALANCED or found is None:
        return None
    color = "green" if found.median >= PUBLISHED_GAIN else "red"
    return (
        f"[{color}]{variant}: composite {found.median:+.0%} \\[{found.low:+.0%} to {found.high:+.0%}] over the balanced"
        f" split[/] (PipeLive's paper: {PUBLISHED_GAIN:+.0%})"
    )


def _composite_table(result: TraceResult, rounds: Sequence[tuple[dict[str, Totals], dict[str, Scores]]]) -> Table:
    title = "composite: mean of the scores of TTFT, TPOT, tokens/s (1: the best variant); median \\[range]"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    columns: tuple[tuple[str, Callable[[Totals, Scores], float], int], ...] = (
        ("TTFT\nms", lambda t, _: t.ttft_s * 1e3, 0),
        ("TPOT\nms", lambda t, _: t.tpot_s * 1e3, 1),
        ("tokens/s", lambda t, _: t.tokens_per_s, 1),
        ("s TTFT", lambda _, s: s.ttft, 3),
        ("s TPOT", lambda _, s: s.tpot, 3),
        ("s tokens/s", lambda _, s: s.throughput, 3),
        ("composite", lambda _, s: s.composite, 3),
    )
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    table.add_column("gain over\nbalanced %", justify="right")
    for name in result.variants:
        cells = [
            spread_text(Spread.of(value(totals[name], scores[name]) for totals, scores in rounds), digits=digits)
            for _, value, digits in columns
        ]
        percent = gain(rounds, name)
        shown = None if percent is None else Spread(100 * percent.median, 100 * percent.low, 100 * percent.high)
        table.add_row(name, *cells, spread_text(shown))
    return table


def _phase_table(result: TraceResult, *, shift_s: float) -> Table:
    table = Table(title="before and after the shift; median \\[range]", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("TTFT ms\nbefore", "TTFT ms\nafter", "TPOT ms\nbefore", "TPOT ms\nafter"):
        table.add_column(heading, justify="right")
    for name in result.variants:
        phases = [
            [
                Totals.of([j.request for j in result.judged(run) if (j.request.start_s >= shift_s) == is_after])
                for run in result.runs_of(name)
            ]
            for is_after in (False, True)
        ]
        cells = [
            spread_text(Spread.of(None if t is None else value(t) * 1e3 for t in phase), digits=digits)
            for value, digits in ((_ttft, 0), (_tpot, 1))
            for phase in phases
        ]
        table.add_row(name, *cells)
    return table


def _ttft(totals: Totals) -> float:
    return totals.ttft_s


def _tpot(totals: Totals) -> float:
    return totals.tpot_s


def to_json(points: Sequence[SweepPoint], result: TraceResult | None, *, shift_s: float) -> dict[str, Any]:
    """Everything measured, ready for ``json.dump``."""
    data: dict[str, Any] = {"sweep": [asdict(point) for point in points], "shift_s": shift_s}
    if result is not None and result.runs:
        rounds = scored(result)
        data["composite"] = [
            {
                name: {**asdict(totals[name]), "scores": asdict(scores[name]), "composite": scores[name].composite}
                for name in totals
            }
            for totals, scores in rounds
        ]
        gains = {name: gain(rounds, name) for name in result.variants} if rounds else {}
        data["gain_over_balanced"] = {
            name: None if spread is None else asdict(spread) for name, spread in gains.items()
        }
        data["trace"] = adapt_report.to_json(result)
    return data
