"""Several pipelines that serve one model, also of unequal granularity: requests go to the one that should finish them
first. ``fleet_scaling.py`` lets pipelines come and go meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

import msgspec

from flexpipe_serve.config import PlannerConfig
from flexpipe_serve.engine.assemble import EngineMaker
from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.fleet_routing import FleetRouting
from flexpipe_serve.engine.fleet_scaling import FleetScaling
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.planner_service import PlannerService
from flexpipe_serve.engine.planner_view import PipelineView, join_views, own_computes
from flexpipe_serve.engine.profile_source import ProfileSource
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scale_record import ScaleRecord, ScaleRequest
from flexpipe_serve.engine.stage_status import merge_nodes
from flexpipe_serve.engine.status import Event, ServerStatus
from flexpipe_serve.engine.step_loop import RetiredError
from flexpipe_serve.engine.stream import RequestStream, make_stream
from flexpipe_serve.errors import InvalidRequestError, QueueFullError, RefactorBusyError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest, merge_drains
from flexpipe_serve.planner.calibration import MeasuredStep
from flexpipe_serve.planner.types import Decision, Split
from flexpipe_serve.prometheus_text import render
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest

_MAX_EVENTS = 1000
_MAX_RECORDS = 256


class Fleet:
    """Serves one model through one or more pipelines; an EngineClient. The first pipeline, number 0, is always there.

    Args:
        maker: of the pipelines' engines.
        make_metrics: of a pipeline, by its number.
    """

    def __init__(self, maker: EngineMaker, *, make_metrics: Callable[[int], EngineMetrics]) -> None:
        self.model = maker.model
        self.tokenizer = maker.tokenizer
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        """Of the fleet itself, and of pipelines that are gone."""
        self._records: deque[RefactorRecord] = deque(maxlen=_MAX_RECORDS)
        """Of pipelines that are gone."""
        self._routing = FleetRouting(maker.block_size)
        self._scaling = FleetScaling(
            maker, make_metrics=make_metrics, routing=self._routing, note=self.note, on_gone=self._keep_records
        )
        self._planner = PlannerService(
            self,
            get_profile=ProfileSource(
                maker.spec.path, dtype=maker.setup.dtype, device=maker.setup.device, num_threads=maker.num_cores
            ).get,
            note=self.note,
        )
        self.config_error: str | None = None
        """Why the latest change of the configuration was refused; shown in the status."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Of the pipelines that serve, by number."""
        return self._scaling.engines

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
        """See EngineClient.generate. The queue's limit is each pipeline's own."""
        if not any(engine.accepts for engine in self.engines):
            await self.check_health()
        arrived_at = time.monotonic()
        stream = make_stream(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            n=n,
            priority=priority,
            eos_token_ids=self.model.eos_token_ids,
            backend=self.tokenizer.backend,
            now=arrived_at,
        )
        self._routing.admit(stream)
        self._planner.on_arrival(num_prompt_tokens=len(prompt_token_ids))
        num_output_tokens = 0
        has_failed = False
        try:
            await self._add(stream)
            async for output in stream:
                self._routing.note_output(stream)
                self._planner.on_output(len(output.token_ids), num_before=num_output_tokens)
                num_output_tokens += len(output.token_ids)
                has_failed = has_failed or output.error is not None
                yield output
        finally:
            if stream.is_over and not has_failed:
                latency_s = time.monotonic() - arrived_at
                self._planner.on_finish(num_output_tokens=num_output_tokens, latency_s=latency_s)
            else:
                self._planner.on_leave(num_output_tokens=num_output_tokens)
            stream.leave()
            self._routing.close(stream, num_output_tokens=num_output_tokens if stream.is_over else None)

    async def _add(self, stream: RequestStream) -> None:
        """Give a request to the best pipeline that takes it."""
        while True:
            refused: QueueFullError | None = None
            for engine in self._routing.rank(self.engines, stream):
                self._routing.assign(stream, engine.number)
                try:
                    await asyncio.wrap_future(engine.loop.add(stream))
                    return
                except QueueFullError as error:
                    refused = refused or error
                except RetiredError:
                    if engine in self.engines:
                        raise
                    break  # it was taken away a moment ago: look again
            else:
                assert refused is not None
                raise refused

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless a request could be served now."""
        if not any(engine.is_up for engine in self.engines):
            await self._scaling.first.check_health()

    def status(self) -> ServerStatus:
        """See EngineClient.status."""
        pipelines = tuple(engine.status() for engine in self.engines)
        return ServerStatus(
            **{
                **msgspec.structs.asdict(pipelines[0]),
                "nodes": merge_nodes(status.nodes for status in pipelines),
                "model": self.model.name,
                "config_error": self.config_error,
                "pipelines": pipelines,
            }
        )

    async def refactor(self, request: RefactorRequest) -> RefactorRecord:
        """See EngineClient.refactor. Raises InvalidRequestError too: there is no such pipeline."""
        engines = self.engines
        if request.pipeline >= len(engines):
            raise InvalidRequestError(
                f"pipeline is {request.pipeline}; there are {len(engines)}, from 0 on.", param="pipeline"
            )
        if self._scaling.is_busy and not request.dry_run:
            raise RefactorBusyError("Pipelines come or go; wait for that.")
        return await engines[request.pipeline].refactor(request)

    def refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """See EngineClient.refactoring."""
        for engine in self.engines:
            record = engine.refactoring(refactoring_id)
            if record is not None:
                return record
        return next((record for record in self._records if record.id == refactoring_id), None)

    def cancel_refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """See EngineClient.cancel_refactoring."""
        for engine in self.engines:
            record = engine.cancel_refactoring(refactoring_id)
            if record is not None:
                return record
        return self.refactoring(refactoring_id)

    def refactorings(self) -> list[RefactorRecord]:
        """See EngineClient.refactorings."""
        records = [*self._records, *(record for engine in self.engines for record in engine.refactorings())]
        return sorted(records, key=lambda record: record.requested_at)

    async def scale(self, request: ScaleRequest) -> ScaleRecord:
        """See EngineClient.scale."""
        await self.check_health()
        return await asyncio.wrap_future(self._scaling.scale(request))

    def metrics_text(self) -> str:
        """See EngineClient.metrics_text."""
        return render(family for engine in self.engines for family in engine.metrics.families())

    def plan(self) -> Decision:
        """See EngineClient.plan."""
        return self._planner.plan()

    def decisions(self) -> list[Decision]:
        """See EngineClient.decisions."""
        return self._planner.decisions()

    def view(self) -> PipelineView | None:
        """See Plannable.view."""
        found = [engine.view() for engine in self.engines]
        views = [view for view in found if view is not None]
        if not views or len(views) < len(found):
            return None
        view = join_views(views)
        return dataclasses.replace(view, is_changing=True) if self._scaling.is_busy else view

    def take_steps(self) -> list[tuple[Split, list[MeasuredStep]]]:
        """See Plannable.take_steps. What pipelines take on the same computes depends on each other's load and tells
        nothing."""
        found = [(engine.view(), engine.take_steps()) for engine in self.engines]
        taken = [(view.split, steps) for view, steps in found if view is not None]
        have_own = own_computes([split for split, _ in taken])
        return [each for each, has_own in zip(taken, have_own, strict=True) if has_own]

    async def drain(self, request: DrainRequest) -> DrainRecord:
        """See EngineClient.drain: all pipelines leave the node."""
        return merge_drains([await engine.drain(request) for engine in self.engines])

    def drains(self) -> list[DrainRecord]:
        """See EngineClient.drains."""
        by_node: dict[str, list[DrainRecord]] = {}
        for engine in self.engines:
            for record in engine.drains():
                by_node.setdefault(record.node, []).append(record)
        return [merge_drains(records) for records in by_node.values()]

    async def undrain(self, node: str, /) -> DrainRecord | None:
        """See EngineClient.undrain."""
        found = [await engine.undrain(node) for engine in self.engines]
        records = [record for record in found if record is not None]
        return merge_drains(records) if records else None

    def events(self) -> list[Event]:
        """See EngineClient.events."""
        events = [*self._events, *(event for engine in self.engines for event in engine.events())]
        return sorted(events, key=lambda event: event.time)

    # ------------------------------------------------------------------ control

    def start(self, layout: Layout, *, num_pipelines: int = 1) -> None:
        """Bring the pipelines up and serve, each with the boundaries of ``layout``. Blocks until requests could be
        served.

        Raises:
            ConfigError, EngineUnavailableError: why not; nothing is left running.
        """
        self._scaling.start(layout, num_pipelines=num_pipelines)
        self._planner.start()

    def check_alive(self) -> None:
        """Raises EngineUnavailableError when only a new process can help."""
        for engine in self.engines:
            engine.check_alive()

    def set_layout(self, layout: Layout, *, num_pipelines: int) -> Future[None]:
        """Serve through so many pipelines, each with these boundaries, by live refactorings; see Engine.set_layout.

        The future fails with ConfigError where that cannot be had; what serves then goes on.
        """
        return self._scaling.set_layout(layout, num_pipelines=num_pipelines)

    def set_refactor_limits(self, *, max_bytes_per_s: float, num_warm_stages: int) -> None:
        """New limit of copying KV, and a new size of the pool of warm stages, which only the first pipeline has."""
        self._scaling.configure(max_bytes_per_s=max_bytes_per_s, num_warm_stages=num_warm_stages)
        self._planner.max_bytes_per_s = max_bytes_per_s

    def set_planner(self, config: PlannerConfig) -> None:
        """A new configuration of the planner."""
        self._planner.configure(config)

    def set_max_waiting(self, max_waiting: int) -> None:
        """A new bound of each pipeline's waiting queue, from the next request on."""
        self._scaling.configure(max_waiting=max_waiting)

    def stop(self) -> None:
        """End all requests with an error, and all stages."""
        self._planner.stop()
        self._scaling.stop()

    def note(self, kind: str, message: str) -> None:
        """Write an event."""
        self._events.append(Event(time=time.time(), kind=kind, message=message))

    def _keep_records(self, engine: Engine) -> None:
        self._events.extend(engine.events())
        self._records.extend(engine.refactorings())
