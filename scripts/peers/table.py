"""The tables and the JSON file of a comparison."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.report import machine, notes, spread_text
from flexpipe_serve.bench.summary import Spread
from peers.compare import Contender, Turn


def print_tables(contenders: Sequence[Contender], console: Console) -> None:
    """Throughput and latency by concurrency, start-up, then everything that failed or looks odd.

    The first contender is the one that the others are compared with.
    """
    console.print(_speed_table(contenders))
    console.print(_start_table(contenders))
    for contender in contenders:
        for streams, turns in contender.turns.items():
            for turn in turns:
                for note in notes(turn.summary):
                    console.print(f"[yellow]{contender.name}, {streams} streams: {note}[/]")
                for reason, count in turn.summary.errors.items():
                    console.print(f"[red]{contender.name}, {streams} streams: {count} failed: {escape(reason)}[/]")
        if contender.failure is not None:
            console.print(f"[red]{contender.name} failed: {escape(contender.failure)}[/]")


def to_json(contenders: Sequence[Contender], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, every round of it."""
    return {
        "version": 1,
        "settings": settings,
        "machine": machine(),
        "servers": {
            contender.name: {
                "versions": contender.versions,
                "launched": contender.launched and asdict(contender.launched),
                "failure": contender.failure,
                "starts_s": contender.starts_s,
                "peak_resident_bytes": contender.peak_resident_bytes,
                "streams": {
                    str(streams): [
                        {"other_cores": turn.other_cores, "same_answers": same, **asdict(turn.summary)}
                        for turn, same in zip(turns, _same_answers(contender, contenders[0], streams), strict=True)
                    ]
                    for streams, turns in contender.turns.items()
                },
            }
            for contender in contenders
        },
    }


def _speed_table(contenders: Sequence[Contender]) -> Table:
    first = contenders[0]
    table = Table(title="Median \\[range] over rounds", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("streams", "server", "output\ntokens/s", f"{first.name}\n÷ it", "TTFT p50\nms", "TPOT p50\nms"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for heading in ("failed", f"answers as\n{first.name}", "other load\ncores"):
        table.add_column(heading, justify="right")
    for streams in sorted({streams for contender in contenders for streams in contender.turns}):
        for contender in contenders:
            turns = contender.turns.get(streams, [])
            rate = [turn.summary.output_tokens_per_s for turn in turns]
            ratios = [
                ours.summary.output_tokens_per_s / theirs
                for ours, theirs in zip(first.turns.get(streams, []), rate, strict=False)
                if theirs > 0
            ]
            same = _same_answers(contender, first, streams)
            table.add_row(
                str(streams),
                contender.name,
                spread_text(Spread.of(rate)),
                "" if contender is first else spread_text(Spread.of(ratios), digits=2),
                spread_text(Spread.of(turn.summary.ttft_ms.p50 for turn in turns), digits=0),
                spread_text(Spread.of(turn.summary.tpot_ms.p50 for turn in turns)),
                str(sum(turn.summary.num_errors for turn in turns)),
                "" if contender is first else f"{sum(same)} of {len(turns) * streams}",
                spread_text(Spread.of(turn.other_cores for turn in turns), digits=2),
            )
        table.add_section()
    return table


def _start_table(contenders: Iterable[Contender]) -> Table:
    table = Table(title="Start to first answer, memory, versions", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("server")
    table.add_column("start s", justify="right")
    table.add_column("resident GiB", justify="right")
    table.add_column("versions")
    for contender in contenders:
        table.add_row(
            contender.name,
            spread_text(Spread.of(contender.starts_s)),
            f"{contender.peak_resident_bytes / 2**30:.1f}" if contender.peak_resident_bytes else "-",
            ", ".join(f"{name} {version}" for name, version in contender.versions.items()),
        )
    return table


def _same_answers(contender: Contender, first: Contender, streams: int) -> list[int]:
    """Of each round, how many answers equal the first contender's to the same prompt."""

    def equal(own: Turn, other: Turn) -> int:
        return sum(mine == theirs != "" for mine, theirs in zip(own.texts, other.texts, strict=True))

    own, others = contender.turns.get(streams, []), first.turns.get(streams, [])
    counts = [equal(turn, other) for turn, other in zip(own, others, strict=False)]
    return counts + [0] * (len(own) - len(counts))
