"""An engine in lock-step: which sequences share a step depends on a script alone, so that a run with refactorings can
be compared with one without, step by step and bit by bit.

Everything is the product's but the order of a few calls in the engine thread. A tick: the script adds and aborts
requests, steps are scheduled until ``depth`` are in flight, the result of the oldest is taken. The split, the time and
the arrival order of messages have no part in it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from engines import LinearHost, running_engine
from loads import Request, make_requests

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.request import SequenceUpdate
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.pipeline.messages import Frame, ResultHeader, StepBatch, decode_header
from flexpipe_serve.refactor.record import Phase, RefactorRecord, RefactorRequest

MAX_STEP_TOKENS = 64
MAX_RUNNING = 12
_END_S = 120.0


@dataclass(frozen=True)
class Change:
    """A refactoring of the script."""

    start: int
    """Tick at which it is asked for, or later: when the one before is over."""
    num_ticks: int
    """Ticks that may pass in PREPARE, and again in COPY; then the script waits."""
    request: RefactorRequest


@dataclass(frozen=True)
class Script:
    """What happens at which tick."""

    arrivals: dict[int, list[Request]]
    aborts: dict[int, list[str]]
    changes: tuple[Change, ...] = ()

    @property
    def last_tick(self) -> int:
        return max([*self.arrivals, *self.aborts, *(c.start for c in self.changes)])

    def during(self, changes: Sequence[Change]) -> Script:
        """The same with these refactorings."""
        return replace(self, changes=tuple(changes))


def make_script(seed: int, *, num_requests: int, num_ticks: int) -> Script:
    """Requests at random ticks."""
    rng = random.Random(seed)
    arrivals: dict[int, list[Request]] = {}
    aborts: dict[int, list[str]] = {}
    for request in make_requests(rng, num_requests):
        tick = rng.randrange(1, num_ticks)
        arrivals.setdefault(tick, []).append(request)
        if request.abort_after is not None:
            aborts.setdefault(tick + request.abort_after, []).append(request.id)
    return Script(arrivals, aborts)


def make_changes(seed: int, requests: Sequence[RefactorRequest], *, num_ticks: int) -> list[Change]:
    """Refactorings one after the other, from random ticks on."""
    rng = random.Random(seed)
    starts = sorted(rng.randrange(2, num_ticks) for _ in requests)
    return [Change(start, rng.choice((3, 10, 30)), request) for start, request in zip(starts, requests, strict=True)]


Row = tuple[Any, ...]


@dataclass
class Transcript:
    """All that one run sent and got."""

    steps: list[Row] = field(default_factory=list)
    """What each step computes, without its epoch."""
    results: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    """Of each sequence: tokens and log probabilities, prompt's too, and how it ended."""
    records: list[RefactorRecord] = field(default_factory=list)
    num_preemptions: int = 0
    num_kept: list[int] = field(default_factory=list)
    """Sequences that held KV while each refactoring switched."""


class _RecordingLink:
    """The pipeline's data side; notes what is sent."""

    def __init__(self, link: Any, steps: list[Row]) -> None:
        self._link = link
        self._steps = steps

    @property
    def epoch(self) -> int:
        return int(self._link.epoch)

    def send(self, batch: StepBatch) -> None:
        header = replace_struct(batch.header)
        arrays = (batch.token_ids, batch.num_computed, batch.num_new, batch.block_tables, batch.histories)
        self._steps.append((header, *(array.tolist() for array in arrays)))
        self._link.send(batch)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        return self._link.receive(timeout_s)  # type: ignore[no-any-return]

    def wake(self) -> None:
        self._link.wake()


def replace_struct(header: Any) -> tuple[Any, ...]:
    """A step's header without what a refactoring may change."""
    return (header.step, header.num_threads, header.copies, header.samples, header.prompt_logprobs)


