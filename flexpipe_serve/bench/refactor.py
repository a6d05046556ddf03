"""``flexpipe bench refactor``: what a change of the pipeline costs those who wait for tokens.

A fixed number of streams decode all the time. Windows at rest and refactorings alternate: boundaries shift, stages
split and merge, layers go both ways at once, the pipeline shrinks to one stage and grows again. All modes run on the
same server, one after the other, and so do both kinds of domain, on servers that the command starts and ends itself:
where the stages of a node share their KV, and where each has its own and layers that move are copied.

The prefix cache is off by default: prompts are used again and again, because each stream is compared with the output
that the same prompt had at rest, and with the cache the load would be without prefills, and every copy larger than the
one before.
"""

import argparse
import contextlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.experiment import run_experiment
from flexpipe_serve.bench.leaks import Holdings, compare, find_leaks, look
from flexpipe_serve.bench.memory import Sample
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.refactor_report import is_tie, render, to_json
from flexpipe_serve.bench.refactor_run import LoadPlan, Section, Session
from flexpipe_serve.bench.serve import first_model, positive_int
from flexpipe_serve.bench.server import adapt_config, default_log, read_config, running_server
from flexpipe_serve.bench.tour import KINDS, Step, random_steps, tour
from flexpipe_serve.errors import ConfigError, EngineUnavailableError, InvalidRequestError
from flexpipe_serve.model.demo import ensure_demo
from flexpipe_serve.refactor.record import Mode
from flexpipe_serve.transport import HttpTransport

DOMAINS = {"shared": "node", "private": "stage"}
"""Names in the report, and what ``kv.domain`` is called in the configuration."""

_MODES = tuple(mode.value for mode in Mode)
_KV_RESERVE = 2
"""KV is limited to so many times what the streams need, so that a domain's budget is not all committed at start."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench refactor``."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    where = parser.add_argument_group("server")
    where.add_argument("--url", help="measure this server as it is (default: start one for each of --domains)")
    where.add_argument(
        "--config", type=Path, default=Path("serve_config.yaml"), metavar="YAML", help="of the servers that are started"
    )
    where.add_argument(
        "--domains",
        type=_names(tuple(DOMAINS)),
        default=tuple(DOMAINS),
        metavar="LIST",
        help="who can map a layer's KV: all stages of the node (shared: nothing is copied) or each its own (private)."
        " Default: shared,private",
    )
    where.add_argument("--warm-stages", type=int, default=1, metavar="N", help="empty stages kept ready (default 1)")
    where.add_argument("--prefix-cache", action="store_true", help="leave it on; see above")
    where.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json (default: the demo's)")
    what = parser.add_argument_group("refactorings")
    what.add_argument(
        "--kinds", type=_names(KINDS), default=KINDS, metavar="LIST", help=f"any of {','.join(KINDS)} (default: all)"
    )
    what.add_argument(
        "--modes", type=_names(_MODES), default=_MODES, metavar="LIST", help=f"any of {','.join(_MODES)} (default: all)"
    )
    what.add_argument(
        "--rounds",
        type=positive_int,
        default=1,
        metavar="N",
        help="repetitions (default 1); beside live, the other modes are measured in the first one only",
    )
    what.add_argument(
        "--idle",
        type=float,
        default=3.0,
        metavar="S",
        help="shortest window at rest, half of it beside modes that stop (default 3)",
    )
    what.add_argument(
        "--churn",
        type=positive_int,
        metavar="N",
        help="instead: N live refactorings of a few layers back to back, in a hurry, at random, and what is leaked",
    )
    what.add_argument("--max-stages", type=positive_int, default=4, metavar="N", help="with --churn (default 4)")
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=positive_int, default=8, metavar="N", help="streams at once (default 8)")
    load.add_argument("--prompt-tokens", type=positive_int, default=128, metavar="N", help="a prompt (default 128)")
    load.add_argument("--output-tokens", type=positive_int, metavar="N", help="a stream (default 256)")
    load.add_argument(
        "--pure-decode",
        action="store_true",
        help="no prefill disturbs a window: all streams start before the first one and are long (default 1536 tokens)",
    )
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="a longer request failed (default 600)")
    load.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**31), help="of prompts and layouts (default: new)"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything, each token's arrival included")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="write timelines: tokens as dots, phases as bands")
    out.add_argument("--server-log", type=Path, metavar="FILE", help="of the servers that are started")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 if a refactoring did not end well, something was lost or leaked, or a stream differed where there was no
        tie; 2 if it cannot be measured.
    """
    return run_experiment(_Bench, args)


