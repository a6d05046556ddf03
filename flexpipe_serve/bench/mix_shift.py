"""``flexpipe bench mix-shift``: the kind of request changes, and two unequal stages must be cut anew (PipeLive).

The first stage is slow and has much memory, the second is fast and has little. Each has half of the machine's cores to
itself; the slow one is emulated: it rests after each step so that it computes for --slow-share of the time. Requests
with long prompts and short outputs hold KV for a moment only and want layers on the fast stage. Requests with short
prompts and long outputs want KV for many sequences, so layers must leave the stage that has little memory, also where
the other one is slower. PipeLive had two unlike GPUs; what is emulated here is their unequal compute and memory, not an
unequal memory bandwidth.

1. A first server, with plentiful KV, tells what weights, processes and KV blocks take, a second one what processes take
   with little. The fast stage's budget is what it takes with the layers from --boundary on, and KV for --sequences of
   the longest requests; the slow stage's is the one that never limits, up to the boundary that leaves the fast stage
   room for --growth times as many.
2. On a server with these budgets, every boundary of the sweep (--sweep; default: --boundary and that one; the
   even split always) is measured with --concurrency requests of each kind at once. A table says where the best ones
   are.
3. Both kinds come one after the other, --requests of each, at --load times what the best boundary for it sustains, to:
   the even split (balanced), with --all-static every other boundary of the sweep too, the planner with each policy
   (from the even split on), and PipeLive's own script, which begins with the first kind's best split and is told to
   change to the second's when the requests change. One server serves them all, in another order each time (see
   ``bench adapt``).

The composite is PipeLive's mean of three scores: mean TTFT, mean TPOT and tokens/s, each in units of the best
variant's. Its gain over the balanced split stands beside PipeLive's. Requests of the first --lead-in seconds do not
count. The results so far are written after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import AsyncIterator, Sequence

from rich.console import Console
from rich.markup import escape

from flexpipe_serve.bench.adapt import describe, in_turn, policies
from flexpipe_serve.bench.adapt_report import TraceResult, Yardstick
from flexpipe_serve.bench.adapt_run import AdaptSession, Variant
from flexpipe_serve.bench.adapt_server import (
    add_server_arguments,
    compare_answers,
    make_prompts,
    running_session,
    settings_of,
    write_json,
)
from flexpipe_serve.bench.adapt_trace import WorkloadFacts
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.experiment import run_experiment
from flexpipe_serve.bench.mix_shift_plan import BALANCED, Mix, SweepPoint, best_boundary, shifting_arrivals
from flexpipe_serve.bench.mix_shift_report import render, sweep_table, to_json
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.refactor_report import is_tie
from flexpipe_serve.bench.report import machine
from flexpipe_serve.bench.resize_plan import plan_resize
from flexpipe_serve.bench.resize_run import calibrate
from flexpipe_serve.bench.serve import positive_int
from flexpipe_serve.bench.server import adapt_config, default_log, read_config
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.demo import ensure_demo

_LOOK_AT = 8
"""Requests of each kind, at once, while memory is looked at."""
_LOOK_AT_OUTPUT = 16
_NUM_ALONE = 2
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench mix-shift``."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    stages = parser.add_argument_group("stages")
    stages.add_argument(
        "--slow-share", type=float, default=0.5, metavar="X", help="speed of the slow one (default 0.5)"
    )
    stages.add_argument("--boundary", type=positive_int, default=13, metavar="N", help="lowest boundary (default 13)")
    stages.add_argument("--sequences", type=positive_int, default=1, metavar="N", help="that fit there (default 1)")
    stages.add_argument("--growth", type=float, default=9.0, metavar="X", help="at the highest one (default 9)")
    stages.add_argument(
        "--budgets", type=_budgets, metavar="A,B", help="MiB of the slow and the fast stage, instead of looking first"
    )
    stages.add_argument("--sweep", type=_numbers, metavar="LIST", help="boundaries to measure; see above")
    stages.add_argument(
        "--policies",
        type=policies,
        default=("gated",),
        metavar="LIST",
        help="of flexpipe,gated (default gated)",
    )
    stages.add_argument("--all-static", action="store_true", help="run every boundary of the sweep throughout")
    load = parser.add_argument_group("load")
    load.add_argument("--first", type=_mix, default=_mix("96+4"), metavar="P+O", help="prompt + output (default 96+4)")
    load.add_argument("--second", type=_mix, default=_mix("32+160"), metavar="P+O", help="likewise (default 32+160)")
    load.add_argument("--load", type=float, default=0.85, metavar="X", help="of the best capacity (default 0.85)")
    load.add_argument("--rates", type=_pair, metavar="A,B", help="requests/s of both kinds, instead of --load")
    load.add_argument(
        "--requests", type=positive_int, default=24, metavar="N", help="of each kind that count (default 24)"
    )
    load.add_argument("--lead-in", type=float, default=4.0, metavar="S", help="before that (default 4)")
    load.add_argument("--cv", type=float, default=0.1, help="of the gaps between requests (default 0.1, as PipeLive)")
    load.add_argument("--concurrency", type=positive_int, default=12, metavar="N", help="of the sweep (default 12)")
    load.add_argument("--slo-factor", type=float, default=5.0, metavar="X", help="times the latency alone (default 5)")
    load.add_argument("--repeats", type=positive_int, default=2, metavar="N", help="of all variants (default 2)")
    load.add_argument("--only-sweep", action="store_true", help="measure the boundaries, and no more")
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the experiment.

    Returns:
        0; 1 if a request was lost, or answered otherwise than in the first run without a tie; 2 if it cannot be
        measured.
    """
    return run_experiment(_Experiment, args)