class LockstepLoop(StepLoop):
    """See the module. ``depth`` steps are in flight whatever the number of stages; each computes with one thread."""

    def __init__(self, link: Any, *args: Any, depth: int, script: Script, **kwargs: Any) -> None:
        self.transcript = Transcript()
        super().__init__(_RecordingLink(link, self.transcript.steps), *args, **kwargs)  # type: ignore[arg-type]
        self._script_depth = depth
        self._script = script
        self._changes = list(script.changes)
        self._results: dict[int, Sequence[Frame]] = {}
        self._tick = 0
        self._is_filled = False
        self._engine: Engine | None = None
        self._change: Change | None = None
        self._started: Future[RefactorRecord] | None = None
        self._is_copying = False
        self._old_epoch = 0
        self.over = threading.Event()

    def begin(self, engine: Engine) -> None:
        """Follow the script from now on."""
        manager = engine._refactorings
        tell = manager._on_over

        def on_over(*args: Any) -> None:
            tell(*args)
            self._link.wake()

        manager._on_over = on_over
        self._engine = engine
        self._link.wake()

    def resume(self, *, depth: int, num_blocks: int) -> Future[int]:
        return super().resume(depth=min(depth, 1) * self._script_depth, num_blocks=num_blocks)

    def switch(self, *, depth: int, patching_epoch: int | None) -> int:
        self.transcript.num_kept.append(self.scheduler.stats().num_running)
        return super().switch(depth=self._script_depth, patching_epoch=patching_epoch)

    def hold(self) -> None:
        assert self._script_depth == 1, "taking the results in flight without sending more steps would change batches"
        super().hold()

    def _threads_per_stage(self) -> int:
        return 1

    def _take(self, frames: Sequence[Frame]) -> None:
        header = decode_header(frames[0])
        assert isinstance(header, ResultHeader), header
        self._results[header.step] = frames

    def _fill_pipeline(self) -> None:
        if self._engine is None or self.over.is_set():
            return
        if not self._is_filled:
            if not self._may_go_on(self._engine):
                return
            if self._hold is not None:
                super()._fill_pipeline()  # notes how long it lasts
                return
            self._tick += 1
            self._follow_script()
            super()._fill_pipeline()
            self._is_filled = True
        if self._in_flight:
            frames = self._results.pop(min(self._in_flight), None)
            if frames is None:
                return
            super()._take(frames)
        elif self._tick > self._script.last_tick and self.scheduler.is_idle and not self._changes and not self._change:
            self.over.set()
        self._is_filled = False
        self._link.wake()

    def _follow_script(self) -> None:
        for request in self._script.arrivals.get(self._tick, ()):
            self.scheduler.add(
                *(
                    EngineSequence(
                        request_id=request.id,
                        prompt_token_ids=request.prompt,
                        params=request.params,
                        index=index,
                        priority=request.priority,
                    )
                    for index in range(request.n)
                )
            )
        for request_id in self._script.aborts.get(self._tick, ()):
            self.scheduler.abort(request_id, now=0.0)
        self.scheduler.check_integrity()

    # ------------------------------------------------------------------ refactorings

    def _may_go_on(self, engine: Engine) -> bool:
        """Starts refactorings at their ticks; False while the script waits for one."""
        if self._change is not None:
            assert self._started is not None
            if not self._started.done():
                return False
            if engine._refactorings.is_running:
                if self._link.epoch == self._old_epoch:
                    self._note_copying(engine)
                    return self._tick < self._change.start + self._change.num_ticks
                is_drained = not self.num_in_flight_of(self._old_epoch)
                return not (is_drained and self._changes and self._tick >= self._changes[0].start)
            record = engine.refactoring(self._started.result().id)
            assert record is not None
            self.transcript.records.append(record)
            self._change = self._started = None
        if self._changes and self._tick >= self._changes[0].start:
            change = self._changes.pop(0)
            self._change = replace(change, start=self._tick)
            self._is_copying = False
            self._old_epoch = self._link.epoch
            self._started = engine._control.submit(engine._start_refactoring, change.request)
            self._started.add_done_callback(lambda _: self._link.wake())
            return False
        return True

    def _note_copying(self, engine: Engine) -> None:
        assert self._change is not None
        assert self._started is not None
        record = engine.refactoring(self._started.result().id)
        if not self._is_copying and record is not None and record.phase is Phase.COPY:
            self._is_copying = True
            self._change = replace(self._change, start=self._tick)

    # ------------------------------------------------------------------ what came of it

    def _take_update(self, update: SequenceUpdate, header: ResultHeader, now: float) -> None:
        seq = update.sequence
        logprobs = prompt = None
        if update.sample_index is not None and header.logprobs:
            logprobs = header.logprobs[update.sample_index]
        if update.prompt_logprobs_index is not None:
            prompt = header.prompt_logprobs[update.prompt_logprobs_index]
        row = (update.new_token_ids, logprobs, prompt, seq.finish_reason)
        self.transcript.results.setdefault((seq.request_id, seq.index), []).append(row)

    def _end(self, seq: EngineSequence, error: str | None = None) -> None:
        raise AssertionError(f"{seq} ended outside a step")


@contextlib.contextmanager
def _lockstep_engine(folder: Path, make_loop: Callable[..., LockstepLoop], **options: Any) -> Iterator[Engine]:
    with (
        mock.patch("flexpipe_serve.engine.engine.StepLoop", make_loop),
        running_engine(
            folder,
            host=LinearHost("plain"),
            attention="torch",
            block_size=4,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            max_num_seqs=MAX_RUNNING,
            **options,
        ) as engine,
    ):
        yield engine


def run_script(
    folder: Path,
    script: Script,
    *,
    boundaries: Sequence[int],
    depth: int,
    check: Callable[[Engine], None],
    **options: Any,
) -> Transcript:
    """Run ``script`` through an engine of its own that starts with ``boundaries``.

    Args:
        check: looks at the idle engine in the end.
        options: of ``running_engine``.
    """
    loops: list[LockstepLoop] = []

    def make_loop(*args: Any, **kwargs: Any) -> LockstepLoop:
        loops.append(LockstepLoop(*args, depth=depth, script=script, **kwargs))
        return loops[-1]

    with _lockstep_engine(folder, make_loop, boundaries=boundaries, **options) as engine:
        (loop,) = loops
        loop.begin(engine)
        assert loop.over.wait(_END_S), f"the script stands at tick {loop._tick}"
        loop.transcript.num_preemptions = loop.scheduler.stats().num_preemptions
        check(engine)
        return loop.transcript
