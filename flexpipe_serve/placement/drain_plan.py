"""How layers leave a node that is to be emptied, and when: pure code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from flexpipe_serve.placement.drain_options import DrainOption
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, RefactorPlan, RefactorRecord

_MARGIN = 1.5
"""Predictions are rough, and requests add KV while layers move."""
_MIN_TIMEOUT_S = 2.0
_MAX_TIMEOUT_S = 3600.0
_MAX_COPY_BYTES_PER_S = 1e9


class Pace(Enum):
    """How much those who wait for tokens are spared, most first."""

    GENTLE = auto()
    """A live refactoring as any other."""
    HURRIED = auto()
    """Live, with loading without rests, and KV copied as fast as the deadline asks for."""
    REPLAY = auto()
    """No KV is copied: the new layout is brought up, and sequences are replayed from their tokens. They pause."""


@dataclass(frozen=True, kw_only=True)
class MoveRates:
    """What a prediction goes by. The defaults are assumptions, to be replaced by what was seen."""

    launch_s: float = 8.0
    """A stage's process, until it answers, on a busy machine."""
    load_bytes_per_s: float = 1e7
    """Weights, with the rests that spare others."""
    hurried_bytes_per_s: float = 5e7
    """Weights, without rests but at a low priority."""
    replay_bytes_per_s: float = 1e8
    """Weights, while no step runs."""
    copy_bytes_per_s: float = 4e7
    """KV, as configured."""


def learned_rates(rates: MoveRates, records: Iterable[RefactorRecord]) -> MoveRates:
    """``rates`` with the loading rate of the latest of ``records`` (the newest last) that tells one.

    Starting a process is taken off at the assumed time.
    """
    seen = rates.load_bytes_per_s
    for record in records:
        if record.outcome is not Outcome.DONE or record.mode is not Mode.LIVE or record.hurry:
            continue
        seconds = sum(phase.seconds for phase in record.phases if phase.phase is Phase.PREPARE)
        if record.plan.launched:
            seconds -= rates.launch_s
        if record.plan.weights_bytes and seconds > 0:
            seen = record.plan.weights_bytes / seconds
    return replace(
        rates,
        load_bytes_per_s=seen,
        hurried_bytes_per_s=max(seen, rates.hurried_bytes_per_s),
        replay_bytes_per_s=max(seen, rates.replay_bytes_per_s),
    )


@dataclass(frozen=True)
class Offer:
    """One way to empty the node that the memory allows."""

    option: DrainOption
    pace: Pace
    plan: RefactorPlan


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is to be tried now."""

    option: DrainOption
    pace: Pace
    predicted_s: float
    in_time: bool
    """Whether it is predicted to make the deadline, with a margin."""
    copy_bytes_per_s: float
    timeout_s: float
    """To the switch: then there is still time for a replay."""


def predict_seconds(plan: RefactorPlan, pace: Pace, *, rates: MoveRates) -> float:
    """Time to carry a plan out: setting up (processes, weights), then copying KV.

    FlexPipe's Eq 12 in the form that has the right units, capacity ``(T - S) * mu >= r``: with ``T`` the time left,
    ``S`` the set-up, ``mu`` bytes a second and ``r`` the bytes of KV that are due.
    """
    return _setup_seconds(plan, pace, rates) + _due_bytes(plan, pace) / _copy_limit(pace, rates)


def makes_deadline(plan: RefactorPlan, pace: Pace, *, time_left: float | None, rates: MoveRates) -> bool:
    """Whether it is predicted to be over in time, with a margin."""
    return time_left is None or predict_seconds(plan, pace, rates=rates) * _MARGIN <= time_left


def choose_attempt(offers: Sequence[Offer], *, time_left: float | None, rates: MoveRates) -> Attempt | None:
    """The offer of the gentlest pace that makes the deadline, and among those the first; where none makes it, the
    quickest, for then the node's end would cost a replay anyway. None: there is no offer.

    Args:
        offers: those that change least first.
        time_left: to the deadline; None: there is none.
    """
    if not offers:
        return None
    left = math.inf if time_left is None else max(0.0, time_left)
    timed = [(offer, predict_seconds(offer.plan, offer.pace, rates=rates)) for offer in offers]
    in_time = [
        (offer, seconds)
        for offer, seconds in timed
        if makes_deadline(offer.plan, offer.pace, time_left=time_left, rates=rates)
    ]
    paces = list(Pace)
    if in_time:
        chosen, predicted = min(in_time, key=lambda item: paces.index(item[0].pace))
    else:
        chosen, predicted = min(timed, key=lambda item: item[1])
    replays = [seconds for offer, seconds in timed if offer.pace is Pace.REPLAY]
    reserve = min(replays, default=0.0) if chosen.pace is not Pace.REPLAY else 0.0
    return Attempt(
        option=chosen.option,
        pace=chosen.pace,
        predicted_s=predicted,
        in_time=bool(in_time),
        copy_bytes_per_s=_copy_rate(chosen, left, rates),
        timeout_s=min(max(left - reserve, _MIN_TIMEOUT_S), _MAX_TIMEOUT_S),
    )


def _setup_seconds(plan: RefactorPlan, pace: Pace, rates: MoveRates) -> float:
    load = {
        Pace.GENTLE: rates.load_bytes_per_s,
        Pace.HURRIED: rates.hurried_bytes_per_s,
        Pace.REPLAY: rates.replay_bytes_per_s,
    }[pace]
    return (rates.launch_s if plan.launched else 0.0) + plan.weights_bytes / load


def _due_bytes(plan: RefactorPlan, pace: Pace) -> int:
    return 0 if pace is Pace.REPLAY else plan.kv_bytes


def _copy_limit(pace: Pace, rates: MoveRates) -> float:
    return rates.copy_bytes_per_s if pace is Pace.GENTLE else max(_MAX_COPY_BYTES_PER_S, rates.copy_bytes_per_s)


def _copy_rate(offer: Offer, left: float, rates: MoveRates) -> float:
    """Bytes a second: the configured limit, or in a hurry what the time behind the set-up asks for."""
    if offer.pace is not Pace.HURRIED:
        return rates.copy_bytes_per_s
    window = left / _MARGIN - _setup_seconds(offer.plan, offer.pace, rates)
    needed = offer.plan.kv_bytes / window if window > 0 else math.inf
    return min(max(needed, rates.copy_bytes_per_s), _copy_limit(offer.pace, rates))


class Step(Enum):
    """What to do next about nodes that are being emptied."""

    REST = auto()
    """They are empty."""
    WAIT = auto()
    """Something is under way that must end first, or does what is wanted."""
    CANCEL = auto()
    """A refactoring runs that does something else, and can still be taken back."""
    END_SPARE = auto()
    """Only stages without layers stand there: end them."""
    MOVE = auto()
    """Move the layers away."""


def next_step(
    *, num_stages: int, num_spare: int, is_running: bool, is_welcome: bool, can_cancel: bool, is_complete: bool
) -> Step:
    """Args:
    num_stages: of the layout in force that stand on nodes to be emptied.
    num_spare: stages without layers there.
    is_running: a refactoring is.
    is_welcome: it empties these nodes, all of them, and as soon as need be.
    can_cancel: it is not past its switch.
    is_complete: all stages of the layout in force are up; else they are being brought up, elsewhere.
    """
    if not num_stages and not num_spare:
        return Step.REST
    if is_running:
        return Step.CANCEL if num_stages and not is_welcome and can_cancel else Step.WAIT
    if not is_complete:
        return Step.WAIT
    return Step.MOVE if num_stages else Step.END_SPARE
