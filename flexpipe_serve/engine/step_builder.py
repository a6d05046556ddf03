"""From the scheduler's choice of chunks to the step message that the stages execute."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.kv.block_manager import Moves
from flexpipe_serve.pipeline.messages import PromptLogprobSpec, SampleSpec, StepBatch, StepHeader

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_new`` tokens of a sequence, its row in a step."""

    sequence: Sequence
    num_new: int
    sample_index: int | None
    """Its place among the step's samples; None where the chunk does not reach the last token."""
    prompt_logprobs_index: int | None
    num_targets: int
    """Prompt tokens whose log probabilities the chunk gives."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step in flight."""

    chunks: tuple[Chunk, ...]
    num_samples: int
    copies: Moves
    """KV blocks that the stages copy first."""


def plan_step(rows: AbstractSequence[tuple[Sequence, int]], *, copies: Moves = ()) -> Step:
    """Decide which of the (sequence, number of new tokens) rows sample and which give prompt log probabilities."""
    chunks: list[Chunk] = []
    num_samples = num_prompt_logprobs = 0
    for seq, num_new in rows:
        sample_index = prompt_logprobs_index = None
        num_targets = 0
        if seq.num_remaining == num_new and seq.params.max_tokens > 0:
            sample_index = num_samples
            num_samples += 1
        if seq.awaits_prompt_logprobs and seq.num_computed == seq.num_prompt_logprobs:
            num_targets = min(num_new, seq.num_prompt_tokens - 1 - seq.num_computed)
            prompt_logprobs_index = num_prompt_logprobs
            num_prompt_logprobs += 1
        chunks.append(Chunk(seq, num_new, sample_index, prompt_logprobs_index, num_targets))
    return Step(tuple(chunks), num_samples, copies)


def build_batch(
    step_plan: Step, *, step: int, epoch: int, block_size: int, num_threads: int, patched_through: int
) -> StepBatch:
    """The message of a planned step. Its arrays are copies: the sequences may change while it is sent."""
    chunks = step_plan.chunks
    samples: list[SampleSpec] = []
    prompt_logprobs: list[PromptLogprobSpec] = []
    histories: list[Int32] = []
    targets: list[Int32] = []
    for row, chunk in enumerate(chunks):
        seq = chunk.sequence
        if chunk.sample_index is not None:
            history = seq.tokens.view() if seq.params.needs_history else None
            samples.append(_sample_spec(seq, row, history))
            if history is not None:
                histories.append(history)
        if chunk.prompt_logprobs_index is not None:
            first = seq.num_computed + 1
            targets.append(seq.tokens.view(first, first + chunk.num_targets))
            num_logprobs = seq.params.num_logprobs or 0
            prompt_logprobs.append(PromptLogprobSpec(row=row, num_targets=chunk.num_targets, num_logprobs=num_logprobs))

    num_computed = np.array([c.sequence.num_computed for c in chunks], np.int32)
    num_new = np.array([c.num_new for c in chunks], np.int32)
    num_blocks = (-(-(num_computed + num_new) // block_size)).tolist()
    block_tables = np.zeros((len(chunks), max(num_blocks, default=0)), np.int32)
    for row, (chunk, num) in enumerate(zip(chunks, num_blocks, strict=True)):
        block_tables[row, :num] = chunk.sequence.block_table.view(0, num)
    token_ids = _concatenate([_chunk_tokens(c.sequence, c.num_new) for c in chunks])
    header = StepHeader(
        epoch=epoch,
        step=step,
        num_seqs=len(chunks),
        num_tokens=len(token_ids),
        table_width=block_tables.shape[1],
        num_threads=num_threads,
        copies=step_plan.copies,
        patched_through=patched_through,
        samples=tuple(samples),
        prompt_logprobs=tuple(prompt_logprobs),
    )
    return StepBatch(
        header=header,
        token_ids=token_ids,
        num_computed=num_computed,
        num_new=num_new,
        block_tables=block_tables,
        histories=_concatenate(histories),
        targets=_concatenate(targets),
    )


def _chunk_tokens(seq: Sequence, num_new: int) -> Int32:
    return seq.tokens.view(seq.num_computed, seq.num_computed + num_new)


def _concatenate(arrays: list[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


def _sample_spec(seq: Sequence, row: int, history: Int32 | None) -> SampleSpec:
    params = seq.params
    return SampleSpec(
        row=row,
        position=len(seq.tokens),
        seed=seq.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        num_history=0 if history is None else len(history),
        num_prompt=0 if history is None else seq.num_prompt_tokens,
        logit_bias=tuple(params.logit_bias.items()),
        num_logprobs=-1 if params.num_logprobs is None else params.num_logprobs,
    )
