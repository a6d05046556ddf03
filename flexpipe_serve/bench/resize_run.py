"""Runs the resize experiment: on a fresh server each time, the same requests, a refactoring when the rate steps up."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.resize_plan import Profile, ResizePlan
from flexpipe_serve.bench.serve import first_model
from flexpipe_serve.bench.server import adapt_config, running_server
from flexpipe_serve.bench.wave import Wave, run_wave
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.refactor.record import RefactorRecord
from flexpipe_serve.transport import HttpTransport

_POLL_S = 1.0
_REPORT_S = 2.5
"""Stages tell the Router of their memory every two seconds."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was learned before the experiment.

    Args:
        profile: memory of the stages.
        few_per_s: requests a second that are finished when as many run as the old layout is to hold.
        many_per_s: the same for the new one.
    """

    profile: Profile
    few_per_s: float
    many_per_s: float


@dataclass(frozen=True, slots=True)
class KVSample:
    """The server's KV and queue at a time (seconds after the wave's start)."""

    at_s: float
    num_blocks: int
    num_used_blocks: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class ResizeRun:
    """One run.

    Args:
        resize_kv: whether the capacity was allowed to grow.
        round: which repetition.
        wave: the requests.
        record: of the refactoring.
        step_s: when the rate stepped up and the refactoring was asked for.
        samples: of the KV over time.
        num_preemptions: meanwhile.
    """

    resize_kv: bool
    round: int
    wave: Wave
    record: RefactorRecord
    step_s: float
    samples: tuple[KVSample, ...]
    num_preemptions: int


async def calibrate(
    config: Mapping[str, Any], arrivals: Sequence[Arrival], prompts: Sequence[str], *, num_few: int, log: Path
) -> Calibration:
    """Looks at a server with plentiful KV: speed with ``num_few`` requests at once and with all of them, then memory.

    Args:
        config: of a server with two stages, each its own domain.
        arrivals: lengths of the requests; more than ``num_few``.
        prompts: of the requests.
        num_few: requests at once.
        log: of the server.
    """
    with running_server(config, log=log) as url:
        target = _target(url)
        rates = []
        for num in (num_few, len(prompts)):
            wave = await run_wave(target, arrivals[:num], prompts[:num], concurrency=num, timeout_s=600)
            _check(wave, url)
            rates.append(num / max(request.end_s for request in wave.requests))
        async with AsyncHandle(HttpTransport(url)) as handle:
            await asyncio.sleep(_REPORT_S)
            status = await handle.status()
            boundary = status.layout.boundaries[0]
            plan = (await handle.refactor(boundaries=[boundary + 1], dry_run=True)).plan
    return Calibration(Profile.of(status, layer_bytes=plan.weights_bytes), *rates)


async def run_once(
    config: Mapping[str, Any],
    plan: ResizePlan,
    arrivals: Sequence[Arrival],
    prompts: Sequence[str],
    *,
    step_s: float,
    resize_kv: bool,
    round_index: int,
    num_warm_up: int,
    timeout_s: float,
    log: Path,
) -> ResizeRun:
    """One run on a server of its own.

    The server starts with the new layout, is warmed up, and goes to the old one before it is measured: so the old
    layout's capacity follows from what its processes take under load, as the new one's will.

    Args:
        config: of a server with two stages, each its own domain.
        plan: layouts and budgets.
        arrivals: the requests.
        prompts: of the requests.
        step_s: when to refactor.
        resize_kv: whether the capacity may grow.
        round_index: which repetition.
        num_warm_up: so many of the requests, shortened, are sent before.
        timeout_s: a longer request failed.
        log: of the server.

    Raises:
        ConfigError: the server cannot do the old layout.
    """
    budgets = {f"stage-{index}": size for index, size in enumerate(plan.budgets)}
    config = adapt_config(config, args={"memory_budget": budgets}, user_config={"layout": {"boundaries": [plan.new]}})
    with running_server(config, log=log) as url:
        target = _target(url)
        async with AsyncHandle(HttpTransport(url)) as handle:
            warm_up = [Arrival(0.0, arrival.num_prompt_tokens, 32) for arrival in arrivals[-num_warm_up:]]
            _check(
                await run_wave(
                    target, warm_up, prompts[-num_warm_up:], concurrency=max(1, num_warm_up // 2), timeout_s=timeout_s
                ),
                url,
            )
            record = await (await handle.refactor(boundaries=[plan.old])).wait()
            if record.error is not None:
                raise ConfigError(f"{url} did not get to the boundary {plan.old}: {record.error}")
            before = (await handle.status()).queue.num_preemptions
            samples: list[KVSample] = []
            looking = asyncio.create_task(_look(handle, samples))
            refactoring = asyncio.create_task(_refactor(handle, plan.new, after_s=step_s, resize_kv=resize_kv))
            try:
                wave = await run_wave(target, arrivals, prompts, concurrency=None, timeout_s=timeout_s)
                record = await refactoring
            finally:
                looking.cancel()
                refactoring.cancel()
            after = (await handle.status()).queue.num_preemptions
    return ResizeRun(resize_kv, round_index, wave, record, step_s, tuple(samples), after - before)


async def _refactor(handle: AsyncHandle, boundary: int, *, after_s: float, resize_kv: bool) -> RefactorRecord:
    await asyncio.sleep(after_s)
    job = await handle.refactor(boundaries=[boundary], resize_kv=resize_kv, hurry=True, reason="the rate steps up")
    return await job.wait()


async def _look(handle: AsyncHandle, samples: list[KVSample]) -> None:
    """Fill ``samples`` until cancelled."""
    started = time.perf_counter()
    while True:
        status = await handle.status()
        kv, queue = status.kv, status.queue
        samples.append(
            KVSample(
                at_s=time.perf_counter() - started,
                num_blocks=kv.num_blocks,
                num_used_blocks=kv.num_used_blocks,
                num_running=queue.num_running,
                num_waiting=queue.num_waiting,
            )
        )
        await asyncio.sleep(_POLL_S)


def _target(url: str) -> Target:
    return Target("flexpipe", url, model=first_model(Target("flexpipe", url, model="")))


def _check(wave: Wave, url: str) -> None:
    for request in wave.requests:
        if request.error is not None:
            raise ConfigError(f"{url} cannot do the requests: {request.error}")
