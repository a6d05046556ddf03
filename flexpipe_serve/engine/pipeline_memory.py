"""A pipeline's memory beside that of others: what it takes, and another size of its KV while it serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

from flexpipe_serve.engine.fleet_memory import PipelineUse
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError
from flexpipe_serve.pipeline.budget import DomainUse, KVBudget, count_blocks
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.refactor.manager import RefactorManager

_START_S = 300.0
_RESIZE_S = 300.0


class PipelineMemory:
    """Any thread but the control thread may call its methods, where that is not said otherwise.

    Args:
        control: runs what changes the pipeline, one call at a time.
        on_resized: called in ``control`` when the KV has another size, with its blocks; None: that failed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        loop: StepLoop,
        refactorings: RefactorManager,
        *,
        control: Executor,
        on_resized: Callable[[int | None], None],
    ) -> None:
        self._pipeline = pipeline
        self._loop = loop
        self._refactorings = refactorings
        self._control = control
        self._on_resized = on_resized
        self.is_resizing = False
        """Whether the KV is being resized; no refactoring is to be started then. Of the control thread."""
        self.changing = threading.Lock()
        """Held by who has the stages change the size of their KV."""

    @property
    def budget(self) -> KVBudget:
        """How the KV follows from memory."""
        return self._pipeline.budget

    @property
    def budgets(self) -> dict[str, int]:
        """Bytes that the pipeline may take, by domain."""
        return dict(self._pipeline.budgets)

    def launch(self, layout: Layout) -> PipelineUse:
        """Start the stages of ``layout`` without anything in them. For the control thread.

        Raises:
            EngineUnavailableError: one could not be started.
        """
        launches = [self._pipeline.launch(name) for name in layout.stages]
        reports = {report.name: report for report in (launch.result(_START_S) for launch in launches)}
        return PipelineUse(layout=layout, reports=reports, budgets={}, num_needed=1)

    def use(self) -> PipelineUse:
        """What the pipeline takes, and the KV blocks without which its sequences would not go on as they are.

        Raises:
            EngineUnavailableError: it is not up.
        """
        return self._control.submit(self._use).result()

    def _use(self) -> PipelineUse:
        layout = self._pipeline.layout
        if layout is None or not self._pipeline.is_complete:
            raise EngineUnavailableError("a pipeline is not up; try again when all are.")
        scheduler = self._loop.scheduler
        return PipelineUse(
            layout=layout,
            reports=self._pipeline.reports(),
            budgets=dict(self._pipeline.budgets),
            num_needed=self._loop.call(lambda: scheduler.num_blocks_needed).result(),
        )

    def domain_use(self, domain: str, reports: Mapping[str, StageReport]) -> DomainUse:
        """The pipeline's part of a domain.

        Args:
            reports: the latest, by stage.
        """
        held = [r.weights_bytes + r.overhead_bytes + r.kv_bytes for r in reports.values() if r.domain == domain]
        return DomainUse(
            budget_bytes=self._pipeline.budgets.get(domain, 0) if held else 0,
            held_bytes=sum(held),
        )

    def resize(self, budgets: Mapping[str, int]) -> None:
        """Have as many KV blocks as other budgets allow, while steps go on.

        Args:
            budgets: bytes by domain; those not named stay.

        Raises:
            RefactorBusyError: a refactoring runs; the next one sees to it.
            RefactorRefusedError: more blocks are in use.
            KVMemoryError: the memory cannot be had.
            EngineUnavailableError: the pipeline was rebuilt meanwhile, which has seen to it.
        """
        use = self._control.submit(self._begin).result()
        num_blocks = None
        try:
            num_blocks = self._resize(use, {**use.budgets, **budgets})
        finally:
            self._control.submit(self._end, num_blocks).result()

    def _begin(self) -> PipelineUse:
        if self._refactorings.is_running:
            raise RefactorBusyError("A refactoring is running; wait or cancel it.")
        use = self._use()
        self.is_resizing = True
        return use

    def _end(self, num_blocks: int | None) -> None:
        self.is_resizing = False
        self._on_resized(num_blocks)

    def _resize(self, use: PipelineUse, budgets: Mapping[str, int]) -> int:
        pipeline, loop = self._pipeline, self._loop
        scheduler, epoch = loop.scheduler, pipeline.epoch
        num_before = scheduler.stats().num_blocks
        num_blocks = count_blocks(use.layout, use.reports, budgets=budgets, budget=pipeline.budget)
        if num_blocks < num_before:
            loop.call(lambda: scheduler.shrink(num_blocks)).result()
            loop.when(lambda: scheduler.is_shrunk).result(_RESIZE_S)
        pipeline.budgets.update(budgets)
        with self.changing:
            if pipeline.epoch != epoch:
                raise EngineUnavailableError("the pipeline was rebuilt meanwhile.")
            if num_blocks != num_before:
                self._resize_stages(use.layout, num_blocks)
                loop.call(lambda: loop.grow(num_blocks)).result()
        return num_blocks

    def _resize_stages(self, layout: Layout, num_blocks: int) -> None:
        answers = [self._pipeline.stage(name).resize_kv(num_blocks) for name in layout.stages]
        for answer in answers:
            answer.result(_RESIZE_S)
