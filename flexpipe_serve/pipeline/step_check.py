"""Refuses a step that does not hold together. Kernels take indices as they are: a bad one would be a crash, or
somebody else's KV."""

from __future__ import annotations

import numpy as np

from flexpipe_serve.pipeline.messages import Int32, StepBatch


def check_batch(batch: StepBatch, *, num_blocks: int, block_size: int, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError, naming what is wrong, unless every index of a step with sequences is in range.

    Args:
        num_blocks: committed in the stage's segments.
    """
    header = batch.header
    for name, array, length in (
        ("token_ids", batch.token_ids, header.num_tokens),
        ("num_computed", batch.num_computed, header.num_seqs),
        ("num_new", batch.num_new, header.num_seqs),
        ("histories", batch.histories, sum(spec.num_history for spec in header.samples)),
        ("targets", batch.targets, sum(spec.num_targets for spec in header.prompt_logprobs)),
    ):
        if len(array) != length:
            raise ValueError(f"{name} has {len(array)} entries, the header says {length}.")
    _check_below("token_ids", batch.token_ids, vocab_size)
    if (fewest := int(batch.num_new.min())) < 1:
        raise ValueError(f"num_new has {fewest}; each sequence of a step has at least 1.")
    if (total := int(batch.num_new.sum())) != header.num_tokens:
        raise ValueError(f"num_new adds up to {total}, the header says {header.num_tokens}.")
    _check_below("num_computed", batch.num_computed, max_model_len)
    end = int((batch.num_computed + batch.num_new).max())
    limit = min(max_model_len, header.table_width * block_size)
    if end > limit:
        raise ValueError(f"a sequence reaches {end} tokens; its block table and the model allow {limit}.")
    _check_below("block_tables", batch.block_tables, num_blocks)
    _check_below("targets", batch.targets, vocab_size)
    for sample in header.samples:
        _check_row(sample.row, header.num_seqs)
    for spec in header.prompt_logprobs:
        _check_row(spec.row, header.num_seqs)
        if spec.num_targets > batch.num_new[spec.row]:
            raise ValueError(f"{spec.num_targets} targets for {batch.num_new[spec.row]} new tokens of a sequence.")


def _check_below(name: str, array: Int32, stop: int) -> None:
    # Read as unsigned, what is negative is too large: one pass over the array finds both.
    if array.size and int(array.view(np.uint32).max()) >= stop:
        wrong = array[(array < 0) | (array >= stop)][0]
        raise ValueError(f"{name} has {wrong}; 0 to {stop - 1} are valid.")


def _check_row(row: int, num_seqs: int) -> None:
    if not 0 <= row < num_seqs:
        raise ValueError(f"row {row} of a step with {num_seqs} sequences.")
