"""A server in virtual time: the same scheduler, demand monitor and policy as the real one, on a profile's times. Pure
and exact to repeat: nothing in it is random."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.request import SequenceUpdate
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import ConfigError, InvalidRequestError, RefactorRefusedError
from flexpipe_serve.planner.demand import DemandMonitor, trigger_of
from flexpipe_serve.planner.memory import num_kv_tokens, pipelines_of
from flexpipe_serve.planner.policy import Policy
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Decision, PlannerState, SchedulerLimits, Split, StageDevice, Verdict
from flexpipe_serve.simulate.events import EventQueue, Server
from flexpipe_serve.simulate.pipeline import BLOCK_SIZE, Route, SimulatedPipeline
from flexpipe_serve.simulate.refactoring import RefactoringTimes, SimulatedRefactoring
from flexpipe_serve.simulate.result import Sample, SimulatedChange, SimulatedRequest, SimulationResult

_NO_LIMIT = 1 << 40


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Of the simulated server; the defaults are the real one's."""

    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    interval_s: float = 1.0
    """Between decisions."""
    horizon_s: float = 60.0
    """Over which a rising rate counts as a reason to look."""
    times: RefactoringTimes = field(default_factory=RefactoringTimes)


@dataclass
class _Request:
    arrival: Arrival
    sequence: EngineSequence
    pipeline: SimulatedPipeline
    num_output_before: int = 0
    """Tokens that it got in pipelines which have ended."""
    first_token_at: float | None = None


