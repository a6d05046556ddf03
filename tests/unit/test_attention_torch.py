"""The torch attention backend against a plain reference, over ragged batches of any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import CPU, TOLERANCE, Case, cases, run
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.kernels import torch_attention
from flexpipe_serve.kernels.attention import RaggedBatch
from flexpipe_serve.kernels.torch_attention import TorchAttention

BACKEND = TorchAttention(dtype=torch.float32)


@given(case=cases)
@settings(max_examples=60, deadline=None)
def test_agrees_with_reference(case: Case) -> None:
    for difference in run(BACKEND, case).differences:
        assert difference.abs().max() < TOLERANCE


@given(case=cases)
@settings(max_examples=30, deadline=None)
def test_agrees_with_reference_in_many_small_groups(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_attention, "_CPU_GROUP_TOKENS", 32)
        test_agrees_with_reference.hypothesis.inner_test(case)


def test_sequence_of_nan_spoils_no_other() -> None:
    case = Case(chunks=[[3, 1, 1], [5, 1, 2], [1, 1, 1]], block_size=4, num_kv_heads=2, num_groups=2, seed=1)
    differences = run(BACKEND, case, poison=1).differences
    assert differences[1].isnan().all()
    assert max(differences[0].abs().max(), differences[2].abs().max()) < TOLERANCE


def test_nan_left_in_a_block_does_not_reach_its_next_owner() -> None:
    kv = torch.zeros(2, 2, 4, 1, 8)

    def step(num_computed: int, num_new: int, value: float) -> torch.Tensor:
        batch = RaggedBatch(
            num_computed=np.array([num_computed], np.int32),
            num_new=np.array([num_new], np.int32),
            block_tables=np.array([[1]], np.int32),
            block_size=4,
        )
        tokens = torch.full((num_new, 1, 8), value)
        return BACKEND.forward(tokens, tokens, tokens, kv=kv, plan=BACKEND.plan(batch, device=CPU), scale=1.0)

    assert step(0, 4, float("nan")).isnan().all()
    assert (step(0, 1, 2.0) == 2.0).all()
    assert (step(1, 1, 2.0) == 2.0).all()


@given(
    num_blocks=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_blocks=st.sampled_from([1, 8, 64, 512]),
)
def test_groups_cover_all_sequences_with_bounded_padding(num_blocks: list[int], max_blocks: int) -> None:
    sizes = np.array(num_blocks)
    groups = torch_attention._group(np.arange(len(sizes)), sizes, max_blocks)
    assert sorted(int(seq) for group in groups for seq in group) == list(range(len(sizes)))
    for group in groups:
        longest = sizes[group].max()
        assert (2 * sizes[group] >= longest).all()
        assert len(group) == 1 or len(group) * longest <= max_blocks
