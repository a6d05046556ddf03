"""The attention contract: paged KV, ragged batches of prefill chunks and decodes, grouped heads.

A backend turns a step's ragged description into a plan once (index tensors, masks), then every layer of the step
runs with that plan. A backend in C++ or Triton is one more class with these two methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Which tokens a step computes, on the host: int32 arrays as they came off the wire."""

    num_computed: npt.NDArray[np.int32]
    """[num_seqs], tokens of each sequence whose KV is already in the cache."""
    num_new: npt.NDArray[np.int32]
    """[num_seqs], tokens of each sequence in this step; query tokens stand one sequence after the other."""
    block_tables: npt.NDArray[np.int32]
    """[num_seqs, table_width], padded with 0."""
    block_size: int


class AttentionBackend(Protocol):
    """Causal attention over paged KV."""

    name: str
    block_size_multiple: int
    """Block sizes must be a multiple of this."""

    def plan(self, batch: RaggedBatch, *, device: torch.device) -> Any:
        """What all layers of the step share."""
        ...

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
        """Write ``k`` and ``v`` into the cache, then attend.

        Args:
            q: [num_tokens, num_heads, head_dim].
            k, v: [num_tokens, num_kv_heads, head_dim], of the same tokens.
            kv: one layer's segment, [num_blocks, 2, block_size, num_kv_heads, head_dim]; K first.
            scale: factor on the scores.

        Returns:
            [num_tokens, num_heads, head_dim].
        """
        ...
