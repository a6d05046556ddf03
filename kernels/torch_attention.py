"""Paged attention from plain torch operations: any device, any float dtype.

Decodes are batched: the KV of a group of sequences is gathered block by block and one
``scaled_dot_product_attention`` serves the group, the query heads that share a KV head standing as query positions.
Prefill chunks run one sequence at a time, straight from their own keys and values where nothing is cached.

What may lie in the slots of a block that no token was written to does not matter: a block is zeroed when its first
token arrives, and no block of another sequence is ever read, so a sequence whose numbers went to NaN spoils nobody
else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from flexpipe_serve.kernels.attention import RaggedBatch

Int64 = npt.NDArray[np.int64]

# A group of decodes gathers at most this many tokens of KV: what is gathered must still be in the second-level cache
# when attention reads it (measured: 16 sequences of 256 tokens take 2.2 ms a layer in one group, 0.9 ms in groups
# of 2,048 tokens, for 3 KV heads of 64 in float32). An accelerator takes them all at once.
_CPU_GROUP_TOKENS = 2048
_GROUP_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one new token each, attended together."""

    rows: torch.Tensor | slice
    """Where their tokens stand among the step's tokens."""
    num_seqs: int
    half_blocks: torch.Tensor
    """[2 * num_seqs * width], indices into the segment seen as [2 * num_blocks, -1]: all K, then all V."""
    mask: torch.Tensor | None
    """[num_seqs, 1, 1, width * block_size], additive; None where all have the same length."""
    num_tokens: int
    """Longest length, its own new token included."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence with several new tokens."""

    rows: slice
    half_blocks: torch.Tensor | None
    """As above; None where nothing is cached."""
    mask: torch.Tensor | None
    """[num_new, num_tokens], additive and causal from the bottom right."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """Index tensors and masks that all layers of a step share."""

    key_slots: torch.Tensor
    """[num_tokens], where each new token's key goes in the segment seen as [num_blocks * 2 * block_size, -1]."""
    value_slots: torch.Tensor
    begun_blocks: torch.Tensor | None
    """Blocks that this step begins and does not fill."""
    decodes: tuple[_Decodes, ...]
    prefills: tuple[_Prefill, ...]


