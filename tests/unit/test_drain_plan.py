"""How a node is left before its deadline: properties of the choice."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.placement.drain import DrainRecord, DrainState, merge_drains
from flexpipe_serve.placement.drain_options import DrainOption
from flexpipe_serve.placement.drain_plan import (
    MoveRates,
    Offer,
    Pace,
    Step,
    choose_attempt,
    learned_rates,
    makes_deadline,
    next_step,
    predict_seconds,
)
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, PhaseTime, RefactorPlan, RefactorRecord

RATES = MoveRates(
    launch_s=4.0, load_bytes_per_s=1e6, hurried_bytes_per_s=1e7, replay_bytes_per_s=1e8, copy_bytes_per_s=1e6
)


def plan_of(*, num_weights_bytes: int = 0, num_kv_bytes: int = 0, launches: bool = False) -> RefactorPlan:
    return RefactorPlan(
        verdict="fits", reason="", old=(), new=(), moves=(), launched=("stage-9",) if launches else (), retired=(),
        domains=(), num_blocks_before=1, num_blocks_during=1, num_blocks_after=1, weights_bytes=num_weights_bytes,
        kv_bytes=num_kv_bytes,
    )  # fmt: skip


@st.composite
def offers(draw: st.DrawFn) -> list[Offer]:
    found = []
    for i in range(draw(st.integers(1, 5))):
        plan = plan_of(
            num_weights_bytes=draw(st.integers(0, 10**9)),
            num_kv_bytes=draw(st.integers(0, 10**9)),
            launches=draw(st.booleans()),
        )
        option = DrainOption((), (f"n{i}",))
        found += [Offer(option, pace, plan) for pace in Pace if draw(st.booleans())]
    return found


TIMES = st.none() | st.floats(-10, 2000)


@settings(deadline=None)
@given(offers(), TIMES)
def test_the_gentlest_that_makes_it_else_the_quickest(offered: list[Offer], time_left: float | None) -> None:
    attempt = choose_attempt(offered, time_left=time_left, rates=RATES)
    if not offered:
        assert attempt is None
        return
    assert attempt is not None
    seconds = [predict_seconds(offer.plan, offer.pace, rates=RATES) for offer in offered]
    makes = [makes_deadline(offer.plan, offer.pace, time_left=time_left, rates=RATES) for offer in offered]
    assert attempt.in_time == any(makes)
    paces = list(Pace)
    if attempt.in_time:
        best = min(paces.index(offer.pace) for offer, ok in zip(offered, makes, strict=True) if ok)
        first = next(o for o, ok in zip(offered, makes, strict=True) if ok and paces.index(o.pace) == best)
        assert (attempt.pace, attempt.option) == (first.pace, first.option)
        assert time_left is None or attempt.predicted_s <= time_left
    else:
        assert attempt.predicted_s == min(seconds)


@settings(deadline=None)
@given(offers(), st.floats(0, 2000), st.floats(0, 2000))
def test_more_time_never_means_a_rougher_way(offered: list[Offer], a: float, b: float) -> None:
    less, more = sorted((a, b))
    hasty = choose_attempt(offered, time_left=less, rates=RATES)
    calm = choose_attempt(offered, time_left=more, rates=RATES)
    if hasty is not None and calm is not None and hasty.in_time:
        assert list(Pace).index(calm.pace) <= list(Pace).index(hasty.pace)


@settings(deadline=None)
@given(offers(), TIMES)
def test_a_live_attempt_leaves_time_for_a_replay(offered: list[Offer], time_left: float | None) -> None:
    attempt = choose_attempt(offered, time_left=time_left, rates=RATES)
    replays = [predict_seconds(o.plan, o.pace, rates=RATES) for o in offered if o.pace is Pace.REPLAY]
    if attempt is not None and attempt.pace is not Pace.REPLAY and replays and time_left is not None:
        assert attempt.timeout_s <= max(2.0, time_left - min(replays))
    if attempt is not None:
        assert attempt.timeout_s > 0
        assert attempt.copy_bytes_per_s >= RATES.copy_bytes_per_s


def test_the_byte_rate_rises_with_the_hurry() -> None:
    plan = plan_of(num_kv_bytes=100_000_000)
    offered = [Offer(DrainOption((), ("n",)), pace, plan) for pace in Pace]
    calm = choose_attempt(offered, time_left=1000.0, rates=RATES)
    assert calm is not None
    assert (calm.pace, calm.copy_bytes_per_s, calm.predicted_s) == (Pace.GENTLE, 1e6, 100.0)
    hurried = choose_attempt(offered, time_left=15.0, rates=RATES)
    assert hurried is not None
    assert (hurried.pace, hurried.in_time) == (Pace.HURRIED, True)
    assert hurried.copy_bytes_per_s == pytest.approx(1e7)  # 100 MB in two thirds of the time
    replay = choose_attempt(offered, time_left=0.1, rates=RATES)
    assert replay is not None
    assert replay.pace is Pace.REPLAY


def test_no_deadline_no_hurry() -> None:
    plan = plan_of(num_weights_bytes=10**12, launches=True)
    attempt = choose_attempt([Offer(DrainOption((), ("n",)), pace, plan) for pace in Pace], time_left=None, rates=RATES)
    assert attempt is not None
    assert (attempt.pace, attempt.in_time) == (Pace.GENTLE, True)


def record_of(seconds: float, *, plan: RefactorPlan, **fields: object) -> RefactorRecord:
    record = RefactorRecord(
        id="r", mode=Mode.LIVE, reason="", outcome=Outcome.DONE, phase=Phase.RETIRE, plan=plan, epoch=2,
        requested_at=0.0, phases=[PhaseTime(phase=Phase.PREPARE, start_s=0.0, seconds=seconds)],
    )  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def test_the_loading_rate_is_learned() -> None:
    plan = plan_of(num_weights_bytes=30_000_000)
    assert learned_rates(RATES, []).load_bytes_per_s == 1e6
    assert learned_rates(RATES, [record_of(1.0, plan=plan), record_of(2.0, plan=plan)]).load_bytes_per_s == 15e6
    faster = learned_rates(RATES, [record_of(0.1, plan=plan)])
    assert (faster.load_bytes_per_s, faster.hurried_bytes_per_s, faster.replay_bytes_per_s) == (3e8, 3e8, 3e8)
    launched = plan_of(num_weights_bytes=30_000_000, launches=True)
    assert learned_rates(RATES, [record_of(7.0, plan=launched)]).load_bytes_per_s == 1e7
    for useless in (
        record_of(2.0, plan=launched),
        record_of(1.0, plan=plan_of()),
        record_of(1.0, plan=plan, hurry=True),
        record_of(1.0, plan=plan, mode=Mode.SYNC),
        record_of(1.0, plan=plan, outcome=Outcome.ABORTED),
    ):
        assert learned_rates(RATES, [useless]) == RATES


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_what_runs_is_taken_back_only_where_it_is_in_the_way(
    num_stages: int, num_spare: int, is_running: bool, is_welcome: bool, can_cancel: bool, is_complete: bool
) -> None:
    step = next_step(
        num_stages=num_stages,
        num_spare=num_spare,
        is_running=is_running,
        is_welcome=is_welcome,
        can_cancel=can_cancel,
        is_complete=is_complete,
    )
    assert (step is Step.REST) == (num_stages + num_spare == 0)
    if step is Step.CANCEL:
        assert (is_running, is_welcome, can_cancel, num_stages > 0) == (True, False, True, True)
    if step in (Step.MOVE, Step.END_SPARE):
        assert (is_running, is_complete) == (False, True)
        assert (step is Step.MOVE) == (num_stages > 0)


def test_a_node_is_empty_when_all_pipelines_have_left_it() -> None:
    def record(state: DrainState, **fields: object) -> DrainRecord:
        made = DrainRecord(
            node="n", state=state, reason="", message=state.value, requested_at=0.0, deadline_at=9.0, holds_router=False
        )
        return msgspec.structs.replace(made, **fields)

    empty = record(DrainState.EMPTY, seconds=1.0, refactorings=("a",), predicted_s=2.0)
    busy = record(DrainState.DRAINING, seconds=3.0, stages=("p1-stage-0",), refactorings=("b",), error="no room")
    merged = merge_drains([empty, busy])
    assert (merged.state, merged.message, merged.seconds) == (DrainState.DRAINING, "draining", 3.0)
    assert (merged.stages, merged.refactorings, merged.error) == (("p1-stage-0",), ("a", "b"), "no room")
    assert merged.predicted_s == 2.0
    assert merge_drains([empty, empty]).state is DrainState.EMPTY
    assert merge_drains([empty, record(DrainState.LOST)]).state is DrainState.LOST
