"""Paged attention in float32 on the CPU, through the kernels in ``csrc``.

Keys and values are read from their blocks, without a copy. The bits of a token's result depend on its own sequence
alone: not on the batch, on how the prompt is cut into chunks, or on the number of threads. Slots of a block that no
token was written to are never read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexpipe_serve.kernels.attention import RaggedBatch
from flexpipe_serve.kernels.native import native_threads


class Batch(ctypes.Structure):
    """``flexpipe::Batch``."""

    _fields_ = (
        ("num_computed", ctypes.c_void_p),
        ("num_new", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("num_seqs", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class Heads(ctypes.Structure):
    """``flexpipe::Heads``."""

    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step as the kernels take it."""

    batch: Batch
    arrays: tuple[npt.NDArray[np.int32], ...]
    """What ``batch`` points to."""


class NativeAttention:
    """The :class:`~flexpipe_serve.kernels.attention.AttentionBackend` over ``native_library()``."""

    name = "native"
    block_size_multiple = 1

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def plan(self, batch: RaggedBatch, *, device: torch.device) -> NativePlan:
        arrays = tuple(
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (batch.num_computed, batch.num_new, batch.block_tables)
        )
        pointers = (array.ctypes.data for array in arrays)
        return NativePlan(Batch(*pointers, *batch.block_tables.shape, batch.block_size), arrays)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        num_tokens, num_heads, head_dim = q.shape
        q, k, v = _with_whole_rows(q), _with_whole_rows(k), _with_whole_rows(v)
        heads = Heads(num_heads, k.shape[1], head_dim, scale)
        out = torch.empty(num_tokens, num_heads, head_dim)
        self._library.flexpipe_attention(
            *(ctypes.byref(plan.batch), ctypes.byref(heads), q.data_ptr(), q.stride(0)),
            *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(kv.data_ptr(), out.data_ptr(), native_threads()),
        )
        return out


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with each token's heads one after the other; tokens may be further apart (parts of a merged QKV)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