class TorchAttention:
    """The :class:`~flexpipe_serve.kernels.attention.AttentionBackend` that runs everywhere."""

    name = "torch"
    block_size_multiple = 1

    def __init__(self, *, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def plan(self, batch: RaggedBatch, *, device: torch.device) -> TorchPlan:
        num_new, num_computed = batch.num_new.astype(np.int64), batch.num_computed.astype(np.int64)
        starts = np.cumsum(num_new) - num_new
        tables, block_size = batch.block_tables.astype(np.int64), batch.block_size
        lengths = num_computed + num_new

        decode_seqs = np.flatnonzero(num_new == 1)
        group_tokens = _CPU_GROUP_TOKENS if device.type == "cpu" else _GROUP_TOKENS
        decodes = tuple(
            self._plan_decodes(seqs, starts[seqs], lengths[seqs], tables[seqs], block_size, device)
            for seqs in _group(decode_seqs, -(-lengths // block_size), group_tokens // block_size)
        )
        prefills = tuple(
            self._plan_prefill(int(starts[i]), int(num_new[i]), int(num_computed[i]), tables[i], block_size, device)
            for i in np.flatnonzero(num_new > 1)
        )
        blocks, offsets = _slots_of_new_tokens(num_computed, num_new, starts, tables, block_size)
        begun = _begun_blocks(num_computed, num_new, tables, block_size)
        key_slots = blocks * (2 * block_size) + offsets
        return TorchPlan(
            key_slots=_tensor(key_slots, device),
            value_slots=_tensor(key_slots + block_size, device),
            begun_blocks=_tensor(begun, device) if begun.size else None,
            decodes=decodes,
            prefills=prefills,
        )

    def _plan_decodes(
        self, seqs: Int64, rows: Int64, lengths: Int64, tables: Int64, block_size: int, device: torch.device
    ) -> _Decodes:
        longest = int(lengths.max())
        width = -(-longest // block_size)
        # Past its own end a sequence reads its own first block again (masked), never somebody else's.
        own = np.arange(width) < -(-lengths // block_size)[:, None]
        blocks = np.where(own, tables[:, :width], tables[:, :1])
        mask = None
        if (lengths != longest).any():
            hidden = torch.from_numpy(np.arange(width * block_size) >= lengths[:, None])
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
            mask = mask[:, None, None, :].to(device)
        contiguous = int(rows[-1]) - int(rows[0]) == len(rows) - 1
        return _Decodes(
            rows=slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else _tensor(rows, device),
            num_seqs=len(seqs),
            half_blocks=_half_blocks(blocks, device),
            mask=mask,
            num_tokens=longest,
        )

    def _plan_prefill(
        self, start: int, num_new: int, num_computed: int, table: Int64, block_size: int, device: torch.device
    ) -> _Prefill:
        rows = slice(start, start + num_new)
        num_tokens = num_computed + num_new
        if num_computed == 0:
            return _Prefill(rows=rows, half_blocks=None, mask=None, num_tokens=num_tokens)
        later = torch.ones(num_new, num_tokens, dtype=torch.bool).triu_(num_computed + 1)
        return _Prefill(
            rows=rows,
            half_blocks=_half_blocks(table[: -(-num_tokens // block_size)], device),
            mask=torch.zeros(later.shape, dtype=self._dtype).masked_fill_(later, float("-inf")).to(device),
            num_tokens=num_tokens,
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv: torch.Tensor,
        plan: TorchPlan,
        scale: float,
    ) -> torch.Tensor:
        num_blocks, _, block_size, num_kv_heads, head_dim = kv.shape
        num_tokens, num_heads, _ = q.shape
        width = num_kv_heads * head_dim
        if plan.begun_blocks is not None:
            kv.index_fill_(0, plan.begun_blocks, 0.0)
        slots = kv.view(-1, width)
        slots.index_copy_(0, plan.key_slots, k.reshape(num_tokens, width))
        slots.index_copy_(0, plan.value_slots, v.reshape(num_tokens, width))

        half_blocks = kv.view(2 * num_blocks, block_size * width)
        num_groups = num_heads // num_kv_heads
        if len(plan.decodes) == 1 and plan.decodes[0].num_seqs == num_tokens:
            grouped = q.reshape(num_tokens, num_kv_heads, num_groups, head_dim)
            return _attend_decodes(grouped, half_blocks, plan.decodes[0], scale).reshape(q.shape)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in plan.decodes:
            grouped = q[group.rows].reshape(group.num_seqs, num_kv_heads, num_groups, head_dim)
            out[group.rows] = _attend_decodes(grouped, half_blocks, group, scale).reshape(
                group.num_seqs, num_heads, head_dim
            )
        for chunk in plan.prefills:
            out[chunk.rows] = _attend_prefill(q[chunk.rows], k[chunk.rows], v[chunk.rows], half_blocks, chunk, scale)
        return out


def _attend_decodes(q: torch.Tensor, half_blocks: torch.Tensor, group: _Decodes, scale: float) -> torch.Tensor:
    """q: [num_seqs, num_kv_heads, heads of a group, head_dim]; returns the same shape."""
    num_seqs, num_kv_heads, _, head_dim = q.shape
    # embedding() is the faster of torch's two row gathers; one call fetches keys and values.
    gathered = torch.embedding(half_blocks, group.half_blocks).view(2, num_seqs, -1, num_kv_heads, head_dim)
    if group.mask is None:
        gathered = gathered[:, :, : group.num_tokens]
    k, v = gathered.transpose(2, 3).unbind(0)
    return scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)


def _attend_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, half_blocks: torch.Tensor, chunk: _Prefill, scale: float
) -> torch.Tensor:
    """One sequence, [num_new, heads, head_dim] each; returns the shape of ``q``."""
    _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if chunk.half_blocks is not None:
        gathered = torch.embedding(half_blocks, chunk.half_blocks).view(2, -1, num_kv_heads, head_dim)
        k, v = gathered[:, : chunk.num_tokens].unbind(0)
    # KV heads stand as the batch, so the keys of a group are shared by a stride of zero instead of a copy.
    num_groups = num_heads // num_kv_heads
    shape = (num_kv_heads, num_groups, -1, head_dim)
    out = scaled_dot_product_attention(
        q.view(-1, num_kv_heads, num_groups, head_dim).permute(1, 2, 0, 3),
        k.transpose(0, 1).unsqueeze(1).expand(shape),
        v.transpose(0, 1).unsqueeze(1).expand(shape),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(q.shape)


def _group(seqs: Int64, num_blocks: Int64, max_blocks: int) -> list[Int64]:
    """Sequences of similar length together, in groups of at most ``max_blocks`` padded blocks.

    A group ends where the next sequence is less than half as long as its longest one: at most half of what a group
    gathers is padding.
    """
    groups: list[Int64] = []
    ordered = seqs[np.argsort(-num_blocks[seqs], kind="stable")]
    start = 0
    while start < len(ordered):
        longest = int(num_blocks[ordered[start]])
        stop = start + max(1, max_blocks // longest)
        similar = int(np.count_nonzero(2 * num_blocks[ordered] >= longest))
        stop = min(stop, similar)
        groups.append(np.sort(ordered[start:stop]))
        start = stop
    return groups


def _slots_of_new_tokens(
    num_computed: Int64, num_new: Int64, starts: Int64, tables: Int64, block_size: int
) -> tuple[Int64, Int64]:
    """Block id and offset of every new token, both [num_tokens]."""
    seqs = np.repeat(np.arange(len(num_new)), num_new)
    positions = np.arange(len(seqs)) - starts[seqs] + num_computed[seqs]
    return tables[seqs, positions // block_size], positions % block_size


def _begun_blocks(num_computed: Int64, num_new: Int64, tables: Int64, block_size: int) -> Int64:
    """The last block of each sequence whose first token this step writes, unless the step also fills it."""
    lengths = num_computed + num_new
    begun = (lengths % block_size != 0) & (lengths // block_size * block_size >= num_computed)
    seqs = np.flatnonzero(begun)
    blocks: Int64 = tables[seqs, lengths[seqs] // block_size]
    return blocks


def _half_blocks(blocks: Int64, device: torch.device) -> torch.Tensor:
    keys = blocks.ravel() * 2
    return _tensor(np.concatenate((keys, keys + 1)), device)


def _tensor(array: Int64, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
