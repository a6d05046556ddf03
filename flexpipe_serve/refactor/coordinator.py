"""Carries one refactoring out: the I/O around the state machine in ``protocol.py``."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.channel import Outlet
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.messages import CopyHeader, encode
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import Incoming, StageReport
from flexpipe_serve.refactor.commands import (
    BeginCopy,
    CancelRequested,
    Command,
    Done,
    Drain,
    Drained,
    EndPatching,
    EndStage,
    Event,
    Failed,
    Finish,
    Grow,
    Launch,
    Pause,
    Prepare,
    Rebuild,
    Release,
    ResizeKV,
    Resume,
    Shrink,
    StageLost,
    Switch,
    Switched,
    TimedOut,
    WaitCopied,
)
from flexpipe_serve.refactor.protocol import Refactoring, Transition
from flexpipe_serve.refactor.record import Mode, Phase, PhaseTime, RefactorRecord

logger = logging.getLogger(__name__)
_ANSWER_S = 60.0
"""For a command whose work does not grow with the model."""
_POLL_S = 1.0
"""Seldom: while KV is copied, each time its targets are asked how far they are."""
_REPORT_S = 5.0


class Coordinator:
    """One refactoring. :meth:`run` drives it to its end in the calling thread; the other methods may be called by any.

    Args:
        record: is filled in as it goes on; only this thread writes to it.
        max_bytes_per_s: of each copy's snapshot.
        timeout_s: time to the switch.
        max_spare: how many stages without layers the pool may hold now, this one included.
        node_of: where the plan has the stages that are launched.
        hurry: load without rests.
        rebuild: brings a layout up from nothing but tokens; returns how many sequences are replayed.
    """

    def __init__(
        self,
        transition: Transition,
        *,
        record: RefactorRecord,
        pipeline: Pipeline,
        step_loop: StepLoop,
        max_bytes_per_s: float,
        timeout_s: float,
        max_spare: Callable[[str], int],
        node_of: Mapping[str, str],
        hurry: bool,
        rebuild: Callable[[Layout], int],
    ) -> None:
        self.record = record
        self._transition = transition
        self._machine = Refactoring(transition)
        self._pipeline = pipeline
        self._loop = step_loop
        self._max_bytes_per_s = max_bytes_per_s
        self._timeout_s = timeout_s
        self._max_spare = max_spare
        self._node_of = node_of
        self._hurry = hurry
        self._rebuild = rebuild
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deadlines: dict[Command, float] = {}
        self._num_issued = 0
        """Commands of the present phase."""
        self._num_answered = 0
        self._route: dict[str, Outlet] | None = None
        self._copied: dict[str, StageReport] = {}
        """What targets say of their copies."""
        self._started = time.monotonic()
        self._phase_since = 0.0

    def post(self, event: StageLost | CancelRequested) -> None:
        """Tell the refactoring of something that happened."""
        self._events.put(event)

    @property
    def can_cancel(self) -> bool:
        """Whether a cancellation would still abort it."""
        return self._machine.can_cancel

    def run(self) -> Finish:
        """Carry it out. Returns how it ended."""
        self._loop.call(self._loop.start_watch).result()
        finish = self._carry_out(self._machine.start())
        while finish is None:
            event = self._next_event()
            if event is None:
                self._update_record()
            else:
                finish = self._carry_out(self._machine.handle(event))
        self._drop_route_of_the_loser()
        self._close_record(finish)
        return finish

    # ------------------------------------------------------------------ events

    def _next_event(self) -> Event | None:
        now = time.monotonic()
        if self._machine.can_cancel and now - self._started > self._timeout_s:
            return TimedOut(self._timeout_s)
        for command, deadline in list(self._deadlines.items()):  # answers take theirs out meanwhile
            if now > deadline and self._deadlines.pop(command, None) is not None:
                return Failed(command, "no answer in time")
        try:
            return self._events.get(timeout=_POLL_S)
        except queue.Empty:
            self._ask_for_progress()
            return None

    def _ask_for_progress(self) -> None:
        """While KV is copied, let its targets say how far they are."""
        if self._machine.phase is not Phase.COPY:
            return
        for stage in self._targets:
            with contextlib.suppress(EngineUnavailableError):
                self._pipeline.stage(stage).report().add_done_callback(partial(self._note_copied, stage))

    @property
    def _targets(self) -> set[str]:
        return {move.target for move in self._transition.copies}

    def _note_copied(self, stage: str, answer: Future[StageReport]) -> None:
        if answer.exception() is None:
            self._copied[stage] = answer.result()

    def _carry_out(self, commands: Collection[Command]) -> Finish | None:
        self._update_record()
        for command in commands:
            if isinstance(command, Finish):
                return command
            logger.debug("refactoring %s: %s", self.record.id, command)
            self._num_issued += 1
            self._deadlines[command] = time.monotonic() + self._time_limit(command)
            try:
                answer = self._issue(command)
            except Exception as error:  # process edge: whatever a command raises, the machine knows the way back
                self._events.put(Failed(command, _text(error)))
            else:
                answer.add_done_callback(partial(self._on_answer, command))
        return None

    def _on_answer(self, command: Command, answer: Future[Any]) -> None:
        self._deadlines.pop(command, None)
        self._num_answered += 1
        error = answer.exception()
        if error is not None:
            self._events.put(Failed(command, _text(error)))
        elif isinstance(command, Switch):
            self._events.put(Switched(answer.result()))
        elif isinstance(command, Drain):
            self._events.put(Drained(answer.result()))
        else:
            self._events.put(Done(command))

    def _time_limit(self, command: Command) -> float:
        if isinstance(command, Launch | Prepare | WaitCopied | Shrink | Pause | Rebuild | Drain):
            return max(self._timeout_s, _ANSWER_S)
        return _ANSWER_S

    # ------------------------------------------------------------------ commands

    def _issue(self, command: Command) -> Future[Any]:
        loop, pipeline = self._loop, self._pipeline
        match command:
            case Launch(stage):
                return pipeline.launch(stage, node=self._node_of[stage])
            case Prepare(stage, num_blocks):
                return self._prepare(stage, num_blocks)
            case ResizeKV(stage, num_blocks):
                return pipeline.stage(stage).resize_kv(num_blocks)
            case WaitCopied(stage, through_step):
                return pipeline.stage(stage).wait_copied(
                    self._transition.epoch, through_step=through_step, timeout_s=self._timeout_s
                )
            case Release(stage, epoch):
                return pipeline.stage(stage).release(epoch)
            case EndStage(stage, can_park):
                return self._in_thread(lambda: self._end_stage(stage, can_park=can_park))
            case Rebuild(layout):
                return self._in_thread(lambda: self._note_rebuilt(self._rebuild(layout)))
            case Pause():
                loop.call(loop.hold)
                return loop.when(lambda: loop.num_in_flight == 0)
            case Resume():
                return loop.call(loop.unhold)
            case Shrink(num_blocks):
                loop.call(lambda: loop.scheduler.shrink(num_blocks)).result()
                return loop.when(lambda: loop.scheduler.is_shrunk)
            case Grow(num_blocks):
                loop.call(lambda: loop.grow(num_blocks)).result()
                return loop.when(lambda: loop.scheduler.is_shrunk)  # copies of a shrink taken back are on their way
            case BeginCopy(move):
                return loop.call(lambda: self._begin_copy(move.source, move.target, move.layers))
            case Switch():
                return self._switch()
            case Drain():
                return self._drain()
            case EndPatching():
                return loop.call(loop.end_patching)
        raise AssertionError(f"unknown command {command}")

    def _prepare(self, stage: str, num_blocks: int) -> Future[Any]:
        for move in self.record.plan.moves:
            domains = self._pipeline.domain(move.source), self._pipeline.domain(move.target)
            if move.target == stage and move.shared and domains[0] != domains[1]:
                raise EngineUnavailableError(f"stage {stage!r} runs in {domains[1]}, and was planned for {domains[0]}.")
        incoming = tuple(
            Incoming(source=move.source, endpoint=self._pipeline.endpoint(move.source), layers=move.layers)
            for move in self._transition.copies
            if move.target == stage
        )
        assignments = self._pipeline.assignments(self._transition.new, self._transition.epoch, {stage: incoming})
        steps_wait = self._transition.mode is Mode.SYNC  # rests would make the stop longer
        assignment = replace(assignments[stage], hurry=self._hurry or steps_wait)
        return self._pipeline.stage(stage).prepare(assignment, num_blocks=num_blocks, fresh=False)

    def _begin_copy(self, source: str, target: str, layers: tuple[int, ...]) -> None:
        endpoint = self._pipeline.endpoint(target)
        header = CopyHeader(
            epoch=self._transition.epoch,
            old_epoch=self._transition.old_epoch,
            layers=layers,
            target=target,
            node=endpoint.node,
            ipc=endpoint.ipc,
            tcp=endpoint.tcp,
            max_bytes_per_s=self._max_bytes_per_s,
        )
        blocks = np.ascontiguousarray(self._loop.scheduler.blocks_in_use(), np.int32)
        frames = encode(header, blocks.data.cast("B") if blocks.size else b"")
        self._pipeline.send_on_route(self._transition.old_epoch, source, frames)

    def _switch(self) -> Future[int]:
        transition = self._transition
        route = self._route = self._pipeline.connect(transition.new)

        def switch() -> int:
            started = time.perf_counter()
            self._pipeline.take_route(transition.new, epoch=transition.epoch, route=route)
            self._route = None
            step = self._loop.switch(
                depth=self._pipeline.depth(transition.new),
                patching_epoch=transition.old_epoch if transition.copies else None,
            )
            self.record.switched_at = time.time()
            self._loop.holds.add(time.perf_counter() - started)
            return step

        return self._loop.call(switch)

    def _drain(self) -> Future[int]:
        loop, old_epoch = self._loop, self._transition.old_epoch
        last_step: Future[int] = Future()

        def drained(over: Future[None]) -> None:
            error = over.exception()
            if error is not None:
                last_step.set_exception(error)
            else:
                last_step.set_result(loop.last_sent(old_epoch))

        loop.when(lambda: loop.num_in_flight_of(old_epoch) == 0).add_done_callback(drained)
        return last_step

    def _end_stage(self, stage: str, *, can_park: bool) -> None:
        num_spare = len(set(self._pipeline.stages) - {*self._transition.old.stages, *self._transition.new.stages})
        if not can_park or num_spare >= self._max_spare(stage):
            self._pipeline.end(stage)

    def _note_rebuilt(self, num_replayed: int) -> None:
        self.record.num_replayed += num_replayed

    def _in_thread(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                call()
            except Exception as error:  # thread edge: the machine gets it
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=run, name="flexpipe-refactor-call", daemon=True).start()
        return future

    def _drop_route_of_the_loser(self) -> None:
        route, self._route = self._route, None

        def drop() -> None:
            for outlet in (route or {}).values():
                outlet.close()
            old, new = self._transition.old_epoch, self._transition.epoch
            self._pipeline.drop_route(old if self._pipeline.epoch != old else new)

        self._loop.call(drop).result()

    # ------------------------------------------------------------------ record

    def _update_record(self) -> None:
        record, machine = self.record, self._machine
        now = time.monotonic() - self._started
        if machine.phase is not record.phase:
            self._note_phase(now)
            record.phase = machine.phase
            self._num_issued = self._num_answered = 0
        record.seconds = now
        record.switch_step = machine.switch_step
        record.error = machine.error
        reports = list(self._copied.values())
        record.patch_bytes = sum(report.patch_bytes for report in reports)
        record.snapshot_bytes = sum(report.copied_bytes for report in reports) - record.patch_bytes
        record.num_rounds = int(record.snapshot_bytes > 0)
        record.progress = self._progress()
        holds = self._loop.holds
        record.stop_seconds = holds.total_seconds
        record.longest_hold_seconds = holds.longest_seconds
        record.num_tokens_meanwhile = holds.num_tokens

    def _progress(self) -> float:
        """Of the phase: the share of its bytes that was copied, or of its commands that were answered."""
        record = self.record
        if self._machine.phase is Phase.COPY and record.plan.kv_bytes:
            return min(1.0, record.snapshot_bytes / record.plan.kv_bytes)
        return self._num_answered / self._num_issued if self._num_issued else 0.0

    def _note_phase(self, now: float) -> None:
        record = self.record
        record.phases.append(PhaseTime(phase=record.phase, start_s=self._phase_since, seconds=now - self._phase_since))
        self._phase_since = now

    def _close_record(self, finish: Finish) -> None:
        record = self.record
        for stage in self._targets:
            with contextlib.suppress(EngineUnavailableError, TimeoutError):
                self._copied[stage] = self._pipeline.stage(stage).report().result(_REPORT_S)
        self._update_record()
        self._note_phase(record.seconds)
        if finish.num_blocks is not None:
            record.num_blocks = finish.num_blocks
        record.error = finish.error
        record.outcome = finish.outcome


def _text(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
