"""Paged attention through the flash-attn package (version 2) on CUDA.

Never run on a GPU so far: written against the documented signatures. ``scripts/gpu_check`` and the tests marked
``gpu`` are what will tell.

Both calls read the cache through ``block_table``; the segment's K and V halves are strided views, which the kernels
take. A chunk with several new tokens is masked from the bottom right, which is what a prefill against cached tokens
needs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexpipe_serve.kernels.attention import RaggedBatch

DTYPES = (torch.float16, torch.bfloat16)


def is_available(device: torch.device) -> bool:
    """True where the package is installed and the device is one it runs on (Ampere or later)."""
    if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """What all layers of a step share."""

    key_slots: torch.Tensor
    """[num_tokens], where each new token goes in a half segment seen as [num_blocks * 2 * block_size, ...]."""
    value_slots: torch.Tensor
    block_tables: torch.Tensor
    """int32 [num_seqs, table_width]."""
    lengths: torch.Tensor
    """int32 [num_seqs], new tokens included."""
    cu_seqlens_q: torch.Tensor | None
    """int32 [num_seqs + 1]; None where every sequence has one new token."""
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


class FlashAttention:
    """The :class:`~flexpipe_serve.kernels.attention.AttentionBackend` over flash-attn 2."""

    name = "flash_attn"
    block_size_multiple = 256

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen = flash_attn_varlen_func
        self._with_kvcache = flash_attn_with_kvcache

    def plan(self, batch: RaggedBatch, *, device: torch.device) -> FlashPlan:
        num_new, num_computed = batch.num_new, batch.num_computed
        starts = np.cumsum(num_new) - num_new
        seqs = np.repeat(np.arange(len(num_new)), num_new)
        positions = np.arange(len(seqs)) - starts[seqs] + num_computed[seqs]
        blocks = batch.block_tables[seqs, positions // batch.block_size].astype(np.int64)
        key_slots = blocks * (2 * batch.block_size) + positions % batch.block_size
        lengths = (num_computed + num_new).astype(np.int32)
        ragged = bool((num_new != 1).any())

        def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        def cumulated(counts: np.ndarray[Any, Any]) -> torch.Tensor:
            return tensor(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))

        return FlashPlan(
            key_slots=tensor(key_slots),
            value_slots=tensor(key_slots + batch.block_size),
            block_tables=tensor(batch.block_tables),
            lengths=tensor(lengths),
            cu_seqlens_q=cumulated(num_new) if ragged else None,
            cu_seqlens_k=cumulated(lengths) if ragged else None,
            max_seqlen_q=int(num_new.max()),
            max_seqlen_k=int(lengths.max()),
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv: torch.Tensor,
        plan: FlashPlan,
        scale: float,
    ) -> torch.Tensor:
        num_tokens = q.shape[0]
        slots = kv.view(-1, kv.shape[3] * kv.shape[4])
        slots.index_copy_(0, plan.key_slots, k.reshape(num_tokens, -1))
        slots.index_copy_(0, plan.value_slots, v.reshape(num_tokens, -1))
        keys, values = kv.unbind(1)
        if plan.cu_seqlens_q is None:
            out: torch.Tensor = self._with_kvcache(
                q.unsqueeze(1),
                keys,
                values,
                cache_seqlens=plan.lengths,
                block_table=plan.block_tables,
                softmax_scale=scale,
                causal=True,
            )
            return out.squeeze(1)
        ragged: torch.Tensor = self._varlen(
            q.contiguous(),
            keys,
            values,
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_k=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_k=plan.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            block_table=plan.block_tables,
        )
        return ragged