class Simulation:
    """One run over given arrivals.

    Args:
        arrivals: rising in time.
        split: to begin with.
        devices: that the policy may use.
        policy: None: the split stays.

    Raises:
        ConfigError: the split does not fit.
    """

    def __init__(
        self,
        profile: ModelProfile,
        arrivals: Sequence[Arrival],
        *,
        split: Split,
        devices: Sequence[StageDevice],
        policy: Policy | None = None,
        config: SimulationConfig | None = None,
    ) -> None:
        self._profile = profile
        self._arrivals = iter(arrivals)
        self._split = split
        self._devices = tuple(devices)
        self._policy = policy
        self._config = config or SimulationConfig()
        self._events = EventQueue()
        self._monitor = DemandMonitor()
        self._computes: dict[str, Server] = {}
        self._pipelines: list[SimulatedPipeline] = []
        self._leaving: list[SimulatedPipeline] = []
        self._requests: dict[str, _Request] = {}
        self._is_through = False
        self._num_arrived = 0
        self._last_change_at: float | None = None
        self._is_refactoring = False
        self._held: tuple[Split, ...] = (split,)
        """Splits that hold devices: two while a refactoring runs."""
        self._held_since = 0.0
        self._device_seconds = 0.0
        self._served: list[SimulatedRequest] = []
        self._num_rejected = 0
        self._changes: list[SimulatedChange] = []
        self._decisions: list[Decision] = []
        self._num_decisions = 0
        self._samples: list[Sample] = []
        if num_kv_tokens(profile, split) < BLOCK_SIZE:
            raise ConfigError(
                f"the split {split.boundaries} leaves room for {num_kv_tokens(profile, split)} tokens of KV on its"
                f" devices; give them more memory."
            )
        for route in self._routes(split):
            self._pipelines.append(self._make_pipeline(route, split))

    def run(self) -> SimulationResult:
        """Until every request is served."""
        self._await_arrival()
        self._events.after(self._config.interval_s, self._tick)
        self._events.run(until=lambda: self._is_through and not self._requests)
        self._hold(())
        self._served.sort(key=lambda request: request.arrived_at)
        return SimulationResult(
            requests=tuple(self._served),
            num_rejected=self._num_rejected,
            changes=tuple(self._changes),
            decisions=tuple(self._decisions),
            num_decisions=self._num_decisions,
            samples=tuple(self._samples),
            duration_s=max((request.finished_at for request in self._served), default=0.0),
            device_seconds=self._device_seconds,
            num_steps=sum(pipeline.num_steps for pipeline in (*self._pipelines, *self._leaving)),
            num_preemptions=sum(p.scheduler.stats().num_preemptions for p in (*self._pipelines, *self._leaving)),
        )

    # ------------------------------------------------------------------ requests

    def _await_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._is_through = True
            return

        def arrive() -> None:
            self._arrive(arrival)
            self._await_arrival()

        self._events.after(arrival.at_s - self._events.now, arrive)

    def _arrive(self, arrival: Arrival) -> None:
        self._monitor.arrived(self._events.now, num_prompt_tokens=arrival.num_prompt_tokens)
        name = f"request-{self._num_arrived}"
        self._num_arrived += 1
        sequence = _sequence(name, arrival.num_prompt_tokens, arrival.num_output_tokens)
        pipeline = self._least_loaded()
        self._requests[name] = _Request(arrival, sequence, pipeline)
        try:
            pipeline.add(sequence)
        except InvalidRequestError:
            del self._requests[name]
            self._num_rejected += 1

    def _least_loaded(self) -> SimulatedPipeline:
        return min(self._pipelines, key=lambda pipeline: pipeline.scheduler.num_unfinished)

    def _take(self, update: SequenceUpdate) -> None:
        sequence = update.sequence
        request = self._requests[sequence.request_id]
        if request.first_token_at is None:
            request.first_token_at = sequence.first_token_time
        if num_new := len(update.new_token_ids):
            num_before = request.num_output_before + sequence.num_output_tokens - num_new
            self._monitor.generated(self._events.now, num_tokens=num_new, num_before=num_before)
        if update.finished:
            self._end(sequence)

    def _end(self, sequence: EngineSequence) -> None:
        """It is over, or only in its pipeline."""
        request = self._requests[sequence.request_id]
        if sequence.finish_reason == "abort":
            self._hand_over(request)
            return
        del self._requests[sequence.request_id]
        if request.first_token_at is None:  # the KV cache has become too small for it
            self._num_rejected += 1
            return
        now = self._events.now
        arrival = request.arrival
        num_output = request.num_output_before + sequence.num_output_tokens
        self._monitor.finished(now, num_output_tokens=num_output, latency_s=now - arrival.at_s)
        self._served.append(
            SimulatedRequest(
                arrived_at=arrival.at_s,
                first_token_at=request.first_token_at,
                finished_at=now,
                num_prompt_tokens=arrival.num_prompt_tokens,
                num_output_tokens=num_output,
            )
        )

    def _hand_over(self, request: _Request) -> None:
        """Another pipeline computes it again from its tokens."""
        old = request.sequence
        request.num_output_before += old.num_output_tokens
        request.sequence = _sequence(
            old.request_id,
            request.arrival.num_prompt_tokens + request.num_output_before,
            request.arrival.num_output_tokens - request.num_output_before,
        )
        request.pipeline = self._least_loaded()
        request.pipeline.add(request.sequence)

    # ------------------------------------------------------------------ the planner

    def _tick(self) -> None:
        is_idle = all(pipeline.is_idle for pipeline in (*self._pipelines, *self._leaving))
        assert self._is_refactoring or not is_idle or not self._requests, "requests wait and nothing runs"
        state = self._state()
        utilisation = 0.0
        if self._policy is not None and not self._is_refactoring:
            decision = self._policy.decide(self._profile, state)
            self._num_decisions += 1
            utilisation = decision.current.prediction.utilisation
            if decision.verdict is Verdict.MOVE and decision.chosen is not None:
                self._decisions.append(decision)
                self._refactor(decision.chosen, hurry=decision.hurry)
        stats = [pipeline.scheduler.stats() for pipeline in self._pipelines]
        self._samples.append(
            Sample(
                demand=state.demand,
                num_stages=self._split.num_stages,
                num_pipelines=self._split.num_pipelines,
                kv_use=sum(s.num_used_blocks for s in stats) / sum(s.num_blocks for s in stats),
                utilisation=utilisation,
            )
        )
        self._events.after(self._config.interval_s, self._tick)

    def _state(self) -> PlannerState:
        now = self._events.now
        stats = [pipeline.scheduler.stats() for pipeline in self._pipelines]
        demand = self._monitor.demand(
            now,
            num_waiting=sum(s.num_waiting for s in stats),
            num_running=sum(s.num_running for s in stats),
        )
        return PlannerState(
            now=now,
            demand=demand,
            current=self._split,
            devices=self._devices,
            trigger=trigger_of(demand, is_stalled=self._monitor.is_stalled, horizon_s=self._config.horizon_s),
            last_change_at=self._last_change_at,
            num_kv_tokens_in_use=sum(s.num_used_blocks for s in stats) * BLOCK_SIZE,
            migration_bytes_per_s=self._config.times.migration_bytes_per_s,
            limits=self._config.limits,
        )

    def _refactor(self, new: Split, *, hurry: bool) -> None:
        old, asked_at = self._split, self._events.now
        num_kept = min(old.num_pipelines, new.num_pipelines)

        def switch() -> None:
            self._split = new
            self._last_change_at = self._events.now
            self._changes[-1] = msgspec.structs.replace(self._changes[-1], switched_at=self._events.now)
            self._take_routes(new)

        self._changes.append(SimulatedChange(asked_at=asked_at, switched_at=None, old=old, new=new))
        try:
            SimulatedRefactoring(
                self._events,
                self._profile,
                old=old,
                new=new,
                times=self._config.times,
                hurry=hurry,
                pipelines=self._pipelines[:num_kept],
                switch=switch,
            ).begin()
        except RefactorRefusedError as error:
            self._changes[-1] = msgspec.structs.replace(self._changes[-1], refused=str(error))
            self._last_change_at = asked_at
            return
        self._is_refactoring = True
        self._hold((old, new))

    def _take_routes(self, new: Split) -> None:
        """Every pipeline goes on as ``new`` has it; some begin, some end and hand their sequences over."""
        routes = self._routes(new)
        kept = list(zip(self._pipelines, routes, strict=False))
        old_ones = {id(pipeline) for pipeline, _ in kept}
        capacity = num_kv_tokens(self._profile, new) // BLOCK_SIZE

        def retire(pipeline: SimulatedPipeline) -> None:
            for sequence in pipeline.scheduler.grow(capacity, now=self._events.now):
                self._end(sequence)
            pipeline.fill()
            old_ones.remove(id(pipeline))
            if not old_ones:
                self._is_refactoring = False
                self._hold((new,))

        leaving = self._pipelines[len(routes) :]
        del self._pipelines[len(routes) :]
        for route in routes[len(self._pipelines) :]:
            self._pipelines.append(self._make_pipeline(route, new))
        self._leaving += leaving
        for request in [r for r in self._requests.values() if r.pipeline in leaving]:
            request.pipeline.scheduler.finish(request.sequence, "abort", now=self._events.now)
            if request.sequence.is_finished:  # the others end with their step in flight
                self._hand_over(request)
        for pipeline, route in kept:
            pipeline.switch(route, when_old_are_out=functools.partial(retire, pipeline))

    # ------------------------------------------------------------------ devices

    def _routes(self, split: Split) -> list[Route]:
        """One for each pipeline; those whose devices are not named have such devices of their own."""
        named = pipelines_of(split)
        routes = []
        for i in range(split.num_pipelines):
            devices = named[i] if i < len(named) else named[0]
            suffix = "" if i < len(named) else f"#{i}"
            computes = tuple(
                self._computes.setdefault(device.compute + suffix, Server(self._events)) for device in devices
            )
            routes.append(Route(devices, split.boundaries, computes))
        return routes

    def _make_pipeline(self, route: Route, split: Split) -> SimulatedPipeline:
        config = SchedulerConfig(
            max_num_seqs=self._config.limits.max_num_seqs,
            max_num_batched_tokens=self._config.limits.max_num_batched_tokens,
            max_waiting=_NO_LIMIT,
            max_model_len=_NO_LIMIT,
            prefix_cache=False,  # prompts have lengths only
        )
        return SimulatedPipeline(
            self._events,
            self._profile,
            route,
            config=config,
            num_kv_tokens=num_kv_tokens(self._profile, split),
            on_update=self._take,
        )

    def _hold(self, splits: tuple[Split, ...]) -> None:
        """Devices of ``splits`` are held from now on."""
        seconds = self._events.now - self._held_since
        self._device_seconds += seconds * len({name for split in self._held for name in _device_names(split)})
        self._held, self._held_since = splits, self._events.now


def _sequence(name: str, num_prompt_tokens: int, num_output_tokens: int) -> EngineSequence:
    return EngineSequence(
        request_id=name,
        prompt_token_ids=[0] * num_prompt_tokens,
        params=SamplingParams(max_tokens=num_output_tokens, ignore_eos=True),
    )


def _device_names(split: Split) -> Iterator[str]:
    named = pipelines_of(split)
    for i in range(split.num_pipelines):
        for device in named[i] if i < len(named) else named[0]:
            yield device.name if i < len(named) else f"{device.name}#{i}"
