"""``flexpipe bench serve``: measures OpenAI endpoints under an open or a closed loop, several of them alternately."""

import argparse
import asyncio
import json
import os
import resource
import secrets
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals, read_trace
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.report import print_report, to_json
from flexpipe_serve.bench.wave import Wave, run_wave
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.demo import ensure_demo

_DEFAULT_URL = "http://127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexpipe bench serve``."""
    where = parser.add_argument_group("servers")
    where.add_argument(
        "--url",
        action="append",
        metavar="[NAME=]URL",
        help=f"an OpenAI endpoint; repeat it to measure several alternately (default {_DEFAULT_URL})",
    )
    where.add_argument("--model", help="model name to ask for (default: the first of each server's /v1/models)")
    where.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    where.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json (default: the demo model)"
    )
    where.add_argument("--prompt-ids", action="store_true", help="send prompts as token ids instead of text")
    where.add_argument(
        "--extra-body", type=json.loads, default={}, metavar="JSON", help="more request fields; null removes a field"
    )
    load = parser.add_argument_group("load (one of --concurrency, --rate, --trace)")
    kind = load.add_mutually_exclusive_group(required=True)
    kind.add_argument("--concurrency", type=positive_int, metavar="N", help="closed loop: N requests in flight")
    kind.add_argument("--rate", type=float, metavar="R", help="open loop: R requests/s with Gamma distributed gaps")
    kind.add_argument(
        "--trace", type=Path, metavar="CSV", help="open loop: arrival_s,prompt_tokens,output_tokens; .gz too"
    )
    load.add_argument("--cv", type=float, help="of the gaps, with --rate: 0 even, 1 Poisson (default), more is bursty")
    load.add_argument("--num-requests", type=positive_int, metavar="N", help="a round; default 64, or the whole trace")
    load.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="a prompt (default 128)")
    load.add_argument("--output-tokens", type=positive_int, metavar="N", help="an answer (default 128)")
    load.add_argument(
        "--time-scale", type=float, metavar="X", help="trace times are multiplied by X; 2 halves the rate"
    )
    load.add_argument("--length-scale", type=float, metavar="X", help="trace lengths are multiplied by X")
    load.add_argument("--max-prompt-tokens", type=positive_int, metavar="N", help="longer trace prompts are cut")
    load.add_argument("--max-output-tokens", type=positive_int, metavar="N", help="longer trace outputs are cut")
    run = parser.add_argument_group("run")
    run.add_argument("--rounds", type=positive_int, default=1, metavar="N", help="of the load, on each server in turn")
    run.add_argument("--warmup", type=int, default=1, metavar="N", help="requests to each server before (default 1)")
    run.add_argument(
        "--seed",
        type=int,
        # Not a constant: a second run with the same prompts would be answered from the prefix cache.
        default=secrets.randbelow(2**31),
        help="of arrivals and prompts (default: a new one each run)",
    )
    run.add_argument("--timeout", type=float, default=600.0, metavar="S", help="a longer request failed (default 600)")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    out.add_argument("--requests", action="store_true", help="with --json: every request and its token times too")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="write distributions and timeline")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark.

    Returns:
        0, or 1 if any request failed.

    Raises:
        ConfigError: options that contradict each other, an unreadable file, a server that does not answer.
    """
    _check(args)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file need not fold tables to 80 columns
    targets = [_target(text, args) for text in args.url or [_DEFAULT_URL]]
    if len({target.name for target in targets}) < len(targets):
        raise ConfigError("two servers have the same name; give each its own, as in --url a=http://...")
    prompts = PromptBuilder(args.tokenizer or ensure_demo())
    _allow_many_connections()
    num_requests = len(workload(args, round_index=0))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Drawing costs CPU that the server under test may need.
        refresh_per_second=2,
        console=console,
    ) as progress:
        bar = progress.add_task("requests", total=num_requests * len(targets) * args.rounds)

        def on_start(target: Target, round_index: int) -> None:
            progress.update(bar, description=f"{target.name}, round {round_index + 1}/{args.rounds}")

        waves = asyncio.run(
            _run(args, targets, prompts, on_start=on_start, on_done=lambda: progress.advance(bar)),
        )
    print_report(waves, console)
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings = {name: value for name, value in settings.items() if _is_json(value) and name != "api_key"}
        data = to_json(waves, settings=settings, with_requests=args.requests)
        args.json.write_text(json.dumps(data, indent=None if args.requests else 2) + "\n")
        console.print(f"wrote {args.json}")
    if args.plot is not None:
        from flexpipe_serve.bench.plot import save_plot  # only now: matplotlib takes its time to import

        save_plot(waves, args.plot)
        console.print(f"wrote {args.plot}")
    return int(any(request.error is not None for wave in waves for request in wave.requests))


def workload(args: argparse.Namespace, *, round_index: int) -> list[Arrival]:
    """The arrivals of one round: the same for every server, new gaps each round."""
    if args.trace is not None:
        return read_trace(
            args.trace,
            time_scale=args.time_scale or 1.0,
            length_scale=args.length_scale or 1.0,
            max_prompt_tokens=args.max_prompt_tokens,
            max_output_tokens=args.max_output_tokens,
            max_requests=args.num_requests,
        )
    return gamma_arrivals(
        args.num_requests or 64,
        rate=args.rate if args.rate is not None else float("inf"),
        cv=1.0 if args.cv is None else args.cv,
        num_prompt_tokens=args.prompt_tokens or 128,
        num_output_tokens=args.output_tokens or 128,
        seed=(args.seed, round_index),
    )


def build_prompts(
    builder: PromptBuilder, arrivals: Sequence[Arrival], *, seed: Sequence[int], ids: bool
) -> list[str | list[int]]:
    """One distinct prompt for each arrival, as text or as token ids."""
    # The extra number keeps prompts independent of the arrivals that share their seed.
    rng = np.random.default_rng([*seed, 1])
    texts = [builder.build(arrival.num_prompt_tokens, rng) for arrival in arrivals]
    return [builder.ids(text) if ids else text for text in texts]


async def warm_up(target: Target, builder: PromptBuilder, *, num_requests: int, seed: int, timeout_s: float) -> None:
    """Sends a few short requests, one after another.

    Raises:
        ConfigError: one failed, so that measuring the server is pointless.
    """
    arrivals = [Arrival(0.0, 32, 16)] * num_requests
    prompts = build_prompts(builder, arrivals, seed=(seed, 2), ids=target.prompt_ids)
    wave = await run_wave(target, arrivals, prompts, concurrency=1, timeout_s=timeout_s)
    for request in wave.requests:
        if request.error is not None:
            raise ConfigError(f"the warm-up request to {target.name} ({target.url}) failed: {request.error}")


async def _run(
    args: argparse.Namespace,
    targets: Sequence[Target],
    builder: PromptBuilder,
    *,
    on_start: Callable[[Target, int], None],
    on_done: Callable[[], None],
) -> list[Wave]:
    for target in targets:
        await warm_up(target, builder, num_requests=args.warmup, seed=args.seed, timeout_s=args.timeout)
    waves = []
    for round_index in range(args.rounds):
        arrivals = workload(args, round_index=round_index)
        prompts = build_prompts(builder, arrivals, seed=(args.seed, round_index), ids=args.prompt_ids)
        for target in targets:
            on_start(target, round_index)
            waves.append(
                await run_wave(
                    target,
                    arrivals,
                    prompts,
                    concurrency=args.concurrency,
                    timeout_s=args.timeout,
                    on_done=on_done,
                )
            )
    return waves


def first_model(target: Target) -> str:
    """Name of the first model a server lists.

    Raises:
        ConfigError: it does not answer, or lists none.
    """
    request = urllib.request.Request(target.address.geturl() + "/v1/models")
    if target.api_key is not None:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{request.full_url} names no model ({error}); start the server or give --model") from error


def _target(text: str, args: argparse.Namespace) -> Target:
    name, separator, url = text.partition("=")
    if not separator or "://" in name:
        name, url = text, text
    target = Target(
        name,
        url,
        model=args.model or "",
        api_key=args.api_key,
        prompt_ids=args.prompt_ids,
        extra_body=args.extra_body,
    )
    return target if target.model else replace(target, model=first_model(target))


def _check(args: argparse.Namespace) -> None:
    allowed = {
        "cv": args.rate is not None,
        "prompt_tokens": args.trace is None,
        "output_tokens": args.trace is None,
        "time_scale": args.trace is not None,
        "length_scale": args.trace is not None,
        "max_prompt_tokens": args.trace is not None,
        "max_output_tokens": args.trace is not None,
        "requests": args.json is not None,
    }
    for name, is_allowed in allowed.items():
        if getattr(args, name) and not is_allowed:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with this load; see flexpipe bench serve --help"
            )
    if not isinstance(args.extra_body, dict):
        raise ConfigError("--extra-body must be a JSON object")


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def positive_int(text: str) -> int:
    """A number of something, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | list | dict)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    try:
        sys.exit(main(_parser.parse_args()))
    except ConfigError as _error:
        sys.exit(f"error: {_error}")
