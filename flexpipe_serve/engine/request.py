"""One sequence of a request: its tokens, how far they are computed, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from enum import Enum

from flexpipe_serve.engine.outputs import FinishReason
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.kv.int_vector import Int32Vector


class SequenceStatus(Enum):
    """Where the scheduler has a sequence."""

    WAITING = "waiting"
    """Holds no KV; also after preemption or a lost step."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """Why a sequence ended."""

    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or stop token id, where one ended it."""


class Sequence:
    """A prompt and what has been generated from it.

    The caller makes it; from ``Scheduler.add`` on, only the scheduler changes it.

    Args:
        index: which of the request's ``n`` sequences.
        priority: lower values are served first.
        arrival_time: like all times in seconds, of the caller's clock.
    """

    __slots__ = (
        "arrival",
        "arrival_time",
        "block_table",
        "end",
        "end_requested",
        "eos_token_ids",
        "finish_time",
        "first_scheduled_time",
        "first_token_time",
        "in_flight",
        "index",
        "last_token_time",
        "num_cached_tokens",
        "num_computed",
        "num_failed_steps",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "params",
        "priority",
        "request_id",
        "status",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: AbstractSequence[int],
        params: SamplingParams,
        index: int = 0,
        priority: int = 0,
        eos_token_ids: Iterable[int] = (),
        arrival_time: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.priority = priority
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.arrival = 0
        """Number of the request in order of arrival; set by the scheduler."""

        self.tokens = Int32Vector(prompt_token_ids)
        """Prompt, then output."""
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0
        """Leading tokens whose KV is in ``block_table``'s blocks."""
        self.block_table = Int32Vector()
        self.status = SequenceStatus.WAITING
        self.in_flight: int | None = None
        """The step that computes it now."""
        self.end_requested: SequenceEnd | None = None
        """Ends thus when its step in flight is over."""
        self.end: SequenceEnd | None = None

        self.num_cached_tokens = 0
        """Tokens found in the prefix cache when it was first admitted."""
        self.num_prompt_logprobs = 0
        """Leading prompt positions whose log probabilities have been delivered."""
        self.num_preemptions = 0
        self.num_failed_steps = 0
        self.arrival_time = arrival_time
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        """As the metrics have it."""
        self.finish_time: float | None = None

    def __repr__(self) -> str:
        return (
            f"<{self.request_id}/{self.index} {self.status.value} prompt={self.num_prompt_tokens} "
            f"output={self.num_output_tokens} computed={self.num_computed} in_flight={self.in_flight}>"
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        ids: list[int] = self.tokens.view(0, self.num_prompt_tokens).tolist()
        return ids

    @property
    def output_token_ids(self) -> list[int]:
        ids: list[int] = self.tokens.view(self.num_prompt_tokens).tolist()
        return ids

    @property
    def num_remaining(self) -> int:
        """Known tokens whose KV is not computed; 1 means the next step is a decode."""
        return len(self.tokens) - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.end.finish_reason if self.end else None

    @property
    def stop_reason(self) -> str | int | None:
        return self.end.stop_reason if self.end else None

    @property
    def seed(self) -> int:
        """The sequence's own seed, 63 bits."""
        return (self.params.seed + self.index) & (2**63 - 1)

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """True while log probabilities of prompt tokens are wanted and not all delivered."""
        return self.params.prompt_logprobs and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may be taken from the prefix cache: the last is always computed, for its logits,
        and so is every prompt position whose log probabilities are still to be delivered."""
        return self.num_prompt_logprobs if self.awaits_prompt_logprobs else len(self.tokens) - 1

    def max_chunk(self, budget: int) -> int:
        """Tokens to compute in the next step, of at most ``budget``.

        A chunk is cut where the delivery of prompt log probabilities was interrupted: the ones before are
        recomputed without asking for them again.
        """
        num_tokens = min(self.num_remaining, budget)
        if self.awaits_prompt_logprobs and self.num_computed < self.num_prompt_logprobs:
            num_tokens = min(num_tokens, self.num_prompt_logprobs - self.num_computed)
        return num_tokens

    def end_after(self, token: int, *, max_len: int) -> SequenceEnd | None:
        """How ``token``, just appended, ends the sequence of at most ``max_len`` tokens; None: it goes on."""
        if token in self.eos_token_ids and not self.params.ignore_eos:
            return SequenceEnd("stop")
        if token in self.stop_token_ids:
            return SequenceEnd("stop", token)
        if self.num_output_tokens >= self.params.max_tokens or len(self.tokens) >= max_len:
            return SequenceEnd("length")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """What a step brought to one of its sequences."""

    sequence: Sequence
    new_token_ids: tuple[int, ...] = ()
    """The sampled token; none where the prompt is not through, or the sequence was aborted or its step lost."""
    finished: bool = False
    sample_index: int | None = None
    """Which of the step's ``samples`` (and of the result's ``logprobs``) the token is."""
    prompt_logprobs_index: int | None = None
    """Which of the step's ``prompt_logprobs`` are this sequence's; they continue where the last ones ended."""
