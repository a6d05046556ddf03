"""Seeded requests of every kind, for tests in which a pipeline changes under load."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flexpipe_serve.engine.sampling_params import SamplingParams

VOCAB = range(3, 131)


@dataclass(frozen=True)
class Request:
    """One request, and when somebody aborts it."""

    id: str
    prompt: list[int]
    params: SamplingParams
    n: int = 1
    priority: int = 0
    abort_after: int | None = None
    """That many ticks (or outputs) after it was sent."""


def make_requests(rng: random.Random, num_requests: int, *, max_tokens: int = 60) -> list[Request]:
    """Greedy and sampled, with and without log probabilities and penalties, short and longer than a step, many with
    common beginnings; some score their prompt, some are aborted, some end at a stop token."""
    beginnings = [[rng.choice(VOCAB) for _ in range(length)] for length in (9, 24, 50)]
    return [_make_request(rng, f"request-{i}", beginnings, max_tokens) for i in range(num_requests)]


def _make_request(rng: random.Random, request_id: str, beginnings: list[list[int]], max_tokens: int) -> Request:
    prompt = [rng.choice(VOCAB) for _ in range(rng.choice((1, 3, 7, 16, 33, 70)))]
    if rng.random() < 0.5:
        prompt = rng.choice(beginnings) + prompt
    kind = rng.choice(("greedy", "greedy", "sampled", "sampled", "penalties", "scored"))
    fields: dict[str, object] = {"temperature": 0.0}
    if kind in ("sampled", "penalties"):
        fields = {"temperature": rng.choice((0.5, 1.0)), "top_p": 0.9, "top_k": 40, "seed": rng.randrange(1000)}
    if kind == "penalties":
        fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    if kind == "scored":
        fields["prompt_logprobs"] = True
    params = SamplingParams(
        max_tokens=rng.randrange(1, max_tokens + 1),
        ignore_eos=True,
        stop_token_ids=(rng.choice(VOCAB),) if rng.random() < 0.1 else (),
        num_logprobs=rng.choice((0, 2)),
        **fields,  # type: ignore[arg-type]
    )
    return Request(
        id=request_id,
        prompt=prompt,
        params=params,
        n=rng.choice((1, 1, 1, 3)),
        priority=rng.choice((0, 0, 0, 1)),
        abort_after=rng.randrange(1, 40) if rng.random() < 0.15 else None,
    )
