"""FlexPipe's own policy (Algorithm 1), to compare with: Eq 4 chooses, Eq 5 counts, Eq 9, 11 and 12 check. Pure code.

It weighs no cost and knows no mix of requests: a granularity is cut once, by Eq 2. The paper does not say how often its
loop runs; here the cool-down is its interval.
"""

from __future__ import annotations

from collections import Counter

from flexpipe_serve.planner.candidates import Candidate, device_choices, is_same_place, refusal
from flexpipe_serve.planner.cost import GENTLE, transition_cost
from flexpipe_serve.planner.flexpipe_scores import (
    FlexPipeWeights,
    best_cv,
    granularity_score,
    meets_deadline,
    num_replicas,
    scaling_stages,
    sharing_penalty,
)
from flexpipe_serve.planner.gate import FEW_ARRIVALS, with_round_lengths
from flexpipe_serve.planner.ladder import nested_ladder
from flexpipe_serve.planner.latency import SplitModel
from flexpipe_serve.planner.partition import eq2_boundaries
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import (
    CandidateScore,
    Decision,
    Demand,
    PlannerState,
    PlannerWeights,
    Split,
)
from flexpipe_serve.planner.words import describe, make_decision

_BYTES_PER_S = 12.5e9
"""Eq 2's B: the 100 Gbit/s between the paper's servers."""
_REFACTOR_WEIGHT_S = 1.0
"""Eq 2's lambda: no cut that the finest granularity lacks."""
_SHAPE = StepShape(num_tokens=16.0, num_samples=16.0)
"""The step that Eq 2 cuts for, once and for all."""


