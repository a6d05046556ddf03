"""The planner at work, over pipelines and a policy that do as they are told."""

from __future__ import annotations

import threading

import msgspec
import pytest
from planner_cases import make_profile

from flexpipe_serve.config import PlannerConfig
from flexpipe_serve.engine.planner_service import PlannerService
from flexpipe_serve.engine.planner_view import PipelineView
from flexpipe_serve.errors import EngineUnavailableError, RefactorRefusedError
from flexpipe_serve.planner.calibration import MeasuredStep
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import (
    CandidateScore,
    Decision,
    PlannerState,
    Prediction,
    Split,
    StageDevice,
    Trigger,
    Verdict,
)
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, RefactorPlan, RefactorRecord, RefactorRequest

WAIT_S = 60.0
PROFILE = make_profile()
DEVICE = StageDevice(name="a", node="a", compute="a", domain="a", memory_bytes=1)
ONE, TWO = Split(boundaries=(), devices=(DEVICE,)), Split(boundaries=(2,), devices=(DEVICE, DEVICE))
PREDICTION = Prediction(ttft_s=1, tpot_s=1, latency_s=1, max_rate=1, utilisation=0.5, num_kv_tokens=1)
PLAN = RefactorPlan(
    verdict="fits",
    reason="",
    old=(),
    new=(),
    moves=(),
    launched=(),
    retired=(),
    domains=(),
    num_blocks_before=1,
    num_blocks_during=1,
    num_blocks_after=1,
    weights_bytes=0,
    kv_bytes=0,
)


class Pipelines:
    """One pipeline that becomes what is asked for at once, or refuses."""

    def __init__(self) -> None:
        self.split = TWO
        self.devices = (DEVICE,)
        self.is_changing = False
        self.is_up = True
        self.refuses = False
        self.requests: list[RefactorRequest] = []
        self.asked = threading.Event()
        self.looked = threading.Semaphore(0)
        self.steps: list[MeasuredStep] = []

    def view(self) -> PipelineView | None:
        self.looked.release()
        if not self.is_up:
            return None
        return PipelineView(
            split=self.split,
            devices=self.devices,
            num_waiting=1,
            num_running=2,
            num_kv_tokens_in_use=3,
            num_kv_tokens=9,
            num_prompt_tokens=10,
            num_prefix_hit_tokens=5,
            is_changing=self.is_changing,
        )

    def take_steps(self) -> list[tuple[Split, list[MeasuredStep]]]:
        steps, self.steps = self.steps, []
        half = len(steps) // 2
        return [(self.split, steps[:half]), (ONE, steps[half:])]

    async def refactor(self, request: RefactorRequest) -> RefactorRecord:
        self.requests.append(request)
        self.asked.set()
        if self.refuses:
            raise RefactorRefusedError("no room.")
        self.split = Split(boundaries=request.boundaries or (), devices=(DEVICE,) * (1 + len(request.boundaries or ())))
        return self.refactoring("r")

    def refactoring(self, refactoring_id: str, /) -> RefactorRecord:
        return RefactorRecord(
            id=refactoring_id,
            mode=Mode.LIVE,
            reason="",
            outcome=Outcome.DONE,
            phase=Phase.RETIRE,
            plan=PLAN,
            epoch=2,
            requested_at=0.0,
        )


class Merges:
    """Goes to one stage, and stays there."""

    def __init__(self) -> None:
        self.states: list[PlannerState] = []
        self.profiles: list[ModelProfile] = []

    def decide(self, profile: ModelProfile, state: PlannerState) -> Decision:
        self.states.append(state)
        self.profiles.append(profile)
        moves = state.current != ONE
        score = CandidateScore(split=state.current, prediction=PREDICTION, score=1.0)
        return Decision(
            at=state.now,
            policy="merges",
            trigger=state.trigger,
            demand=state.demand,
            current=score,
            candidates=(score,),
            verdict=Verdict.MOVE if moves else Verdict.STAY,
            chosen=ONE if moves else None,
            sentence="One stage has no hops.",
        )


class Bench:
    def __init__(self) -> None:
        self.pipelines = Pipelines()
        self.policy = Merges()
        self.events: list[tuple[str, str]] = []
        self.service = PlannerService(
            self.pipelines,
            get_profile=lambda: PROFILE,
            note=lambda kind, message: self.events.append((kind, message)),
            make_policy=lambda name, weights: self.policy,
        )

    def wait_for_looks(self, num: int) -> None:
        for _ in range(num):
            assert self.pipelines.looked.acquire(timeout=WAIT_S)


@pytest.fixture
def bench():
    bench = Bench()
    bench.service.start()
    yield bench
    bench.service.stop()


def test_on_it_moves_once_and_says_so(bench: Bench) -> None:
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1))
    assert bench.pipelines.asked.wait(WAIT_S)
    bench.wait_for_looks(3)
    assert [request.boundaries for request in bench.pipelines.requests] == [()]
    assert bench.pipelines.requests[0].reason == "planner: One stage has no hops."
    assert bench.events == [("planned", "r: One stage has no hops.")]
    first, second, *_ = bench.service.decisions()
    assert (first.verdict, first.refactoring_id) == (Verdict.MOVE, "r")
    assert (second.verdict, second.refactoring_id) == (Verdict.STAY, None)
    assert first.decision_s > 0
    assert bench.policy.states[0].last_change_at is None
    assert bench.policy.states[1].last_change_at is not None


