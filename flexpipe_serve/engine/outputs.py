"""What the engine tells a client of it about a running request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log probability and the most likely alternatives at its place.

    ``top`` is ordered by falling probability. ``logprob`` is None for a prompt's first token.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What became of one sequence since the last output of it.

    ``text`` may be empty though ``token_ids`` is not: half a character, or the possible beginning of a stop
    string, is held back until it is decided. The last output of a sequence has a ``finish_reason``.
    """

    index: int
    """Which of the request's ``n`` sequences."""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of ``token_ids`` where asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Once, with the first output, where ``prompt_logprobs`` was asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the sequence; None for end-of-sequence and length."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache (in the first output)."""
    error: str | None = None
    """What went wrong, with finish_reason ``error``."""
