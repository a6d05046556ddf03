"""Whether a change pays: its gain over a horizon against its cost, with a margin, agreement and a cool-down. Pure code.

FlexPipe scores without a cost, and PipeLive's own autoscaler lost to a static layout: it had no gate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from flexpipe_serve.planner.types import (
    CandidateScore,
    Demand,
    PlannerState,
    PlannerWeights,
    Split,
    Trigger,
    Verdict,
)
from flexpipe_serve.planner.words import describe

FEW_ARRIVALS = 10
"""From fewer requests nothing can be told."""
NUM_AGREEING = 3
"""Decisions in a row that must have the same winner."""
_LOOK_AHEAD_S = 30.0
"""A rate goes on changing as it does for so long at most."""
_LEAST_OF_MARGIN = 0.3
"""Its share for what predictions are wrong by however long they say the same."""
_CLEARLY_MORE = 1.1
"""Requests a second in units of others'; predictions err by nearly as much."""
_SHARE_AFTER_GROWTH = 1 / 3
"""Of the cool-down."""
_ROUNDING = 1.04
_NOISE_WINDOW_S = 15.0
"""Over which a rate is told; what its change may be by chance follows from it."""


def expected_demand(demand: Demand, horizon_s: float) -> Demand:
    """The demand with its mean rate over the horizon, as far as its gradient tells (F16): a rise that is no larger than
    chance makes it is left out, and the rate at most doubles. A fall is believed when it has come: what is left of one
    in the longer windows would make a queue look as if it went away by itself."""
    ahead_s = min(horizon_s, _LOOK_AHEAD_S)
    rise = demand.rate_gradient * ahead_s * (1 - ahead_s / (2 * horizon_s))
    by_chance = demand.cv * math.sqrt(demand.rate / _NOISE_WINDOW_S)
    rate = min(demand.rate + max(0.0, rise - by_chance), 2 * demand.rate)
    return msgspec.structs.replace(with_round_lengths(demand), rate=rate)


def with_round_lengths(demand: Demand) -> Demand:
    """The demand with lengths in steps of 4 %, less than can be told: so that what follows from them is worked out once
    while they hardly change."""
    return msgspec.structs.replace(
        demand,
        prompt_tokens=_round(demand.prompt_tokens),
        output_tokens=_round(demand.output_tokens),
        prefix_hit_share=round(demand.prefix_hit_share, 2),
    )


def _round(count: float) -> float:
    return math.pow(_ROUNDING, round(math.log(max(1.0, count), _ROUNDING)))


class Judgement(NamedTuple):
    """What the gate says."""

    verdict: Verdict
    why: str


class Gate:
    """Remembers who won lately, and which way the pipeline changed last.

    A split beyond its capacity is left for one within it that sustains clearly more, whatever share of the latency that
    saves, and also within the cool-down; where the last change was for more capacity already a part of it is waited, so
    that this one shows its effect. Where there is a queue already, agreement is not waited for.
    """

    def __init__(self, weights: PlannerWeights) -> None:
        self._weights = weights
        self._winner: tuple[object, ...] | None = None
        self._num_agreed = 0
        self._grew = False
        """The last change was for more capacity."""

    def note_change(self, *, grew: bool) -> None:
        """The split in force is another one than before."""
        self._grew = grew

    def is_way_out(self, present: CandidateScore, best: CandidateScore, *, present_total_s: float) -> bool:
        """Whether ``best`` sustains what is asked for, which the present split does not, and loses no more latency over
        the horizon than a margin: in the long run it saves all."""
        return (
            present.prediction.utilisation >= 1 > best.prediction.utilisation
            and best.gain_s > best.cost_s - self._weights.margin * present_total_s
        )

    def judge(
        self,
        state: PlannerState,
        present: CandidateScore,
        best: CandidateScore | None,
        *,
        horizon_s: float,
        present_total_s: float,
        better_for_s: float,
    ) -> Judgement:
        """Whether to go from ``present`` to ``best``, and why.

        Args:
            best: None where nothing is better.
            horizon_s: over which its gain is counted.
            present_total_s: latency of all requests over the horizon, if nothing changes.
            better_for_s: since when its like has been better: what demand does by chance does not last, so less of a
                margin is needed.
        """
        weights = self._weights
        if best is None:
            self._agree(state, None)
            return Judgement(Verdict.STAY, "nothing else would be faster")
        by_chance = 1 / math.sqrt(1 + better_for_s / weights.horizon_s)
        margin_s = weights.margin * max(_LEAST_OF_MARGIN, by_chance) * present_total_s
        relieves = (
            self.is_way_out(present, best, present_total_s=present_total_s)
            and best.prediction.max_rate > _CLEARLY_MORE * present.prediction.max_rate
        )
        words = describe(best.split, present=present.split)
        pays = best.gain_s > best.cost_s + margin_s
        numbers = (
            f"{words} would save {best.gain_s:.3g} s of request latency over {horizon_s:.0f} s,"
            f" {'more' if pays else 'not more'} than the {best.cost_s + margin_s:.3g} s that a change must save (its"
            f" cost of {best.cost_s:.3g} s and a margin of {margin_s:.3g} s)"
        )
        if relieves:
            numbers += (
                f", and sustain {best.prediction.max_rate:.3g} requests/s instead of"
                f" {present.prediction.max_rate:.3g}, with {state.demand.rate:.3g} asked for"
            )
        if not relieves and not pays:
            self._agree(state, None)
            return Judgement(Verdict.STAY, numbers)
        num_agreed = self._agree(state, best.split)
        since_s = math.inf if state.last_change_at is None else state.now - state.last_change_at
        cool_down_s = weights.cool_down_s
        if relieves:
            cool_down_s *= _SHARE_AFTER_GROWTH if self._grew else 0.0
        if since_s < cool_down_s:
            return Judgement(
                Verdict.STAY, f"{numbers}; but the last change was {since_s:.3g} s ago, less than {cool_down_s:g} s"
            )
        has_queue = relieves and state.demand.num_waiting > 0
        is_urgent = has_queue or state.trigger in (Trigger.STALL, Trigger.ASKED)
        if not is_urgent and num_agreed < NUM_AGREEING:
            return Judgement(Verdict.STAY, f"{numbers}; seen {num_agreed} times in a row, {NUM_AGREEING} are needed")
        if state.trigger is not Trigger.ASKED:
            self._grew = best.prediction.max_rate > present.prediction.max_rate
            self._agree(state, None)
        return Judgement(Verdict.MOVE, numbers)

    def _agree(self, state: PlannerState, winner: Split | None) -> int:
        """Decisions in a row that ``winner`` has won, this one included; where only the cuts differ it is the same one.
        A dry run changes nothing."""
        key = None if winner is None else (winner.num_pipelines, *(device.name for device in winner.devices))
        num_agreed = self._num_agreed + 1 if key == self._winner else 1
        if state.trigger is not Trigger.ASKED:
            self._winner, self._num_agreed = key, num_agreed if winner is not None else 0
        return num_agreed
