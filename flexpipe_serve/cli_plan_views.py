"""How the command line shows a decision of the planner, and a replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.cli_views import clock, seconds
from flexpipe_serve.planner.types import CandidateScore, Decision, Demand, Split, Verdict
from flexpipe_serve.simulate.result import SimulationResult, SimulationSummary, Spread

_MAX_CANDIDATES = 12
_COLOURS = {Verdict.MOVE: "yellow", Verdict.STAY: "green"}


def decision_view(decision: Decision) -> RenderableType:
    """The verdict with its sentence, the demand, and the candidates, best first."""
    colour = _COLOURS[decision.verdict]
    shown = decision.candidates[:_MAX_CANDIDATES]
    parts: list[RenderableType] = [
        f"[bold {colour}]{decision.verdict}[/]: {escape(decision.sentence)}",
        f"demand  {_demand(decision.demand)}",
        _candidate_table(decision, shown),
    ]
    if len(shown) < len(decision.candidates):
        parts.append(f"[dim]and {len(decision.candidates) - len(shown)} more, worse ones[/]")
    if decision.calibration.num_steps:
        factors = decision.calibration.compute.seconds
        parts.append(
            f"[dim]predicted by the profile's times, times {min(factors):.2f} to {max(factors):.2f} by the size of a"
            f" step, as {decision.calibration.num_steps} live steps say[/]"
        )
    took = f", decided in {seconds(decision.decision_s)}" if decision.decision_s else ""
    parts.append(f"[dim]policy {decision.policy}, trigger {decision.trigger}{took}[/]")
    return Group(*parts)


def decisions_table(decisions: Sequence[Decision]) -> RenderableType:
    """A line each, the newest last."""
    table = _table("time", "verdict", "trigger", "req/s", "why", "refactoring")
    for decision in decisions:
        colour = _COLOURS[decision.verdict]
        table.add_row(
            clock(decision.at),
            f"[{colour}]{decision.verdict}[/]",
            str(decision.trigger),
            f"{decision.demand.rate:.2f}",
            escape(decision.sentence),
            escape(decision.refactoring_id or ""),
        )
    return table


def replay_view(summary: SimulationSummary | None, result: SimulationResult) -> RenderableType:
    """The figures of a replay and its changes."""
    if summary is None:
        return "no request was served; every one was too long for the KV cache."
    figures = _table("simulated", "mean", "p50", "p99", right=1)
    spreads = (("latency", summary.latency), ("time to first token", summary.ttft), ("time per token", summary.tpot))
    for name, spread in spreads:
        if spread is not None:
            figures.add_row(name, *_times(spread))
    lines = [
        f"{summary.num_requests} requests served, {summary.num_rejected} rejected, in {summary.duration_s:.0f} s of"
        f" virtual time; {summary.tokens_per_s:.1f} tokens/s, {summary.device_seconds:.0f} device-seconds held",
        f"{summary.num_decisions} decisions, {summary.num_changes} changes",
    ]
    if not result.changes:
        return Group(figures, *lines)
    changes = _table("asked at", "took", "from", "to", "why")
    reasons = {decision.at: decision.sentence for decision in result.decisions}
    for change in result.changes:
        if change.switched_at is not None:
            took = seconds(change.switched_at - change.asked_at)
        else:
            took = "refused" if change.refused else "did not end"
        why = change.refused or reasons.get(change.asked_at, "")
        changes.add_row(f"{change.asked_at:.0f} s", took, split_text(change.old), split_text(change.new), escape(why))
    return Group(figures, *lines, changes)


def split_text(split: Split) -> str:
    """Such as '2 x 3 stages [10, 20]'."""
    stages = "1 stage" if split.num_stages == 1 else f"{split.num_stages} stages {list(split.boundaries)}"
    return escape(stages if split.num_pipelines == 1 else f"{split.num_pipelines} × {stages}")


def _demand(demand: Demand) -> str:
    trend = f" ({demand.rate_gradient:+.3f}/s each second)" if demand.rate_gradient else ""
    return (
        f"{demand.rate:.2f} requests/s{trend}, CV {demand.cv:.2f}, {demand.prompt_tokens:.0f} prompt and"
        f" {demand.output_tokens:.0f} output tokens, {demand.num_running} running, {demand.num_waiting} waiting"
    )


def _candidate_table(decision: Decision, shown: tuple[CandidateScore, ...]) -> Table:
    table = _table(
        "", "split", "devices", "latency", "TTFT", "TPOT", "max req/s", "use", "KV tokens", "score", "gain", "cost", ""
    )
    for column in table.columns[3:-1]:
        column.justify = "right"
    rows = [decision.current, *(c for c in shown if c.split != decision.current.split)]
    for candidate in rows:
        split, prediction = candidate.split, candidate.prediction
        mark = "now" if candidate is decision.current else ("→" if split == decision.chosen else "")
        table.add_row(
            mark,
            split_text(split),
            escape(_devices(split)),
            _seconds(prediction.latency_s),
            _seconds(prediction.ttft_s),
            _seconds(prediction.tpot_s),
            f"{prediction.max_rate:.2f}",
            f"{prediction.utilisation:.0%}" if math.isfinite(prediction.utilisation) else "∞",
            str(prediction.num_kv_tokens),
            f"{candidate.score:.3g}",
            f"{candidate.gain_s:.1f} s",
            f"{candidate.cost_s:.1f} s",
            f"[red]{escape(candidate.refused)}[/]" if candidate.refused else "",
        )
    return table


def _devices(split: Split) -> str:
    """Neighbours on one device once, such as 'a, b ×2'."""
    runs: list[list[str]] = [[split.devices[0].name]]
    for before, after in pairwise(split.devices):
        if after.name == before.name:
            runs[-1].append(after.name)
        else:
            runs.append([after.name])
    return ", ".join(_short(run[0]) + (f" ×{len(run)}" if len(run) > 1 else "") for run in runs)


def _short(name: str) -> str:
    """Ray's node ids have 56 digits, of which the first tell them apart."""
    return name if len(name) <= 24 else f"{name[:8]}…"


def _seconds(value: float) -> str:
    return seconds(value) if math.isfinite(value) else "∞"


def _times(spread: Spread) -> tuple[str, str, str]:
    return seconds(spread.mean), seconds(spread.p50), seconds(spread.p99)


def _table(*columns: str, right: int | None = None) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right is not None and index >= right else "left")
    return table
