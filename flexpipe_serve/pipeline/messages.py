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
    copies: tuple[tuple[int, int], ...] = ()
    """KV blocks (from, to) that every stage copies in its layers before it computes the step, in order; also when the
    step is dropped for a failure. ``num_seqs`` may be 0 where there are copies: such a step computes nothing."""
    patched_through: int = 0
    """Of steps of the epoch before: a stage runs this one when it has applied every patch up to this step."""
    samples: tuple[SampleSpec, ...] = ()
    prompt_logprobs: tuple[PromptLogprobSpec, ...] = ()


class HiddenHeader(msgspec.Struct, frozen=True, array_like=True, tag="hidden", kw_only=True):
    """Stage to next stage: hidden states.

    Buffers: ``float64`` seconds (how long a refactoring held the step back in the stages passed so far, and the compute
    time of each of those), and the states ``[num_tokens, hidden_size]``. The header has nothing in it that is not known
    before the step is computed.
    """

    epoch: int
    step: int
    shape: tuple[int, int]
    dtype: str


class LogprobResult(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token, and the most likely ones at its place (falling)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ResultHeader(msgspec.Struct, frozen=True, array_like=True, tag="result", kw_only=True):
    """Last stage to Router: one buffer, the sampled tokens ``int32[len(samples)]``."""

    epoch: int
    step: int
    stage_seconds: tuple[float, ...]
    held_seconds: float = 0.0
    """How long a refactoring held the step back in the stages."""
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


class CopyHeader(msgspec.Struct, frozen=True, array_like=True, tag="copy", kw_only=True):
    """Router to the stage that gives layers away, in order with its steps: copy their KV to the target.

    One buffer: the blocks that hold KV now, ``int32``. From this message on every step's new KV goes along as a patch,
    but for blocks whose snapshot is still to come; so nothing written is missed and no second round is needed.
    """

    epoch: int
    """The new epoch, which the copy is for."""
    old_epoch: int
    """Whose steps write the KV."""
    layers: tuple[int, ...]
    target: str
    node: str
    ipc: str
    tcp: str
    """``node``, ``ipc`` and ``tcp`` are the target's Endpoint."""
    max_bytes_per_s: float
    """Limit of the snapshot; patches are not held back."""


class PatchHeader(msgspec.Struct, frozen=True, array_like=True, tag="patch", kw_only=True):
    """Giving stage to target: KV of moving layers. Numbered from 1 without gaps, for each pair of stages.

    Buffers: ``int32`` places, and the KV in the segment's dtype. With ``is_snapshot`` the places are whole blocks and
    the KV is ``[num_layers, num_places, 2, block_size, heads, head_dim]``; else they are tokens
    (``block * block_size + offset``) and it is ``[num_layers, num_places, 2, heads, head_dim]``.
    """

    epoch: int
    source: str
    number: int
    through_step: int
    """Last step of the old epoch whose writes this and the patches before it carry."""
    layers: tuple[int, ...]
    is_snapshot: bool
    snapshot_complete: bool
    """This patch and those before it hold the whole snapshot."""


class PatchAckHeader(msgspec.Struct, frozen=True, array_like=True, tag="ack", kw_only=True):
    """Target to the giving stage: every patch up to ``number`` is applied."""

    epoch: int
    target: str
    number: int


Header = StepHeader | HiddenHeader | ResultHeader | FailureHeader | CopyHeader | PatchHeader | PatchAckHeader

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


def encode_header(header: Header) -> bytes:
    """The first frame of a message."""
    return _encoder.encode(header)


def encode(header: Header, *buffers: Frame) -> list[Frame]:
    """Frames of a message without a body of its own class."""
    return [encode_header(header), *buffers]


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
