"""The engine: requests in, tokens out; keeps its pipeline up."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.errors import ConfigError, EngineUnavailableError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.tokenizer import ModelTokenizer
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport

logger = logging.getLogger(__name__)
_RETRY_S = 2.0
"""Between attempts to bring a lost pipeline back."""

OnLost = Callable[[str, str], None]


class Engine:
    """Serves one model through one pipeline; an EngineClient.

    Args:
        make_pipeline: the pipeline, given whom to call when a stage is lost.
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
        self._reports: list[StageReport] = []
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
            "stages": [_describe(report) for report in self._reports],
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
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._speak_to_stages, name="flexpipe-heartbeat", daemon=True).start()

    def check_alive(self) -> None:
        """Raises EngineUnavailableError when only a new process can help."""
        if not self._loop.is_alive:
            raise EngineUnavailableError("the engine thread has ended.")

    def set_layout(self, layout: Layout) -> Future[None]:
        """Serve through another layout: the pipeline is rebuilt, running sequences are replayed from their tokens.

        Where the layout does not fit into the memory the future fails with ConfigError and the former one is back.
        """
        return self._control.submit(self._change_layout, layout)

    def set_max_waiting(self, max_waiting: int) -> None:
        """A new bound of the waiting queue, from the next request on."""
        self._loop.call(lambda: self._loop.scheduler.set_max_waiting(max_waiting))

    def stop(self) -> None:
        """End all requests with an error, and all stages."""
        self._unavailable = "the server is shutting down."
        self._stopping.set()
        self._loop.stop("the server is shutting down.")
        self._control.submit(self._pipeline.stop).result()
        self._control.shutdown()

    def _bring_up(self, layout: Layout) -> None:
        num_blocks = self._pipeline.start(layout)
        self._reports = self._pipeline.reports()
        self._loop.resume(num_stages=layout.num_stages, num_blocks=num_blocks).result()
        self._unavailable = None

    def _change_layout(self, layout: Layout) -> None:
        former = self._pipeline.layout
        assert former is not None
        if layout == former:
            return
        reason = "the layout is changing."
        try:
            self._unavailable = reason
            self._loop.pause().result()
            self._bring_up(layout)
        except ConfigError:
            self._rebuild(former, reason)
            raise
        except EngineUnavailableError:
            logger.exception("the layout could not be changed at once")
            self._rebuild(layout, reason)

    def _rebuild(self, layout: Layout, reason: str) -> None:
        """Bring the pipeline up again, however often it takes; requests wait meanwhile."""
        while not self._stopping.is_set():
            self._unavailable = reason
            try:
                self._loop.pause().result()
                self._bring_up(layout)
                return
            except Exception as error:  # process edge: whatever it was, try again with new stages
                logger.exception("the pipeline could not be rebuilt")
                self._unavailable = f"{reason} Bringing the pipeline up failed: {error}"
                self._stopping.wait(_RETRY_S)

    def _on_stage_lost(self, name: str, reason: str) -> None:
        if self._stopping.is_set():
            return
        logger.error("stage %s is lost: %s", name, reason)
        self._unavailable = f"stage {name!r} was lost and is being replaced."
        self._pipeline.forget(name)
        if self._pipeline.layout is not None:  # else its start is under way and fails by itself
            self._control.submit(self._replace_lost, self._unavailable)

    def _replace_lost(self, reason: str) -> None:
        # The layout may have changed since the loss, and that may have replaced the stage.
        layout = self._pipeline.layout
        if layout is None or self._pipeline.is_complete:
            self._unavailable = None
        else:
            self._rebuild(layout, reason)

    def _speak_to_stages(self) -> None:
        while not self._stopping.wait(self._sign_of_life_s):
            try:
                self._reports = self._control.submit(self._pipeline.reports).result()
            except EngineUnavailableError as error:
                logger.warning("%s", error)  # a lost stage is noticed by its watch call
                continue
            except RuntimeError:
                return  # stopped meanwhile
            self._metrics.set_gauges(self._loop.scheduler.stats(), self._reports, epoch=self._pipeline.epoch)
            self._metrics.flush(time.monotonic())


def _describe(report: StageReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "node": report.node,
        "pid": report.pid,
        "device": report.device,
        "layers": [report.start, report.stop],
        "num_layers": report.stop - report.start,
        "weights_bytes": report.weights_bytes,
        "overhead_bytes": report.overhead_bytes,
        "kv_bytes": report.kv_bytes,
        "num_steps": report.num_steps,
        "busy_seconds": round(report.busy_seconds, 3),
    }
