"""Which pipeline serves a request: the one that is predicted to finish it first. Pure code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpipe_serve.engine.step_costs import StepCost

_LEAST_SLOPE = 0.01
"""Of a step's time, what one more token in it costs at least. Steps that were all alike do not show it, and a pipeline
would get everything because it was the quicker one a moment ago."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, as far as it matters here."""

    num_prompt_tokens: int
    num_output_tokens: float
    """Expected, of each sequence."""
    max_len: int
    """The most tokens that a sequence may come to have."""
    num_sequences: int = 1


@dataclass(frozen=True, kw_only=True)
class PipelineLoad:
    """A pipeline, and what it has to do."""

    cost: StepCost | None
    """Of its steps lately; None: not known."""
    num_sequences: int
    """That wait or run."""
    num_pending_tokens: int
    """Of prompts that have no output yet."""
    max_num_seqs: int
    """Sequences that run at once."""
    max_num_batched_tokens: int
    max_len: int
    """Tokens that one sequence can have."""
    is_up: bool = True
    """False: requests wait until it is up again."""


def predict_finish_s(load: PipelineLoad, ask: Ask, *, num_cached_tokens: int, cost: StepCost) -> float:
    """Seconds until the last token of a request.

    First the prompts before it and its own are computed, by full steps; then each output token takes a step together
    with all other sequences that run. Beyond the places it also waits for its turn.

    Args:
        num_cached_tokens: of its prompt, that the pipeline need not compute.
    """
    num_prompt_tokens = load.num_pending_tokens + max(1, ask.num_prompt_tokens - num_cached_tokens)
    num_steps = -(-num_prompt_tokens // load.max_num_batched_tokens)
    prompt_s = num_steps * cost.step_s + num_prompt_tokens * cost.token_s
    num_sequences = load.num_sequences + ask.num_sequences
    output_s = ask.num_output_tokens * cost.seconds(min(num_sequences, load.max_num_seqs))
    num_turns_before = max(0, num_sequences - load.max_num_seqs) / load.max_num_seqs
    return prompt_s + (1 + num_turns_before) * output_s


def rank_pipelines(loads: Sequence[PipelineLoad], ask: Ask, *, num_cached_tokens: Sequence[int]) -> list[int]:
    """Indices of the pipelines, the one that should serve the request first.

    Those that are up come before others, and those that have room for all of its tokens before those that would cut it
    short; then who finishes it sooner. A pipeline of which nothing is known is taken to be as quick as the quickest.

    Args:
        num_cached_tokens: of the prompt, by pipeline.
    """
    known = [load.cost for load in loads if load.cost is not None]
    quickest = min(known, key=lambda cost: cost.seconds(1), default=StepCost(1.0, 0.0))
    costs = [_with_slope(load.cost or quickest) for load in loads]

    def key(index: int) -> tuple[bool, int, float, int]:
        load = loads[index]
        finish_s = predict_finish_s(load, ask, num_cached_tokens=num_cached_tokens[index], cost=costs[index])
        return (not load.is_up, -min(load.max_len, ask.max_len), finish_s, index)

    return sorted(range(len(loads)), key=key)


def _with_slope(cost: StepCost) -> StepCost:
    return StepCost(cost.step_s, max(cost.token_s, _LEAST_SLOPE * cost.seconds(1)))