class _Bench:
    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.sections: list[Section] = []
        self._args = args
        self._console = console
        self._samples: dict[str, list[Sample]] = {}
        self._holdings: dict[str, tuple[Holdings, Holdings]] = {}
        self._is_whole = False
        num_tokens = args.output_tokens or (1536 if args.pure_decode else 256)
        self._plan = LoadPlan(args.concurrency, num_tokens, args.pure_decode, args.timeout)
        builder = PromptBuilder(args.tokenizer or ensure_demo())
        rng = np.random.default_rng([args.seed, 1])
        num_prompts = args.concurrency if args.pure_decode else 2 * args.concurrency
        self._prompts = [builder.build(args.prompt_tokens, rng) for _ in range(num_prompts)]

    @property
    def is_good(self) -> bool:
        """Whether all that was asked for was done, and nothing was lost."""
        return (
            self._is_whole
            and not any(
                section.num_dropped
                or not all(trial.is_done for trial in section.trials)
                or not all(is_tie(difference.logprob_gap) for difference in section.differences)
                for section in self.sections
            )
            and not any(find_leaks(*holdings) for holdings in self._holdings.values())
        )

    async def run(self) -> None:
        """Measures every domain; what was measured before an error stays."""
        try:
            for domain in ("url",) if self._args.url else self._args.domains:
                with self._server(domain) as url:
                    await self._measure(domain, url)
            self._is_whole = True
        except (ConfigError, EngineUnavailableError, InvalidRequestError, TimeoutError) as error:
            if not self.sections:
                raise
            self._console.print(f"[red]given up:[/red] {escape(str(error) or repr(error))}")

    @contextlib.contextmanager
    def _server(self, domain: str) -> Iterator[str]:
        if self._args.url:
            yield self._args.url.rstrip("/").removesuffix("/v1")
            return
        log = self._args.server_log or default_log()
        self._console.print(f"{domain}: starting a server (log: {log})")
        with running_server(self._config(domain), log=log) as url:
            yield url

    def _config(self, domain: str) -> dict[str, Any]:
        args, plan = self._args, self._plan
        max_tokens = _KV_RESERVE * plan.concurrency * (args.prompt_tokens + plan.num_tokens)
        kv = {"domain": DOMAINS[domain], "prefix_cache": args.prefix_cache, "max_tokens": max_tokens}
        user_config = {"layout": {"stages": 2}, "warm_stages": args.warm_stages}
        return adapt_config(read_config(args.config), args={"kv": kv}, user_config=user_config)

    async def _measure(self, domain: str, url: str) -> None:
        args = self._args
        target = Target(domain, url, model="")
        target = Target(domain, url, model=first_model(target))
        async with AsyncHandle(HttpTransport(url)) as handle:
            session = Session(
                domain=domain,
                target=target,
                handle=handle,
                prompts=self._prompts,
                plan=self._plan,
                say=lambda text: self._console.print(escape(text)),
            )
            try:
                status = await session.prepare()
                num_layers = status.layout.num_layers
                if args.churn is None:
                    steps = tour(num_layers, kinds=args.kinds)
                    for round_index in range(args.rounds):
                        for mode in args.modes:
                            if round_index and mode != Mode.LIVE and Mode.LIVE in args.modes:
                                continue
                            await session.run(steps, mode=mode, round_index=round_index, rest_s=args.idle)
                else:
                    await self._churn(domain, session, list(status.layout.boundaries), num_layers)
            finally:
                self.sections += session.sections
                if session.memory is not None:
                    self._samples[domain] = session.memory.samples

    async def _churn(self, domain: str, session: Session, start: list[int], num_layers: int) -> None:
        before = await look(session.handle, session.memory)
        steps: Iterator[Step] = random_steps(
            self._args.churn,
            start=tuple(start),
            num_layers=num_layers,
            max_stages=self._args.max_stages,
            rng=np.random.default_rng([self._args.seed, 2]),
        )
        try:
            await session.churn(steps, rest_s=self._args.idle)
        finally:  # also after an interrupt
            self._holdings[domain] = (before, await look(session.handle, session.memory))

    def report(self) -> None:
        """Tables, JSON and picture of what was measured."""
        args, console = self._args, self._console
        if not self.sections:
            return
        console.print(render(self.sections, self._samples))
        for domain, holdings in self._holdings.items():
            console.print(_leak_table(domain, *holdings))
        if args.json is not None:
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
            del settings["run"]
            data = to_json(self.sections, self._samples, settings=settings)
            data["holdings"] = {domain: compare(*holdings) for domain, holdings in self._holdings.items()}
            args.json.write_text(json.dumps(data) + "\n")
            console.print(f"wrote {args.json}")
        if args.plot is not None:
            from flexpipe_serve.bench.refactor_plot import (
                save_timelines,
            )  # only now: matplotlib takes its time to import

            save_timelines(self.sections, args.plot)
            console.print(f"wrote {args.plot}")


def _leak_table(domain: str, before: Holdings, after: Holdings) -> Table:
    table = Table(title=f"{domain}: what the server holds at rest", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    leaks = find_leaks(before, after)
    for name, (old, new) in compare(before, after).items():
        text = "-" if new is None else f"{new:,}"
        table.add_row(name, "-" if old is None else f"{old:,}", f"[red]{text}[/]" if name in leaks else text)
    return table


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse
