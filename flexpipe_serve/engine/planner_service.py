"""The planner at work: watches what clients ask for, decides now and then, and has the pipelines changed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from flexpipe_serve.config import PlannerConfig
from flexpipe_serve.engine.planner_view import PipelineView, nodes_of
from flexpipe_serve.engine.scale_record import ScaleRecord, ScaleRequest
from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError
from flexpipe_serve.planner.calibration import MeasuredStep, StepCalibration
from flexpipe_serve.planner.demand import DemandMonitor, trigger_of
from flexpipe_serve.planner.give_back import GiveBack
from flexpipe_serve.planner.policy import Policy, make_policy
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Calibration, Decision, PlannerState, PlannerWeights, Split, Trigger, Verdict
from flexpipe_serve.refactor.record import MAX_REASON_CHARS, RefactorRecord, RefactorRequest

logger = logging.getLogger(__name__)
_MAX_DECISIONS = 1000
_STOP_S = 2.0
_MakePolicy = Callable[[Literal["gated", "flexpipe"], PlannerWeights], Policy]


class Plannable(Protocol):
    """What the planner may look at and change."""

    def view(self) -> PipelineView | None:
        """The state now; None while there is no pipeline."""
        ...

    async def refactor(self, request: RefactorRequest) -> RefactorRecord: ...

    async def scale(self, request: ScaleRequest) -> ScaleRecord: ...

    def refactoring(self, refactoring_id: str, /) -> RefactorRecord | None: ...

    def take_steps(self) -> list[tuple[Split, list[MeasuredStep]]]:
        """What steps on the splits in force took since the last call, by pipeline."""
        ...


class PlannerService:
    """One application's planner. Any thread may call its methods.

    Args:
        get_profile: the model's profile on the devices at hand; raises EngineUnavailableError while there is none.
        note: writes an event, given its kind and its message.
        make_policy: by name and knobs.
    """

    def __init__(
        self,
        pipelines: Plannable,
        *,
        get_profile: Callable[[], ModelProfile],
        note: Callable[[str, str], None],
        make_policy: _MakePolicy = make_policy,
    ) -> None:
        self._pipelines = pipelines
        self._get_profile = get_profile
        self._note = note
        self.max_bytes_per_s = 4e7
        """Of KV that a refactoring copies."""
        self._make_policy = make_policy
        self._monitor = DemandMonitor()
        self._calibration = StepCalibration()
        self._calibrating = threading.Lock()
        self._watching = threading.Lock()
        self._deciding = threading.Lock()
        self._config = PlannerConfig()
        self._policy = make_policy(self._config.policy, _weights(self._config))
        self._give_back = _give_back(self._config)
        self._decisions: deque[Decision] = deque(maxlen=_MAX_DECISIONS)
        self._last_change_at: float | None = None
        self._refactoring_id: str | None = None
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ what is watched

    def on_arrival(self, *, num_prompt_tokens: int) -> None:
        """A request came."""
        with self._watching:
            self._monitor.arrived(time.monotonic(), num_prompt_tokens=num_prompt_tokens)

    def on_output(self, num_tokens: int, *, num_before: int) -> None:
        """A request that had ``num_before`` tokens got some more."""
        with self._watching:
            self._monitor.generated(time.monotonic(), num_tokens=num_tokens, num_before=num_before)

    def on_finish(self, *, num_output_tokens: int, latency_s: float) -> None:
        """A request came to its own end, without an error."""
        with self._watching:
            self._monitor.finished(time.monotonic(), num_output_tokens=num_output_tokens, latency_s=latency_s)

    def on_leave(self, *, num_output_tokens: int) -> None:
        """A request failed or was given up."""
        with self._watching:
            self._monitor.left(num_output_tokens=num_output_tokens)

    # ------------------------------------------------------------------ control

    def start(self) -> None:
        """Decide from now on, as the configuration says."""
        self._thread = threading.Thread(target=self._run, name="flexpipe-planner", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Decide nothing more."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)  # a change that it waits for is ended by whoever stops the pipelines

    def configure(self, config: PlannerConfig) -> None:
        """Take a new configuration. Switched on, the planner starts with nothing seen; otherwise what has been seen is
        forgotten only by those whose own knobs changed."""
        with self._deciding:
            is_switched_on = self._config.mode == "off" != config.mode
            if is_switched_on:
                with self._watching:
                    self._monitor = DemandMonitor()
                self._last_change_at = self._refactoring_id = None
            if is_switched_on or (config.policy, _weights(config)) != (self._config.policy, _weights(self._config)):
                self._policy = self._make_policy(config.policy, _weights(config))
            if is_switched_on or _elasticity(config) != _elasticity(self._config):
                self._give_back = _give_back(config)
            self._config = config
        self._wake.set()

    def plan(self) -> Decision:
        """What would be decided now; nothing comes of it, and no hysteresis stands in its way.

        Raises:
            EngineUnavailableError: there is no pipeline, or no profile yet.
        """
        view = self._pipelines.view()
        if view is None:
            raise EngineUnavailableError("the pipeline is not up.")
        config = self._config
        return self._decide(view, self._make_policy(config.policy, _weights(config)), Trigger.ASKED)

    def decisions(self) -> list[Decision]:
        """The latest ones, the newest last."""
        return list(self._decisions)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            config = self._config
            self._wake.wait(None if config.mode == "off" else config.interval_s)
            self._wake.clear()
            if self._stopping.is_set() or self._config.mode == "off":
                continue
            try:
                self._look()
            except EngineUnavailableError as error:
                logger.debug("nothing is decided: %s", error)
            except Exception:  # thread edge: the next look may go better
                logger.exception("the planner met an error")

    def _look(self) -> None:
        if self._is_carrying_out():
            return
        view = self._pipelines.view()
        if view is None or view.is_changing:
            return
        with self._deciding:
            decision = self._give_back.judge(self._decide(view, self._policy, None), at=time.monotonic())
            mode = self._config.mode
        if decision.verdict is Verdict.MOVE and mode == "on":
            assert decision.chosen is not None
            decision = self._carry_out(decision, decision.chosen, view)
        self._decisions.append(decision)

    def _is_carrying_out(self) -> bool:
        """Whether a refactoring of our own runs; notes its end."""
        if self._refactoring_id is None:
            return False
        record = self._pipelines.refactoring(self._refactoring_id)
        if record is not None and not record.is_over:
            return True
        self._refactoring_id = None
        self._last_change_at = time.monotonic()
        return False

    def _calibrated(self, profile: ModelProfile) -> tuple[ModelProfile, Calibration]:
        """The profile as the pipelines' latest steps correct it."""
        with self._calibrating:
            for split, steps in self._pipelines.take_steps():
                self._calibration.note(profile, split, steps)
            return self._calibration.calibrated(profile), self._calibration.applied

    def _decide(self, view: PipelineView, policy: Policy, trigger: Trigger | None) -> Decision:
        profile, calibration = self._calibrated(self._get_profile())
        now = time.monotonic()
        with self._watching:
            demand = self._monitor.demand(
                now,
                num_waiting=view.num_waiting,
                num_running=view.num_running,
                prefix_hit_share=view.num_prefix_hit_tokens / max(1, view.num_prompt_tokens),
            )
            is_stalled = self._monitor.is_stalled
        if trigger is None:
            trigger = trigger_of(demand, is_stalled=is_stalled, horizon_s=self._config.horizon_s)
        state = PlannerState(
            now=now,
            demand=demand,
            current=view.split,
            devices=view.devices,
            trigger=trigger,
            last_change_at=self._last_change_at,
            num_kv_tokens_in_use=view.num_kv_tokens_in_use,
            migration_bytes_per_s=self.max_bytes_per_s,
            limits=view.limits,
        )
        started = time.perf_counter()
        decision = policy.decide(profile, state)
        seconds = time.perf_counter() - started
        return msgspec.structs.replace(decision, at=time.time(), decision_s=seconds, calibration=calibration)

    def _carry_out(self, decision: Decision, chosen: Split, view: PipelineView) -> Decision:
        self._last_change_at = time.monotonic()
        current = decision.current.split
        reason = f"planner: {decision.sentence}"[:MAX_REASON_CHARS]
        try:
            if chosen.num_pipelines != current.num_pipelines:
                asyncio.run(self._pipelines.scale(ScaleRequest(pipelines=chosen.num_pipelines, reason=reason)))
                self._note("planned", decision.sentence)
                return decision
            nodes = nodes_of(chosen, known=[device.node for device in view.devices])
            request = RefactorRequest(boundaries=chosen.boundaries, nodes=nodes, reason=reason, hurry=decision.hurry)
            record = asyncio.run(self._pipelines.refactor(request))
        except (ValueError, RefactorBusyError, EngineUnavailableError) as error:  # refused, in one way or another
            self._note("plan_refused", f"{decision.sentence} But: {error}")
            return decision
        self._refactoring_id = record.id
        self._note("planned", f"{record.id}: {decision.sentence}")
        return msgspec.structs.replace(decision, refactoring_id=record.id)


def _weights(config: PlannerConfig) -> PlannerWeights:
    return PlannerWeights(
        horizon_s=config.horizon_s,
        margin=config.margin,
        cool_down_s=config.cool_down_s,
        max_stages=config.max_stages,
        max_pipelines=config.max_pipelines,
    )


def _elasticity(config: PlannerConfig) -> tuple[float, float]:
    return config.give_back_after_s, config.always_on_share


def _give_back(config: PlannerConfig) -> GiveBack:
    window_s, floor_share = _elasticity(config)
    return GiveBack(window_s=window_s, floor_share=floor_share)
