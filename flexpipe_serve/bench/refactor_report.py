"""What a refactoring benchmark found, as JSON and as tables."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import msgspec
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.load import StreamRecord
from flexpipe_serve.bench.memory import Sample
from flexpipe_serve.bench.refactor_run import CHURN, Section
from flexpipe_serve.bench.report import machine, spread_text
from flexpipe_serve.bench.summary import Spread
from flexpipe_serve.bench.trial import Figures, Trial, assess, at_rest, extra_memory
from flexpipe_serve.bench.windows import TokenTimes, Window

ALL_KINDS = "all"
_LONG_PREFILL = 2.0
"""Times the median."""
TIE_LOGPROB = 1e-3
"""Two tokens whose log probabilities are closer are a tie: rounding, which depends on the batch, decides."""


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one domain, mode and kind over all rounds.

    Args:
        domain: as in Trial.
        mode: as in Trial.
        kind: of the steps, or ALL_KINDS.
        pooled: gaps and tokens of all trials together.
        quiet: the same of trials in which nothing happens, cut out of the windows at rest.
        stop_ms: the server's: steps that could have run were held back for so long.
        longest_hold_ms: the longest that a single step was held back.
        seconds: from request to end.
        p99_ratio: of each trial by itself.
        loss: share of the tokens, of each trial by itself.
        copied_mb: snapshots and patches.
        extra_mb: memory at the peak above that before.
    """

    domain: str
    mode: str
    kind: str
    pooled: Figures
    quiet: Figures
    stop_ms: Spread | None
    longest_hold_ms: Spread | None
    seconds: Spread | None
    p99_ratio: Spread | None
    loss: Spread | None
    copied_mb: Spread | None
    extra_mb: Spread | None


def summary_rows(sections: Sequence[Section], samples: dict[str, list[Sample]]) -> list[Row]:
    """One row for each (domain, mode, kind), and one over the kinds of each (domain, mode)."""
    times = token_times(sections)
    trials = [trial for section in sections for trial in section.trials]
    keys: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        keys.setdefault((trial.domain, trial.mode, trial.step.kind), []).append(trial)
    for trial in trials:
        keys.setdefault((trial.domain, trial.mode, ALL_KINDS), []).append(trial)
    order = list(dict.fromkeys(key[:2] for key in keys))
    return [
        _row(key, group, times, samples.get(key[0], []))
        for key, group in sorted(keys.items(), key=lambda item: order.index(item[0][:2]))
    ]


def token_times(sections: Iterable[Section]) -> TokenTimes:
    """All streams' tokens, but for moments in which a prompt was computed; sections do not overlap in time."""
    streams = [stream for section in sections for stream in section.streams]
    return TokenTimes((stream.token_times_s for stream in streams), left_out=_prefills(streams))


def _prefills(streams: Sequence[StreamRecord]) -> list[Window]:
    """When prompts were computed. One that took much longer than usual is the server's fault and no excuse."""
    waits = [stream.waiting for stream in streams if stream.waiting is not None]
    if not waits:
        return []
    longest_s = _LONG_PREFILL * median(wait.seconds for wait in waits)
    return [wait for wait in waits if wait.seconds <= longest_s]


def _row(key: tuple[str, str, str], trials: list[Trial], times: TokenTimes, samples: list[Sample]) -> Row:
    each = [assess([trial], times) for trial in trials]
    records = [trial.record for trial in trials]
    extra = [extra_memory(trial, samples) for trial in trials]
    return Row(
        *key,
        pooled=assess(trials, times),
        quiet=assess(at_rest(trials), times),
        stop_ms=Spread.of(record.stop_seconds * 1e3 for record in records),
        longest_hold_ms=Spread.of(record.longest_hold_seconds * 1e3 for record in records),
        seconds=Spread.of(record.seconds for record in records),
        p99_ratio=Spread.of(figures.p99_ratio for figures in each),
        loss=Spread.of(figures.loss for figures in each),
        copied_mb=Spread.of((record.snapshot_bytes + record.patch_bytes) / 1e6 for record in records),
        extra_mb=Spread.of(None if size is None else size / 1e6 for size in extra),
    )


def render(sections: Sequence[Section], samples: dict[str, list[Sample]]) -> Group:
    """The tables, and what a reader must know before trusting them."""
    rows = summary_rows(sections, samples)
    return Group(_stop_table(rows), _gap_table(rows), request_table(sections), *notes(sections))


def _stop_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "Refactorings: median \\[range] over rounds",
        (
            "done",
            "stop ms",
            "longest\nhold ms",
            "total s",
            "copied MB",
            "extra MB",
            "tokens\nlost %",
            "the same\nat rest",
        ),
    )
    for row, names in _named(rows):
        done = f"{row.pooled.num_done}/{row.pooled.num}"
        table.add_row(
            *names,
            done if row.pooled.num_done == row.pooled.num else f"[red]{done}[/]",
            spread_text(row.stop_ms, digits=2),
            spread_text(row.longest_hold_ms, digits=2),
            spread_text(row.seconds, digits=2),
            spread_text(row.copied_mb),
            spread_text(row.extra_mb),
            *(_text(figures.loss, "{:.1%}").rstrip("%") for figures in (row.pooled, row.quiet)),
            end_section=row.kind == ALL_KINDS,
        )
    return table


