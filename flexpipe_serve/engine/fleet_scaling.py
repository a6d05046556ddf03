"""Pipelines come and go while requests are served."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from flexpipe_serve.engine.assemble import EngineMaker
from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.fleet_memory import make_room, take_room
from flexpipe_serve.engine.fleet_routing import FleetRouting
from flexpipe_serve.engine.scale_record import PipelineState, ScaleRecord, ScaleRequest
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.errors import ConfigError, EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.budget import DomainUse
from flexpipe_serve.pipeline.layout import Layout, even_boundaries, make_layout, stage_prefix

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_REFACTOR_S = 600.0


@dataclass
class _Settings:
    """What every pipeline is told when it has started."""

    max_bytes_per_s: float | None = None
    num_warm_stages: int = 0
    max_waiting: int | None = None


class FleetScaling:
    """The engines of a fleet. Any thread may call its methods.

    Args:
        maker: of engines.
        make_metrics: of a pipeline, by its number.
        routing: chooses where requests go.
        note: writes an event, given its kind and its message.
        on_gone: told of each engine that was taken away.
    """

    def __init__(
        self,
        maker: EngineMaker,
        *,
        make_metrics: Callable[[int], EngineMetrics],
        routing: FleetRouting,
        note: Callable[[str, str], None],
        on_gone: Callable[[Engine], None],
    ) -> None:
        self._maker = maker
        self._make_metrics = make_metrics
        self._routing = routing
        self._note = note
        self._on_gone = on_gone
        self._arrivals = itertools.count()
        self._settings = _Settings()
        self._changing = threading.Lock()
        """Held by the one thread that lets pipelines come or go."""
        self._stopping = threading.Event()
        self.first = self._make(0)
        self.engines: tuple[Engine, ...] = (self.first,)
        """Those that requests may go to, by number."""

    @property
    def is_busy(self) -> bool:
        """Whether pipelines come or go now."""
        return self._changing.locked()

    # ------------------------------------------------------------------ control

    def start(self, layout: Layout, *, num_pipelines: int) -> None:
        """See Fleet.start."""
        self._tell(self.first)
        self.first.start(layout)
        try:
            with self._changing:
                while len(self.engines) < num_pipelines:
                    self._add(layout.boundaries)
        except BaseException as error:
            self.stop()
            if isinstance(error, RefactorRefusedError):
                raise ConfigError(f"pipelines is {num_pipelines}: {error}") from None
            raise

    def configure(
        self,
        *,
        max_bytes_per_s: float | None = None,
        num_warm_stages: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        """New settings of all pipelines, also of those to come; None: as before."""
        settings = self._settings
        settings.max_bytes_per_s = settings.max_bytes_per_s if max_bytes_per_s is None else max_bytes_per_s
        settings.num_warm_stages = settings.num_warm_stages if num_warm_stages is None else num_warm_stages
        settings.max_waiting = settings.max_waiting if max_waiting is None else max_waiting
        for engine in self.engines:
            self._tell(engine)

    def stop(self) -> None:
        """See Fleet.stop."""
        self._stopping.set()
        stops = [threading.Thread(target=engine.stop, name="flexpipe-stop") for engine in self.engines]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()

    def scale(self, request: ScaleRequest) -> Future[ScaleRecord]:
        """Let pipelines come and go as asked.

        Raises:
            RefactorBusyError: they do already, or a refactoring runs.
        """
        if any(engine.is_refactoring for engine in self.engines):
            raise RefactorBusyError("A refactoring is running; wait or cancel it.")
        if not self._changing.acquire(blocking=False):
            raise RefactorBusyError("Pipelines come or go already; wait for that.")
        return _in_thread(lambda: self._scale(request), self._changing)

    def set_layout(self, layout: Layout, *, num_pipelines: int) -> Future[None]:
        """See Fleet.set_layout. Behind what goes on already."""
        if num_pipelines == len(self.engines) == 1 and not self.is_busy:
            return self.first.set_layout(layout)

        def change() -> None:
            with self._changing:
                common = self.engines[:num_pipelines]
                for done in [engine.set_layout(layout) for engine in common]:  # behind refactorings that run
                    done.result(_REFACTOR_S)
                self._reach([layout.boundaries] * num_pipelines)

        return _in_thread(change)

    # ------------------------------------------------------------------ in the thread that holds the lock

    def _scale(self, request: ScaleRequest) -> ScaleRecord:
        started, before = time.monotonic(), self.engines
        num_layers = self._maker.num_layers
        wanted: list[tuple[int, ...] | None] = [None] * min(request.num_pipelines, len(before))
        wanted += [self._boundaries(self.first)] * (request.num_pipelines - len(before))
        if request.layouts is not None:
            wanted = [
                even_boundaries(num_layers=num_layers, num_stages=layout.stages)
                if layout.stages is not None
                else layout.boundaries
                for layout in request.layouts
            ]
        num_handed_over = self._reach(wanted)
        record = ScaleRecord(
            reason=request.reason,
            num_before=len(before),
            pipelines=tuple(
                PipelineState(
                    pipeline=engine.number,
                    boundaries=self._boundaries(engine),
                    num_blocks=engine.loop.scheduler.stats().num_blocks,
                )
                for engine in self.engines
            ),
            num_handed_over=num_handed_over,
            seconds=time.monotonic() - started,
        )
        self._note(
            "scaled", f"{len(before)} to {len(self.engines)} pipelines in {record.seconds:.2f} s ({request.reason})."
        )
        return record

    def _reach(self, wanted: Sequence[tuple[int, ...] | None]) -> int:
        """Have pipelines with these boundaries; None: as it is. Returns how many sequences were handed over.

        Raises:
            ConfigError: the model cannot be cut like that, or a layout could not be changed.
            RefactorRefusedError: there is no room.
            RefactorBusyError: a refactoring has started meanwhile.
        """
        layouts = [None if b is None else self._layout(number, b) for number, b in enumerate(wanted)]
        num_handed_over = 0
        num_before = len(self.engines)
        try:
            for boundaries in wanted[num_before:]:
                assert boundaries is not None
                self._add(boundaries)
        except BaseException:  # all or none
            while len(self.engines) > num_before:
                self._remove_last()
            raise
        changes = [e.set_layout(layout) for e, layout in zip(self.engines, layouts, strict=False) if layout is not None]
        for change in changes:
            change.result(_REFACTOR_S)
        while len(self.engines) > len(wanted):
            num_handed_over += self._remove_last()
        return num_handed_over

    def _add(self, boundaries: Sequence[int]) -> None:
        """Start one more pipeline: the others make room for it first.

        Raises:
            ConfigError, RefactorRefusedError, EngineUnavailableError: why not; all is as before.
        """
        serving, number = self.engines, len(self.engines)
        layout = self._layout(number, boundaries)
        engine = self._make(number)
        changed: list[tuple[Engine, dict[str, int]]] = []
        try:
            new = engine.launch(layout)
            uses = [other.memory.use() for other in serving]
            weights = self._maker.weights.seen(r.weight_sizes for use in uses for r in use.reports.values())
            shares = make_room(uses, new, budget=engine.memory.budget, weights=weights)
            for other, use, share in zip(serving, uses, shares, strict=True):
                former = {domain: use.budgets[domain] for domain in share}
                if share != former:
                    changed.append((other, former))
                    other.memory.resize(share)
            self._tell(engine)
            engine.start(layout)
            if self._stopping.is_set():
                raise EngineUnavailableError("the server is shutting down.")
        except BaseException:
            engine.stop()
            for other, former in changed:
                self._resize(other, former)
            raise
        self.engines = (*serving, engine)
        self._note("pipeline_started", f"pipeline {number} serves, with {layout.num_stages} stages.")

    def _remove_last(self) -> int:
        """Take the last pipeline away: its sequences go on in the others, which then have its memory.

        Returns:
            How many sequences went.

        Raises:
            RefactorRefusedError: one is too long for the others; all is as before.
        """
        before = self.engines
        *staying, leaving = before
        self.engines = tuple(staying)  # no new requests go to it
        longest = leaving.loop.longest().result()
        room = max(engine.loop.scheduler.max_len for engine in staying)
        if longest > room:
            self.engines = before
            raise RefactorRefusedError(
                f"Pipeline {leaving.number} has a sequence that may come to have {longest} tokens, and the KV of the"
                f" others has room for {room}. Wait until it has ended."
            )
        num_handed_over = leaving.loop.hand_over(lambda stream: self._place(stream, staying), retire=True).result()
        self._routing.forget(leaving.number)
        budgets = leaving.memory.budgets
        leaving.stop()
        self._note(
            "pipeline_ended", f"pipeline {leaving.number} is gone; {num_handed_over} sequences go on in the others."
        )
        self._on_gone(leaving)
        with contextlib.suppress(EngineUnavailableError):  # one is being rebuilt, and takes what is there
            for engine, share in zip(staying, take_room([e.memory.use() for e in staying], budgets), strict=True):
                if share:
                    self._resize(engine, share)
        return num_handed_over

    def _place(self, stream: RequestStream, engines: Sequence[Engine]) -> StepLoop:
        """Choose who goes on with a request. In an engine's thread."""
        engine = self._routing.rank(engines, stream)[0]
        self._routing.assign(stream, engine.number)
        return engine.loop

    def _hand_over_lost(self, number: int) -> None:
        """A pipeline is down for a while: others that are up go on with its requests, if they have room for them."""
        lost = next((engine for engine in self.engines if engine.number == number), None)
        up = [engine for engine in self.engines if engine.is_up and engine is not lost]
        if lost is None or not up:
            return
        if lost.loop.longest().result() > max(engine.loop.scheduler.max_len for engine in up):
            return
        num = lost.loop.hand_over(lambda stream: self._place(stream, up), retire=False).result()
        self._routing.forget(number)
        self._note("handed_over", f"pipeline {number} is down; {num} of its sequences go on in others.")

    def _resize(self, engine: Engine, budgets: dict[str, int]) -> None:
        try:
            engine.memory.resize(budgets)
        except (MemoryError, TimeoutError, RefactorBusyError, RefactorRefusedError, EngineUnavailableError) as error:
            logger.warning("the KV of pipeline %d stays as it is: %s", engine.number, error)
            self._note("kv_not_resized", f"the KV of pipeline {engine.number} stays as it is: {error}")

    def _make(self, number: int) -> Engine:
        return self._maker.make(
            number,
            metrics=self._make_metrics(number),
            arrivals=self._arrivals,
            others=lambda domain: self._use_of_others(number, domain),
            on_down=lambda: self._hand_over_lost(number),
        )

    def _use_of_others(self, number: int, domain: str) -> DomainUse:
        uses = [engine.domain_use(domain) for engine in self.engines if engine.number != number]
        return DomainUse(
            budget_bytes=sum(use.budget_bytes for use in uses), held_bytes=sum(use.held_bytes for use in uses)
        )

    def _tell(self, engine: Engine) -> None:
        settings = self._settings
        if settings.max_waiting is not None:
            engine.set_max_waiting(settings.max_waiting)
        if settings.max_bytes_per_s is not None:
            engine.set_refactor_limits(
                max_bytes_per_s=settings.max_bytes_per_s,
                num_warm_stages=settings.num_warm_stages if engine is self.first else 0,
            )

    def _layout(self, number: int, boundaries: Sequence[int]) -> Layout:
        return make_layout(num_layers=self._maker.num_layers, boundaries=boundaries, prefix=stage_prefix(number))

    @staticmethod
    def _boundaries(engine: Engine) -> tuple[int, ...]:
        assert engine.layout is not None
        return engine.layout.boundaries


def _in_thread(work: Callable[[], _T], held: threading.Lock | None = None) -> Future[_T]:
    """What ``work`` comes to, in a thread of its own, which releases the lock that is ``held``."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()  # a client that leaves does not stop it

    def run() -> None:
        error = result = None
        try:
            result = work()
        except BaseException as raised:  # thread edge: the caller gets it
            error = raised
        if held is not None:
            held.release()  # before anybody hears of the end
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    threading.Thread(target=run, name="flexpipe-scaling", daemon=True).start()
    return future
