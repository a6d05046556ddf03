"""The engine thread: schedules steps, sends them, takes results, tells the clients.

The scheduler belongs to this thread alone, so every decision about a sequence (admission, abort, its end) is taken
in one place, between two steps. Others speak to it by commands.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flexpipe_serve.engine.holds import Hold, HoldTimes
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.request import SequenceUpdate
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.step_costs import StepCosts
from flexpipe_serve.engine.step_samples import StepSamples
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.engine.stream_table import StreamTable
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    Frame,
    ResultHeader,
    StepBatch,
    decode_header,
    decode_tokens,
)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_IDLE_WAIT_S = 1.0
_MAX_STEP_FAILURES = 2


class StepLink(Protocol):
    """The data side of a pipeline."""

    @property
    def epoch(self) -> int:
        """Of the steps that are scheduled now."""
        ...

    def send(self, batch: StepBatch) -> None: ...

    def receive(self, timeout_s: float) -> Sequence[Frame] | None: ...

    def wake(self) -> None: ...


class RetiredError(EngineUnavailableError):
    """The pipeline takes no more requests; another one may."""


@dataclass(frozen=True)
class _Sent:
    epoch: int
    time: float
    batch: StepBatch
    begun_at: float | None
    """When the Router began its part of it; None where other steps were in flight."""


class StepLoop:
    """Runs the scheduler against a pipeline.

    Args:
        num_cores: CPU cores the stages share; each step says how many threads a stage may use of them.
    """

    def __init__(self, link: StepLink, scheduler: Scheduler, metrics: EngineMetrics, *, num_cores: int) -> None:
        self.scheduler = scheduler
        self._link = link
        self._metrics = metrics
        self._num_cores = num_cores
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexpipe-engine", daemon=True)
        # The thread's own.
        self._streams = StreamTable(metrics)
        self._is_retired = False
        self._depth = 0
        """Steps in flight at once; 0: none are sent."""
        self._next_step = 1
        self._in_flight: dict[int, _Sent] = {}
        self._conditions: list[tuple[Callable[[], bool], Future[None]]] = []
        self._patching_epoch: int | None = None
        self._last_sent: dict[int, int] = {}
        """Newest step sent, by epoch."""
        self._last_taken: dict[int, int] = {}
        """Newest step whose result was taken, by epoch: those of one epoch end in the order sent."""
        self._hold: Hold | None = None
        self.holds = HoldTimes()
        self.costs = StepCosts()
        self.samples = StepSamples()
        self._result_at: float | None = None
        """When the result came that was taken last, until steps are sent after it."""

    # ------------------------------------------------------------------ for other threads

    def start(self) -> None:
        """Begin; no step is sent before :meth:`resume`."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, reason: str) -> None:
        """End every request with ``reason`` as its error, and the thread."""
        if self._thread.is_alive():
            self.call(lambda: self._end_all(reason)).result()
            self._stopping.set()
            self._link.wake()
            self._thread.join()

    def call(self, command: Callable[[], _T]) -> Future[_T]:
        """Run ``command`` in the engine thread, between two steps."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except Exception as error:  # thread edge: the caller gets it
                future.set_exception(error)

        self._commands.put(run)
        self._link.wake()
        return future

    def add(self, stream: RequestStream) -> Future[None]:
        """Queue a request. Fails with what Scheduler.add raises, and with RetiredError."""
        stream.home = self

        def add() -> None:
            if self._is_retired:
                raise RetiredError("the pipeline is being taken away.")
            self.scheduler.add(*stream.sequences)
            self._streams.add(stream)

        return self.call(add)

    def abort(self, stream: RequestStream) -> Future[None]:
        """End a request whose client is gone; harmless if it is over already. It may have been handed over."""

        def abort() -> None:
            if stream in self._streams:
                for seq in self.scheduler.abort(stream.request_id, now=time.monotonic()):
                    self._end(seq)
            elif stream.home is not self:
                stream.home.abort(stream)

        return self.call(abort)

    def longest(self) -> Future[int]:
        """Tokens that the longest sequence may come to have, of those that are not over; 0: there is none."""
        return self.call(lambda: max((min(s.max_len, self.scheduler.max_len) for s in self._streams.all()), default=0))

    def hand_over(self, place: Callable[[RequestStream], StepLoop], *, retire: bool) -> Future[int]:
        """Give all requests to other loops, which go on with them from their tokens; steps in flight are void.

        Args:
            place: chooses the loop, not this one; called in the engine thread.
            retire: send no more steps, and take no more requests.

        Returns:
            How many sequences went.
        """

        def hand_over() -> int:
            if retire:
                self._is_retired = True
                self._depth = 0
            self._in_flight.clear()
            ended, going = self.scheduler.hand_over(now=time.monotonic())
            for seq in ended:
                self._end(seq)
            self._streams.deliver()  # before anything that the others have to tell
            streams = self._streams.take_out()
            for stream in streams:
                target = place(stream)
                target.take_over(stream, [seq for seq in going if seq.request_id == stream.request_id])
                stream.home = target  # only now: an abort goes there behind it
            return len(going)

        return self.call(hand_over)

    def take_over(self, stream: RequestStream, sequences: Sequence[EngineSequence]) -> Future[None]:
        """Go on with a request that another loop handed over, and with those of its sequences that are not over."""

        def take_over() -> None:
            self._streams.add(stream)
            for seq in self.scheduler.take_over(sequences, now=time.monotonic()):
                self._end(seq)

        return self.call(take_over)

    def when(self, condition: Callable[[], bool]) -> Future[None]:
        """Ends when ``condition``, asked in the engine thread between two steps, is true; fails on :meth:`resume`,
        which makes an end of every wait, and at the end of the thread."""
        future: Future[None] = Future()

        def add() -> None:
            self._conditions.append((condition, future))

        self.call(add)
        return future

    def pause(self) -> Future[None]:
        """Send no more steps; those in flight are void once :meth:`resume` says how the pipeline goes on."""

        def pause() -> None:
            self._depth = 0

        return self.call(pause)

    def resume(self, *, depth: int, num_blocks: int) -> Future[int]:
        """Go on with a pipeline whose KV is empty: running sequences are replayed from their tokens.

        Returns:
            How many sequences lost KV.
        """

        def resume() -> int:
            self._in_flight.clear()
            self._patching_epoch = None
            self._end_hold()
            conditions, self._conditions = self._conditions, []
            for _, future in conditions:
                future.set_exception(EngineUnavailableError("the pipeline was rebuilt meanwhile."))
            self._depth = depth
            num_replayed = self.scheduler.stats().num_running
            for seq in self.scheduler.reset(num_blocks, now=time.monotonic()):
                self._end(seq)
            return num_replayed

        return self.call(resume)

    # ------------------------------------------------------------------ for a refactoring, in the engine thread

    def hold(self) -> None:
        """Send no new steps, until :meth:`unhold`; those in flight go on."""
        if self._hold is None:
            self._hold = Hold()

    def unhold(self) -> None:
        """Send steps again."""
        self._end_hold()

    def start_watch(self) -> None:
        """Count holds and tokens from zero."""
        self.holds = HoldTimes()

    @property
    def num_in_flight(self) -> int:
        """Steps sent and not answered."""
        return len(self._in_flight)

    def num_in_flight_of(self, epoch: int) -> int:
        """Steps of one epoch in flight."""
        return sum(sent.epoch == epoch for sent in self._in_flight.values())

    def last_sent(self, epoch: int) -> int:
        """The newest step sent in an epoch; 0: none."""
        return self._last_sent.get(epoch, 0)

    def switch(self, *, depth: int, patching_epoch: int | None) -> int:
        """The link has changed its epoch: go on with as many steps in flight as suits the new pipeline.

        Args:
            depth: steps in flight at once.
            patching_epoch: the old epoch, where stages wait for patches of its steps; else None.

        Returns:
            The switch step: the first of the new epoch.
        """
        self._depth = depth
        self._patching_epoch = patching_epoch
        for steps in (self._last_sent, self._last_taken):
            for epoch in sorted(steps)[:-1]:  # those before the old epoch
                del steps[epoch]
        return self._next_step

    def grow(self, num_blocks: int) -> None:
        """The stages have ``num_blocks`` blocks, no fewer than the scheduler uses."""
        for seq in self.scheduler.grow(num_blocks, now=time.monotonic()):
            self._end(seq)

    def end_patching(self) -> None:
        """All patches are applied: new steps wait for none."""
        self._patching_epoch = None

    def _end_hold(self) -> None:
        if self._hold is not None and self._hold.since is not None:
            self.holds.add(time.monotonic() - self._hold.since)
        self._hold = None

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._take_commands()
                self._fill_pipeline()
                self._check_conditions()
                self._streams.deliver()
                frames = self._link.receive(_IDLE_WAIT_S)
                if frames is not None:
                    self._take(frames)
            except Exception:  # thread edge: one bad message must not end all requests
                logger.exception("the engine loop caught an error")
        self._streams.deliver()
        for _, future in self._conditions:
            future.set_exception(EngineUnavailableError("the engine has ended."))

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _fill_pipeline(self) -> None:
        """Keep as many steps in flight as the pipeline is deep; a sequence is in one at most."""
        result_at, self._result_at = self._result_at, None
        if self._hold is not None:
            if self._hold.since is None and len(self._in_flight) < self._depth and self.scheduler.num_unfinished:
                self._hold.since = time.monotonic()
            return
        while len(self._in_flight) < self._depth:
            begun_at = None if self._in_flight else result_at or time.monotonic()
            batch = self.scheduler.schedule(
                step=self._next_step,
                epoch=self._link.epoch,
                num_stages=self._depth,
                now=time.monotonic(),
                num_threads=self._threads_per_stage(),
                patched_through=self._last_taken.get(self._patching_epoch or 0, 0),
            )
            if batch is None:
                return
            self._in_flight[self._next_step] = _Sent(self._link.epoch, time.monotonic(), batch, begun_at)
            self._last_sent[self._link.epoch] = self._next_step
            self._next_step += 1
            self._link.send(batch)

    def _check_conditions(self) -> None:
        if not self._conditions:
            return
        waiting, self._conditions = self._conditions, []
        for condition, future in waiting:
            if condition():
                future.set_result(None)
            else:
                self._conditions.append((condition, future))

    def _threads_per_stage(self) -> int:
        """Stages that compute at the same time share the cores; one that computes alone has them all."""
        num_busy = min(self._depth, self.scheduler.num_unfinished)
        return max(1, self._num_cores // max(1, num_busy))

    def _take(self, frames: Sequence[Frame]) -> None:
        header = decode_header(frames[0])
        if not isinstance(header, ResultHeader | FailureHeader):
            return
        sent = self._in_flight.get(header.step)
        if sent is None or sent.epoch != header.epoch:
            return  # of a void step
        del self._in_flight[header.step]
        now = time.monotonic()
        step_seconds = now - sent.time
        self._last_taken[header.epoch] = header.step
        self._result_at = now
        if isinstance(header, ResultHeader):
            tokens = decode_tokens(frames[1])
            self.holds.add(header.held_seconds)
            self.holds.num_tokens += len(tokens)
            updates = self.scheduler.complete(header.step, tokens, now=now)
            self.costs.note(sent.batch.header.num_tokens, step_seconds, now=now)
            begun_at = sent.begun_at if self._next_step == header.step + 1 else None
            self.samples.note(sent.batch, header, seconds=None if begun_at is None else now - begun_at)
            self._metrics.on_step(step_seconds, header.stage_seconds, num_tokens=len(tokens))
            self._metrics.on_tokens(updates, now=now)
            for update in updates:
                self._take_update(update, header, now)
        elif isinstance(header, FailureHeader):
            logger.error("step %d failed on %s: %s", header.step, header.stage, header.message)
            self._take_failure(header, now)

    def _take_update(self, update: SequenceUpdate, header: ResultHeader, now: float) -> None:
        seq = update.sequence
        output, stop = self._streams.of(seq).texts[seq.index].push(update, header)
        if stop is not None and not update.finished:
            self.scheduler.finish(seq, "stop", stop, now=now)
        if output is not None:
            self._streams.put(seq, output)

    def _take_failure(self, header: FailureHeader, now: float) -> None:
        for update in self.scheduler.fail_step(header.step, now=now):
            seq = update.sequence
            if update.finished:
                self._end(seq)
            elif seq.num_failed_steps >= _MAX_STEP_FAILURES:
                self.scheduler.finish(seq, "error", now=now)
                self._end(seq, error=f"computing it failed on {header.stage}: {header.message}")

    def _end(self, seq: EngineSequence, error: str | None = None) -> None:
        self._streams.end(seq, error)

    def _end_all(self, reason: str) -> None:
        for stream in self._streams.all():
            for seq in stream.sequences:
                if not stream.texts[seq.index].is_over:
                    self.scheduler.finish(seq, "error", now=time.monotonic())
                    self._end(seq, error=reason)
