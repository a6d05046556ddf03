"""Synthetic steps, as the scheduler would make them: what the profile is measured with. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexpipe_serve.pipeline.messages import SampleSpec, StepBatch, StepHeader
from flexpipe_serve.planner.profile import StepShape

_FIRST_TOKEN = 1


class Row(NamedTuple):
    """A sequence's part in a step."""

    num_computed: int
    """Tokens in the cache."""
    num_new: int = 1
    """1: it decodes; more: a chunk of its prompt."""
    is_sampled: bool = True
    """Gets a token."""


def decodes(num_seqs: int, *, context: int) -> tuple[Row, ...]:
    """So many sequences that decode, each with ``context`` tokens in the cache."""
    return (Row(context),) * num_seqs


def shape_of(rows: Sequence[Row]) -> StepShape:
    """What of a step its time depends on."""
    return StepShape(
        num_tokens=sum(row.num_new for row in rows),
        num_samples=sum(row.is_sampled for row in rows),
        num_context_tokens=sum(row.num_computed for row in rows if row.num_new == 1),
        num_pairs=sum(
            row.num_new * row.num_computed + row.num_new * (row.num_new + 1) // 2 for row in rows if row.num_new > 1
        ),
    )


def num_blocks_of(rows: Sequence[Row], *, block_size: int) -> int:
    """KV blocks that the step's sequences take together."""
    return sum(-(-(row.num_computed + row.num_new) // block_size) for row in rows)


def make_step(
    rows: Sequence[Row], *, block_size: int, vocab_size: int, num_threads: int, epoch: int = 1, step: int = 1
) -> StepBatch:
    """A greedy step of these sequences; their blocks are 0, 1, 2, ... without gaps.

    Args:
        num_threads: CPU threads that a stage may use.
    """
    num_new = np.array([row.num_new for row in rows], np.int32)
    num_tokens = int(num_new.sum())
    num_blocks = [-(-(row.num_computed + row.num_new) // block_size) for row in rows]
    tables = np.zeros((len(rows), max(num_blocks)), np.int32)
    taken = 0
    for index, num in enumerate(num_blocks):
        tables[index, :num] = np.arange(taken, taken + num)
        taken += num
    header = StepHeader(
        epoch=epoch,
        step=step,
        num_seqs=len(rows),
        num_tokens=num_tokens,
        table_width=tables.shape[1],
        num_threads=num_threads,
        samples=tuple(
            SampleSpec(row=index, position=row.num_computed + row.num_new)
            for index, row in enumerate(rows)
            if row.is_sampled
        ),
    )
    empty = np.empty(0, np.int32)
    return StepBatch(
        header=header,
        token_ids=(np.arange(_FIRST_TOKEN, _FIRST_TOKEN + num_tokens) % vocab_size).astype(np.int32),
        num_computed=np.array([row.num_computed for row in rows], np.int32),
        num_new=num_new,
        block_tables=tables,
        histories=empty,
        targets=empty,
    )
