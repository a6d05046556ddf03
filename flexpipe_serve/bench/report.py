"""The table on the terminal and the JSON file of a benchmark run."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.summary import Quantiles, Spread, Summary, summarize
from flexpipe_serve.bench.wave import Wave


def waves_by_target(waves: Sequence[Wave]) -> dict[str, list[Wave]]:
    """Waves of each target, targets in the order of their first wave."""
    grouped: dict[str, list[Wave]] = {}
    for wave in waves:
        grouped.setdefault(wave.target, []).append(wave)
    return grouped


def render(waves: Sequence[Wave]) -> Group:
    """Latency table, throughput table and, where there are any, errors and warnings."""
    grouped = {
        name: (summarize(own), [summarize([wave]) for wave in own]) for name, own in waves_by_target(waves).items()
    }
    parts: list[Table | str] = [_throughput_table(grouped), _latency_table(grouped)]
    for name, (summary, _) in grouped.items():
        parts += [f"[yellow]{name}: {note}[/]" for note in notes(summary)]
        parts += [f"[red]{name}: {count} failed: {escape(reason)}[/]" for reason, count in summary.errors.items()]
    return Group(*parts)


def notes(summary: Summary) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    if summary.num_short:
        found.append(f"{summary.num_short} of {summary.num_requests} answers stopped before the tokens asked for")
    if summary.num_wrong_prompts:
        found.append(f"the server counted {summary.num_wrong_prompts} prompts differently than asked for")
    if summary.send_lag_ms.p99 is not None and summary.send_lag_ms.p99 > 50:
        found.append(f"the client sent late (p99 {summary.send_lag_ms.p99:.0f} ms): it was the limit, not the server")
    return found


def to_json(waves: Sequence[Wave], *, settings: dict[str, Any], with_requests: bool) -> dict[str, Any]:
    """Everything measured, ready for ``json.dump``.

    Args:
        waves: of all targets.
        settings: how the run was called.
        with_requests: every request with its token times too.
    """
    return {
        "version": 1,
        "settings": settings,
        "machine": machine(),
        "targets": {
            name: {
                "all_rounds": asdict(summarize(own)),
                "rounds": [asdict(summarize([wave])) for wave in own],
                **(
                    {"requests": [[asdict(request) for request in wave.requests] for wave in own]}
                    if with_requests
                    else {}
                ),
            }
            for name, own in waves_by_target(waves).items()
        },
    }


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1m": os.getloadavg()[0],
    }


def print_report(waves: Sequence[Wave], console: Console) -> None:
    """Prints the tables of :func:`render`."""
    console.print(render(waves))


def _throughput_table(grouped: dict[str, tuple[Summary, list[Summary]]]) -> Table:
    table = Table(title="Throughput: median \\[range] over rounds", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("target")
    for heading in (
        "rounds",
        "requests",
        "errors",
        "output\ntokens/s",
        "requests\n/s",
        "TTFT p50\nms",
        "TPOT p50\nms",
        "client CPU\nµs/token",
    ):
        table.add_column(heading, justify="right")
    for name, (summary, rounds) in grouped.items():
        cpu_us = summary.client_cpu_us_per_token
        table.add_row(
            name,
            str(len(rounds)),
            str(summary.num_requests),
            f"[red]{summary.num_errors}[/]" if summary.num_errors else "0",
            spread_text(Spread.of(each.output_tokens_per_s for each in rounds)),
            spread_text(Spread.of(each.requests_per_s for each in rounds), digits=2),
            spread_text(Spread.of(each.ttft_ms.p50 for each in rounds)),
            spread_text(Spread.of(each.tpot_ms.p50 for each in rounds)),
            "-" if cpu_us is None else f"{cpu_us:.0f}",
        )
    return table


def _latency_table(grouped: dict[str, tuple[Summary, list[Summary]]]) -> Table:
    table = Table(title="Latency in ms, all rounds", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("target")
    table.add_column("")
    for heading in ("mean", "p50", "p90", "p99", "max", "n"):
        table.add_column(heading, justify="right")
    for name, (summary, _) in grouped.items():
        for label, quantiles in (
            ("time to first token", summary.ttft_ms),
            ("time per output token", summary.tpot_ms),
            ("gap between tokens", summary.gap_ms),
            ("whole request", summary.e2e_ms),
        ):
            table.add_row(name, label, *_cells(quantiles))
            name = ""
    return table


def _cells(quantiles: Quantiles) -> list[str]:
    values = (quantiles.mean, quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max)
    return [*("-" if value is None else f"{value:.1f}" for value in values), str(quantiles.count)]


def spread_text(spread: Spread | None, *, digits: int = 1) -> str:
    """``median [low-high]``, or only the median where all rounds agree."""
    if spread is None:
        return "-"
    median, low, high = (f"{value:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} \\[{low}-{high}]"
