"""The data loop of a stage: one thread that takes messages and runs steps, of several epochs at once.

Everything that a step needs beside weights and KV is the loop's own; the control side hands over routes, and whatever
else must not happen during a step, as functions that the loop calls between messages.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import TypeVar

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kernels.native_layer import LayerRun
from flexpipe_serve.kv.block_copies import copy_blocks
from flexpipe_serve.kv.stage_kv import StageKV
from flexpipe_serve.pipeline.channel import Outlet
from flexpipe_serve.pipeline.copy_worker import CopyWorker
from flexpipe_serve.pipeline.inbox import Inbox
from flexpipe_serve.pipeline.messages import (
    CopyHeader,
    FailureHeader,
    Frame,
    HiddenHeader,
    PatchAckHeader,
    PatchHeader,
    StepBatch,
    StepHeader,
    decode_header,
    decode_step,
    encode,
)
from flexpipe_serve.pipeline.native_hop import HiddenSource, NativeHop
from flexpipe_serve.pipeline.prepared_step import PreparedStep
from flexpipe_serve.pipeline.stage_copies import StageCopies
from flexpipe_serve.pipeline.stage_types import Assignment
from flexpipe_serve.pipeline.step_compute import Hidden, StepComputer
from flexpipe_serve.pipeline.step_queue import ReadyStep, StepQueue

_T = TypeVar("_T")
logger = logging.getLogger(__name__)
_POLL_S = 1.0


@dataclass(frozen=True)
class _BrokenStep:
    """A step that cannot be computed."""

    header: StepHeader
    error: Exception


_Step = PreparedStep | _BrokenStep
_Given = Hidden | FailureHeader


class _Route:
    """Where steps of one epoch go, and those that wait."""

    def __init__(self, assignment: Assignment, outlet: Outlet) -> None:
        self.assignment = assignment
        self.outlet = outlet
        self.run: LayerRun | None = None
        """For native hops, where they are possible; of segments with ``num_blocks``."""
        self.num_blocks = -1
        self.source: HiddenSource | None = None
        """Of the last hidden states, where they came over a unix socket."""
        self.hop: NativeHop | None = None
        """The last one."""
        self.queue: StepQueue[_Step, _Given] = StepQueue(needs_input=not assignment.is_first)
        self.last_step = 0
        self.gives = False
        """Whether KV that its steps write goes to another stage, which waits for it."""

    @property
    def starts(self) -> bool:
        """Whether it begins a step and others go on with it."""
        return self.assignment.is_first and not self.assignment.is_last


class StageLoop:
    """The loop and what belongs to its thread; :meth:`call` is for the others.

    Time that refactorings cost is measured as an upper bound: a step counts as held back while it waits for patches,
    and for the duration of other refactoring work (new routes, block copies) after which a message was waiting already,
    as if that had come when the work began. KV copies have a thread of their own.

    Args:
        name: of the stage.
        stopping: set by whoever wants :meth:`run` to end.
    """

    def __init__(
        self, *, name: str, inbox: Inbox, computer: StepComputer, kv: StageKV, copies: StageCopies,
        stopping: threading.Event,
    ) -> None:  # fmt: skip
        self._name = name
        self._inbox = inbox
        self._computer = computer
        self._kv = kv
        self._copies = copies
        self.worker = CopyWorker(copies, name=name, on_applied=self._recheck)
        self._stopping = stopping
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        self._patched_epochs: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._routes: dict[int, _Route] = {}
        self._last_epoch = 0
        """Of the hidden states that came last."""
        self._extra_seconds = 0.0
        """Refactoring work since the inbox was last seen empty or a step was charged with it."""
        self.num_steps = 0
        self.busy_seconds = 0.0

    def call(self, function: Callable[[], _T]) -> _T:
        """Let the loop call ``function`` between two messages, and wait for it.

        Raises:
            EngineUnavailableError: the stage is stopping.
        """
        done: Future[_T] = Future()
        self._calls.put((function, done))  # type: ignore[arg-type]
        self._inbox.wake()
        while True:
            try:
                return done.result(_POLL_S)
            except TimeoutError:
                if self._stopping.is_set() and not done.done():
                    raise EngineUnavailableError(f"stage {self._name!r} is stopping.") from None

    # ------------------------------------------------------------------ in the loop's thread

    def add_route(self, assignment: Assignment, outlet: Outlet) -> None:
        """Take steps of the assignment's epoch from now on."""
        self._copies.expect(assignment)
        self._routes[assignment.epoch] = _Route(assignment, outlet)

    def drop_route(self, epoch: int) -> None:
        """Drop the steps of an epoch, also those that wait."""
        route = self._routes.pop(epoch, None)
        if route is not None:
            route.outlet.close()

    def drop_all_routes(self) -> None:
        """:meth:`drop_route` of every epoch."""
        for epoch in list(self._routes):
            self.drop_route(epoch)

    def run(self) -> None:
        """Take messages until the stage is stopping."""
        while not self._stopping.is_set():
            # Without waiting, where it must be seen whether a message waited.
            frames = self._receive(0.0 if self._extra_seconds else _POLL_S)
            self._take_calls()
            while not self._patched_epochs.empty():
                self._run_steps(self._patched_epochs.get())
            if frames is None:
                self._extra_seconds = 0.0  # nobody waited for that
                continue
            try:
                self._take(frames)
            except Exception:  # process edge: whatever a message holds, the stage goes on
                logger.exception("%s: dropped a message", self._name)
        self._take_calls()
        self.drop_all_routes()
        self.worker.close()

    def _receive(self, timeout_s: float) -> Sequence[Frame] | None:
        """The next message, after the step that came before it and was computed on the way."""
        route = self._routes.get(self._last_epoch)
        hop = None if route is None else self._next_hop(route)
        frames = self._inbox.receive(timeout_s, hop)
        if route is not None and hop is not None and hop.is_done:
            self._finish_hop(route, hop)
        return frames

    def _next_hop(self, route: _Route) -> NativeHop | None:
        """The step for which nothing but its hidden states is missing, where the kernels can take those."""
        waiting = route.queue.next_waiting
        if route.source is None or waiting is None or self._extra_seconds:
            return None
        step, patched_through = waiting
        if isinstance(step, _BrokenStep) or not self._copies.is_patched(route.assignment.epoch, patched_through):
            return None
        hop = self._make_hop(route, step)
        if hop is not None:
            hop.linger(not route.assignment.is_last and not route.gives)
        return hop

    def _make_hop(self, route: _Route, step: PreparedStep) -> NativeHop | None:
        if route.num_blocks != self._kv.num_blocks:
            route.num_blocks = self._kv.num_blocks
            route.run = self._computer.layer_run(route.assignment, self._kv)
        if route.run is None or step.num_blocks > route.num_blocks:
            return None
        if route.hop is None or route.hop.is_spent or route.hop.step is not step:
            route.hop = self._computer.make_hop(
                step,
                route.run,
                source=route.source,
                outlet=None if route.assignment.is_last else route.outlet,
                used=route.hop,
            )
        return route.hop if route.hop is not None and route.hop.can_send else None

    def _finish_hop(self, route: _Route, hop: NativeHop) -> None:
        started = time.perf_counter()
        route.queue.take_waiting()
        header = hop.step.batch.header
        computed: StepBatch | None = hop.step.batch
        if route.assignment.is_last:
            try:
                frames = self._computer.finish(hop)
            except Exception as error:  # process edge: a step that fails must not take the stage with it
                logger.exception("%s: step %d failed", self._name, header.step)
                frames, computed = encode(self._failure(header, error)), None
            route.outlet.send(frames)
        self._note_step(route, header, computed, seconds=hop.seconds + time.perf_counter() - started)

    def _take_calls(self) -> None:
        while not self._calls.empty():
            function, done = self._calls.get()
            started = time.perf_counter()
            try:
                done.set_result(function())
            except Exception as error:  # thread edge: the caller gets it
                done.set_exception(error)
            self._extra_seconds += time.perf_counter() - started

    def _take(self, frames: Sequence[Frame]) -> None:
        header = decode_header(frames[0])
        started = time.perf_counter()
        if isinstance(header, PatchHeader):
            self.worker.apply(header, frames[1:])
        elif isinstance(header, PatchAckHeader):
            self.worker.on_ack(header)
        elif isinstance(header, CopyHeader):
            route = self._routes.get(header.old_epoch)
            if route is not None:
                route.gives = True
                self.worker.give(header, frames[1:], last_step=route.last_step)
        else:
            self._take_of_step(header, frames[1:], now=started)

    def _take_of_step(self, header: object, buffers: Sequence[Frame], *, now: float) -> None:
        if not isinstance(header, StepHeader | HiddenHeader | FailureHeader):
            raise ValueError(f"a stage takes no {type(header).__name__}.")
        route = self._routes.get(header.epoch)
        if route is None:
            logger.info("%s: dropped a message of epoch %d", self._name, header.epoch)
            return
        if isinstance(header, StepHeader):
            step = self._prepare(header, buffers)
            route.queue.add_step(header.step, step, patched_through=header.patched_through, now=now)
        else:
            given: _Given
            try:
                given = self._computer.read_hidden(header, buffers) if isinstance(header, HiddenHeader) else header
            except ValueError as error:
                given = self._failure(header, error)
            if isinstance(given, Hidden):
                connection = self._inbox.connection
                num_times = 1 + len(given.stage_seconds)
                route.source = None if connection is None else HiddenSource(connection, num_times)
                self._last_epoch = header.epoch
            route.queue.add_input(header.step, given, now=now)
        self._run_steps(header.epoch)

    def _prepare(self, header: StepHeader, buffers: Sequence[Frame]) -> _Step:
        try:
            step = self._computer.prepare(decode_step(header, buffers), num_blocks=self._kv.num_blocks)
        except Exception as error:  # process edge: it fails in its turn
            logger.exception("%s: step %d cannot be computed", self._name, header.step)
            return _BrokenStep(header, error)
        self.busy_seconds += step.seconds
        return step

    def _recheck(self, epoch: int) -> None:
        """In the copies' thread: patches were applied; a step may wait for them."""
        route = self._routes.get(epoch)
        if route is not None and route.queue.has_complete:
            self._patched_epochs.put(epoch)
            self._inbox.wake()

    def _run_steps(self, epoch: int) -> None:
        route = self._routes.get(epoch)
        if route is None:
            return
        while ready := route.queue.pop(lambda step: self._copies.is_patched(epoch, step), now=time.perf_counter()):
            self._run_step(route, ready)

    def _run_step(self, route: _Route, ready: ReadyStep[_Step, _Given]) -> None:
        started = time.perf_counter()
        step, given = ready.step, ready.given
        header = step.header if isinstance(step, _BrokenStep) else step.batch.header
        held_seconds = ready.held_seconds + self._extra_seconds
        self._extra_seconds = 0.0
        computed: StepBatch | None = None
        frames: Sequence[Frame] | None
        try:
            if header.copies:
                copy_blocks([self._kv[layer] for layer in route.assignment.layers], header.copies)
                held_seconds += time.perf_counter() - started
            if isinstance(given, FailureHeader):
                frames = encode(given)  # travels on, so that every stage drops the step in order
            elif isinstance(step, _BrokenStep):
                frames = encode(self._failure(header, step.error))
            elif route.starts and (hop := self._make_hop(route, step)):
                self._computer.start(hop, held_seconds=held_seconds)
                frames, computed = None, step.batch
            else:
                frames = self._computer.run(
                    route.assignment,
                    step,
                    given,
                    kv=self._kv,
                    num_blocks=self._kv.num_blocks,
                    held_seconds=held_seconds,
                )
                computed = step.batch
        except Exception as error:  # process edge: a step that fails must not take the stage with it
            logger.exception("%s: step %d failed", self._name, header.step)
            frames = encode(self._failure(header, error))
        if frames is not None:
            route.outlet.send(frames)
        self._note_step(route, header, computed, seconds=time.perf_counter() - started)

    def _note_step(
        self,
        route: _Route,
        header: StepHeader | HiddenHeader | FailureHeader,
        computed: StepBatch | None,
        *,
        seconds: float,
    ) -> None:
        route.last_step = header.step
        self.num_steps += 1
        self.busy_seconds += seconds
        self.worker.on_step(header.epoch, header.step, computed)

    def _failure(self, header: StepHeader | HiddenHeader | FailureHeader, error: Exception) -> FailureHeader:
        message = f"{type(error).__name__}: {error}"
        return FailureHeader(epoch=header.epoch, step=header.step, stage=self._name, message=message)