def _gap_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "Gaps between tokens in the refactorings' windows and at rest, pooled over rounds",
        (
            "n", "n rest", "p50 ms", "p50 rest", "p99 ms", "p99 rest", "p99\nratio", "the same\nat rest", "max ms",
            "max rest",
            "p99 ratio of\neach window",
        ),
    )  # fmt: skip
    for row, names in _named(rows):
        gaps, idle = row.pooled.gaps_ms, row.pooled.idle_gaps_ms
        table.add_row(
            *names,
            str(gaps.count),
            str(idle.count),
            *(_text(value, "{:.1f}") for value in (gaps.p50, idle.p50, gaps.p99, idle.p99)),
            *(_text(figures.p99_ratio, "{:.2f}") for figures in (row.pooled, row.quiet)),
            *(_text(value, "{:.1f}") for value in (gaps.max, idle.max)),
            spread_text(row.p99_ratio, digits=2),
            end_section=row.kind == ALL_KINDS,
        )
    return table


def request_table(sections: Sequence[Section]) -> Table:
    """Whether anybody lost anything."""
    table = Table(title="Requests", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("domain")
    table.add_column("mode")
    for heading in ("sent", "finished", "dropped", "other\ntext", "of these\nties", "tokens", "differing", "replayed"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, str], list[Section]] = {}
    for section in sections:
        groups.setdefault((section.domain, section.name), []).append(section)
    for (domain, mode), group in groups.items():
        differences = [difference for section in group for difference in section.differences]
        streams = [stream for section in group for stream in section.streams]
        table.add_row(
            domain,
            mode,
            str(len(streams)),
            str(sum(section.num_finished for section in group)),
            _zero_is_good(sum(section.num_dropped for section in group)),
            _zero_is_good(len(differences)),
            str(sum(is_tie(difference.logprob_gap) for difference in differences)),
            str(sum(len(stream.pieces) for stream in streams)),
            _zero_is_good(sum(difference.num_pieces for difference in differences)),
            str(sum(trial.record.num_replayed for section in group for trial in section.trials)),
        )
    return table


def is_tie(logprob_gap: float | None) -> bool:
    """Whether the two best tokens were too close to tell."""
    return logprob_gap is not None and logprob_gap < TIE_LOGPROB


def notes(sections: Sequence[Section]) -> list[str]:
    """Failures in words, and prefills inside windows."""
    found = []
    for section in sections:
        where = f"{section.domain}, {section.name}"
        found += [
            f"[red]{where}: {escape(trial.step.kind)} was {trial.record.outcome}: {escape(str(trial.record.error))}[/]"
            for trial in section.trials
            if not trial.is_done
        ]
        errors = {stream.error for stream in section.streams if stream.error is not None}
        found += [f"[red]{where}: a request failed: {escape(error)}[/]" for error in sorted(errors)]
        found += [
            f"[red]{where}: prompt {d.prompt}, piece {d.piece}: {escape(repr(d.found))} instead of"
            f" {escape(repr(d.expected))}, log probabilities {d.logprob_gap} apart[/]"
            for d in section.differences[:3]
        ]
    num_prefills = sum(
        stream.waiting is not None
        and stream.waiting.end_s > trial.window.start_s
        and stream.waiting.start_s < trial.window.end_s
        for section in sections
        for trial in section.trials
        for stream in section.streams
    )
    num_trials = sum(len(section.trials) for section in sections)
    if any(section.name == CHURN for section in sections):
        found.append("Churn loads without rests and copies fast: its gaps and lost tokens are not those of live.")
    return [
        *found,
        f"{num_prefills} prompts were computed in the windows of {num_trials} refactorings; those moments, there and at"
        " rest, are in no gap and no rate.",
        "The same at rest: the middle of each window at rest against its first and last quarter. These have fewer"
        " tokens than the refactorings' windows, so they show at least how far figures go up and down by themselves.",
    ]


def to_json(
    sections: Sequence[Section], samples: dict[str, list[Sample]], *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything measured, ready for ``json.dump``; times are of one clock."""
    times = token_times(sections)
    return {
        "version": 1,
        "settings": settings,
        "machine": machine(),
        "summary": [asdict(row) for row in summary_rows(sections, samples)],
        "sections": [
            {
                "domain": section.domain,
                "name": section.name,
                "round": section.round,
                "num_dropped": section.num_dropped,
                "num_stalled": section.num_stalled,
                "differences": [asdict(difference) for difference in section.differences],
                "trials": [
                    {
                        "step": asdict(trial.step),
                        "window": asdict(trial.window),
                        "before": asdict(trial.before),
                        "after": asdict(trial.after),
                        "asked_s": trial.asked_s,
                        "switched_s": trial.switched_s,
                        "figures": asdict(assess([trial], times)),
                        "extra_memory_bytes": extra_memory(trial, samples.get(section.domain, [])),
                        "record": msgspec.to_builtins(trial.record),
                    }
                    for trial in section.trials
                ],
                "streams": [_stream(asdict(stream)) for stream in section.streams],
            }
            for section in sections
        ],
        "memory_samples": samples,
    }


def _stream(fields: dict[str, Any]) -> dict[str, Any]:
    # A tenth of a millisecond is below what a client can see, and six digits a token are enough.
    times = [round(at_s, 4) for at_s in fields["token_times_s"]]
    return fields | {"token_times_s": times, "pieces": len(fields["pieces"])}


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("domain", "mode", "kind"):
        table.add_column(name, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _named(rows: Sequence[Row]) -> Iterable[tuple[Row, tuple[str, str, str]]]:
    """Rows with their names, those of the row above left out."""
    last: tuple[str, str] = ("", "")
    for row in rows:
        same = (row.domain, row.mode) == last
        last = (row.domain, row.mode)
        yield row, ("" if same else row.domain, "" if same else row.mode, row.kind)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _zero_is_good(number: int) -> str:
    return f"[red]{number}[/]" if number else "0"
