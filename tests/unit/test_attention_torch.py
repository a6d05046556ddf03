"""The torch attention backend against a plain reference, over ragged batches of any shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.kernels import torch_attention
from flexpipe_serve.kernels.attention import RaggedBatch
from flexpipe_serve.kernels.torch_attention import TorchAttention

CPU = torch.device("cpu")
HEAD_DIM = 8


@dataclass(frozen=True)
class Case:
    """Sequences, each as the lengths of the chunks it is computed in."""

    chunks: list[list[int]]
    block_size: int
    num_kv_heads: int
    num_groups: int
    seed: int


cases = st.builds(
    Case,
    chunks=st.lists(
        st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=5), min_size=1, max_size=7
    ),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    num_groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last ``len(q)`` queries of a sequence, [n, heads, head_dim], against all its keys and values."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), v).float()


def run(case: Case, *, poison: int | None = None) -> list[torch.Tensor]:
    """Outputs of every sequence minus the reference; ``poison`` makes that sequence's values NaN."""
    rng = np.random.default_rng(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [sum(chunks) for chunks in case.chunks]
    widths = [-(-length // case.block_size) for length in lengths]
    blocks = [int(block) for block in rng.permutation(sum(widths) + 5)]
    tables = [[blocks.pop() for _ in range(width)] for width in widths]
    shape = (sum(widths) + 5, 2, case.block_size, case.num_kv_heads, HEAD_DIM)
    kv = torch.full(shape, float("nan"))
    num_heads = case.num_kv_heads * case.num_groups

    def random(length: int, heads: int) -> torch.Tensor:
        return torch.randn(length, heads, HEAD_DIM, generator=generator)

    q = [random(length, num_heads) for length in lengths]
    k = [random(length, case.num_kv_heads) for length in lengths]
    v = [random(length, case.num_kv_heads) for length in lengths]
    if poison is not None:
        v[poison][:] = float("nan")
    backend = TorchAttention(dtype=torch.float32)
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    for turn in range(max(map(len, case.chunks))):
        order = [int(s) for s in rng.permutation(len(lengths)) if turn < len(case.chunks[s])]
        counts = [case.chunks[s][turn] for s in order]
        table = np.zeros((len(order), max(widths[s] for s in order)), np.int32)
        for row, s in zip(table, order, strict=True):
            row[: widths[s]] = tables[s]
        batch = RaggedBatch(
            num_computed=np.array([done[s] for s in order], np.int32),
            num_new=np.array(counts, np.int32),
            block_tables=table,
            block_size=case.block_size,
        )
        now = [(s, slice(done[s], done[s] + count)) for s, count in zip(order, counts, strict=True)]
        out = backend.forward(
            *(torch.cat([tensors[s][span] for s, span in now]) for tensors in (q, k, v)),
            kv=kv,
            plan=backend.plan(batch, device=CPU),
            scale=0.3,
        )
        for (s, span), part in zip(now, out.split(counts), strict=True):
            outputs[s].append(part - reference(q[s][span], k[s][: span.stop], v[s][: span.stop], 0.3))
            done[s] = span.stop
    return [torch.cat(parts) for parts in outputs]


@given(case=cases)
@settings(max_examples=120, deadline=None)
def test_agrees_with_reference(case: Case) -> None:
    for difference in run(case):
        assert difference.abs().max() < 1e-5


@given(case=cases)
@settings(max_examples=30, deadline=None)
def test_agrees_with_reference_in_many_small_groups(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_attention, "_CPU_GROUP_TOKENS", 32)
        test_agrees_with_reference.hypothesis.inner_test(case)


def test_sequence_of_nan_spoils_no_other() -> None:
    case = Case(chunks=[[3, 1, 1], [5, 1, 2], [1, 1, 1]], block_size=4, num_kv_heads=2, num_groups=2, seed=1)
    differences = run(case, poison=1)
    assert differences[1].isnan().all()
    assert max(differences[0].abs().max(), differences[2].abs().max()) < 1e-5


def test_nan_left_in_a_block_does_not_reach_its_next_owner() -> None:
    backend = TorchAttention(dtype=torch.float32)
    kv = torch.zeros(2, 2, 4, 1, HEAD_DIM)

    def step(num_computed: int, num_new: int, value: float) -> torch.Tensor:
        batch = RaggedBatch(
            num_computed=np.array([num_computed], np.int32),
            num_new=np.array([num_new], np.int32),
            block_tables=np.array([[1]], np.int32),
            block_size=4,
        )
        tokens = torch.full((num_new, 1, HEAD_DIM), value)
        return backend.forward(tokens, tokens, tokens, kv=kv, plan=backend.plan(batch, device=CPU), scale=1.0)

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
