"""A pipeline whose stages only take time: the server's own scheduler, and a profile's times. Pure code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.request import SequenceUpdate
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.step_samples import step_shape
from flexpipe_serve.pipeline.messages import StepBatch
from flexpipe_serve.planner.memory import slices_of
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import StageDevice
from flexpipe_serve.simulate.events import EventQueue, Server

BLOCK_SIZE = 16
"""Tokens; the server's default on a CPU."""


@dataclass(frozen=True)
class Route:
    """Where steps go from some moment on."""

    devices: tuple[StageDevice, ...]
    boundaries: tuple[int, ...]
    computes: tuple[Server, ...]
    """One for each stage; stages may share one."""

    @property
    def depth(self) -> int:
        """Steps in flight at once: as many as the stages have computes."""
        return len(set(map(id, self.computes)))


class SimulatedPipeline:
    """One pipeline in virtual time.

    Args:
        config: of its scheduler.
        num_kv_tokens: capacity.
        on_update: called with what a step brought to each of its sequences.
    """

    def __init__(
        self,
        events: EventQueue,
        profile: ModelProfile,
        route: Route,
        *,
        config: SchedulerConfig,
        num_kv_tokens: int,
        on_update: Callable[[SequenceUpdate], None],
    ) -> None:
        self.scheduler = Scheduler(config, num_blocks=num_kv_tokens // BLOCK_SIZE, block_size=BLOCK_SIZE)
        self.slowdown = 0.0
        """Share by which stages compute longer, such as while a refactoring runs."""
        self._events = events
        self._profile = profile
        self._route = route
        self._router = Server(events)
        self._on_update = on_update
        self._in_flight: dict[int, Route] = {}
        self.num_steps = 0
        """Sent so far."""
        self._when_old_are_out: Callable[[], None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no step is in flight."""
        return not self._in_flight

    def add(self, *sequences: EngineSequence) -> None:
        """Queue sequences. Raises what Scheduler.add raises."""
        self.scheduler.add(*sequences)
        self.fill()

    def switch(self, route: Route, *, when_old_are_out: Callable[[], None]) -> None:
        """Steps take ``route`` from now on; those in flight end on the old one, then ``when_old_are_out`` is called."""
        self._route = route
        self._when_old_are_out = when_old_are_out
        self._note_old()
        self.fill()

    def fill(self) -> None:
        """Keep as many steps in flight as the route is deep."""
        depth = self._route.depth
        while len(self._in_flight) < depth:
            batch = self.scheduler.schedule(step=self.num_steps, epoch=0, num_stages=depth, now=self._events.now)
            if batch is None:
                return
            self._in_flight[self.num_steps] = self._route
            self.num_steps += 1
            self._send(batch, self._route)

    def _send(self, batch: StepBatch, route: Route) -> None:
        times = self._stage_seconds(step_shape(batch), route)
        step, num_samples = batch.header.step, len(batch.header.samples)

        def enter(stage: int) -> None:
            if stage == len(times):
                self._complete(step, num_samples)
                return
            self._events.after(
                self._profile.hop_s, lambda: route.computes[stage].serve(times[stage], lambda: enter(stage + 1))
            )

        self._router.serve(self._profile.step_s, lambda: enter(0))

    def _stage_seconds(self, shape: StepShape, route: Route) -> Sequence[float]:
        return [
            self._profile.stage_seconds(start, stop, shape, speed=device.speed) * (1 + self.slowdown)
            for device, (start, stop) in zip(
                route.devices, slices_of(route.boundaries, self._profile.num_layers), strict=True
            )
        ]

    def _complete(self, step: int, num_samples: int) -> None:
        del self._in_flight[step]
        for update in self.scheduler.complete(step, [0] * num_samples, now=self._events.now):
            self._on_update(update)
        self._note_old()
        self.fill()

    def _note_old(self) -> None:
        call = self._when_old_are_out
        if call is not None and all(route is self._route for route in self._in_flight.values()):
            self._when_old_are_out = None
            call()
