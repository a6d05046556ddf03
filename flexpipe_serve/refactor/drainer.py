"""Empties the nodes of one pipeline that go away, and keeps them empty: the I/O around ``placement/drain*.py``."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.kv.copy_rate import LEAST_SHARE
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest, DrainState
from flexpipe_serve.placement.drain_options import drain_options
from flexpipe_serve.placement.drain_plan import MoveRates, Pace, Step, learned_rates, next_step
from flexpipe_serve.placement.nodes import find_node, mark_draining, short_name
from flexpipe_serve.placement.topology import Node, Topology
from flexpipe_serve.refactor.drain_attempt import describe, find_attempt
from flexpipe_serve.refactor.manager import RefactorManager
from flexpipe_serve.refactor.record import (
    MAX_REASON_CHARS,
    Mode,
    Outcome,
    RefactorRecord,
    RefactorRequest,
)

logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_LOOK_EVERY_WHILE_DRAINING_S = 0.2
_RETRY_S = 1.0
_STOP_S = 5.0
_MAX_RECORDS = 256


class Drainer:
    """Watches the nodes, one thread; nodes that somebody names, and those that Ray is about to take away, are emptied.

    Any thread may call its methods.

    Args:
        control: runs what changes the pipeline, one call at a time.
        start_refactoring: starts one; called in ``control``.
        note: writes an event, given its kind and its message.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        refactorings: RefactorManager,
        *,
        control: Executor,
        start_refactoring: Callable[[RefactorRequest], RefactorRecord],
        note: Callable[[str, str], None],
    ) -> None:
        self._pipeline = pipeline
        self._refactorings = refactorings
        self._control = control
        self._start_refactoring = start_refactoring
        self._note = note
        self._lock = threading.Lock()
        self._records: dict[str, DrainRecord] = {}
        self._topology: Topology | None = None
        self._thread = threading.Thread(target=self._run, name="flexpipe-drain", daemon=True)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        # Of the control thread.
        self._was_running = False
        self._retry_at = 0.0

    # ------------------------------------------------------------------ for the engine

    def start(self) -> None:
        """Begin to watch; nodes that were to be kept empty by an earlier Router still are."""
        self._look_at_nodes()
        for node, deadline in self._pipeline.read_drained().items():
            if self._is_alive(node) and node not in self._records:
                self._add(node, reason="requested before the Router was replaced", deadline_at=deadline or None)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nodes stay as they are."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def drain(self, request: DrainRequest) -> DrainRecord:
        """See EngineClient.drain."""
        topology = self._pipeline.topology()
        node = find_node(request.node, topology, param="node").name
        if not self._pipeline.usable_nodes(topology, avoid={node}):
            raise RefactorRefusedError(
                f"node {short_name(node)!r} is the only one left where stages can stand; add another one first."
            )
        deadline_at = time.time() + request.deadline_s
        with self._lock:
            record = self._records.get(node)
            if record is not None:
                record.deadline_at, record.reason = deadline_at, request.reason
        if record is None:
            record = self._add(node, reason=request.reason, deadline_at=deadline_at)
        self._remember()
        self._wake.set()
        return copy.copy(record)

    def undrain(self, node: str) -> DrainRecord | None:
        """See EngineClient.undrain."""
        found = next((found for found in self._pipeline.topology().nodes if found.name == node), None)
        if found is not None and found.is_draining and found.is_alive:
            raise RefactorRefusedError(f"Ray itself drains node {short_name(node)!r}; that cannot be taken back here.")
        with self._lock:
            record = self._records.pop(node, None)
        if record is None:
            return None
        self._remember()
        if not record.is_over and record.refactorings:
            self._refactorings.cancel(record.refactorings[-1], "its node is not drained any more")
        self._note("undrained", f"node {short_name(node)} may hold stages again.")
        return record

    def records(self) -> list[DrainRecord]:
        """See EngineClient.drains."""
        with self._lock:
            return [copy.copy(record) for record in self._records.values()]

    def topology(self) -> Topology | None:
        """The nodes as seen last, those that are being emptied or kept empty as draining."""
        return None if self._topology is None else mark_draining(self._topology, self._pipeline.avoid)

    # ------------------------------------------------------------------ records

    def _add(self, node: str, *, reason: str, deadline_at: float | None) -> DrainRecord:
        now = time.time()
        stages = tuple(name for name, its_node in self._pipeline.node_of.items() if its_node == node)
        record = DrainRecord(
            node=node,
            state=DrainState.DRAINING,
            reason=reason,
            message=f"It holds {_named(stages)}.",
            requested_at=now,
            deadline_at=deadline_at,
            holds_router=node == self._pipeline.router_node,
            stages=stages,
        )
        with self._lock:
            self._records[node] = record
            gone = [name for name, old in self._records.items() if old.is_over and not self._is_alive(name)]
            for name in gone[: max(0, len(self._records) - _MAX_RECORDS)]:
                del self._records[name]
            self._pipeline.avoid = frozenset(self._records)
        within = "" if deadline_at is None else f" within {deadline_at - now:.0f} s"
        self._note("drain_started", f"node {short_name(node)} is to be emptied{within} ({reason}).")
        return record

    def _remember(self) -> None:
        with self._lock:
            self._pipeline.avoid = frozenset(self._records)
            deadlines = {record.node: record.deadline_at or 0.0 for record in self._records.values()}
        self._pipeline.write_drained(deadlines)

    def _is_alive(self, node: str) -> bool:
        return self._topology is None or any(known.name == node and known.is_alive for known in self._topology.nodes)

    def _draining(self) -> list[DrainRecord]:
        with self._lock:
            return [record for record in self._records.values() if not record.is_over]

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look_at_nodes()
                if self._draining():
                    self._control.submit(self._advance).result()
            except Exception:  # thread edge: Ray may not answer for a while, and nodes must be watched on
                if not self._stopping.is_set():
                    logger.exception("looking after draining nodes failed")
            self._wake.wait(_LOOK_EVERY_WHILE_DRAINING_S if self._draining() else _LOOK_EVERY_S)
            self._wake.clear()

    def _look_at_nodes(self) -> None:
        self._topology = self._pipeline.topology()
        for node in self._topology.nodes:
            with self._lock:
                record = self._records.get(node.name)
            if record is not None and not record.is_over and not node.is_alive:
                self._take_end(record)
            elif node.is_alive and node.is_draining:
                self._take_notice(node, record)

    def _take_end(self, record: DrainRecord) -> None:
        """Of a node that is gone: one that Ray drains ends as soon as it is empty."""
        latest = self._refactorings.get(record.refactorings[-1]) if record.refactorings else None
        if latest is not None and not latest.is_over:
            return
        if not record.stages or (latest is not None and latest.outcome is Outcome.DONE):
            self._close(record, DrainState.EMPTY, "It held no stage any more, and has ended.")
        else:
            self._close(record, DrainState.LOST, "It was gone before it was empty; its layers come up elsewhere.")

    def _take_notice(self, node: Node, record: DrainRecord | None) -> None:
        """Of what Ray says: it will take the node away."""
        if record is None:
            self._add(node.name, reason="Ray drains the node", deadline_at=node.deadline)
        elif node.deadline is not None and (record.deadline_at is None or node.deadline < record.deadline_at):
            record.deadline_at = node.deadline

    def _close(self, record: DrainRecord, state: DrainState, message: str) -> None:
        record.seconds = time.time() - record.requested_at
        record.stages = ()
        record.error = None
        record.message = message
        record.state = state
        kind = "drained" if state is DrainState.EMPTY else "drain_lost"
        self._note(kind, f"node {short_name(record.node)} after {record.seconds:.1f} s: {message}")

    # ------------------------------------------------------------------ in the control thread

    def _advance(self) -> None:
        layout = self._pipeline.layout
        if layout is None:
            return
        avoid = self._pipeline.avoid
        running = self._refactorings.running
        node_of = self._pipeline.node_of
        if running is not None:  # it may be about to launch a stage
            node_of |= {part.stage: part.node for part in running.plan.new if part.node is not None}
        needed = {*layout.stages, *(part.stage for part in (running.plan.new if running else ()))}
        there = [name for name, node in node_of.items() if node in avoid]
        self._update_records(node_of, running)
        step = next_step(
            num_stages=len([name for name in there if name in needed]),
            num_spare=len([name for name in there if name not in needed]),
            is_running=running is not None or self._was_running,  # and what follows from its end is done
            is_welcome=running is not None and self._is_welcome(running),
            can_cancel=running is not None and self._refactorings.can_cancel,
            is_complete=self._pipeline.is_complete,
        )
        self._was_running = running is not None
        if step is Step.CANCEL and running is not None:
            self._refactorings.cancel(running.id, "a node has to be emptied")
        elif step is Step.END_SPARE:
            for name in there:
                self._pipeline.end(name)
            self._refactorings.fill_pool()
        elif step is Step.MOVE and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + _RETRY_S
            self._move(layout, node_of)

    def _is_welcome(self, running: RefactorRecord) -> bool:
        """Whether a refactoring that runs leaves all nodes that are to be emptied, and as soon as need be."""
        draining = self._draining()
        is_ours = any(running.id in record.refactorings for record in draining)
        has_time = all(record.deadline_at is None for record in draining)
        return (is_ours or has_time) and not any(part.node in self._pipeline.avoid for part in running.plan.new)

    def _update_records(self, node_of: dict[str, str], running: RefactorRecord | None) -> None:
        now = time.time()
        for record in self._draining():
            record.seconds = now - record.requested_at
            record.stages = tuple(name for name, node in node_of.items() if node == record.node)
            is_moving = running is not None and running.id in record.refactorings  # perhaps about to end a stage
            if not record.stages and not is_moving:
                early = "" if record.deadline_at is None else f", {record.deadline_at - now:.1f} s before its deadline"
                router = " The Router itself runs there, and ends with the node." if record.holds_router else ""
                self._close(record, DrainState.EMPTY, f"It holds no stage any more{early}.{router}")

    def _move(self, layout: Layout, node_of: dict[str, str]) -> None:
        """Start the refactoring that leaves all nodes that are to be emptied."""
        draining = self._draining()
        usable = self._pipeline.usable_nodes(self._pipeline.topology())
        deadlines = [record.deadline_at for record in draining if record.deadline_at is not None]
        left = min(deadlines) - time.time() if deadlines else None
        copy_bytes_per_s = LEAST_SHARE * self._refactorings.max_bytes_per_s  # though it may go faster
        rates = learned_rates(MoveRates(copy_bytes_per_s=copy_bytes_per_s), self._refactorings.all())
        options = drain_options(layout, node_of=node_of, usable=usable)
        attempt, refusal = find_attempt(self._refactorings, options, time_left=left, rates=rates)
        if attempt is None:
            self._block(draining, refusal)
            return
        names = ", ".join(short_name(record.node) for record in draining)
        request = RefactorRequest(
            boundaries=attempt.option.boundaries,
            nodes=attempt.option.nodes,
            mode=Mode.RESTART if attempt.pace is Pace.REPLAY else Mode.LIVE,
            hurry=attempt.pace is not Pace.GENTLE,
            max_bytes_per_s=attempt.copy_bytes_per_s / LEAST_SHARE,
            timeout_s=attempt.timeout_s,
            reason=f"drain of node {names}: {draining[0].reason}"[:MAX_REASON_CHARS],
        )
        try:
            started = self._start_refactoring(request)
        except (RefactorRefusedError, RefactorBusyError, EngineUnavailableError) as error:
            self._block(draining, str(error))
            return
        for record in draining:
            record.refactorings += (started.id,)
            record.predicted_s = attempt.predicted_s
            record.error = None
            record.message = describe(attempt, started.id, left)
        if not attempt.in_time:
            self._note("drain_late", f"node {names}: {describe(attempt, started.id, left)}")

    def _block(self, draining: Sequence[DrainRecord], error: str) -> None:
        for record in draining:
            if record.error is None:
                self._note("drain_blocked", f"node {short_name(record.node)}: {error}")
            record.error = error
            record.message = f"It holds {_named(record.stages)}; moving them away is tried again and again: {error}"


def _named(stages: Sequence[str]) -> str:
    return ", ".join(stages) or "no stage"
