"""Reads and writes rows of several layers' KV: whole blocks, or single tokens' keys and values.

Rows are moved as bytes, so any dtype goes. On the CPU NumPy does it: it copies a row at the speed of memcpy (torch's
index_select and index_copy_ take two to four times as long for rows of 768 bytes) and starts no threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexpipe_serve.pipeline.messages import Frame

Int64 = npt.NDArray[np.int64]


def row_bytes(kv: torch.Tensor, *, rows_per_block: int) -> int:
    """Size of a row of one layer's segment, [num_blocks, ...], whose blocks are ``rows_per_block`` rows each."""
    return math.prod(kv.shape[1:]) * kv.element_size() // rows_per_block


def gather(layers: Sequence[torch.Tensor], rows: Int64, *, rows_per_block: int) -> Frame:
    """The bytes of ``rows`` of each of the ``layers``, in memory of its own: [num_layers, num_rows, row_bytes].

    Args:
        layers: segments of one shape, contiguous, on one device.
        rows: at least one, all in range.
    """
    if layers[0].device.type != "cpu":
        return _gather_on_device(layers, rows, rows_per_block)
    size = row_bytes(layers[0], rows_per_block=rows_per_block)
    out = np.empty((len(layers), len(rows)), f"V{size}")
    for layer, kv in zip(out, layers, strict=True):
        _as_rows(kv, size).take(rows, out=layer, mode="clip")  # the default mode copies twice
    return out.view(np.uint8).data.cast("B")


def scatter(layers: Sequence[torch.Tensor], rows: Int64, data: Frame, *, rows_per_block: int) -> None:
    """Write what :func:`gather` read; ``data`` may lie at any address."""
    if layers[0].device.type != "cpu":
        _scatter_on_device(layers, rows, data, rows_per_block)
        return
    size = row_bytes(layers[0], rows_per_block=rows_per_block)
    values = np.frombuffer(data, f"V{size}").reshape(len(layers), len(rows))
    for kv, layer in zip(layers, values, strict=True):
        _as_rows(kv, size)[rows] = layer


def zero_blocks(layers: Sequence[torch.Tensor], blocks: Int64) -> None:
    """Fill ``blocks`` of every layer with zeros."""
    if layers[0].device.type != "cpu":
        indices = torch.from_numpy(blocks).to(layers[0].device)
        for kv in layers:
            kv.index_fill_(0, indices, 0)
        return
    size = row_bytes(layers[0], rows_per_block=1)
    zero = np.zeros((), f"V{size}")
    for kv in layers:
        _as_rows(kv, size)[blocks] = zero


def _as_rows(kv: torch.Tensor, size: int) -> npt.NDArray[Any]:
    return kv.view(torch.uint8).numpy().reshape(-1).view(f"V{size}")


def _gather_on_device(layers: Sequence[torch.Tensor], rows: Int64, rows_per_block: int) -> Frame:
    indices = torch.from_numpy(rows).to(layers[0].device)
    parts = [kv.view(len(kv) * rows_per_block, -1).index_select(0, indices) for kv in layers]
    return torch.stack(parts).cpu().view(torch.uint8).numpy().data.cast("B")


def _scatter_on_device(layers: Sequence[torch.Tensor], rows: Int64, data: Frame, rows_per_block: int) -> None:
    device = layers[0].device
    indices = torch.from_numpy(rows).to(device)
    # As bytes until it is there: a tensor's elements must lie at multiples of their size.
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device).view(layers[0].dtype)
    values = values.view(len(layers), len(rows), -1)
    for kv, layer in zip(layers, values, strict=True):
        kv.view(len(kv) * rows_per_block, -1).index_copy_(0, indices, layer)