def test_observe_records_and_touches_nothing(bench: Bench) -> None:
    bench.service.configure(PlannerConfig(mode="observe", interval_s=0.1))
    bench.wait_for_looks(3)
    assert bench.pipelines.requests == []
    assert {decision.verdict for decision in bench.service.decisions()} == {Verdict.MOVE}


def test_off_decides_nothing_but_answers(bench: Bench) -> None:
    decision = bench.service.plan()
    assert (decision.trigger, decision.chosen) == (Trigger.ASKED, ONE)
    assert bench.service.decisions() == []
    assert bench.pipelines.requests == []


def test_demand_reaches_the_policy(bench: Bench) -> None:
    for _ in range(4):
        bench.service.on_arrival(num_prompt_tokens=40)
    for num_tokens in (10, 20, 30):
        bench.service.on_output(num_tokens, num_before=0)
    bench.service.on_finish(num_output_tokens=10, latency_s=0.5)
    bench.service.on_leave(num_output_tokens=30)
    bench.service.max_bytes_per_s = 1e6
    bench.service.plan()
    state = bench.policy.states[-1]
    assert (state.demand.num_arrived, state.demand.num_waiting, state.demand.num_running) == (4, 1, 2)
    assert state.demand.output_tokens == 15  # one ended with 10, one has 20 and will have more
    assert state.demand.prefix_hit_share == 0.5
    assert state.num_kv_tokens_in_use == 3
    assert state.migration_bytes_per_s == 1e6


def test_what_steps_take_goes_into_the_profile(bench: Bench) -> None:
    first = bench.service.plan()
    assert first.calibration.num_steps == 0
    assert bench.policy.profiles[-1] == PROFILE
    shape = StepShape(num_tokens=8, num_samples=8)
    compute_s = PROFILE.stage_seconds(0, 2, shape) + PROFILE.stage_seconds(2, 30, shape)
    # Of two pipelines, which are cut in different ways.
    bench.pipelines.steps = [MeasuredStep(shape=shape, compute_s=1.5 * compute_s, outside_s=None)] * 64
    decision = bench.service.plan()
    assert decision.calibration.num_steps == 64
    assert bench.pipelines.steps == []
    slower = bench.policy.profiles[-1]
    assert slower.stage_seconds(0, 2, shape) + slower.stage_seconds(2, 30, shape) == pytest.approx(
        1.5 * compute_s, rel=0.06
    )


def test_switched_on_it_starts_with_nothing_seen(bench: Bench) -> None:
    bench.service.on_arrival(num_prompt_tokens=40)
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1))
    assert bench.pipelines.asked.wait(WAIT_S)
    bench.service.on_arrival(num_prompt_tokens=40)
    bench.service.configure(PlannerConfig(mode="observe", interval_s=0.1))  # it is on already
    bench.service.plan()
    seen = bench.policy.states[-1]
    bench.service.configure(PlannerConfig())
    bench.service.configure(PlannerConfig(mode="observe"))
    bench.service.plan()
    anew = bench.policy.states[-1]
    assert (seen.demand.num_arrived, anew.demand.num_arrived) == (1, 0)
    assert anew.last_change_at is None


def test_a_refusal_is_an_event_and_starts_the_cool_down(bench: Bench) -> None:
    bench.pipelines.refuses = True
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1))
    bench.wait_for_looks(3)
    bench.service.stop()
    assert bench.events[0] == ("plan_refused", "One stage has no hops. But: no room.")
    assert bench.policy.states[-1].last_change_at is not None


def test_while_a_refactoring_runs_nothing_is_decided(bench: Bench) -> None:
    bench.pipelines.is_changing = True
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1))
    bench.wait_for_looks(3)
    assert bench.service.decisions() == []


def test_without_a_pipeline_there_is_no_plan(bench: Bench) -> None:
    bench.pipelines.is_up = False
    with pytest.raises(EngineUnavailableError, match="not up"):
        bench.service.plan()


def test_a_move_to_fewer_nodes_waits_and_keeps_its_nodes_when_it_comes(bench: Bench) -> None:
    other = msgspec.structs.replace(DEVICE, name="b", node="b")
    bench.pipelines.split = Split(boundaries=(2,), devices=(DEVICE, other))
    bench.pipelines.devices = (DEVICE, other)
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1))
    bench.wait_for_looks(4)
    assert bench.pipelines.requests == []
    assert "But it waits: that takes 2 nodes down to 1" in bench.service.decisions()[0].sentence
    bench.service.configure(PlannerConfig(mode="on", interval_s=0.1, give_back_after_s=0))
    assert bench.pipelines.asked.wait(WAIT_S)
    assert bench.pipelines.requests[0].nodes == ("a",)
