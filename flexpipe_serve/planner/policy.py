"""What decides: given the profile and the state, whether to change the pipeline and into what. Pure code."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from flexpipe_serve.planner.candidates import Candidate, CandidateMaker, refusal, split_key
from flexpipe_serve.planner.cost import GENTLE, HURRIED, transition_cost
from flexpipe_serve.planner.flexpipe_policy import FlexPipePolicy
from flexpipe_serve.planner.gate import FEW_ARRIVALS, Gate, expected_demand
from flexpipe_serve.planner.latency import SplitModel
from flexpipe_serve.planner.peaks import Peaks, work_of
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import (
    CandidateScore,
    Decision,
    Demand,
    PlannerState,
    PlannerWeights,
    Split,
    Trigger,
    Verdict,
)
from flexpipe_serve.planner.words import make_decision

_LONGEST = 10.0
"""Horizons that a gain is counted over at most."""
_NEVER = 10.0
"""Horizons that a request waits which does not fit."""


class Policy(Protocol):
    """Decides; remembers between decisions only what it must."""

    def decide(self, profile: ModelProfile, state: PlannerState) -> Decision:
        """Stay or move, with the reasons. A dry run (trigger ``asked``) changes nothing in the policy. ``decision_s``
        is the caller's to fill in."""
        ...


def make_policy(name: Literal["gated", "flexpipe"], weights: PlannerWeights) -> Policy:
    """A policy that has seen nothing yet."""
    return GatedPolicy(weights) if name == "gated" else FlexPipePolicy(weights)


class _Present(NamedTuple):
    """The split that serves."""

    candidate: Candidate
    model: SplitModel
    latency_s: float
    """Over the horizon, if nothing changes."""
    work: float
    """Of a request."""

    @property
    def is_saturated(self) -> bool:
        return self.model.utilisation >= 1


class GatedPolicy:
    """Predicted gain over the horizon against predicted cost. Where capacity is given away, the cost has what it takes
    if demand that was there lately returns. Beyond the present split's capacity a change is in a hurry: those who wait
    save more than those who get tokens lose."""

    def __init__(self, weights: PlannerWeights) -> None:
        self._weights = weights
        self._maker = CandidateMaker(weights)
        self._gate = Gate(weights)
        self._peaks = Peaks()
        self._better_since: dict[tuple[object, ...], float] = {}
        """By devices and number of pipelines, since when that has been faster than the present split."""
        self._present: Split | None = None

    def decide(self, profile: ModelProfile, state: PlannerState) -> Decision:
        """See ``Policy``."""
        demand = expected_demand(state.demand, self._weights.horizon_s)
        candidates = self._maker.candidates(profile, state, demand)
        self._notice_change(profile, state, demand, candidates[0])
        model = candidates[0].under(demand)
        work = work_of(profile, demand)
        if state.trigger is not Trigger.ASKED:
            self._peaks.note(state.now, state.demand.rate * work)
        present = _Present(candidates[0], model, self._latency_s(model), work)
        current = CandidateScore(split=state.current, prediction=model.predict(), score=0.0)
        scores = [current]
        better: set[tuple[object, ...]] = set()
        for candidate in candidates[1:]:
            score, saved_s = self._score(candidate, state, demand, present)
            scores.append(score)
            if saved_s > 0:
                better.add(candidate.place)
        if state.trigger is not Trigger.ASKED:
            self._better_since = {place: self._better_since.get(place, state.now) for place in better}
        total_s = present.latency_s * demand.rate * self._weights.horizon_s

        def order(score: CandidateScore) -> tuple[bool, float]:
            # A way out of saturation comes before what saves a little more and is saturated too.
            is_way_out = self._gate.is_way_out(current, score, present_total_s=total_s)
            return score.refused is None, score.score + (self._weights.margin * total_s if is_way_out else 0.0)

        scores.sort(key=order, reverse=True)
        chosen = None
        if demand.rate <= 0:
            why = "nobody asks for anything"
        elif demand.num_arrived < FEW_ARRIVALS:
            why = f"{demand.num_arrived} requests so far tell too little"
        elif demand.num_alike < FEW_ARRIVALS and not demand.num_waiting:
            why = f"the demand has just changed, {demand.num_alike} requests since tell too little, and nobody waits"
        else:
            best = scores[0] if scores[0] is not current else None
            place = split_key(scores[0].split)[1:]
            horizon_s = self._horizon_s(place, state.now)
            verdict, why = self._gate.judge(
                state,
                current,
                best,
                horizon_s=horizon_s,
                present_total_s=present.latency_s * demand.rate * horizon_s,
                better_for_s=self._better_for_s(place, state.now),
            )
            if verdict is Verdict.MOVE:
                chosen = scores[0].split
        return make_decision(
            "gated", state, current=current, candidates=scores, chosen=chosen, why=why, hurry=present.is_saturated
        )

    def _score(
        self, candidate: Candidate, state: PlannerState, demand: Demand, present: _Present
    ) -> tuple[CandidateScore, float]:
        """And seconds that it saves a request."""
        model = candidate.under(demand)
        cost_s, duration_s, back_s = transition_cost(
            candidate.transition,
            state,
            demand,
            present=present.model,
            latency_s=present.latency_s,
            pace=HURRIED if present.is_saturated else GENTLE,
        )
        if model.max_rate < present.model.max_rate:
            cost_s += self._peaks.risk_s(
                now=state.now,
                work=present.work,
                max_rate=model.max_rate,
                present_rate=present.model.max_rate,
                duration_s=back_s,
                horizon_s=self._weights.horizon_s,
            )
        saved_s = present.latency_s - self._latency_s(model)
        num_requests = demand.rate * max(0.0, self._horizon_s(candidate.place, state.now) - duration_s)
        gain_s = num_requests * saved_s
        refused = refusal(candidate, state, demand, present=present.candidate)
        if refused is None and model.utilisation >= 1 and not present.is_saturated:
            # What saves latency over the horizon costs ever more beyond it.
            refused = f"sustains {model.max_rate:.3g} requests/s, but {demand.rate:.3g} are asked for"
        score = CandidateScore(
            split=candidate.split,
            prediction=model.predict(),
            score=gain_s - cost_s,
            gain_s=gain_s,
            cost_s=cost_s,
            refused=refused,
        )
        return score, saved_s

    def _horizon_s(self, place: tuple[object, ...], now: float) -> float:
        """What has been better for some time is taken to stay so for as long again: a change that takes longer than the
        horizon may pay all the same."""
        horizon_s = self._weights.horizon_s
        return min(max(horizon_s, self._better_for_s(place, now)), _LONGEST * horizon_s)

    def _better_for_s(self, place: tuple[object, ...], now: float) -> float:
        return now - self._better_since.get(place, now)

    def _latency_s(self, model: SplitModel) -> float:
        return min(model.latency_over(self._weights.horizon_s), _NEVER * self._weights.horizon_s)

    def _notice_change(self, profile: ModelProfile, state: PlannerState, demand: Demand, present: Candidate) -> None:
        if state.trigger is Trigger.ASKED:
            return
        if self._present is not None and split_key(self._present) != split_key(state.current):
            self._better_since.clear()
            before = SplitModel(StepTimes(profile, self._present, state.limits), demand)
            self._gate.note_change(grew=present.under(demand).max_rate > before.max_rate)
        self._present = state.current
