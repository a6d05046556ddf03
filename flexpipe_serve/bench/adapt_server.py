"""What the adaptation benchmarks share: their server, its options, and the check of what was said."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.adapt_run import AdaptRun, AdaptSession
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.identity import Difference, find_difference
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.serve import first_model
from flexpipe_serve.bench.server import adapt_config, default_log, read_config, running_server
from flexpipe_serve.bench.ties import look_up
from flexpipe_serve.transport import HttpTransport

_WARM_TOKENS = 16
_MAX_LOOKED_UP = 10
_PLANNER = {"interval_s": 0.5, "cool_down_s": 5.0}


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the server and of the output."""
    where = parser.add_argument_group("server")
    where.add_argument("--config", type=Path, default=Path("serve_config.yaml"), metavar="YAML", help="of the server")
    where.add_argument(
        "--planner",
        type=json.loads,
        default=_PLANNER,
        metavar="JSON",
        help="fields of user_config.planner beside mode and policy (default: changes may come as fast as the load does"
        f" here, '{json.dumps(_PLANNER)}')",
    )
    where.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json (default: the demo's)")
    where.add_argument("--seed", type=int, default=1, help="of arrivals and prompts (default 1)")
    where.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="a longer request failed (default 300)"
    )
    where.add_argument("--server-log", type=Path, metavar="FILE", help="of the server")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="write pictures; the trace's name is added")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """How the command was called, ready for JSON."""
    return {name: _plain(value) for name, value in vars(args).items() if name != "run"}


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Writes a file that is whole at any time, so that an interrupted run leaves what it had."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data) + "\n")
    new.replace(path)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | dict):
        return value
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else str(value)


@contextlib.asynccontextmanager
async def running_session(
    args: argparse.Namespace, builder: PromptBuilder, *, server_args: Mapping[str, Any], user_config: Mapping[str, Any]
) -> AsyncIterator[AdaptSession]:
    """A server of the benchmark's own, without a prefix cache.

    Args:
        args: of the command.
        builder: of prompts.
        server_args: ``args`` beside those of the configuration.
        user_config: likewise.
    """
    kv = {"prefix_cache": False, **server_args.get("kv", {})}
    config = adapt_config(read_config(args.config), args={**server_args, "kv": kv}, user_config=user_config)
    log = args.server_log or default_log()
    rng = np.random.default_rng([args.seed, 5])
    with running_server(config, log=log) as url:
        target = Target("flexpipe", url, model="")
        target = Target("flexpipe", url, model=first_model(target))
        async with AsyncHandle(HttpTransport(url)) as handle:
            yield AdaptSession(
                config=config,
                url=url,
                log=log,
                handle=handle,
                target=target,
                planner=args.planner,
                warm_prompt=builder.build(_WARM_TOKENS, rng),
                timeout_s=args.timeout,
            )


def make_prompts(builder: PromptBuilder, workload: Sequence[Arrival], *, seed: Sequence[int]) -> list[str]:
    """One distinct prompt for each request."""
    rng = np.random.default_rng([*seed, 9])
    return [builder.build(arrival.num_prompt_tokens, rng) for arrival in workload]


async def compare_answers(
    runs: Sequence[AdaptRun], session: AdaptSession, workload: Sequence[Arrival], prompts: Sequence[str]
) -> list[tuple[AdaptRun, Difference]]:
    """Where answers differ from those of the first run that answered the request; all are greedy, so none should but
    for ties, which are looked up."""
    references: dict[int, tuple[str, ...]] = {}
    found: list[tuple[AdaptRun, Difference]] = []
    for run in runs:
        for index, request in enumerate(run.wave.requests):
            if request.error is not None:
                continue
            difference = find_difference(index, request.pieces, references.setdefault(index, request.pieces))
            if difference is not None:
                if len(found) < _MAX_LOOKED_UP:
                    difference = await look_up(
                        difference,
                        handle=session.handle,
                        model=session.target.model,
                        prompt=prompts[index],
                        num_tokens=workload[index].num_output_tokens,
                    )
                found.append((run, difference))
    return found
