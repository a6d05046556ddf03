"""What each pipeline was given and has not finished: pure code, for routing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

_FIRST_GUESS = 128.0
"""Output tokens, before any request has ended."""
_KEPT = 0.95
"""Of the mean length, at each further end."""


@dataclass
class OpenRequest:
    """A request between its arrival and its end."""

    pipeline: int
    num_prompt_tokens: int
    num_sequences: int
    has_begun: bool = False
    """It has output."""


class RequestLedger:
    """Counts the open requests of each pipeline, and how long answers are."""

    def __init__(self) -> None:
        self._num_sequences: defaultdict[int, int] = defaultdict(int)
        self._num_pending_tokens: defaultdict[int, int] = defaultdict(int)
        self.mean_output_tokens = _FIRST_GUESS
        """Of a sequence, lately."""

    def num_sequences(self, pipeline: int) -> int:
        """Of its open requests; those that have ended already count until their request does."""
        return self._num_sequences[pipeline]

    def num_pending_tokens(self, pipeline: int) -> int:
        """Prompt tokens of its requests that have no output yet."""
        return self._num_pending_tokens[pipeline]

    def open(self, request: OpenRequest) -> None:
        """A pipeline was given a request."""
        self._count(request, 1)

    def begin(self, request: OpenRequest) -> None:
        """A request has its first output."""
        self._count(request, -1)
        request.has_begun = True
        self._count(request, 1)

    def move(self, request: OpenRequest, pipeline: int) -> None:
        """Another pipeline has it now, and computes its prompt again."""
        self._count(request, -1)
        request.pipeline = pipeline
        request.has_begun = False
        self._count(request, 1)

    def close(self, request: OpenRequest, *, num_output_tokens: int | None) -> None:
        """A request is over.

        Args:
            num_output_tokens: of all its sequences; None: its client left before its end.
        """
        self._count(request, -1)
        if num_output_tokens is not None:
            mean = num_output_tokens / request.num_sequences
            self.mean_output_tokens = _KEPT * self.mean_output_tokens + (1 - _KEPT) * mean

    def _count(self, request: OpenRequest, sign: int) -> None:
        self._num_sequences[request.pipeline] += sign * request.num_sequences
        if not request.has_begun:
            self._num_pending_tokens[request.pipeline] += sign * request.num_prompt_tokens
