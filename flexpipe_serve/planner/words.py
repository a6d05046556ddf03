"""Splits and decisions in words. Pure code."""

from __future__ import annotations

from collections.abc import Sequence

from flexpipe_serve.planner.types import CandidateScore, Decision, PlannerState, Split, Verdict

_MANY = 6


def describe(split: Split, *, present: Split | None = None) -> str:
    """Such as ``2 stages (cut at 15)``; with its devices where they are not those of ``present``."""
    words = "1 stage" if split.num_stages == 1 else f"{split.num_stages} stages"
    if split.boundaries:
        words += f" (cut at {_few(list(map(str, split.boundaries)))})"
    if split.num_pipelines > 1:
        words = f"{split.num_pipelines} pipelines of {words}"
    if present is not None:
        names, known = ({device.name for device in s.devices} for s in (split, present))
        if names != known:
            words += f" on {_few(sorted(names))}"
    return words


def _few(words: list[str]) -> str:
    """The first of them, where there are many."""
    return ", ".join(words if len(words) <= _MANY else [*words[:_MANY], "..."])


def make_decision(
    policy: str,
    state: PlannerState,
    *,
    current: CandidateScore,
    candidates: Sequence[CandidateScore],
    chosen: Split | None,
    why: str,
    hurry: bool = False,
) -> Decision:
    """The record of a decision.

    Args:
        candidates: best first.
        chosen: where to go; None to stay.
        why: goes after "Stay with ...: " or "Move from ...: ".
        hurry: move quickly.
    """
    begin = "Stay with" if chosen is None else "Move in a hurry from" if hurry else "Move from"
    return Decision(
        at=state.now,
        policy=policy,
        trigger=state.trigger,
        demand=state.demand,
        current=current,
        candidates=tuple(candidates),
        verdict=Verdict.STAY if chosen is None else Verdict.MOVE,
        chosen=chosen,
        hurry=hurry and chosen is not None,
        sentence=f"{begin} {describe(state.current)}: {why}.",
    )
