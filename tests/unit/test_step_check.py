"""Steps that do not hold together are refused before a kernel sees their indices."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from stage_harness import FakeSequence, make_batch

from flexpipe_serve.pipeline.messages import PromptLogprobSpec, SampleSpec, StepBatch
from flexpipe_serve.pipeline.step_check import check_batch

BATCH = make_batch(1, 1, [FakeSequence([5, 6, 7], [3, 1]), FakeSequence([9, 8, 7, 6, 5], [2, 7], num_computed=4)])


def check(batch: StepBatch) -> None:
    check_batch(batch, num_blocks=8, block_size=4, vocab_size=10, max_model_len=8)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_sound_step_passes() -> None:
    check(BATCH)
    header = msgspec.structs.replace(
        BATCH.header, prompt_logprobs=(PromptLogprobSpec(row=0, num_targets=2, num_logprobs=1),)
    )
    check(replace(BATCH, header=header, targets=int32(1, 2)))


@pytest.mark.parametrize(
    ("changes", "header_changes", "message"),
    [
        ({"token_ids": int32(5, 6, 7)}, {}, "token_ids has 3 entries, the header says 4"),
        ({"token_ids": int32(5, 6, 10, 1)}, {}, "token_ids has 10; 0 to 9 are valid"),
        ({"token_ids": int32(5, 6, -1, 1)}, {}, "token_ids has -1"),
        ({"num_computed": int32(0)}, {}, "num_computed has 1 entries"),
        ({"num_computed": int32(0, -1)}, {}, "num_computed has -1"),
        ({"num_new": int32(4, 0)}, {}, "num_new has 0; each sequence of a step has at least 1"),
        ({"num_new": int32(3, 2)}, {}, "num_new adds up to 5, the header says 4"),
        ({"num_computed": int32(0, 7), "num_new": int32(2, 2)}, {}, "reaches 9 tokens.*allow 8"),
        ({"block_tables": int32(3, 1, 2, 8).reshape(2, 2)}, {}, "block_tables has 8; 0 to 7 are valid"),
        ({"block_tables": int32(3, -1, 2, 7).reshape(2, 2)}, {}, "block_tables has -1"),
        ({"block_tables": int32(3, 2).reshape(2, 1)}, {"table_width": 1}, "reaches 5 tokens.*allow 4"),
        ({"histories": int32(1)}, {}, "histories has 1 entries"),
        ({"targets": int32(1)}, {}, "targets has 1 entries"),
        ({}, {"samples": (SampleSpec(row=2, position=1),)}, "row 2 of a step with 2 sequences"),
        ({}, {"samples": (SampleSpec(row=-1, position=1),)}, "row -1"),
        (
            {"targets": int32(1, 1)},
            {"prompt_logprobs": (PromptLogprobSpec(row=1, num_targets=2, num_logprobs=0),)},
            "2 targets for 1 new tokens",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict, header_changes: dict, message: str) -> None:
    header = msgspec.structs.replace(BATCH.header, **header_changes)
    with pytest.raises(ValueError, match=message):
        check(replace(BATCH, header=header, **changes))
