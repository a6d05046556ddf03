"""The engine thread: schedules steps, sends them, takes results, tells the clients.

The scheduler belongs to this thread alone, so every decision about a sequence (admission, abort, its end) is taken
in one place, between two steps. Others speak to it by commands.
"""

from __future__ import annotations

import logging
import sys
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
from flexpipe_serve.engine.steps_in_flight import SentStep, StepsInFlight
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.engine.stream_table import StreamTable
from flexpipe_serve.engine.thread_calls import ThreadCalls
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
_SWITCH_INTERVAL_S = 0.0005
"""Of Python's threads: a result must not wait 5 ms (the default) while texts are being sent."""


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
class _Result:
    header: ResultHeader
    updates: list[SequenceUpdate]
    num_tokens: int
    taken_at: float
    step_seconds: float


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
        self._calls = ThreadCalls(link.wake)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexpipe-engine", daemon=True)
        # The thread's own.
        self._streams = StreamTable(metrics)
        self._is_retired = False
        self._depth = 0
        """Steps in flight at once; 0: none are sent."""
        self._next_step = 1
        self._in_flight = StepsInFlight()
        self._patching_epoch: int | None = None
        self._hold: Hold | None = None
        self.holds = HoldTimes()
        self.costs = StepCosts()
        self.samples = StepSamples()
        self._untold: list[_Result] = []
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
        return self._calls.call(command)

    def add(self, stream: RequestStream) -> Future[None]:
        """Queue a request. Fails with what Scheduler.add raises, and with RetiredError."""
        stream.home = self

        def add() -> None:
            if self._is_retired:
                raise RetiredError("the pipeline is being taken away, or the server shuts down.")
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
            self._in_flight.void()
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
        return self._calls.when(condition)

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
            self._in_flight.void()
            self._patching_epoch = None
            self._end_hold()
            self._calls.fail_waits(EngineUnavailableError("the pipeline was rebuilt meanwhile."))
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
        return self._in_flight.num_of(epoch)

    def last_sent(self, epoch: int) -> int:
        """The newest step sent in an epoch; 0: none."""
        return self._in_flight.last_sent(epoch)

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
        self._in_flight.forget_old_epochs()  # but the one whose steps are in flight
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
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        while not self._stopping.is_set():
            try:
                if not self._calls.is_empty:
                    self._tell()  # before anything that the calls have to tell
                    self._calls.run()
                self._fill_pipeline()
                self._calls.check()
                self._tell()
                self._streams.deliver()
                frames = self._link.receive(_IDLE_WAIT_S)
                if frames is not None:
                    self._take(frames)
            except Exception:  # thread edge: one bad message must not end all requests
                logger.exception("the engine loop caught an error")
        self._streams.deliver()
        self._calls.close(RetiredError("the pipeline has ended."))

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
                patched_through=self._in_flight.last_taken(self._patching_epoch or 0),
            )
            if batch is None:
                return
            self._in_flight.add(SentStep(batch, time.monotonic(), begun_at))
            self._next_step += 1
            self._link.send(batch)

    def _threads_per_stage(self) -> int:
        """Stages that compute at the same time share the cores; one that computes alone has them all."""
        num_busy = min(self._depth, self.scheduler.num_unfinished)
        return max(1, self._num_cores // max(1, num_busy))

    def _take(self, frames: Sequence[Frame]) -> None:
        header = decode_header(frames[0])
        if not isinstance(header, ResultHeader | FailureHeader):
            return
        sent = self._in_flight.take(header)
        if sent is None:
            return  # of a void step
        now = time.monotonic()
        step_seconds = now - sent.time
        self._result_at = now
        if isinstance(header, ResultHeader):
            tokens = decode_tokens(frames[1])
            self.holds.add(header.held_seconds)
            self.holds.num_tokens += len(tokens)
            updates = self.scheduler.complete(header.step, tokens, now=now)
            self.costs.note(sent.batch.header.num_tokens, step_seconds, now=now)
            begun_at = sent.begun_at if self._next_step == header.step + 1 else None
            self.samples.note(sent.batch, header, seconds=None if begun_at is None else now - begun_at)
            self._untold.append(_Result(header, updates, len(tokens), now, step_seconds))
            if any(update.sequence.params.stop for update in updates):
                self._tell()  # their text may end them
        elif isinstance(header, FailureHeader):
            logger.error("step %d failed on %s: %s", header.step, header.stage, header.message)
            self._take_failure(header, now)

    def _tell(self) -> None:
        """Make text of the results taken, for the clients, and count them: once the next step is on its way."""
        untold, self._untold = self._untold, []
        for result in untold:
            header = result.header
            self._metrics.on_step(result.step_seconds, header.stage_seconds, num_tokens=result.num_tokens)
            self._metrics.on_tokens(result.updates, now=result.taken_at)
            for update in result.updates:
                self._take_update(update, header, result.taken_at)

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
        self._is_retired = True
        for stream in self._streams.all():
            for seq in stream.sequences:
                if not stream.texts[seq.index].is_over:
                    self.scheduler.finish(seq, "error", now=time.monotonic())
                    self._end(seq, error=reason)
