"""What can be tried to empty a node: asks for plans, and no further than to what will be chosen."""

from __future__ import annotations

from collections.abc import Sequence

from flexpipe_serve.errors import ConfigError, RefactorRefusedError
from flexpipe_serve.placement.drain_options import DrainOption
from flexpipe_serve.placement.drain_plan import (
    Attempt,
    MoveRates,
    Offer,
    Pace,
    choose_attempt,
    makes_deadline,
    predict_seconds,
)
from flexpipe_serve.refactor.feasibility import REFUSED
from flexpipe_serve.refactor.manager import RefactorManager
from flexpipe_serve.refactor.record import Mode, RefactorPlan, RefactorRequest


def find_attempt(
    refactorings: RefactorManager, options: Sequence[DrainOption], *, time_left: float | None, rates: MoveRates
) -> tuple[Attempt | None, str]:
    """What to try now, and why the rest was refused. For the engine's control thread.

    Args:
        options: those that change least first.
        time_left: to the deadline; None: there is none.

    Returns:
        None and the reason, where the memory allows nothing.
    """
    offers: list[Offer] = []
    refusal = "there is no node where its layers could go."
    for option in options:
        plan, why = _plan(refactorings, option, Mode.LIVE)
        refusal = why or refusal
        if plan is not None:
            offers += [Offer(option, pace, plan) for pace in (Pace.GENTLE, Pace.HURRIED)]
            if makes_deadline(plan, Pace.GENTLE, time_left=time_left, rates=rates):
                break
    if offers:  # what fits while both layouts are held fits a replay, too
        options = [min(offers, key=lambda offer: predict_seconds(offer.plan, Pace.REPLAY, rates=rates)).option]
    for option in options:
        plan, why = _plan(refactorings, option, Mode.RESTART)
        refusal = why or refusal
        if plan is not None:
            offers.append(Offer(option, Pace.REPLAY, plan))
            break
    return choose_attempt(offers, time_left=time_left, rates=rates), refusal


def describe(attempt: Attempt, refactoring_id: str, time_left: float | None) -> str:
    """The attempt in a sentence."""
    how = {
        Pace.GENTLE: "moves its layers away, live",
        Pace.HURRIED: "moves its layers away, live and in a hurry",
        Pace.REPLAY: "brings its layers up elsewhere, and sequences are replayed from their tokens",
    }[attempt.pace]
    room = "" if time_left is None else f" of the {time_left:.1f} s left"
    late = "" if attempt.in_time else "; nothing quicker is known"
    return f"Refactoring {refactoring_id} {how}; predicted to take {attempt.predicted_s:.1f} s{room}{late}."


def _plan(refactorings: RefactorManager, option: DrainOption, mode: Mode) -> tuple[RefactorPlan | None, str]:
    """A plan that fits; or None and why there is none."""
    request = RefactorRequest(boundaries=option.boundaries, nodes=option.nodes, mode=mode, dry_run=True)
    try:
        plan = refactorings.start(request).plan
    except (RefactorRefusedError, ConfigError) as error:
        return None, str(error)
    return (None, plan.reason) if plan.verdict == REFUSED else (plan, "")
