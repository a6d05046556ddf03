"""Drives one server through layouts and policies, each under the same requests, and notes what it sees."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.adapt_metrics import Alone, Look, sustained_rate
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.server import adapt_config, deploy, router_of
from flexpipe_serve.bench.wave import Wave, run_wave
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import ConfigError, EngineUnavailableError, InvalidRequestError, RefactorBusyError
from flexpipe_serve.refactor.record import Outcome, RefactorRecord

_POLL_S = 0.2
_LOOK_EVERY_S = 1.0
"""Seldom: every look costs both sides CPU."""
_SETTLE_S = 120.0
_PROFILE_S = 300.0
_KEPT = ("at", "trigger", "verdict", "sentence", "decision_s", "refactoring_id")
"""Of a decision; the candidates would make the file too large."""
_WARM_UP = Arrival(0.0, 16, 4)


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compared.

    Args:
        name: in reports.
        boundaries: of the layout at the start.
        policy: of the planner; None: the layout stays.
        moves: layouts that are asked for at given times (seconds after the wave's start), whatever the load.
    """

    name: str
    boundaries: tuple[int, ...]
    policy: str | None = None
    moves: tuple[tuple[float, tuple[int, ...]], ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether the layout stays as it is."""
        return self.policy is None and not self.moves


@dataclass(frozen=True, slots=True)
class AdaptRun:
    """One variant under the load once. Times are seconds after the wave's start.

    Args:
        variant: which.
        repeat: which repetition.
        wave: the requests.
        looks: at the server, in order.
        records: of refactorings that began meanwhile.
        decisions: of the planner, the main fields as ``GET /flexpipe/decisions`` shows them; () where there is none.
        started_at: Unix time of the wave's start.
    """

    variant: Variant
    repeat: int
    wave: Wave
    looks: tuple[Look, ...]
    records: tuple[RefactorRecord, ...]
    decisions: tuple[dict[str, Any], ...]
    started_at: float

    @property
    def switches(self) -> list[tuple[float, tuple[int, ...]]]:
        """When new layouts came into force, and their boundaries."""
        return [
            (record.switched_at - self.started_at, tuple(part.start for part in record.plan.new[1:]))
            for record in self.records
            if record.outcome is Outcome.DONE and record.switched_at is not None
        ]


class AdaptSession:
    """One server that is measured.

    Args:
        config: what it was started with.
        url: where it is.
        log: its log.
        handle: to it.
        target: for completions.
        planner: fields of ``user_config.planner`` beside mode and policy.
        warm_prompt: a prompt of 16 tokens.
        timeout_s: a longer request failed.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        url: str,
        log: Path,
        handle: AsyncHandle,
        target: Target,
        planner: Mapping[str, Any],
        warm_prompt: str,
        timeout_s: float,
    ) -> None:
        self.handle = handle
        self.target = target
        self._config = config
        self._url = url
        self._log = log
        self._planner = planner
        self._warm_prompt = warm_prompt
        self._timeout_s = timeout_s
        self._num_warm = int(router_of(config)["user_config"].get("warm_stages", 0))
        self._is_planning = False

    async def have_planned(self, say: Callable[[str], None]) -> None:
        """Have the planner look: it learns from the latest steps what its profile leaves out, so that the first policy
        knows as much as the next. At a first start it measures the model, which is waited for: it must disturb no run.

        Raises:
            ConfigError: it cannot after some minutes.
        """
        deadline = time.monotonic() + _PROFILE_S
        said = False
        while True:
            try:
                await self.handle.call("GET", "/flexpipe/plan", dict[str, Any])
                return
            except EngineUnavailableError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"the planner cannot plan after {_PROFILE_S:.0f} s: {error}") from None
                if not said:
                    say(f"waiting for the planner: {error}")
                    said = True
            await asyncio.sleep(_POLL_S)

    async def take(self, variant: Variant) -> None:
        """Bring the server into the variant's state: its layout at rest, then its policy, which has seen nothing yet.

        Raises:
            ConfigError: the server refuses the layout, or does not get there.
        """
        # What the last variant asked for late matters no more.
        late = [record for record in await self.handle.refactorings() if not record.is_over]
        if self._is_planning:
            await self._deploy(variant.boundaries, {"mode": "off"})
            self._is_planning = False
        for record in late:
            await (await self.handle.refactoring(record.id)).cancel()
        deadline = time.monotonic() + _SETTLE_S
        while (reason := await self._unrest(variant.boundaries)) is not None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self._url} has not come to rest with {variant.name} after {_SETTLE_S:.0f} s: {reason}; see"
                    f" {self._log}"
                )
            await asyncio.sleep(_POLL_S)
        # Pages and connections that the layout is the first to use.
        await self._wave([_WARM_UP] * 4, [self._warm_prompt] * 4, concurrency=2)
        if variant.policy is not None:
            await self._deploy(variant.boundaries, {**self._planner, "mode": "on", "policy": variant.policy})
            self._is_planning = True

    async def capacity(self, workload: Sequence[Arrival], prompts: Sequence[str], *, concurrency: int) -> float:
        """Requests a second that the layout in force sustains in a closed loop."""
        return sustained_rate((await self._wave(workload, prompts, concurrency=concurrency)).requests)

    async def alone(self, workload: Sequence[Arrival], prompts: Sequence[str]) -> Alone:
        """Latency of requests that have the layout in force to themselves."""
        wave = await self._wave(workload, prompts, concurrency=1)
        latencies = [request.end_s - request.start_s for request in wave.requests]
        return Alone.fit(list(zip(workload, latencies, strict=True)))

    async def run(
        self, variant: Variant, workload: Sequence[Arrival], prompts: Sequence[str], *, repeat: int
    ) -> AdaptRun:
        """The variant under the load. Requests may fail."""
        await self.take(variant)
        started_at, started_s = time.time(), time.perf_counter()
        looks: list[Look] = []
        tasks = [asyncio.create_task(self._look(looks, started_s))]
        tasks += [asyncio.create_task(self._move(at_s, boundaries)) for at_s, boundaries in variant.moves]
        try:
            wave = await run_wave(self.target, workload, prompts, concurrency=None, timeout_s=self._timeout_s)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):  # not the cancellation: a layout was refused, or the server went away
                raise ConfigError(f"{variant.name} could not be measured: {end}")
        decisions: list[dict[str, Any]] = []
        if variant.policy is not None:
            decisions = await self._decisions(since=started_at)
        records = [record for record in await self.handle.refactorings() if record.requested_at >= started_at]
        over_at = started_at + max(request.end_s for request in wave.requests)
        records = [record for record in records if record.requested_at <= over_at]
        return AdaptRun(
            variant=variant,
            repeat=repeat,
            wave=replace(wave, target=variant.name),
            looks=tuple(looks),
            records=tuple(records),
            decisions=tuple(decisions),
            started_at=started_at,
        )

    async def _wave(self, workload: Sequence[Arrival], prompts: Sequence[str], *, concurrency: int) -> Wave:
        wave = await run_wave(self.target, workload, prompts, concurrency=concurrency, timeout_s=self._timeout_s)
        for request in wave.requests:
            if request.error is not None:
                raise ConfigError(f"{self._url} cannot do the requests: {request.error}")
        return wave

    async def _deploy(self, boundaries: Sequence[int], planner: Mapping[str, Any]) -> None:
        layout = {"boundaries": list(boundaries)} if boundaries else {"stages": 1}
        config = adapt_config(self._config, args={}, user_config={"layout": layout})
        router_of(config)["user_config"]["planner"] = dict(planner)  # whole, so that nothing of a former one stays
        await deploy(config, url=self._url, log=self._log)

    async def _unrest(self, boundaries: tuple[int, ...]) -> str | None:
        """What is still missing for the layout at rest, after doing something about it; None: nothing."""
        status = await self.handle.status()
        if status.config_error is not None:
            raise ConfigError(f"{self._url} refuses the layout {list(boundaries)}: {status.config_error}")
        records = await self.handle.refactorings()
        if records and not records[-1].is_over:
            return f"the refactoring {records[-1].id} is in the phase {records[-1].phase}"
        present = status.layout.boundaries
        if present != boundaries:
            with contextlib.suppress(RefactorBusyError):
                await self.handle.refactor(boundaries=boundaries, reason="start of a run")
            error = records[-1].error if records else None
            return f"the layout is {list(present)} ({error or 'nothing failed'})"
        look = look_at(status, at_s=0.0)
        if look.num_running + look.num_waiting:
            return f"{look.num_running + look.num_waiting} sequences are unfinished"
        num_warm = len(status.warm_stages)
        return f"{num_warm} of {self._num_warm} warm stages are ready" if num_warm < self._num_warm else None

    async def _look(self, looks: list[Look], started_s: float) -> None:
        """Fill ``looks`` until cancelled."""
        while True:
            with contextlib.suppress(EngineUnavailableError):
                looks.append(look_at(await self.handle.status(), at_s=time.perf_counter() - started_s))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _move(self, at_s: float, boundaries: tuple[int, ...]) -> None:
        await asyncio.sleep(at_s)
        await self.handle.refactor(boundaries=boundaries, reason="asked for by the benchmark")

    async def _decisions(self, *, since: float) -> list[dict[str, Any]]:
        try:
            answer = await self.handle.call("GET", "/flexpipe/decisions", dict[str, Any])
        except InvalidRequestError:  # a server that has no planner
            return []
        return [{key: each[key] for key in _KEPT} for each in answer["data"] if each["at"] >= since]


def look_at(status: ServerStatus, *, at_s: float) -> Look:
    """What the benchmark keeps of ``GET /flexpipe/status``."""
    pipelines = status.pipelines
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    return Look(
        at_s=at_s,
        num_stages=len(stages),
        num_devices=len({stage.compute for stage in stages}),
        num_pipelines=len(pipelines),
        boundaries=status.layout.boundaries,
        num_running=sum(pipeline.queue.num_running for pipeline in pipelines),
        num_waiting=sum(pipeline.queue.num_waiting for pipeline in pipelines),
        num_blocks=status.kv.num_blocks,
    )
