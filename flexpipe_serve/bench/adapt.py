"""``flexpipe bench adapt``: does it pay to change the pipeline with the load?

For each trace the same requests, in the same order, are sent to one server as each of

* a static pipeline of 1, 2, 3 stages (--stages),
* the planner with FlexPipe's policy, and with the gated one (--policies), both from --start stages on,

one after the other. Between two runs the server is brought to the next one's layout by a refactoring and comes to rest;
a policy is switched on then, and has seen nothing. All traces are run through before the next of --repeats begins, and
the order of the variants is reversed from trace to trace and from repetition to repetition: so a machine that gets
slower or faster favours none, and layouts change seldom. The prefix cache is off, for the requests are the same every
time.

The load suits the machine: at first each static layout is measured in a closed loop (--concurrency), with requests of
the mean lengths, and the best one again with each recorded trace's lengths. A trace's mean rate is --load times that.
Requests of the first --lead-in seconds count for no variant: a policy has seen the load when it is measured, as one
that has run for hours has. The results so far are written after every run.

A policy is judged by its mean latency against the static layout that turns out best: it may take 2 % more, or as much
more as that layout's own slowest repetition. Beside that stands how much longer the same requests took in the same
repetition, with the 95 % confidence interval over repetitions. A policy that never left the layout it began with ran as
that static layout did, and the table says so: then all difference is chance.

Goodput counts answers within --slo seconds, or within --slo-factor times what the request takes on an idle server.
Stalls are FlexPipe's: from a response slower than 1.5 times the 25th percentile (of all runs, each latency in units of
the request's on an idle server) to one within 1.2 times. Devices are what stages compute with: stages that share a
node's cores are one device (see stage_cpus in the configuration).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from flexpipe_serve.bench.adapt_report import PUBLISHED, TraceResult, Yardstick, overview, render, to_json
from flexpipe_serve.bench.adapt_run import AdaptRun, AdaptSession, Variant
from flexpipe_serve.bench.adapt_server import (
    add_server_arguments,
    compare_answers,
    make_prompts,
    running_session,
    settings_of,
    write_json,
)
from flexpipe_serve.bench.adapt_trace import LONGEST, TraceSpec, WorkloadFacts, make_workload
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.experiment import run_experiment
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.refactor_report import is_tie
from flexpipe_serve.bench.report import machine
from flexpipe_serve.bench.serve import positive_int
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.demo import ensure_demo
from flexpipe_serve.pipeline.layout import even_boundaries

POLICIES = ("flexpipe", "gated")
_CALIBRATION = 3
"""So many requests for each place of the closed loop that measures capacity."""
_NUM_ALONE = 6
_KV_RESERVE = 2
"""KV is limited to so many times what the closed loop needs, so that no change of the layout commits gigabytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench adapt``."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what is compared")
    what.add_argument("--stages", type=_numbers, default=(1, 2, 3), metavar="LIST", help="static ones (default 1,2,3)")
    what.add_argument(
        "--policies", type=policies, default=POLICIES, metavar="LIST", help="of flexpipe,gated (default: both)"
    )
    what.add_argument("--start", type=positive_int, default=1, metavar="N", help="stages of policies (default 1)")
    what.add_argument("--warm-stages", type=int, default=1, metavar="N", help="empty stages kept ready (default 1)")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--trace",
        action="append",
        type=_trace,
        metavar="TRACE",
        help="gamma:CV, or a CSV file (arrival_s,prompt_tokens,output_tokens; .gz too): FILE or FILE@START for requests"
        " in a row from START (s) on, FILE@START+SECONDS for a window, thinned; repeat it for several"
        " (default: gamma:1, gamma:2, gamma:4, gamma:8)",
    )
    load.add_argument("--duration", type=float, default=14.0, metavar="S", help="of what counts (default 14)")
    load.add_argument("--lead-in", type=float, default=4.0, metavar="S", help="before that (default 4)")
    load.add_argument("--load", type=float, default=0.65, metavar="X", help="of the best capacity (default 0.65)")
    load.add_argument("--rate", type=float, metavar="R", help="mean requests/s, instead of --load")
    load.add_argument("--prompt-tokens", type=positive_int, default=64, metavar="N", help="mean (default 64)")
    load.add_argument("--output-tokens", type=positive_int, default=32, metavar="N", help="mean (default 32)")
    load.add_argument("--concurrency", type=positive_int, default=16, metavar="N", help="for capacity (default 16)")
    load.add_argument("--slo", type=float, metavar="S", help="target of a request's latency")
    load.add_argument("--slo-factor", type=float, default=5.0, metavar="X", help="without --slo (default 5)")
    load.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="of all variants (default 3)")
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 if a request was lost, or answered otherwise than in the first run without a tie; 2 if it cannot be
        measured. A verdict that goes against a policy is a finding and no failure.
    """
    return run_experiment(_Bench, args)


class _Bench:
    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._args = args
        self._console = console
        self._specs: list[TraceSpec] = args.trace or [TraceSpec.parse(f"gamma:{cv}") for cv in (1, 2, 4, 8)]
        self._builder = PromptBuilder(args.tokenizer or ensure_demo())
        self._results: list[TraceResult] = []
        self._is_whole = False
        # Before the server is started: files that are missing, and traces that are too short.
        for spec in self._specs:
            self._sample(spec)

    @property
    def is_good(self) -> bool:
        """Whether all that was asked for was done, nothing was lost, and what was said is the same."""
        return (
            self._is_whole
            and not any(
                request.error is not None
                for result in self._results
                for run in result.runs
                for request in run.wave.requests
            )
            and all(is_tie(d.logprob_gap) for result in self._results for _, d in result.differences)
        )

    async def run(self) -> None:
        """All traces; what was measured before an error stays."""
        args = self._args
        user_config = {"layout": {"stages": args.start}, "warm_stages": args.warm_stages}
        longest = LONGEST * (args.prompt_tokens + args.output_tokens)
        kv = {"max_tokens": _KV_RESERVE * args.concurrency * longest}
        async with running_session(args, self._builder, server_args={"kv": kv}, user_config=user_config) as session:
            num_layers = (await session.handle.status()).layout.num_layers

            def even(num_stages: int) -> tuple[int, ...]:
                return tuple(even_boundaries(num_layers=num_layers, num_stages=num_stages))

            statics = [Variant(f"static {num}", even(num)) for num in args.stages]
            policies = [Variant(policy, even(args.start), policy) for policy in args.policies]
            await self._measure(session, statics)
            variants = [*statics, *policies]
            for repeat in range(args.repeats):
                for index, result in enumerate(self._results):
                    await self._run_trace(session, result, in_turn(variants, index=index, repeat=repeat), repeat=repeat)
        self._is_whole = True

    async def _measure(self, session: AdaptSession, statics: Sequence[Variant]) -> None:
        """What the machine can do, and so the load of each trace."""
        args = self._args
        capacity: dict[str, float] = {}
        equal = [Arrival(0.0, args.prompt_tokens, args.output_tokens)] * (_CALIBRATION * args.concurrency)
        prompts = make_prompts(self._builder, equal, seed=(args.seed, 0))
        for variant in statics:
            await session.take(variant)
            capacity[variant.name] = await session.capacity(equal, prompts, concurrency=args.concurrency)
            self._console.print(f"{variant.name} sustains {capacity[variant.name]:.2f} requests/s")
            if args.policies:
                await session.have_planned(self._console.print)
        best = max(statics, key=lambda variant: capacity[variant.name])
        await session.take(best)
        alone = await session.alone(equal[:_NUM_ALONE], prompts[:_NUM_ALONE])
        for spec in self._specs:
            yardstick = Yardstick(capacity, alone)
            if spec.cv is None:
                sample = self._sample(spec)
                prompts = make_prompts(self._builder, sample, seed=(args.seed, 0))
                own = await session.capacity(sample, prompts, concurrency=args.concurrency)
                self._console.print(f"{escape(spec.name)}: {best.name} sustains {own:.2f} requests/s")
                yardstick = Yardstick({best.name: own}, await session.alone(sample[:_NUM_ALONE], prompts[:_NUM_ALONE]))
            self._results.append(self._result(spec, yardstick))

    def _result(self, spec: TraceSpec, yardstick: Yardstick) -> TraceResult:
        args = self._args
        seconds = args.lead_in + args.duration
        rate = args.rate or args.load * max(yardstick.capacity.values())
        workload = self._workload(spec, max(2, round(rate * seconds)), seconds)
        counted = [
            Arrival(each.at_s - args.lead_in, each.num_prompt_tokens, each.num_output_tokens)
            for each in workload
            if each.at_s >= args.lead_in
        ]
        if not counted:
            raise ConfigError(f"{spec.name} has no request after the lead-in; give a longer --duration")
        return TraceResult(
            name=spec.name,
            workload=workload,
            facts=WorkloadFacts.of(counted, duration_s=args.duration),
            yardstick=yardstick,
            lead_in_s=args.lead_in,
            duration_s=args.duration,
            slo_s=args.slo,
            slo_factor=args.slo_factor,
            published=None if spec.cv is None else PUBLISHED.get(spec.cv),
        )

    async def _run_trace(
        self, session: AdaptSession, result: TraceResult, variants: Sequence[Variant], *, repeat: int
    ) -> None:
        prompts = make_prompts(self._builder, result.workload, seed=(self._args.seed, 1))
        for variant in variants:
            run = await session.run(variant, result.workload, prompts, repeat=repeat)
            result.runs.append(run)
            self._console.print(escape(f"{result.name}: {describe(run)}"))
            self._save()
        if repeat == self._args.repeats - 1:
            result.differences = await compare_answers(result.runs, session, result.workload, prompts)

    def _sample(self, spec: TraceSpec) -> list[Arrival]:
        """Requests of the trace's lengths."""
        return self._workload(spec, _CALIBRATION * self._args.concurrency, 1.0)

    def _workload(self, spec: TraceSpec, num_requests: int, seconds: float) -> list[Arrival]:
        args = self._args
        return make_workload(
            spec, num_requests, duration_s=seconds, mean_prompt=args.prompt_tokens, mean_output=args.output_tokens,
            seed=args.seed,
        )  # fmt: skip

    def report(self) -> None:
        """Tables, JSON and pictures of what was measured."""
        args, results = self._args, [result for result in self._results if result.runs]
        for result in results:
            self._console.print(render(result))
        if results:
            self._console.print(overview(results))
        self._save()
        if args.json is not None and results:
            self._console.print(f"wrote {args.json}")
        if args.plot is not None:
            from flexpipe_serve.bench.adapt_plot import save_plot  # only now: matplotlib takes its time to import

            for result in results:
                slug = re.sub(r"[^A-Za-z0-9.]+", "-", result.name)
                path = args.plot.with_stem(f"{args.plot.stem}-{slug}")
                save_plot(result, path)
                self._console.print(f"wrote {path}")

    def _save(self) -> None:
        results = [result for result in self._results if result.runs]
        if self._args.json is not None and results:
            write_json(
                {
                    "version": 1,
                    "settings": settings_of(self._args),
                    "machine": machine(),
                    "traces": [to_json(result) for result in results],
                },
                self._args.json,
            )


def in_turn(variants: Sequence[Variant], *, index: int, repeat: int) -> list[Variant]:
    """The order of the variants in a trace's repetition, by the layout at the start: to and fro."""
    order = sorted(variants, key=lambda variant: (len(variant.boundaries), variant.boundaries))
    return order if (index + repeat) % 2 == 0 else order[::-1]


def describe(run: AdaptRun) -> str:
    """One line about a run that is over."""
    good = [request for request in run.wave.requests if request.error is None]
    mean_s = sum(request.end_s - request.start_s for request in good) / max(1, len(good))
    switches = "".join(f"; {list(boundaries)} at {at_s:.1f} s" for at_s, boundaries in run.switches)
    return (
        f"{run.variant.name}, repeat {run.repeat + 1}: {len(good)} of {len(run.wave.requests)} answered,"
        f" mean {mean_s * 1e3:.0f} ms{switches}"
    )


def _trace(text: str) -> TraceSpec:
    try:
        return TraceSpec.parse(text)
    except ConfigError as error:  # argparse would show no ValueError's text
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


def policies(text: str) -> tuple[str, ...]:
    """Names of policies, for argparse; '' is none."""
    names = tuple(part for part in text.split(",") if part)
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(POLICIES)}")
    return names
