"""Drives one server through refactorings under load, and notes what it sees."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.identity import Difference, find_difference
from flexpipe_serve.bench.load import SteadyLoad, StreamRecord, find_stalled
from flexpipe_serve.bench.memory import LocalMemory
from flexpipe_serve.bench.ties import look_up
from flexpipe_serve.bench.tour import Boundaries, Step
from flexpipe_serve.bench.trial import Trial, refactoring_window
from flexpipe_serve.bench.wave import run_wave
from flexpipe_serve.bench.windows import Window
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import ConfigError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.refactor.record import Mode, RefactorRecord

CHURN = "churn"
"""The mode's name of back-to-back refactorings."""

STALLED_S = 3.0
"""A stream that is silent for longer when the load ends is counted as dropped."""

_SETTLE_S = 0.5
"""Between a refactoring and the window at rest behind it."""
_POOL_S = 60.0
_POLL_S = 0.5
"""Seldom: every look costs both sides CPU in the window that is measured; so there are as many looks at rest."""
_CHURN_POLL_S = 0.1
_CHURN_BYTES_PER_S = 2e8
_MAX_REST = 2
"""A window at rest is as long as the refactoring before it, but at most so many times the usual."""
_SHORT_REST = 0.5
"""Times the usual, for modes whose stops are far longer than any noise."""
_MAX_LOOKED_UP = 10


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The steady load.

    Args:
        concurrency: streams at once.
        num_tokens: of each stream.
        pure_decode: all streams start before the first window and outlast the last, so that no prefill disturbs any.
        timeout_s: a longer stream failed.
    """

    concurrency: int
    num_tokens: int
    pure_decode: bool
    timeout_s: float


@dataclass(slots=True)
class Section:
    """What was measured under one load on one server.

    Args:
        domain: as in Trial.
        name: the mode, or ``churn``.
        round: which repetition.
        trials: the measured refactorings.
        streams: all that were sent.
        differences: streams that said something else than their reference.
        num_stalled: streams that were lost without an error.
    """

    domain: str
    name: str
    round: int = 0
    trials: list[Trial] = field(default_factory=list)
    streams: list[StreamRecord] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    num_stalled: int = 0

    @property
    def num_dropped(self) -> int:
        """Streams that failed, or were lost."""
        return self.num_stalled + sum(stream.error is not None for stream in self.streams)

    @property
    def num_finished(self) -> int:
        """Streams that came to their end."""
        return sum(stream.error is None and not stream.was_ended for stream in self.streams)


class Session:
    """One server that is measured.

    Args:
        domain: name of its kind in the report.
        target: for completions.
        handle: for everything else.
        prompts: of the load.
        plan: the load.
        say: told of every refactoring when it is over.

    Attributes:
        sections: what was measured, also of a section that an error ended.
        memory: of the server; None where it is not on this machine.
        reference: text of each prompt, in pieces, without disturbance.
    """

    def __init__(
        self,
        *,
        domain: str,
        target: Target,
        handle: AsyncHandle,
        prompts: Sequence[str],
        plan: LoadPlan,
        say: Callable[[str], None],
    ) -> None:
        self.domain = domain
        self.handle = handle
        self.memory: LocalMemory | None = None
        self.reference: list[tuple[str, ...]] = []
        self._target = target
        self._prompts = prompts
        self._plan = plan
        self._say = say
        self.sections: list[Section] = []
        self._layout: Boundaries = ()
        self._num_warm = 0
        self._last_id: str | None = None
        """Of the latest refactoring."""

    async def prepare(self) -> ServerStatus:
        """Computes the reference outputs, on the server at rest. Returns its status.

        Raises:
            ConfigError: a request failed.
        """
        status = await self.handle.status()
        self._layout = status.layout.boundaries
        with contextlib.suppress(ProcessLookupError):
            self.memory = LocalMemory(status)
        self._say(f"{self.domain}: {len(self._prompts)} reference outputs of {self._plan.num_tokens} tokens")
        wave = await run_wave(
            self._target,
            [Arrival(0.0, 0, self._plan.num_tokens)] * len(self._prompts),
            self._prompts,
            concurrency=self._plan.concurrency,
            timeout_s=self._plan.timeout_s,
        )
        for request in wave.requests:
            if request.error is not None:
                raise ConfigError(f"{self._target.url} cannot do the load at rest: {request.error}")
        self.reference = [request.pieces for request in wave.requests]
        status = await self.handle.status()
        self._num_warm = len(status.warm_stages)
        return status

    @contextlib.asynccontextmanager
    async def loaded(self, name: str, round_index: int) -> AsyncIterator[tuple[Section, SteadyLoad]]:
        """The load, while the context lasts; afterwards the section has all about its streams."""
        section = Section(self.domain, name, round_index)
        load = SteadyLoad(
            target=self._target,
            prompts=self._prompts,
            concurrency=self._plan.concurrency,
            num_tokens=self._plan.num_tokens,
            spread=not self._plan.pure_decode,
            timeout_s=self._plan.timeout_s,
        )
        self.sections.append(section)
        try:
            await load.start()
            await asyncio.sleep(_SETTLE_S)
            async with self._sampled():
                yield section, load
        finally:
            section.streams = await load.stop()
            section.num_stalled = len(find_stalled(section.streams, after_s=STALLED_S))
            found = (find_difference(s.prompt, s.pieces, self.reference[s.prompt]) for s in section.streams)
            section.differences = [difference for difference in found if difference is not None]
        for index, difference in enumerate(section.differences[:_MAX_LOOKED_UP]):
            section.differences[index] = await look_up(
                difference,
                handle=self.handle,
                model=self._target.model,
                prompt=self._prompts[difference.prompt],
                num_tokens=self._plan.num_tokens,
            )

    async def run(self, steps: Sequence[Step], *, mode: str, round_index: int, rest_s: float) -> None:
        """Measures each step, with a window at rest before and behind it; that between two steps serves both."""
        if mode != Mode.LIVE:
            rest_s *= _SHORT_REST
        async with self.loaded(mode, round_index) as (section, load):
            before: Window | None = None
            for step in steps:
                if self._layout != step.old:
                    await self.refactor(step.old, mode=Mode.LIVE)
                    await self._settle(load)
                    before = None
                    step = replace(step, old=self._layout)
                if before is None:
                    before = await self._rest(rest_s)
                record, window, asked_s = await self.refactor(step.new, mode=mode)
                await self._settle(load)
                after = await self._rest(min(max(rest_s, window.seconds), _MAX_REST * rest_s))
                section.trials.append(
                    Trial(self.domain, mode, round_index, step, record, window, asked_s, before, after)
                )
                self._say(f"{self.domain}, {mode}, round {round_index + 1}: {describe(step, record)}")
                before = after

    async def churn(self, steps: Iterable[Step], *, rest_s: float) -> None:
        """Carries the steps out back to back and in a hurry, with one window at rest before and one behind all of them.
        What was done before an interrupt is kept."""
        async with self.loaded(CHURN, 0) as (section, load):
            before = await self._rest(rest_s)
            for index, step in enumerate(steps):
                step = replace(step, old=self._layout)
                record, window, asked_s = await self.refactor(step.new, mode=Mode.LIVE, hurry=True)
                section.trials.append(Trial(self.domain, CHURN, 0, step, record, window, asked_s, before, before))
                self._say(f"{self.domain}, churn {index + 1}: {describe(step, record)}")
            await self._settle(load)
            after = await self._rest(rest_s)
            section.trials = [replace(trial, after=after) for trial in section.trials]

    async def _settle(self, load: SteadyLoad) -> None:
        """After a refactoring, until all is as at rest: replayed streams have caught up, and the pool is full again; a
        stage that starts in it takes CPU which would make rest look worse than it is."""
        await load.wait_for_tokens(time.perf_counter())
        deadline = time.monotonic() + _POOL_S
        while time.monotonic() < deadline:
            if len((await self.handle.status()).warm_stages) >= self._num_warm:
                break
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_SETTLE_S)

    async def _rest(self, seconds: float) -> Window:
        """A window at rest, with looks at the server as often as in one of a refactoring."""
        start_s = time.perf_counter()
        while (left_s := start_s + seconds - time.perf_counter()) > 0:
            # Not by a job: one that is over answers by itself.
            await (self.handle.refactoring(self._last_id) if self._last_id else self.handle.refactorings())
            await asyncio.sleep(min(_POLL_S, left_s))
        return Window(start_s, time.perf_counter())

    async def refactor(
        self, boundaries: Boundaries, *, mode: str, hurry: bool = False
    ) -> tuple[RefactorRecord, Window, float]:
        """Refactors, and waits for the end. A refused one has the record of its dry run.

        Args:
            boundaries: of the new layout.
            mode: how.
            hurry: load without rests and copy fast.

        Returns:
            Its record, its window, and when it was asked for.
        """
        offset_s = time.time() - time.perf_counter()
        asked_s = time.perf_counter()
        poll_s = _CHURN_POLL_S if hurry else _POLL_S
        try:
            job = await self.handle.refactor(
                boundaries=boundaries,
                mode=mode,
                hurry=hurry,
                max_bytes_per_s=_CHURN_BYTES_PER_S if hurry else None,
                reason="benchmark",
            )
            self._last_id = job.id
        except RefactorBusyError:  # the record of the one before is closed a moment before it makes room
            await asyncio.sleep(poll_s)
            return await self.refactor(boundaries, mode=mode, hurry=hurry)
        except RefactorRefusedError:
            job = await self.handle.refactor(boundaries=boundaries, mode=mode, dry_run=True)
        answered_s = time.perf_counter()
        record = await job.record()
        while not record.is_over:
            await asyncio.sleep(poll_s)
            record = await job.record()
        window = refactoring_window(record, asked_s=asked_s, answered_s=answered_s, clock_offset_s=offset_s)
        # Not what was asked for: it may have been aborted, or recovered.
        self._layout = (await self.handle.status()).layout.boundaries
        return record, window, asked_s

    @contextlib.asynccontextmanager
    async def _sampled(self) -> AsyncIterator[None]:
        sampling = None if self.memory is None else asyncio.create_task(self.memory.sample())
        try:
            yield
        finally:
            if sampling is not None:
                sampling.cancel()


def describe(step: Step, record: RefactorRecord) -> str:
    """One line about a refactoring that is over."""
    text = (
        f"{step.kind} {list(step.old)} -> {list(step.new)}: {record.outcome} in {record.seconds:.2f} s,"
        f" stop {record.stop_seconds * 1e3:.2f} ms"
    )
    return text if record.error is None else f"{text} ({record.error})"