class FlexPipePolicy:
    """The granularity with the best Eq 4, whatever it costs to get there.

    ``T_k`` is the capacity that our latency model predicts and ``L_k`` the latency it predicts without load; Eq 11 says
    how coarse a pipeline may be under its queue, and Eq 12, with the horizon as its deadline, whether the new pipelines
    come in time.
    """

    def __init__(self, weights: PlannerWeights, scores: FlexPipeWeights | None = None) -> None:
        self._weights = weights
        self._scores = scores or FlexPipeWeights()
        self._made_for: tuple[ModelProfile, PlannerState] | None = None
        self._candidates: list[Candidate] = []

    def decide(self, profile: ModelProfile, state: PlannerState) -> Decision:
        """See ``flexpipe_serve.planner.policy.Policy``."""
        demand = state.demand
        if self._made_for is None or not is_same_place(*self._made_for, profile, state):
            self._made_for = (profile, state)
            self._candidates = self._make(profile, state)
        scores = self._score(state)
        current = scores[0]
        scores.sort(key=lambda s: (s.refused is None, s.score), reverse=True)
        best = scores[0]
        chosen = None
        numbers = (
            f"{describe(best.split, present=state.current)} scores {best.score:.3g} by Eq 4 at CV {demand.cv:.2g},"
            f" now {current.score:.3g}"
        )
        since_s = None if state.last_change_at is None else state.now - state.last_change_at
        if best.refused is not None:
            why = f"nothing is allowed: {best.refused}"
        elif demand.rate <= 0 or demand.num_arrived < FEW_ARRIVALS:
            why = f"{demand.num_arrived} requests so far and {demand.rate:.3g} a second lately tell too little"
        elif _granularity(best.split) == _granularity(state.current):
            why = f"its granularity scores best, {current.score:.3g} by Eq 4 at CV {demand.cv:.2g}"
        elif since_s is not None and since_s < self._weights.cool_down_s:
            why = f"{numbers}; but the last change was {since_s:.3g} s ago, less than {self._weights.cool_down_s:g} s"
        else:
            chosen, why = best.split, numbers
        return make_decision("flexpipe", state, current=current, candidates=scores, chosen=chosen, why=why)

    def _make(self, profile: ModelProfile, state: PlannerState) -> list[Candidate]:
        """The present split, then one for each number of pipelines and stages."""
        max_stages = min(self._weights.max_stages, profile.num_layers)
        finest = nested_ladder(profile, _SHAPE, max_stages=max_stages)[-1]
        splits = {_granularity(state.current): state.current}
        for groups in device_choices(state, self._weights):
            boundaries = eq2_boundaries(
                profile,
                groups[0],
                _SHAPE,
                bytes_per_s=_BYTES_PER_S,
                refactor_weight=_REFACTOR_WEIGHT_S,
                cuts_to_keep=finest,
            )
            if boundaries is not None:
                split = Split(
                    boundaries=boundaries,
                    devices=tuple(device for devices in groups for device in devices),
                    num_pipelines=len(groups),
                )
                splits.setdefault(_granularity(split), split)
        return [Candidate(profile, split, present=state.current, limits=state.limits) for split in splits.values()]

    def _score(self, state: PlannerState) -> list[CandidateScore]:
        demand = with_round_lengths(state.demand)
        models = [candidate.under(demand) for candidate in self._candidates]
        throughputs = [model.max_rate / model.steps.split.num_pipelines for model in models]
        latencies = [model.unloaded_latency_s for model in models]
        coarsest = min(candidate.split.num_stages for candidate in self._candidates)
        penalty = sharing_penalty(demand.cv, self._scores)
        present_s = models[0].latency_over(self._weights.horizon_s)
        scores = []
        for candidate, model, throughput, latency in zip(self._candidates, models, throughputs, latencies, strict=True):
            cost_s = duration_s = 0.0
            if candidate is not self._candidates[0]:
                cost_s, duration_s, _ = transition_cost(
                    candidate.transition, state, demand, present=models[0], latency_s=present_s, pace=GENTLE
                )
            score = 0.0
            if throughput > 0:
                score = granularity_score(
                    throughput=throughput,
                    max_throughput=max(throughputs),
                    latency=latency,
                    min_latency=min(latencies),
                    cv=demand.cv,
                    best_cv=best_cv(candidate.split.num_stages, coarsest=coarsest),
                    weights=self._scores,
                )
            refused = self._rejection(candidate.split, demand, throughput, coarsest)
            if refused is None and candidate is not self._candidates[0]:
                refused = refusal(candidate, state, demand, present=self._candidates[0]) or self._lateness(
                    model, demand, duration_s
                )
            scores.append(
                CandidateScore(
                    split=candidate.split,
                    prediction=model.predict(),
                    score=score - _shared_part(candidate.split) * penalty,
                    cost_s=cost_s,
                    refused=refused,
                )
            )
        return scores

    def _rejection(self, split: Split, demand: Demand, throughput: float, coarsest: int) -> str | None:
        """What Eq 11 and Eq 5 have against a granularity; the present one is not spared."""
        num_stages = scaling_stages(
            cv=demand.cv,
            num_waiting=demand.num_waiting,
            max_stages=max(candidate.split.num_stages for candidate in self._candidates),
            coarsest=coarsest,
            weights=self._scores,
        )
        if split.num_stages < num_stages:
            return (
                f"Eq 11 asks for {num_stages} stages with {demand.num_waiting} requests waiting at CV {demand.cv:.2g}"
            )
        if throughput <= 0:
            return "not even one request's KV fits"
        num_pipelines = num_replicas(
            total_rate=demand.rate,
            throughput=throughput,
            num_stages=split.num_stages,
            max_replicas=max(
                candidate.split.num_pipelines
                for candidate in self._candidates
                if candidate.split.num_stages == split.num_stages
            ),
            weights=self._scores,
        )
        if split.num_pipelines != num_pipelines:
            return f"Eq 5 asks for {num_pipelines} pipelines at {demand.rate:.3g} requests/s"
        return None

    def _lateness(self, model: SplitModel, demand: Demand, duration_s: float) -> str | None:
        """What Eq 12 has against it. Due are those who wait, and those who come until it is ready."""
        deadline_s = self._weights.horizon_s
        num_due = demand.num_waiting + demand.rate * duration_s
        if meets_deadline(deadline_s=deadline_s, init_s=duration_s, rates=[model.max_rate], num_due=num_due):
            return None
        return (
            f"Eq 12: ready after {duration_s:.3g} s, it cannot serve the {num_due:.3g} requests due until"
            f" {deadline_s:g} s from now"
        )


def _granularity(split: Split) -> tuple[int, int]:
    return split.num_pipelines, split.num_stages


def _shared_part(split: Split) -> float:
    """Of the stages, those that share their compute with another one."""
    counts = Counter(device.compute for device in split.devices)
    return sum(count for count in counts.values() if count > 1) / len(split.devices)
