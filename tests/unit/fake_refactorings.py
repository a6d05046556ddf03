"""Refactorings that move no layer: each look at the record takes the running one half a phase further."""

from __future__ import annotations

import copy

from flexpipe_serve.engine.status import Event
from flexpipe_serve.errors import RefactorBusyError, RefactorRefusedError
from flexpipe_serve.pipeline.layout import even_boundaries, make_layout
from flexpipe_serve.refactor.record import (
    DomainPlan,
    MovePlan,
    Outcome,
    Phase,
    PhaseTime,
    RefactorPlan,
    RefactorRecord,
    RefactorRequest,
    StagePlan,
)

NUM_LAYERS = 30
_PHASES = list(Phase)[1:]
_MIB = 1 << 20


class FakeRefactorings:
    """The part of an engine that refactors, from two stages of 15 layers each; stage-0 shares a domain with stage-1.

    Attributes:
        refuse_refactor_with: raised instead of refactoring.
        hold_at: phase that a refactoring does not leave by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse_refactor_with: Exception | None = None
        self.hold_at: Phase | None = None
        self.requests: list[RefactorRequest] = []
        self._layout = make_layout(num_layers=NUM_LAYERS, boundaries=[15])
        self._records: list[RefactorRecord] = []
        self._cancelled: set[str] = set()
        self._events: list[Event] = [Event(time=1_700_000_000.0, kind="started", message="2 stages.")]

    async def refactor(self, request: RefactorRequest) -> RefactorRecord:
        self.requests.append(request)
        if self.refuse_refactor_with is not None:
            raise self.refuse_refactor_with
        plan = self._plan(request)
        refused = plan.verdict == "refused"
        if refused and not request.dry_run:
            raise RefactorRefusedError(plan.reason)
        record = RefactorRecord(
            id=f"r-{len(self._records) + 1}",
            mode=request.mode,
            reason=request.reason,
            outcome=Outcome.REFUSED if refused else Outcome.DONE if request.dry_run else Outcome.RUNNING,
            phase=Phase.PLAN,
            plan=plan,
            epoch=len(self._records) + 2,
            requested_at=1_700_000_100.0,
            num_blocks=plan.num_blocks_before,
            error=plan.reason if refused else None,
        )
        if request.dry_run:
            return record
        running = [other for other in self._records if not other.is_over]
        if running:
            raise RefactorBusyError(f"Refactoring {running[0].id} is running; wait for it, or cancel it.")
        self._records.append(record)
        record.phases.append(PhaseTime(phase=Phase.PLAN, start_s=0.0, seconds=0.002))
        self._events.append(Event(time=1_700_000_100.0, kind="refactoring started", message=f"{record.id}."))
        return copy.deepcopy(record)

    def refactoring(self, refactoring_id: str) -> RefactorRecord | None:
        record = self._find(refactoring_id)
        if record is not None and not record.is_over:
            self._advance(record)
        return copy.deepcopy(record)

    def cancel_refactoring(self, refactoring_id: str) -> RefactorRecord | None:
        record = self._find(refactoring_id)
        if record is not None and _PHASES.index(Phase.SWITCH) > _index(record.phase):
            self._cancelled.add(refactoring_id)
        return copy.deepcopy(record)

    def refactorings(self) -> list[RefactorRecord]:
        return copy.deepcopy(self._records)

    def events(self) -> list[Event]:
        return copy.deepcopy(self._events)

    def _find(self, refactoring_id: str) -> RefactorRecord | None:
        return next((record for record in self._records if record.id == refactoring_id), None)

    def _advance(self, record: RefactorRecord) -> None:
        if record.id in self._cancelled:
            self._end(record, Outcome.ABORTED, "it was cancelled.")
        elif record.phase is Phase.PLAN:
            record.phase, record.progress = Phase.PREPARE, 0.5
        elif record.progress < 1:
            record.progress = 1.0
        elif record.phase is not self.hold_at:
            self._end_phase(record)

    def _end_phase(self, record: RefactorRecord) -> None:
        start = record.phases[-1].start_s + record.phases[-1].seconds
        record.phases.append(PhaseTime(phase=record.phase, start_s=start, seconds=0.5))
        record.seconds = start + 0.5
        if record.phase is Phase.COPY:
            record.snapshot_bytes, record.patch_bytes, record.num_rounds = 20 * _MIB, _MIB, 1
        if record.phase is Phase.SWITCH:
            record.switch_step, record.stop_seconds, record.longest_hold_seconds = 1234, 0.0006, 0.0004
        if record.phase is Phase.RETIRE:
            record.num_blocks, record.num_tokens_meanwhile = record.plan.num_blocks_after, 321
            self._end(record, Outcome.DONE, None)
            return
        record.phase, record.progress = _PHASES[_index(record.phase) + 1], 0.5

    def _end(self, record: RefactorRecord, outcome: Outcome, error: str | None) -> None:
        record.outcome, record.error = outcome, error
        self._events.append(Event(time=1_700_000_103.5, kind="refactoring ended", message=f"{record.id}: {outcome}."))

    def _plan(self, request: RefactorRequest) -> RefactorPlan:
        boundaries = request.boundaries
        if boundaries is None:
            assert request.stages is not None
            boundaries = even_boundaries(num_layers=NUM_LAYERS, num_stages=request.stages)
        new = make_layout(num_layers=NUM_LAYERS, boundaries=boundaries)
        old_of = {layer: part.stage for part in self._layout.slices for layer in part.layers}
        moved: dict[tuple[str, str], list[int]] = {}
        for part in new.slices:
            for layer in part.layers:
                if old_of[layer] != part.stage:
                    moved.setdefault((old_of[layer], part.stage), []).append(layer)
        too_many = new.num_stages > 10
        return RefactorPlan(
            verdict="refused" if too_many else "fits",
            reason="node-a needs 5.0 GiB, its budget is 4.0 GiB." if too_many else "node-a needs 2.1 of 4.0 GiB.",
            old=tuple(StagePlan(stage=p.stage, start=p.start, stop=p.stop) for p in self._layout.slices),
            new=tuple(StagePlan(stage=p.stage, start=p.start, stop=p.stop) for p in new.slices),
            moves=tuple(
                MovePlan(source=s, target=t, layers=tuple(layers), shared=t != "stage-2")
                for (s, t), layers in moved.items()
            ),
            launched=tuple(set(new.stages) - set(self._layout.stages)),
            retired=tuple(set(self._layout.stages) - set(new.stages)),
            domains=(
                DomainPlan(
                    domain="node-a",
                    budget_bytes=4096 * _MIB,
                    weights_bytes=700 * _MIB,
                    overhead_bytes=900 * _MIB,
                    kv_bytes=560 * _MIB,
                ),
            ),
            num_blocks_before=4281,
            num_blocks_during=4000,
            num_blocks_after=4100,
            weights_bytes=140 * _MIB,
            kv_bytes=20 * _MIB,
        )


def _index(phase: Phase) -> int:
    return -1 if phase is Phase.PLAN else _PHASES.index(phase)
