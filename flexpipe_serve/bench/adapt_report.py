"""What the adaptation benchmark found: tables, verdicts, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.bench.adapt_metrics import Alone, Figures, Judged, Paired, Verdict, assess, baseline_of, judge
from flexpipe_serve.bench.adapt_run import AdaptRun
from flexpipe_serve.bench.adapt_trace import WorkloadFacts
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.identity import Difference
from flexpipe_serve.bench.report import notes, spread_text
from flexpipe_serve.bench.summary import Spread, summarize

PUBLISHED = {1.0: -0.383, 4.0: -0.661}
"""Latency of FlexPipe against AlpaServe, whose pipelines are static, by the CV of arrivals: its paper, 82 GPUs."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What was measured before a trace's runs, with its lengths.

    Args:
        capacity: requests a second that each static layout sustains, by name; {}: not measured as a whole.
        alone: latency of a request on an idle server, with the best of them.
    """

    capacity: dict[str, float]
    alone: Alone


@dataclass(slots=True)
class TraceResult:
    """All runs of one trace.

    Args:
        name: of the trace.
        workload: the requests, the same in every run.
        facts: of those that count.
        yardstick: see there.
        lead_in_s: requests that are due earlier do not count.
        duration_s: for which requests come afterwards.
        slo_s: target of the latency; None: ``slo_factor`` times the latency alone, of each request.
        slo_factor: see ``slo_s``.
        published: what FlexPipe's paper has for such arrivals, see ``PUBLISHED``.
        runs: in the order done.
        differences: by run, what was said otherwise than in the first run that answered.
    """

    name: str
    workload: list[Arrival]
    facts: WorkloadFacts
    yardstick: Yardstick
    lead_in_s: float
    duration_s: float
    slo_s: float | None
    slo_factor: float
    published: float | None = None
    runs: list[AdaptRun] = field(default_factory=list)
    differences: list[tuple[AdaptRun, Difference]] = field(default_factory=list)

    @property
    def variants(self) -> list[str]:
        """Names, in the order of the first repetition."""
        return list(dict.fromkeys(run.variant.name for run in self.runs))

    def runs_of(self, variant: str) -> list[AdaptRun]:
        """Repetitions of one variant."""
        return [run for run in self.runs if run.variant.name == variant]

    def judged(self, run: AdaptRun) -> list[Judged]:
        """The requests of a run that count."""
        found = []
        for arrival, request in zip(self.workload, run.wave.requests, strict=True):
            if arrival.at_s >= self.lead_in_s:
                alone_s = self.yardstick.alone.seconds(arrival)
                target_s = self.slo_factor * alone_s if self.slo_s is None else self.slo_s
                found.append(Judged(request, alone_s=alone_s, target_s=target_s))
        return found

    def figures(self) -> dict[str, list[Figures]]:
        """Of every run, by variant. What is normal, and so what is a stall, is the same for all of them."""
        baseline = baseline_of(each for run in self.runs for each in self.judged(run))
        return {
            variant: [
                assess(
                    self.judged(run),
                    run.looks,
                    [at_s for at_s, _ in run.switches],
                    baseline=baseline,
                    start_s=self.lead_in_s,
                    load_s=self.duration_s,
                )
                for run in self.runs_of(variant)
            ]
            for variant in self.variants
        }

    def verdicts(self) -> list[Verdict]:
        """Of each policy that has runs, against the static layouts that have."""
        means = {
            name: spread
            for name, figures in self.figures().items()
            if (spread := Spread.of(each.latency_ms.mean for each in figures)) is not None
        }
        first = {name: self.runs_of(name)[0].variant for name in means}
        statics = {name: spread for name, spread in means.items() if first[name].is_static}
        if not statics:
            return []
        found = []
        for name, spread in means.items():
            if first[name].is_static:
                continue
            has_moved = any(run.records for run in self.runs_of(name))
            same = [other for other in statics if first[other].boundaries == first[name].boundaries]
            paired = {other: Paired.of(self._pairs(name, other)) for other in statics}
            found.append(
                judge(name, spread, statics, paired=paired, same_as=same[0] if same and not has_moved else None)
            )
        return found

    def _pairs(self, name: str, other: str) -> list[list[tuple[float, float]]]:
        """Latencies of each request that both variants answered, by repetition."""
        runs = {run.repeat: run for run in self.runs_of(other)}
        return [
            [
                (mine.latency_s, its.latency_s)
                for mine, its in zip(self.judged(run), self.judged(runs[run.repeat]), strict=True)
                if mine.request.error is None and its.request.error is None
            ]
            for run in self.runs_of(name)
            if run.repeat in runs
        ]


def render(result: TraceResult) -> Group:
    """The table of a trace, the verdicts, and what a reader must know."""
    facts, capacity = result.facts, result.yardstick.capacity
    measured = ", ".join(f"{name} {rate:.2f}" for name, rate in capacity.items())
    share = f" ({facts.rate / max(capacity.values()):.0%} of the best capacity: {measured})" if capacity else ""
    cv = "-" if facts.cv is None else f"{facts.cv:.2f}"
    head = (
        f"[bold]{escape(result.name)}[/]: {facts.num_requests} requests at {facts.rate:.2f}/s{share},"
        f" CV {cv}, busiest tenth {facts.peak:.1f} times the mean,"
        f" {facts.mean_prompt:.0f} + {facts.mean_output:.0f} tokens"
    )
    parts: list[Table | str] = [head, _table(result)]
    parts += [verdict_line(result, verdict) for verdict in result.verdicts()]
    for run in result.runs:
        where = f"{run.variant.name}, repeat {run.repeat + 1}"
        summary = summarize([run.wave])
        parts += [f"[yellow]{where}: {note}[/]" for note in notes(summary)]
        parts += [f"[red]{where}: {count} lost: {escape(reason)}[/]" for reason, count in summary.errors.items()]
        parts += [
            f"[red]{where}: refactoring {record.id} {record.outcome}: {escape(record.error)}[/]"
            for record in run.records
            if record.error is not None
        ]
    for run, difference in result.differences:
        gap = difference.logprob_gap
        shown = "" if gap is None else f" (the two best tokens {gap:.1e} apart)"
        parts.append(
            f"[red]{run.variant.name}, repeat {run.repeat + 1}: request {difference.prompt} said"
            f" {escape(repr(difference.found))} instead of {escape(repr(difference.expected))}{shown}[/]"
        )
    return Group(*parts)


def verdict_line(result: TraceResult, verdict: Verdict) -> str:
    """One sentence about one policy."""
    against = ", ".join(f"{ratio - 1:+.1%} against {name}" for name, ratio in verdict.by_static.items())
    if result.published is not None:
        against += f"; FlexPipe's paper has {result.published:+.1%} against static AlpaServe, on 82 GPUs"
    color, word = ("green", "no worse") if verdict.is_met else ("red", "WORSE")
    said = f"is {word} than the best static layout in hindsight"
    if verdict.same_as == verdict.best:
        said = f"never moved: same layout as {verdict.best} throughout, the best static one; they differ by chance"
    elif verdict.same_as is not None:
        said = f"never moved: same layout as {verdict.same_as} throughout; it {said}"
    return (
        f"[{color}]{escape(result.name)}: {verdict.policy} {said}:"
        f" mean {verdict.policy_ms.median:.0f} ms against {verdict.best_ms.median:.0f} ms"
        f" \\[{verdict.best_ms.low:.0f}-{verdict.best_ms.high:.0f}] of {verdict.best}, ratio {verdict.ratio:.3f},"
        f" allowed {verdict.limit:.3f}; request by request {paired_text(verdict.paired)}[/] ({against})"
    )


def paired_text(paired: Paired | None) -> str:
    """Per cent with the confidence interval."""
    if paired is None:
        return "-"
    interval = "" if paired.low is None else f" \\[{paired.low:+.1%} to {paired.high:+.1%}]"
    return f"{paired.mean:+.1%}{interval}"


def overview(results: Sequence[TraceResult]) -> Table:
    """All traces: each policy's mean latency against that of the static layout that turned out best."""
    table = Table(
        title="mean latency against the best static layout in hindsight; median \\[range] over repeats, and request by"
        " request with its 95 % confidence interval",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    left = ("trace", "best static", "policy", "same as")
    for heading in (
        "trace", "best static", "ms", "policy", "ms", "difference", "allowed", "by request", "switches", "same as",
        "devices × s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in left else "right")
    for result in results:
        figures = result.figures()
        for verdict in result.verdicts():
            own = figures[verdict.policy]
            color = "green" if verdict.is_met else "red"
            table.add_row(
                escape(result.name),
                verdict.best,
                spread_text(verdict.best_ms, digits=0),
                verdict.policy,
                spread_text(verdict.policy_ms, digits=0),
                f"[{color}]{verdict.ratio - 1:+.1%}[/]",
                f"{verdict.limit - 1:+.1%}",
                paired_text(verdict.paired),
                spread_text(Spread.of(each.num_switches for each in own), digits=0),
                verdict.same_as or "-",
                spread_text(Spread.of(each.device_s for each in own), digits=0),
            )
    return table


_COLUMNS: tuple[tuple[str, Callable[[Figures], float | None], int], ...] = (
    ("mean\nms", lambda f: f.latency_ms.mean, 0),
    ("p50\nms", lambda f: f.latency_ms.p50, 0),
    ("p99\nms", lambda f: f.latency_ms.p99, 0),
    ("TTFT\nmean ms", lambda f: f.ttft_ms.mean, 0),
    ("TPOT\nmean ms", lambda f: f.tpot_ms.mean, 1),
    ("goodput\n/s", lambda f: f.goodput_per_s, 2),
    ("in time\n%", lambda f: 100 * f.good_share, 0),
    ("stalls", lambda f: f.num_stalls, 0),
    ("recovery\ns", lambda f: f.recovery_s, 2),
    ("devices\n× s", lambda f: f.device_s, 0),
    ("stages\n× s", lambda f: f.stage_s, 0),
    ("switches", lambda f: f.num_switches, 0),
)


def _table(result: TraceResult) -> Table:
    table = Table(title="median \\[range] over repeats", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("lost", justify="right")
    table.add_column("differ", justify="right")
    for variant, figures in result.figures().items():
        num_lost = sum(each.num_lost for each in figures)
        num_different = sum(run.variant.name == variant for run, _ in result.differences)
        table.add_row(
            variant,
            *(spread_text(Spread.of(value(each) for each in figures), digits=digits) for _, value, digits in _COLUMNS),
            f"[red]{num_lost}[/]" if num_lost else "0",
            f"[red]{num_different}[/]" if num_different else "0",
        )
    return table


def to_json(result: TraceResult) -> dict[str, Any]:
    """Everything measured of a trace, ready for ``json.dump``."""
    figures = result.figures()
    return {
        "trace": result.name,
        "facts": asdict(result.facts),
        "capacity_per_s": result.yardstick.capacity,
        "alone": asdict(result.yardstick.alone),
        "lead_in_s": result.lead_in_s,
        "duration_s": result.duration_s,
        "slo_s": result.slo_s,
        "slo_factor": result.slo_factor,
        "published": result.published,
        "arrivals": [asdict(arrival) for arrival in result.workload],
        "verdicts": [asdict(verdict) | {"is_met": verdict.is_met} for verdict in result.verdicts()],
        "variants": {
            variant: [
                {
                    "repeat": run.repeat,
                    "figures": asdict(own),
                    "requests": [
                        {
                            "start_s": request.start_s,
                            "ttft_s": request.token_times_s[0] - request.start_s if request.token_times_s else None,
                            "end_s": request.end_s,
                            "num_output_tokens": request.num_output_tokens,
                            "error": request.error,
                        }
                        for request in run.wave.requests
                    ],
                    "looks": [asdict(look) for look in run.looks],
                    "refactorings": msgspec.to_builtins(run.records),
                    "decisions": list(run.decisions),
                    "started_at": run.started_at,
                }
                for run, own in zip(result.runs_of(variant), figures[variant], strict=True)
            ]
            for variant in result.variants
        },
        "differences": [
            {"variant": run.variant.name, "repeat": run.repeat, **asdict(difference)}
            for run, difference in result.differences
        ],
    }
