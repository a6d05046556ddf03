"""The engine: requests in, tokens out; keeps its pipeline up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.stage_status import describe_stage
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.errors import ConfigError, EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.tokenizer import ModelTokenizer
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.refactor.commands import Finish
from flexpipe_serve.refactor.feasibility import ModelWeights
from flexpipe_serve.refactor.manager import RefactorManager
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest

logger = logging.getLogger(__name__)
_RETRY_S = 2.0
"""Between attempts to bring a lost pipeline back."""

_MAX_EVENTS = 1000

OnLost = Callable[[str, str], None]


@dataclass
class _Wanted:
    """A layout that the configuration asks for."""

    layout: Layout
    refactoring_id: str | None = None
    """Of the attempt to get it."""
    future: Future[None] = field(default_factory=Future)


class Engine:
    """Serves one model through one pipeline; an EngineClient.

    Args:
        make_pipeline: the pipeline, given whom to call when a stage is lost.
        weights: bytes of the model, to tell whether a refactoring fits.
        num_cores: CPU cores that the stages share.
        sign_of_life_s: interval in which stages hear from the Router.
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
        sign_of_life_s: float = 2.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._metrics = metrics
        self._pipeline = make_pipeline(self._on_stage_lost)
        scheduler = Scheduler(scheduler_config, num_blocks=1, block_size=block_size)
        self._block_size = block_size
        self._loop = StepLoop(self._pipeline, scheduler, metrics, num_cores=num_cores)
        self._control = ThreadPoolExecutor(1, thread_name_prefix="flexpipe-control")
        self._stopping = threading.Event()
        self._sign_of_life_s = sign_of_life_s
        self._reports: dict[str, StageReport] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._refactorings = RefactorManager(
            self._pipeline, self._loop, weights, rebuild=self._rebuild_once, on_over=self._on_refactored
        )
        self._wanted: _Wanted | None = None
        self._unavailable: str | None = "the pipeline has not started."
        self.config_error: str | None = None
        """Why the latest change of the configuration was refused; shown in the status."""

    # ------------------------------------------------------------------ for clients

    async def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        n: int = 1,
        priority: int = 0,
    ) -> AsyncIterator[SequenceOutput]:
        """See EngineClient.generate. While the pipeline is rebuilt requests wait, up to the queue's limit."""
        if self._stopping.is_set() or self._pipeline.layout is None:
            await self.check_health()
        sequences = [
            EngineSequence(
                request_id=request_id,
                prompt_token_ids=prompt_token_ids,
                params=params,
                index=index,
                priority=priority,
                eos_token_ids=self.model.eos_token_ids,
                arrival_time=time.monotonic(),
            )
            for index in range(n)
        ]
        stream = RequestStream(sequences, backend=self.tokenizer.backend)
        added = self._loop.add(stream)
        try:
            await asyncio.wrap_future(added)
            async for output in stream:
                yield output
        finally:
            if not stream.is_over:
                self._loop.abort(stream)

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless a request could be served now."""
        if self._unavailable is not None:
            raise EngineUnavailableError(f"The model cannot be served now: {self._unavailable}")

    def status(self) -> dict[str, Any]:
        """The body of ``GET /flexpipe/status``."""
        stats = self._loop.scheduler.stats()
        layout = self._pipeline.layout
        stages = layout.stages if layout else ()
        reports = self._reports
        return {
            "model": self.model.name,
            "state": "serving" if self._unavailable is None else "unavailable",
            "reason": self._unavailable,
            "config_error": self.config_error,
            "epoch": self._pipeline.epoch,
            "layout": {
                "num_layers": layout.num_layers if layout else 0,
                "num_stages": layout.num_stages if layout else 0,
                "boundaries": list(layout.boundaries) if layout else [],
            },
            "stages": [describe_stage(reports[name]) for name in stages if name in reports],
            "warm_stages": [describe_stage(report) for name, report in reports.items() if name not in stages],
            "kv": {
                "block_size": self._block_size,
                "num_blocks": stats.num_blocks,
                "num_used_blocks": stats.num_used_blocks,
                "num_cached_blocks": stats.num_cached_blocks,
                "num_free_blocks": stats.num_free_blocks,
                "max_tokens": stats.num_blocks * self._block_size,
                "use": round(stats.num_used_blocks / max(1, stats.num_blocks), 4),
            },
            "queue": {
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "num_steps_in_flight": stats.num_steps_in_flight,
                "num_preemptions": stats.num_preemptions,
            },
            "prefix_cache": {
                "num_prompt_tokens": stats.num_prompt_tokens,
                "num_hit_tokens": stats.num_prefix_hit_tokens,
            },
            "metrics": self._metrics.snapshot(),
        }

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

    def events(self) -> list[dict[str, Any]]:
        """See EngineClient.events."""
        return list(self._events)

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
        try:
            self._control.submit(self._bring_up, layout).result()
            self._control.submit(self._refactorings.fill_pool).result()
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._speak_to_stages, name="flexpipe-heartbeat", daemon=True).start()

    def check_alive(self) -> None:
        """Raises EngineUnavailableError when only a new process can help."""
        if not self._loop.is_alive:
            raise EngineUnavailableError("the engine thread has ended.")

    def set_layout(self, layout: Layout) -> Future[None]:
        """Serve through a layout with these boundaries, by a live refactoring; behind the one that runs, if any, and
        instead of one that still waits for its turn.

        The future fails with ConfigError where that cannot be had; the former layout serves on.
        """
        wanted = _Wanted(layout)
        self._control.submit(self._want, wanted)
        return wanted.future

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
        """End all requests with an error, and all stages."""
        self._unavailable = "the server is shutting down."
        self._stopping.set()
        self._refactorings.stop()
        self._loop.stop("the server is shutting down.")
        self._control.submit(self._pipeline.stop).result()
        self._control.shutdown()

    def _bring_up(self, layout: Layout) -> int:
        """Start the layout from nothing but tokens. Returns how many sequences are replayed."""
        num_blocks = self._pipeline.start(layout)
        self._reports = self._pipeline.reports()
        num_replayed = self._loop.resume(depth=self._pipeline.depth(layout), num_blocks=num_blocks).result()
        self._unavailable = None
        return num_replayed

    def _rebuild_once(self, layout: Layout) -> int:
        self._unavailable = "the pipeline is being rebuilt."
        self._loop.pause().result()
        return self._bring_up(layout)

    def _rebuild(self, layout: Layout, reason: str) -> None:
        """Bring the pipeline up again, however often it takes; requests wait meanwhile."""
        while not self._stopping.is_set():
            self._unavailable = reason
            try:
                num_replayed = self._rebuild_once(layout)
                self._note(
                    "rebuilt", f"{layout.num_stages} stages are up again; {num_replayed} sequences are replayed."
                )
                break
            except Exception as error:  # process edge: whatever it was, try again with new stages
                logger.exception("the pipeline could not be rebuilt")
                self._unavailable = f"{reason} Bringing the pipeline up failed: {error}"
                self._stopping.wait(_RETRY_S)
        self._refactorings.fill_pool()

    def _on_stage_lost(self, name: str, reason: str) -> None:
        if self._stopping.is_set():
            return
        logger.error("stage %s is lost: %s", name, reason)
        self._note("stage_lost", f"stage {name!r} was lost: {reason}")
        self._pipeline.forget(name)
        if self._refactorings.on_stage_lost(name, reason):
            return
        if self._pipeline.layout is not None:  # else its start is under way and fails by itself
            self._control.submit(self._replace_lost, f"stage {name!r} was lost and is being replaced.")

    def _replace_lost(self, reason: str) -> None:
        # The layout may have changed since the loss, and that may have replaced the stage.
        layout = self._pipeline.layout
        if layout is None or self._refactorings.is_running:
            return
        if self._pipeline.is_complete:
            self._refactorings.fill_pool()
        else:
            self._rebuild(layout, reason)
        self._pursue()

    # ------------------------------------------------------------------ refactorings

    def _want(self, wanted: _Wanted) -> None:
        former, self._wanted = self._wanted, wanted
        if former is not None:
            former.future.set_exception(ConfigError("another layout was asked for meanwhile."))
        self._pursue()

    def _pursue(self) -> None:
        """Start the refactoring that the configuration asks for, when it is its turn."""
        wanted, layout = self._wanted, self._pipeline.layout
        if wanted is None or layout is None or self._refactorings.is_running or not self._pipeline.is_complete:
            return  # what follows from the end of that, or from the loss of a stage, comes here again
        if wanted.layout.boundaries == layout.boundaries:
            self._wanted = None
            wanted.future.set_result(None)
            return
        try:
            if wanted.refactoring_id is not None:  # it was tried
                record = self._refactorings.get(wanted.refactoring_id)
                raise RefactorRefusedError(f"the layout could not be changed: {record.error if record else ''}")
            request = RefactorRequest(boundaries=wanted.layout.boundaries, reason="configuration")
            wanted.refactoring_id = self._start_refactoring(request).id
        except RefactorBusyError:
            return
        except (RefactorRefusedError, EngineUnavailableError) as error:
            self._wanted = None
            wanted.future.set_exception(ConfigError(str(error)))

    def _start_refactoring(self, request: RefactorRequest) -> RefactorRecord:
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
        if not self._stopping.is_set():
            self._control.submit(self._after_refactoring, finish)

    def _after_refactoring(self, finish: Finish) -> None:
        if self._refactorings.is_running:
            return
        if not finish.is_rebuilt or not self._pipeline.is_complete:
            self._rebuild(finish.layout, "a stage was lost during a refactoring and is being replaced.")
        else:
            self._unavailable = None
            self._refactorings.fill_pool()
            with contextlib.suppress(EngineUnavailableError):  # a lost stage is noticed by its watch call
                self._reports = self._pipeline.reports()  # or the status would not know the new ones yet
        self._pursue()

    def _note(self, kind: str, message: str) -> None:
        self._events.append({"time": time.time(), "kind": kind, "message": message})

    def _speak_to_stages(self) -> None:
        while not self._stopping.wait(self._sign_of_life_s):
            try:
                self._reports = self._control.submit(self._pipeline.reports).result()
            except EngineUnavailableError as error:
                logger.warning("%s", error)  # a lost stage is noticed by its watch call
                continue
            except RuntimeError:
                return  # stopped meanwhile
            self._metrics.set_gauges(
                self._loop.scheduler.stats(), list(self._reports.values()), epoch=self._pipeline.epoch
            )
            self._metrics.flush(time.monotonic())
