"""Ragged batches over paged KV of any shape, and what attention must give for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from flexpipe_serve.kernels.attention import AttentionBackend, RaggedBatch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Sequences, each as the lengths of the chunks it is computed in."""

    chunks: list[list[int]]
    block_size: int
    num_kv_heads: int
    num_groups: int
    seed: int
    head_dim: int = 8


HEAD_DIMS = [8, 20, 64, 80]

cases = st.builds(
    Case,
    chunks=st.lists(
        st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=5), min_size=1, max_size=7
    ),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    num_groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
    head_dim=st.sampled_from(HEAD_DIMS),
)


TOLERANCE = 5e-5
"""Float32 rounding of these cases' large scores: any float32 backend may be more than 1e-5 off at 289 keys of 128."""


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last ``len(q)`` queries of a sequence, [n, heads, head_dim], against all its keys and values."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), v).float()


@dataclass(frozen=True)
class Results:
    """Of each sequence, [length, num_heads, head_dim]."""

    outputs: list[torch.Tensor]
    differences: list[torch.Tensor]
    """From the reference."""


def run(backend: AttentionBackend, case: Case, *, poison: int | None = None, query_size: float = 1.0) -> Results:
    """Compute the case, with NaN in every slot that no token was written to.

    Args:
        poison: makes that sequence's values NaN.
        query_size: factor on the queries.
    """
    rng = np.random.default_rng(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [sum(chunks) for chunks in case.chunks]
    widths = [-(-length // case.block_size) for length in lengths]
    blocks = [int(block) for block in rng.permutation(sum(widths) + 5)]
    tables = [[blocks.pop() for _ in range(width)] for width in widths]
    shape = (sum(widths) + 5, 2, case.block_size, case.num_kv_heads, case.head_dim)
    kv = torch.full(shape, float("nan"))
    num_heads = case.num_kv_heads * case.num_groups

    def random(length: int, heads: int) -> torch.Tensor:
        return torch.randn(length, heads, case.head_dim, generator=generator)

    q = [random(length, num_heads) * query_size for length in lengths]
    k = [random(length, case.num_kv_heads) for length in lengths]
    v = [random(length, case.num_kv_heads) for length in lengths]
    if poison is not None:
        v[poison][:] = float("nan")
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    expected: list[list[torch.Tensor]] = [[] for _ in lengths]
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
            outputs[s].append(part)
            expected[s].append(reference(q[s][span], k[s][: span.stop], v[s][: span.stop], 0.3))
            done[s] = span.stop
    whole = [torch.cat(parts) for parts in outputs]
    return Results(whole, [out - torch.cat(parts) for out, parts in zip(whole, expected, strict=True)])
