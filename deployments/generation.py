"""What one HTTP request asks of the engine, and how its outputs become an answer."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from flexpipe_serve.deployments.prompts import Prompt
from flexpipe_serve.deployments.protocol import PromptTokensDetails, Usage
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the engine is asked for, all checked."""

    id: str
    model: str
    prompts: list[Prompt]
    params: list[SamplingParams]
    """One for each prompt."""
    n: int
    priority: int
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def new_id(kind: str) -> str:
        """Unique whatever the client's own request id is, for the engine tells requests apart by it."""
        return f"{kind}-{uuid.uuid4().hex}"


class UsageCounter:
    """Counts tokens of all prompts and sequences."""

    def __init__(self, generation: Generation) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.prompts)
        self._num_completion_tokens = 0
        self._num_cached_tokens = 0

    def add(self, output: SequenceOutput) -> None:
        """Count one output."""
        self._num_completion_tokens += len(output.token_ids)
        if output.num_cached_tokens and output.index == 0:
            # The other sequences of a prompt share the first one's; a prompt counts once.
            self._num_cached_tokens += output.num_cached_tokens

    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached_tokens),
        )


class Renderer(Protocol):
    """Outputs of the engine as bytes of an answer."""

    streaming: bool
    """Server-sent events as outputs come, or one JSON body at the end."""

    def add(self, prompt_index: int, output: SequenceOutput) -> bytes:
        """What to send now; may be empty, always is where not streaming."""
        ...

    def end(self) -> bytes:
        """The last bytes."""
        ...
