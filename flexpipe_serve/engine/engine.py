"""The engine: requests in, tokens out; keeps its pipeline up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.fleet_memory import PipelineUse
from flexpipe_serve.engine.pipeline_keeper import PipelineKeeper
from flexpipe_serve.engine.pipeline_memory import PipelineMemory
from flexpipe_serve.engine.planner_view import PipelineView, make_view
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.stage_placer import StagePlacer
from flexpipe_serve.engine.stage_status import describe_nodes, describe_pipeline
from flexpipe_serve.engine.status import Event, PipelineStatus
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.engine.wanted_layout import WantedLayout
from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.tokenizer import ModelTokenizer
from flexpipe_serve.pipeline.budget import DomainUse
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest
from flexpipe_serve.placement.placements import Placements
from flexpipe_serve.placement.topology import Topology, devices_for_planner
from flexpipe_serve.planner.calibration import MeasuredStep
from flexpipe_serve.planner.types import SchedulerLimits
from flexpipe_serve.refactor.commands import Finish
from flexpipe_serve.refactor.drainer import Drainer
from flexpipe_serve.refactor.feasibility import ModelWeights
from flexpipe_serve.refactor.manager import RefactorManager
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest

_MAX_EVENTS = 1000

OnLost = Callable[[str, str], None]


class Engine:
    """Serves one model through one pipeline, one of a Fleet's.

    Args:
        make_pipeline: the pipeline, given whom to call when a stage is lost.
        number: of the pipeline.
        weights: bytes of the model, to tell whether a refactoring fits.
        num_cores: CPU cores that the stages share.
        placements: where the application's pipelines have stages.
        sign_of_life_s: interval in which stages hear from the Router.
        arrivals: of the schedulers of one fleet, see Scheduler.
        on_down: see PipelineKeeper.
    """

    def __init__(
        self,
        make_pipeline: Callable[[OnLost], Pipeline],
        *,
        model: ModelCard,
        tokenizer: ModelTokenizer,
        scheduler_config: SchedulerConfig,
        block_size: int,
        metrics: EngineMetrics,
        weights: ModelWeights,
        num_cores: int,
        placements: Placements,
        number: int = 0,
        sign_of_life_s: float = 2.0,
        arrivals: Iterator[int] | None = None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = number
        self.model = model
        self.tokenizer = tokenizer
        self._metrics = metrics
        self._pipeline = make_pipeline(lambda name, reason: self._keeper.on_stage_lost(name, reason))
        scheduler = Scheduler(scheduler_config, num_blocks=1, block_size=block_size, arrivals=arrivals)
        self._block_size = block_size
        self._loop = StepLoop(self._pipeline, scheduler, metrics, num_cores=num_cores)
        self._control = ThreadPoolExecutor(1, thread_name_prefix="flexpipe-control")
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._placer = StagePlacer(self._pipeline, weights, placements, note=self._note)
        self._refactorings = RefactorManager(
            self._pipeline,
            self._loop,
            weights,
            placer=self._placer,
            rebuild=lambda layout: self._keeper.rebuild_once(layout),
            on_over=self._on_refactored,
        )
        self.memory = PipelineMemory(
            self._pipeline,
            self._loop,
            self._refactorings,
            control=self._control,
            on_resized=self._after_resizing,
        )
        self._wanted = WantedLayout(self._pipeline, self._refactorings, start=self._start_refactoring)
        self._keeper = PipelineKeeper(
            self._pipeline,
            self._loop,
            self._refactorings,
            self._placer,
            control=self._control,
            changing=self.memory.changing,
            sign_of_life_s=sign_of_life_s,
            on_heard=self._on_heard,
            on_down=on_down,
            on_settled=self._wanted.pursue,
            note=self._note,
        )
        self._drainer = Drainer(
            self._pipeline,
            self._refactorings,
            control=self._control,
            start_refactoring=self._start_refactoring,
            note=self._note,
        )

    # ------------------------------------------------------------------ for clients

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless a request could be served now."""
        if self._keeper.unavailable is not None:
            raise EngineUnavailableError(f"The model cannot be served now: {self._keeper.unavailable}")

    def status(self) -> PipelineStatus:
        """The pipeline's part of ``GET /flexpipe/status``."""
        return describe_pipeline(
            number=self.number,
            layout=self._pipeline.layout,
            epoch=self._pipeline.epoch,
            reports=self._keeper.reports,
            stats=self._loop.scheduler.stats(),
            block_size=self._block_size,
            unavailable=self._keeper.unavailable,
            metrics=self._metrics.snapshot(),
            nodes=describe_nodes(self._drainer.topology(), self._pipeline.node_of),
        )

    async def refactor(self, request: RefactorRequest) -> RefactorRecord:
        """See EngineClient.refactor."""
        await self.check_health()
        return await asyncio.wrap_future(self._control.submit(self._start_refactoring, request))

    def refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """See EngineClient.refactoring."""
        return self._refactorings.get(refactoring_id)

    def cancel_refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """See EngineClient.cancel_refactoring."""
        return self._refactorings.cancel(refactoring_id, "asked for")

    def refactorings(self) -> list[RefactorRecord]:
        """See EngineClient.refactorings."""
        return self._refactorings.all()

    def events(self) -> list[Event]:
        """See EngineClient.events."""
        return list(self._events)

    async def drain(self, request: DrainRequest) -> DrainRecord:
        """See EngineClient.drain."""
        if self._pipeline.layout is None:
            await self.check_health()
        return await asyncio.to_thread(self._drainer.drain, request)

    def drains(self) -> list[DrainRecord]:
        """See EngineClient.drains."""
        return self._drainer.records()

    async def undrain(self, node: str, /) -> DrainRecord | None:
        """See EngineClient.undrain."""
        return await asyncio.to_thread(self._drainer.undrain, node)

    # ------------------------------------------------------------------ for a fleet

    @property
    def is_up(self) -> bool:
        """Whether a request could be served now."""
        return self._keeper.unavailable is None

    def view(self) -> PipelineView | None:
        """The pipeline as the planner sees it; None while it is not up."""
        layout = self._pipeline.layout
        if layout is None or not self.is_up:
            return None
        topology = self._drainer.topology()
        config = self._loop.scheduler.config
        return make_view(
            layout=layout,
            reports=self._keeper.reports,
            budgets=self._pipeline.budgets,
            stats=self._loop.scheduler.stats(),
            block_size=self._block_size,
            is_changing=self.is_refactoring,
            limits=SchedulerLimits(
                max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
            ),
            usable=() if topology is None else devices_for_planner(self._placer.in_order(topology)),
        )

    def take_steps(self) -> list[MeasuredStep]:
        """What steps on the layout in force took since the last call; none of a refactoring, which slows them down."""
        steps = self._loop.samples.take(epoch=self._pipeline.epoch)
        return [] if self.is_refactoring else steps

    @property
    def metrics(self) -> EngineMetrics:
        """What is measured."""
        return self._metrics

    @property
    def accepts(self) -> bool:
        """Whether requests may come, perhaps to wait until the pipeline is up again."""
        return not self._keeper.is_stopping and self._pipeline.layout is not None

    @property
    def loop(self) -> StepLoop:
        """The engine thread: its requests, its scheduler."""
        return self._loop

    @property
    def topology(self) -> Topology | None:
        """The nodes and devices as seen about a second ago, nodes to be emptied or kept empty as draining."""
        return self._drainer.topology()

    @property
    def is_refactoring(self) -> bool:
        """Whether a refactoring runs."""
        return self._refactorings.is_running

    def launch(self, layout: Layout) -> PipelineUse:
        """Start empty stages, for ``start``. See PipelineMemory.launch."""
        self._keeper.start_heartbeat()
        self._pipeline.avoid = frozenset(self._pipeline.read_drained())
        self._control.submit(self._placer.place, layout).result()
        use = self._control.submit(self.memory.launch, layout).result()
        self._placer.update(use.reports)
        return use

    def domain_use(self, domain: str) -> DomainUse:
        """See PipelineMemory.domain_use."""
        return self.memory.domain_use(domain, self._keeper.reports)

    def _after_resizing(self, num_blocks: int | None) -> None:
        if num_blocks is not None:
            self._note("kv_resized", f"{num_blocks} KV blocks.")
        with contextlib.suppress(EngineUnavailableError):  # a lost stage is noticed by its watch call
            self._keeper.refresh()
        self._wanted.pursue()

    # ------------------------------------------------------------------ control

    @property
    def layout(self) -> Layout | None:
        """The layout in force."""
        return self._pipeline.layout

    def start(self, layout: Layout) -> None:
        """Bring the pipeline up and serve. Blocks until a request could be served.

        Raises:
            ConfigError, EngineUnavailableError: why not; nothing is left running.
        """
        self._loop.start()
        self._keeper.start_heartbeat()
        try:
            self._control.submit(self._keeper.bring_up, layout).result()
            self._control.submit(self._refactorings.fill_pool).result()
            self._drainer.start()
        except BaseException:
            self.stop()
            raise

    def check_alive(self) -> None:
        """Raises EngineUnavailableError when only a new process can help."""
        if not self._loop.is_alive:
            raise EngineUnavailableError("the engine thread has ended.")

    def set_layout(self, layout: Layout) -> Future[None]:
        """Serve through a layout with these boundaries, by a live refactoring; behind the one that runs, if any, and
        instead of one that still waits for its turn.

        The future fails with ConfigError where that cannot be had; the former layout serves on.
        """
        reached: Future[None] = Future()
        self._control.submit(self._wanted.want, layout, reached)
        return reached

    def set_refactor_limits(self, *, max_bytes_per_s: float, num_warm_stages: int) -> None:
        """New limit of copying KV, and a new size of the pool of warm stages."""
        self._refactorings.max_bytes_per_s = max_bytes_per_s
        self._refactorings.num_warm_stages = num_warm_stages
        if self._pipeline.layout is not None:
            self._control.submit(self._refactorings.fill_pool)

    def set_max_waiting(self, max_waiting: int) -> None:
        """A new bound of the waiting queue, from the next request on."""
        self._loop.call(lambda: self._loop.scheduler.set_max_waiting(max_waiting))

    def stop(self) -> None:
        """End all requests with an error, and all stages. A second time it does nothing."""
        if self._keeper.is_stopping:
            return
        self._keeper.stop()
        self._drainer.stop()
        self._refactorings.stop()
        self._loop.stop("the server is shutting down.")
        self._control.submit(self._pipeline.stop).result()
        self._placer.close()
        self._control.shutdown()
        self._metrics.end()

    # ------------------------------------------------------------------ refactorings

    def _start_refactoring(self, request: RefactorRequest) -> RefactorRecord:
        if self.memory.is_resizing and not request.dry_run:
            raise RefactorBusyError("The KV is being resized, for pipelines come or go; wait for that.")
        record = self._refactorings.start(request)
        if not record.is_over:
            old, new = record.plan.old, record.plan.new
            self._note("refactoring_started", f"{record.id}: {len(old)} to {len(new)} stages ({record.reason}).")
        return record

    def _on_refactored(self, record: RefactorRecord, finish: Finish) -> None:
        """In the refactoring's thread, when it is over."""
        why = f": {record.error}" if record.error else ""
        self._note("refactoring_ended", f"{record.id}: {record.outcome} after {record.seconds:.2f} s{why}.")
        self._metrics.on_refactoring(record)
        self._keeper.on_refactored(finish)

    def _note(self, kind: str, message: str) -> None:
        self._events.append(Event(time=time.time(), kind=kind, message=message, pipeline=self.number or None))

    def _on_heard(self) -> None:
        reports = list(self._keeper.reports.values())
        self._metrics.set_gauges(self._loop.scheduler.stats(), reports, epoch=self._pipeline.epoch)
        self._metrics.flush(time.monotonic())
