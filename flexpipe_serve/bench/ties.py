"""How close a decision was where a stream left its reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench.identity import Difference


async def look_up(
    difference: Difference, *, handle: AsyncHandle, model: str, prompt: str, num_tokens: int
) -> Difference:
    """The difference with the gap between the two best tokens' log probabilities there, computed again on the server.

    Args:
        prompt: of the stream.
        num_tokens: of the stream.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
    }
    answer = await handle.call("POST", "/v1/completions", dict[str, Any], body)
    logprobs = answer["choices"][0]["logprobs"]
    # The last token that begins at or before the character.
    index = max(i for i, offset in enumerate(logprobs["text_offset"]) if offset <= difference.char)
    best, second = sorted(logprobs["top_logprobs"][index].values(), reverse=True)[:2]
    return replace(difference, logprob_gap=best - second)
