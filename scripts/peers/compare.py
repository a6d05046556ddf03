"""Measures servers that share one machine: in turns, and only one of them awake at a time."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.serve import build_prompts, first_model, warm_up
from flexpipe_serve.bench.summary import Summary, summarize
from flexpipe_serve.bench.wave import run_wave
from flexpipe_serve.errors import ConfigError
from peers.environment import PeerError
from peers.process import ServerProcess
from peers.recipes import Launch

_START_S = 600.0
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Turn:
    """One wave against one server.

    Args:
        summary: its figures.
        texts: the answers, to compare servers by.
        other_cores: cores that neither this server nor the client used but something else did; ``None`` if the
            server's processes are unknown.
    """

    summary: Summary
    texts: tuple[str, ...]
    other_cores: float | None


@dataclass(slots=True)
class Contender:
    """A server under comparison, and what was measured of it.

    Args:
        name: as in the table.
        launch: from a port to its command; ``None`` for a server that somebody else runs at ``url``.
        url: of a server that somebody else runs.
        model: name to ask for; the first it lists if ``None``.
        extra_body: request fields to add; ``None`` removes one.
        can_pause: between its turns it may be stopped in memory (SIGSTOP); one that may not is ended and started anew.
        versions: of what it consists of.
    """

    name: str
    launch: Callable[[int], Launch] | None
    url: str = ""
    model: str | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    can_pause: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    process: ServerProcess | None = None
    launched: Launch | None = None
    failure: str | None = None
    starts_s: list[float] = field(default_factory=list)
    peak_resident_bytes: int = 0
    turns: dict[int, list[Turn]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Args:
        streams: concurrencies; each is one wave of so many requests, all sent at once.
        rounds: how often all servers take their turn.
        num_prompt_tokens: of each prompt.
        num_output_tokens: of each answer.
        seed: of the prompts; all servers get the same in a round, and new ones in the next.
        logs: folder for the servers' output.
    """

    streams: tuple[int, ...]
    rounds: int
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    logs: Path


def compare(contenders: Sequence[Contender], plan: Plan, prompts: PromptBuilder, console: Console) -> None:
    """Fills in each contender's ``turns``; one that fails gets a ``failure`` and is left out from there on.

    Every server is ended before this returns or raises.
    """
    try:
        for round_index in range(plan.rounds):
            for contender in contenders:
                if contender.failure is None:
                    try:
                        _take_turn(contender, plan, round_index, prompts, console)
                    except (PeerError, ConfigError, psutil.Error) as error:
                        contender.failure = str(error)
                        console.print(f"[red]{contender.name} failed:[/] {error}", highlight=False)
                        _end(contender)
    finally:
        for contender in contenders:
            _end(contender)


def _take_turn(contender: Contender, plan: Plan, round_index: int, prompts: PromptBuilder, console: Console) -> None:
    with _awake(contender, plan, prompts, console) as target:
        # Also brings back what a pause let go cold.
        asyncio.run(warm_up(target, prompts, num_requests=1, seed=plan.seed + round_index, timeout_s=_START_S))
        for streams in plan.streams:
            turn = _measure(contender, target, plan, prompts, streams=streams, round_index=round_index)
            contender.turns.setdefault(streams, []).append(turn)
            summary = turn.summary
            console.print(
                f"round {round_index + 1}/{plan.rounds}, {contender.name}, {streams} streams: "
                f"{summary.output_tokens_per_s:.1f} tokens/s, {summary.num_errors} failed"
                + (f", other load {turn.other_cores:.2f} cores" if turn.other_cores is not None else ""),
                highlight=False,
            )


def _measure(
    contender: Contender, target: Target, plan: Plan, prompts: PromptBuilder, *, streams: int, round_index: int
) -> Turn:
    arrivals = [Arrival(0.0, plan.num_prompt_tokens, plan.num_output_tokens)] * streams
    texts = build_prompts(prompts, arrivals, seed=(plan.seed, round_index, streams), ids=False)
    before, started_s = _cpu_s(contender.process), time.perf_counter()
    wave = asyncio.run(run_wave(target, arrivals, texts, concurrency=streams, timeout_s=_START_S))
    elapsed_s, after = time.perf_counter() - started_s, _cpu_s(contender.process)
    if contender.process is not None:
        contender.peak_resident_bytes = max(contender.peak_resident_bytes, contender.process.resident_bytes())
    return Turn(
        summarize([wave]),
        tuple(request.text for request in wave.requests),
        None if contender.process is None else max(0.0, (after - before) / elapsed_s),
    )


def _cpu_s(process: ServerProcess | None) -> float:
    """CPU time the machine spent on anything but the server and this client, so far."""
    times = psutil.cpu_times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return busy_s - sum(os.times()[:2]) - (process.cpu_s() if process is not None else 0.0)


@contextlib.contextmanager
def _awake(contender: Contender, plan: Plan, prompts: PromptBuilder, console: Console) -> Iterator[Target]:
    if contender.launch is None:
        yield _target(contender)
        return
    if contender.process is None:
        _start(contender, contender.launch, plan, prompts, console)
    else:
        contender.process.resume()
    assert contender.process is not None
    contender.process.check_alive()
    yield _target(contender)
    if contender.can_pause:
        contender.process.pause()
    else:
        _end(contender)


def _start(
    contender: Contender, launch: Callable[[int], Launch], plan: Plan, prompts: PromptBuilder, console: Console
) -> None:
    port = _free_port()
    contender.url = f"http://127.0.0.1:{port}"
    contender.launched = launched = launch(port)
    plan.logs.mkdir(parents=True, exist_ok=True)
    log = plan.logs / f"{contender.name}.log"
    contender.process = ServerProcess(launched.command, env=launched.env, log=log)
    with console.status(f"{contender.name} starts; its output goes to {log}"):
        contender.starts_s.append(_first_answer_s(contender, prompts))
    console.print(f"{contender.name} answered {contender.starts_s[-1]:.1f} s after its start", highlight=False)


def _first_answer_s(contender: Contender, prompts: PromptBuilder) -> float:
    """Seconds from the start to the end of a short first answer."""
    process = contender.process
    assert process is not None
    while True:
        process.check_alive()
        elapsed_s = time.perf_counter() - process.started_s
        try:
            asyncio.run(warm_up(_target(contender), prompts, num_requests=1, seed=0, timeout_s=_START_S))
            return time.perf_counter() - process.started_s
        except ConfigError as error:
            if elapsed_s > _START_S:
                raise PeerError(f"no answer {elapsed_s:.0f} s after its start ({error}); see {process.log}") from error
        time.sleep(_POLL_S)


def _target(contender: Contender) -> Target:
    target = Target(contender.name, contender.url, contender.model or "", extra_body=contender.extra_body)
    return (
        target
        if target.model
        else Target(contender.name, contender.url, first_model(target), extra_body=contender.extra_body)
    )


def _end(contender: Contender) -> None:
    if contender.process is not None:
        process, contender.process = contender.process, None
        process.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
