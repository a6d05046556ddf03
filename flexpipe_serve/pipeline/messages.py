"""The wire format: a msgpack header and raw buffers, one multipart message. No pickle on any socket.

Every message carries its epoch and step. Stages keep no state of sequences: a step brings the tokens, positions,
block tables and sampling choices it needs, so a stage that comes, goes or takes over a layer needs nothing but
weights and KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Frame = bytes | memoryview


class SampleSpec(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How the last stage picks the next token of one sequence of the step."""

    row: int
    """Index of the sequence in the step."""
    position: int
    """Index of the new token in its sequence; with ``seed`` it determines the random number."""
    seed: int = 0
    temperature: float = 0.0
    """Below 1e-5: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_history: int = 0
    """Tokens of this sequence in ``StepBatch.histories`` (only where a penalty needs them)."""
    num_prompt: int = 0
    """How many of those are the prompt: presence and frequency count only what was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int = -1
    """-1: none. k >= 0: the chosen token's and the k most likely ones'."""


class PromptLogprobSpec(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Log probabilities wanted for the prompt tokens that follow each of a sequence's tokens in this step."""

    row: int
    num_targets: int
    """Tokens of this sequence in ``StepBatch.targets``: the token after each of its first ``num_targets`` ones."""
    num_logprobs: int


class StepHeader(msgspec.Struct, frozen=True, array_like=True, tag="step", kw_only=True):
    """Router to every stage of the route: what step ``step`` computes."""

    epoch: int
    step: int
    num_seqs: int
    num_tokens: int
    table_width: int
    num_threads: int = 0
    """CPU threads a stage may use in this step; 0: unchanged."""
    samples: tuple[SampleSpec, ...] = ()
    prompt_logprobs: tuple[PromptLogprobSpec, ...] = ()


class HiddenHeader(msgspec.Struct, frozen=True, array_like=True, tag="hidden", kw_only=True):
    """Stage to next stage: hidden states, one buffer ``[num_tokens, hidden_size]``."""

    epoch: int
    step: int
    shape: tuple[int, int]
    dtype: str
    stage_seconds: tuple[float, ...]
    """Compute time of each stage passed so far."""


class LogprobResult(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token, and the most likely ones at its place (falling)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ResultHeader(msgspec.Struct, frozen=True, array_like=True, tag="result", kw_only=True):
    """Last stage to Router: one buffer, the sampled tokens ``int32[len(samples)]``."""

    epoch: int
    step: int
    stage_seconds: tuple[float, ...]
    logprobs: tuple[LogprobResult | None, ...] = ()
    """One for each sample, or empty where none was asked for."""
    prompt_logprobs: tuple[tuple[LogprobResult, ...], ...] = ()
    """One for each PromptLogprobSpec: one for each target."""


class FailureHeader(msgspec.Struct, frozen=True, array_like=True, tag="failure", kw_only=True):
    """A stage to the Router: this step raised; its KV writes are void, the stage goes on."""

    epoch: int
    step: int
    stage: str
    message: str


Header = StepHeader | HiddenHeader | ResultHeader | FailureHeader

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One microbatch: ``num_seqs`` ragged chunks, prefill and decode alike."""

    header: StepHeader
    token_ids: Int32
    """[num_tokens], the chunks one after the other."""
    num_computed: Int32
    """[num_seqs], tokens of each sequence whose KV is already there."""
    num_new: Int32
    """[num_seqs], tokens of each sequence in this step (>= 1)."""
    block_tables: Int32
    """[num_seqs, table_width], block ids, rows padded with 0."""
    histories: Int32
    """Tokens of the samples with ``num_history > 0``, one after the other."""
    targets: Int32
    """Next tokens of the ``prompt_logprobs``, one after the other."""

    def encode(self) -> list[Frame]:
        """The frames of the message."""
        arrays = (
            self.token_ids, self.num_computed, self.num_new, self.block_tables, self.histories, self.targets,
        )  # fmt: skip
        return [
            _encoder.encode(self.header),
            *(np.ascontiguousarray(a).data.cast("B") if a.size else b"" for a in arrays),
        ]


def encode(header: Header, *buffers: Frame) -> list[Frame]:
    """Frames of a message without a body of its own class."""
    return [_encoder.encode(header), *buffers]


def decode_header(frame: Frame) -> Header:
    """The typed header. Raises msgspec.ValidationError for what is not one."""
    return _decoder.decode(frame)


def decode_step(header: StepHeader, buffers: Sequence[Frame]) -> StepBatch:
    """The step whose header is already decoded; the arrays are views of the frames."""
    token_ids, num_computed, num_new, tables, histories, targets = (np.frombuffer(b, np.int32) for b in buffers)
    return StepBatch(
        header=header,
        token_ids=token_ids,
        num_computed=num_computed,
        num_new=num_new,
        block_tables=tables.reshape(header.num_seqs, header.table_width),
        histories=histories,
        targets=targets,
    )


def decode_tokens(frame: Frame) -> list[int]:
    """The sampled tokens of a result."""
    tokens: list[int] = np.frombuffer(frame, np.int32).tolist()
    return tokens
