"""The refactorings of one pipeline: plans them, lets one run at a time, keeps their records, and the pool of warm
stages."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import msgspec

from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.stage_placer import StagePlacer
from flexpipe_serve.engine.step_loop import RetiredError, StepLoop
from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.pipeline.layout import Layout, even_boundaries, stage_name
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.placement.nodes import find_node
from flexpipe_serve.placement.placing import Placed, place_stages
from flexpipe_serve.placement.topology import Topology
from flexpipe_serve.refactor.commands import CancelRequested, Finish, StageLost
from flexpipe_serve.refactor.coordinator import Coordinator
from flexpipe_serve.refactor.expected import expect_report
from flexpipe_serve.refactor.feasibility import REFUSED, KVDemand, ModelWeights, StageMemory, plan_refactoring
from flexpipe_serve.refactor.moves import Move
from flexpipe_serve.refactor.protocol import Transition
from flexpipe_serve.refactor.record import (
    Mode,
    Outcome,
    Phase,
    RefactorPlan,
    RefactorRecord,
    RefactorRequest,
    StagePlan,
)

logger = logging.getLogger(__name__)
_MAX_RECORDS = 256
_STOP_S = 5.0


class RefactorManager:
    """Any thread may call its methods; planning and starting is for the engine's control thread.

    Args:
        placer: chooses nodes for stages that are added.
        rebuild: brings a layout up from nothing but tokens; returns how many sequences are replayed.
        on_over: told of every refactoring that ended, with its record and how.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        step_loop: StepLoop,
        weights: ModelWeights,
        *,
        placer: StagePlacer,
        rebuild: Callable[[Layout], int],
        on_over: Callable[[RefactorRecord, Finish], None],
    ) -> None:
        self._pipeline = pipeline
        self._loop = step_loop
        self._weights = weights
        self._placer = placer
        self._rebuild = rebuild
        self._on_over = on_over
        self._lock = threading.Lock()
        self._records: OrderedDict[str, RefactorRecord] = OrderedDict()
        self._running: Coordinator | None = None
        self._thread: threading.Thread | None = None
        self.max_bytes_per_s = 4e7
        self.num_warm_stages = 0
        """Wanted size of the pool."""

    # ------------------------------------------------------------------ refactorings

    def start(self, request: RefactorRequest) -> RefactorRecord:
        """Plan and start one, or only plan it (``dry_run``).

        Raises:
            RefactorRefusedError: it cannot be done, or there is nothing to do; nothing was touched.
            RefactorBusyError: one is running.
            EngineUnavailableError: the pipeline is not up.
        """
        with self._lock:
            running = self._running
        if running is not None and not request.dry_run:
            raise RefactorBusyError(
                f"Refactoring {running.record.id!r} is running (phase {running.record.phase}); wait or cancel it."
            )
        old = self._pipeline.layout
        if old is None or not self._pipeline.is_complete:
            raise EngineUnavailableError("The pipeline is not up; try again when /health answers.")
        placed, plan = self._plan(old, request)
        record = RefactorRecord(
            id=f"refactor-{uuid.uuid4().hex[:12]}",
            mode=request.mode,
            reason=request.reason,
            hurry=request.hurry,
            outcome=Outcome.RUNNING,
            phase=Phase.PLAN,
            plan=plan,
            epoch=0,
            requested_at=time.time(),
            num_blocks=plan.num_blocks_before,
        )
        if request.dry_run:
            is_refused = plan.verdict == REFUSED
            record.outcome = Outcome.REFUSED if is_refused else Outcome.DONE
            record.error = plan.reason if is_refused else None
            return record
        if plan.verdict == REFUSED:
            raise RefactorRefusedError(plan.reason)
        record.epoch = self._pipeline.new_epoch()
        self._pipeline.place(placed.node_of)  # a rebuild launches them there, too
        self._placer.mark(placed.node_of[name] for name in plan.launched)
        coordinator = Coordinator(
            Transition(
                old=old,
                new=placed.layout,
                old_epoch=self._pipeline.epoch,
                epoch=record.epoch,
                mode=request.mode,
                copies=tuple(Move(m.source, m.target, m.layers) for m in plan.moves if not m.shared),
                num_blocks=plan.num_blocks_before,
                num_blocks_during=plan.num_blocks_during,
                num_blocks_after=plan.num_blocks_after if request.resize_kv else plan.num_blocks_during,
            ),
            record=record,
            pipeline=self._pipeline,
            step_loop=self._loop,
            # The limit protects steps: where they stop meanwhile, the sooner the better.
            max_bytes_per_s=request.max_bytes_per_s
            or (self.max_bytes_per_s if request.mode is Mode.LIVE else math.inf),
            timeout_s=request.timeout_s,
            max_spare=self._max_spare,
            node_of=placed.node_of,
            hurry=request.hurry,
            rebuild=self._rebuild,
        )
        with self._lock:
            self._records[record.id] = record
            while len(self._records) > _MAX_RECORDS:
                self._records.popitem(last=False)
            self._running = coordinator
            self._thread = threading.Thread(
                target=self._run, args=(coordinator,), name="flexpipe-refactor", daemon=True
            )
            self._thread.start()
        return self._copy(record)

    def get(self, refactoring_id: str) -> RefactorRecord | None:
        """A record as of now; None where there is none, or no longer."""
        with self._lock:
            record = self._records.get(refactoring_id)
        return None if record is None else self._copy(record)

    def all(self) -> list[RefactorRecord]:
        """Records of the latest ones, the newest last."""
        with self._lock:
            records = list(self._records.values())
        return [self._copy(record) for record in records]

    def cancel(self, refactoring_id: str, reason: str) -> RefactorRecord | None:
        """Ask a refactoring to abort; without effect after the switch, or when it is over."""
        with self._lock:
            running = self._running
        if running is not None and running.record.id == refactoring_id:
            running.post(CancelRequested(reason))
        return self.get(refactoring_id)

    def stop(self) -> None:
        """Abort the one that runs, if it still can be, and wait a moment for its end."""
        with self._lock:
            running, thread = self._running, self._thread
        if running is not None and thread is not None:
            running.post(CancelRequested("the server is shutting down"))
            thread.join(_STOP_S)

    @property
    def is_running(self) -> bool:
        """Whether one is running."""
        return self._running is not None

    @property
    def running(self) -> RefactorRecord | None:
        """The record of the one that is running."""
        with self._lock:
            running = self._running
        return None if running is None else self._copy(running.record)

    @property
    def can_cancel(self) -> bool:
        """Whether one is running that is not past its switch."""
        running = self._running
        return running is not None and running.can_cancel

    def on_stage_lost(self, name: str, reason: str) -> bool:
        """Tell the running refactoring of a lost stage.

        Returns:
            Whether there is one, which then sees to it.
        """
        with self._lock:
            running = self._running
            if running is None:
                return False
            running.post(StageLost(name, reason))
            return True

    def _plan(self, old: Layout, request: RefactorRequest) -> tuple[Placed, RefactorPlan]:
        """The new layout with its nodes, and the plan."""
        topology = self._pipeline.topology()
        reports = self._pipeline.reports()
        spare = [name for name in self._pipeline.stages if name not in old.stages]
        placed = self._place(old, request, topology, spare=spare)
        new = placed.layout
        if new == old:
            raise RefactorRefusedError(
                f"the pipeline has the boundaries {list(old.boundaries)} on these nodes already; nothing is to be done."
            )
        scheduler = self._loop.scheduler
        demand = self._loop.call(lambda: _demand(scheduler)).result()
        budgets = self._pipeline.budgets
        for report in reports.values():
            if report.domain not in budgets:
                held = report.weights_bytes + report.overhead_bytes + report.kv_bytes
                free = report.domain_free_bytes + held
                budgets[report.domain] = self._pipeline.budget.domain_bytes(report, free_bytes=free)
        budgets = dict(budgets)
        stages = {
            name: StageMemory(
                domain=r.domain, kv_domain=_kv_domain(r), weights_bytes=r.weights_bytes, overhead_bytes=r.overhead_bytes
            )
            for name, r in reports.items()
        }
        node_of = self._pipeline.node_of | placed.node_of
        like = next(iter(reports.values()))
        for name in {*new.stages, *self._pipeline.stages}:
            if name not in reports:
                report = expect_report(
                    name, node=node_of.get(name, like.node), reports=reports.values(), topology=topology
                )
                if report.domain not in budgets:
                    budgets[report.domain] = self._pipeline.budget.domain_bytes(
                        report, free_bytes=report.domain_free_bytes
                    )
                stages[name] = StageMemory(
                    domain=report.domain,
                    kv_domain=_kv_domain(report),
                    weights_bytes=0,
                    overhead_bytes=report.overhead_bytes,
                )
        kept = len([name for name in spare if name not in new.stages])
        retired = [name for name in old.stages if name not in new.stages and node_of[name] not in self._pipeline.avoid]
        plan = plan_refactoring(
            old=old,
            new=new,
            mode=request.mode,
            weights=self._weights.seen(report.weight_sizes for report in reports.values()),
            stages=stages,
            parked=retired[: max(0, self.num_warm_stages - kept)],
            budgets=budgets,
            block_bytes=self._pipeline.budget.block_bytes,
            max_blocks=self._pipeline.budget.max_blocks,
            demand=demand,
            may_grow=request.resize_kv,
        )
        return placed, _with_nodes(plan, node_of)

    def _place(self, old: Layout, request: RefactorRequest, topology: Topology, *, spare: Sequence[str]) -> Placed:
        if request.boundaries is not None:
            boundaries: Sequence[int] = request.boundaries
        else:
            assert request.stages is not None
            boundaries = even_boundaries(num_layers=old.num_layers, num_stages=request.stages)
        avoid = {find_node(text, topology, param="avoid").name for text in request.avoid}
        usable = self._pipeline.usable_nodes(topology, avoid=avoid)
        if not usable:
            raise RefactorRefusedError("there is no node left: all that live are being drained or to be avoided.")
        nodes: Sequence[str] | None = None
        if request.nodes is not None:
            nodes = [find_node(text, topology, param="nodes").name for text in request.nodes]
            for text, node in zip(request.nodes, nodes, strict=True):
                if node not in usable:
                    raise RefactorRefusedError(
                        f"no stage can be placed on node {text!r}: it is being drained, to be avoided, has no device of"
                        " the kind that stages use, or came after a server that was started on a single node and"
                        " listens on no network."
                    )
        node_of = self._pipeline.node_of
        placed = place_stages(old, boundaries, nodes=nodes, node_of=node_of, spare=spare, usable=usable)
        is_added = not node_of.keys() >= {*placed.layout.stages}
        if nodes is not None or not is_added or len(usable) == 1 or not {*usable} >= {*node_of.values()}:
            return placed
        nodes = self._placer.choose(placed.layout, topology, usable=usable, node_of=node_of)
        if nodes is None or [*nodes] == [placed.node_of[name] for name in placed.layout.stages]:
            return placed
        return place_stages(old, boundaries, nodes=nodes, node_of=node_of, spare=spare, usable=usable)

    def _max_spare(self, stage: str) -> int:
        return self.num_warm_stages if self._pipeline.node_of.get(stage) not in self._pipeline.avoid else 0

    def _run(self, coordinator: Coordinator) -> None:
        try:
            finish = coordinator.run()
        except RetiredError:  # the pipeline has ended meanwhile, and its refactoring with it
            return
        finally:
            with self._lock:
                self._running = None
        self._on_over(self._copy(coordinator.record), finish)

    @staticmethod
    def _copy(record: RefactorRecord) -> RefactorRecord:
        return msgspec.structs.replace(record, phases=list(record.phases))

    # ------------------------------------------------------------------ pool

    def fill_pool(self) -> list[Future[object]]:
        """Start or end warm stages until there are as many as wanted."""
        layout = self._pipeline.layout
        if layout is None or self.is_running:
            return []
        spare = [name for name in self._pipeline.stages if name not in layout.stages]
        for name in spare[self.num_warm_stages :]:
            self._pipeline.end(name)
        launches: list[Future[object]] = []
        for _ in range(len(spare), self.num_warm_stages):
            taken = self._pipeline.stages
            name = next(n for i in range(len(taken) + 1) if (n := stage_name(i, layout.prefix)) not in taken)
            launches.append(self._pipeline.launch(name))  # type: ignore[arg-type]
        return launches


def _kv_domain(report: StageReport) -> str:
    return report.domain if report.device == "cpu" else f"{report.domain}/{report.name}"


def _with_nodes(plan: RefactorPlan, node_of: Mapping[str, str]) -> RefactorPlan:
    def told(stages: Sequence[StagePlan]) -> tuple[StagePlan, ...]:
        return tuple(msgspec.structs.replace(stage, node=node_of.get(stage.stage)) for stage in stages)

    return msgspec.structs.replace(plan, old=told(plan.old), new=told(plan.new))


def _demand(scheduler: Scheduler) -> KVDemand:
    stats = scheduler.stats()
    return KVDemand(
        num_blocks=stats.num_blocks,
        num_used=stats.num_used_blocks,
        num_cached=stats.num_cached_blocks,
        num_longest=scheduler.num_blocks_needed,
    )