class _Experiment:
    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise ConfigError(
                f"this process may use {len(cores)} core; the experiment needs one for each of two stages"
            )
        half = len(cores) // 2
        self._args = args
        self._console = console
        self._mixes: tuple[Mix, Mix] = (args.first, args.second)
        self._builder = PromptBuilder(args.tokenizer or ensure_demo())
        self._log = args.server_log or default_log()
        self._stage_cpus = {
            "stage-0": {"cores": cores[:half], "share": args.slow_share},
            "stage-1": {"cores": cores[half : 2 * half]},
        }
        self._points: list[SweepPoint] = []
        self._result: TraceResult | None = None
        self._shift_s = 0.0
        self._ends = (args.boundary, args.boundary)
        """Of the sweep, unless it is given."""
        self._is_whole = False

    @property
    def is_good(self) -> bool:
        """Whether all that was asked for was done, nothing was lost, and what was said is the same."""
        result = self._result
        return self._is_whole and (
            result is None
            or (
                not any(request.error is not None for run in result.runs for request in run.wave.requests)
                and all(is_tie(difference.logprob_gap) for _, difference in result.differences)
            )
        )

    async def run(self) -> None:
        """The three parts."""
        args = self._args
        budgets = args.budgets or await self._budgets()
        async with self._session(budgets, boundary=args.boundary) as session:
            even = (await session.handle.status()).layout.num_layers // 2
            await self._sweep(session, sorted({*(args.sweep or self._ends), even}))
            self._console.print(sweep_table(self._points, self._mixes))
            if not args.only_sweep:
                await self._compare(session, even)
        self._is_whole = True

    @contextlib.asynccontextmanager
    async def _session(self, budgets: Sequence[int], *, boundary: int) -> AsyncIterator[AdaptSession]:
        """A server with these budgets, whose processes have been used: what they take grows then, and KV gets what they
        leave."""
        args = self._args
        server_args = {
            "kv": {"domain": "stage"},
            "stage_cpus": self._stage_cpus,
            "memory_budget": {f"stage-{index}": size for index, size in enumerate(budgets)},
        }
        user_config = {"layout": {"boundaries": [boundary]}, "warm_stages": 0}
        async with running_session(args, self._builder, server_args=server_args, user_config=user_config) as session:
            requests, prompts = self._both_kinds()
            await session.capacity(requests, prompts, concurrency=_LOOK_AT)
            yield session

    async def _budgets(self) -> tuple[int, int]:
        """Bytes of both stages, from what a server with plentiful KV takes, and then one with little: processes take
        less there."""
        args = self._args
        longest = max(mix.num_tokens for mix in self._mixes)
        config = adapt_config(
            read_config(args.config),
            args={
                "kv": {"domain": "stage", "prefix_cache": False, "max_tokens": 4 * _LOOK_AT * longest},
                "stage_cpus": self._stage_cpus,
            },
            user_config={"layout": {"stages": 2}, "warm_stages": 0},
        )
        requests, prompts = self._both_kinds()
        self._console.print(f"looking at memory with plentiful KV (log of the servers: {self._log})")
        calibration = await calibrate(config, requests, prompts, num_few=_LOOK_AT, log=self._log)
        profile = calibration.profile
        num_blocks = args.sequences * -(-longest // profile.block_size)
        plan = plan_resize(profile, old=args.boundary, num_blocks=num_blocks, growth=args.growth)
        self._ends = (plan.old, plan.new)
        slow, fast = plan.budgets
        async with self._session(plan.budgets, boundary=plan.old) as session:
            num_more = (await session.handle.status()).kv.num_blocks - num_blocks
        fast -= num_more * (profile.num_layers - plan.old) * profile.block_bytes
        self._console.print(
            f"budgets: slow stage (emulated, {args.slow_share:g} of a core's time) {slow / _MIB:.0f} MiB,"
            f" fast stage {fast / _MIB:.1f} MiB (--budgets {slow / _MIB:.0f},{fast / _MIB:.1f} takes the same);"
            f" KV blocks of {profile.block_size} tokens: {plan.old_blocks} with boundary {plan.old},"
            f" {plan.new_blocks} with {plan.new}"
        )
        return slow, fast

    def _both_kinds(self) -> tuple[list[Arrival], list[str]]:
        """Some requests of both kinds, with short outputs."""
        requests = [
            Arrival(0.0, mix.num_prompt_tokens, min(mix.num_output_tokens, _LOOK_AT_OUTPUT))
            for _ in range(_LOOK_AT)
            for mix in self._mixes
        ]
        return requests, make_prompts(self._builder, requests, seed=(self._args.seed, 0))

    async def _sweep(self, session: AdaptSession, boundaries: list[int]) -> None:
        concurrency = self._args.concurrency
        for boundary in boundaries:
            await session.take(Variant(f"boundary {boundary}", (boundary,)))
            rates = {}
            for index, mix in enumerate(self._mixes):
                # Of short requests more, so that they come one after the other.
                requests = mix.requests(concurrency * max(1, _LOOK_AT_OUTPUT // mix.num_output_tokens))
                prompts = make_prompts(self._builder, requests, seed=(self._args.seed, 1 + index))
                rates[mix.name] = await session.capacity(requests, prompts, concurrency=concurrency)
            if self._args.policies and not self._args.only_sweep:
                await session.have_planned(self._console.print)
            num_blocks = (await session.handle.status()).kv.num_blocks
            self._points.append(SweepPoint(boundary, num_blocks, rates))
            self._save()
            shown = ", ".join(f"{rate:.3f} requests/s of {name}" for name, rate in rates.items())
            self._console.print(f"boundary {boundary}: {num_blocks} KV blocks, {shown}")

    async def _compare(self, session: AdaptSession, even: int) -> None:
        args = self._args
        first, second = (best_boundary(self._points, mix) for mix in self._mixes)
        rates = args.rates or [args.load * max(point.per_s[mix.name] for point in self._points) for mix in self._mixes]
        first_s, second_s = (args.requests / rate for rate in rates)
        self._shift_s = args.lead_in + first_s
        phases = [(self._mixes[0], rates[0], self._shift_s), (self._mixes[1], rates[1], second_s)]
        workload = shifting_arrivals(phases, cv=args.cv, seed=args.seed)
        prompts = make_prompts(self._builder, workload, seed=(args.seed, 3))
        variants = [Variant(BALANCED, (even,))]
        if args.all_static:
            variants += [Variant(f"cut at {p.boundary}", (p.boundary,)) for p in self._points if p.boundary != even]
        variants += [Variant(policy, (even,), policy) for policy in args.policies]
        if first != second:
            variants.append(Variant("scripted", (first,), moves=((self._shift_s, (second,)),)))
        await session.take(variants[0])
        some = [arrival for mix in self._mixes for arrival in mix.requests(_NUM_ALONE)]
        alone = await session.alone(some, make_prompts(self._builder, some, seed=(args.seed, 4)))
        counted = [
            Arrival(each.at_s - args.lead_in, each.num_prompt_tokens, each.num_output_tokens)
            for each in workload
            if each.at_s >= args.lead_in
        ]
        self._result = result = TraceResult(
            name=f"{self._mixes[0].name} to {self._mixes[1].name}",
            workload=workload,
            facts=WorkloadFacts.of(counted, duration_s=first_s + second_s),
            yardstick=Yardstick({}, alone),
            lead_in_s=args.lead_in,
            duration_s=first_s + second_s,
            slo_s=None,
            slo_factor=args.slo_factor,
        )
        for repeat in range(args.repeats):
            for variant in in_turn(variants, index=0, repeat=repeat):
                run = await session.run(variant, workload, prompts, repeat=repeat)
                result.runs.append(run)
                self._console.print(escape(describe(run)))
                self._save()
        result.differences = await compare_answers(result.runs, session, workload, prompts)

    def report(self) -> None:
        """Tables, JSON and picture of what was measured."""
        args, result = self._args, self._result
        if result is not None and result.runs:
            self._console.print(render(result, shift_s=self._shift_s))
        self._save()
        if args.json is not None and self._points:
            self._console.print(f"wrote {args.json}")
        if args.plot is not None and result is not None and result.runs:
            from flexpipe_serve.bench.adapt_plot import save_plot  # only now: matplotlib takes its time to import

            save_plot(result, args.plot)
            self._console.print(f"wrote {args.plot}")

    def _save(self) -> None:
        args = self._args
        if args.json is not None and self._points:
            data = {"version": 1, "settings": settings_of(args), "machine": machine()}
            data |= to_json(self._points, self._result, shift_s=self._shift_s)
            write_json(data, args.json)


def _mix(text: str) -> Mix:
    try:
        prompt, output = (int(part) for part in text.split("+"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 256+8") from None
    if prompt < 1 or output < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has fewer than 1 prompt token or 2 output tokens")
    return Mix(text, prompt, output)


def _pair(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2.5,0.6") from None
    if not (0 < first < math.inf and 0 < second < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not positive")
    return first, second


def _budgets(text: str) -> tuple[int, int]:
    slow, fast = _pair(text)
    return int(slow * _MIB), int(fast * _MIB)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))
