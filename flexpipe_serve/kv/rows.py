"""Reads and writes rows of several layers' KV: whole blocks, or the keys and values of single tokens.

Rows are moved as bytes, so any dtype goes. On the CPU NumPy does it, through views made once: it copies a row at the
speed of memcpy (torch's index_select and index_copy_ take two to four times as long for rows of 768 bytes) and
starts no threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexpipe_serve.pipeline.messages import Frame

Int64 = npt.NDArray[np.int64]


class KVRows:
    """Some layers' segments as rows, addressed alike in each.

    A row is a block; or with ``halves`` one token's keys or its values: [num_blocks * 2 * block_size] in a segment.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    half_bytes: int

    def __init__(self, segments: Mapping[int, torch.Tensor]) -> None:
        """
        Args:
            segments: of each layer, [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous; of one shape,
                dtype and device. They must not be resized as long as this is in use.
        """
        one = next(iter(segments.values()))
        self.num_blocks, _, self.block_size, num_kv_heads, head_dim = one.shape
        self.half_bytes = num_kv_heads * head_dim * one.element_size()
        self.block_bytes = 2 * self.block_size * self.half_bytes

    def gather(self, layers: Sequence[int], rows: Int64, *, halves: bool) -> Frame:
        """The bytes of ``rows`` in memory of their own, [num_layers, num_rows, row]. There is at least one row."""
        raise NotImplementedError

    def scatter(self, layers: Sequence[int], rows: Int64, data: Frame, *, halves: bool) -> None:
        """Write what :meth:`gather` read; ``data`` may lie at any address."""
        raise NotImplementedError

    def zero_blocks(self, layers: Sequence[int], blocks: Int64) -> None:
        """Fill ``blocks`` with zeros."""
        raise NotImplementedError


def kv_rows(segments: Mapping[int, torch.Tensor]) -> KVRows:
    """The :class:`KVRows` for the device that the segments are on."""
    on_cpu = next(iter(segments.values())).device.type == "cpu"
    return HostRows(segments) if on_cpu else DeviceRows(segments)


class HostRows(KVRows):
    """Segments in the CPU's memory."""

    def __init__(self, segments: Mapping[int, torch.Tensor]) -> None:
        super().__init__(segments)
        flat = {layer: kv.view(torch.uint8).numpy().reshape(-1) for layer, kv in segments.items()}
        self._blocks = {layer: data.view(f"V{self.block_bytes}") for layer, data in flat.items()}
        self._halves = {layer: data.view(f"V{self.half_bytes}") for layer, data in flat.items()}

    def gather(self, layers: Sequence[int], rows: Int64, *, halves: bool) -> Frame:
        views = self._halves if halves else self._blocks
        out = np.empty((len(layers), len(rows)), views[layers[0]].dtype)
        for layer, part in zip(layers, out, strict=True):
            views[layer].take(rows, out=part, mode="clip")  # the default mode copies twice
        return out.view(np.uint8).data.cast("B")

    def scatter(self, layers: Sequence[int], rows: Int64, data: Frame, *, halves: bool) -> None:
        views = self._halves if halves else self._blocks
        values: npt.NDArray[Any] = np.frombuffer(data, views[layers[0]].dtype).reshape(len(layers), len(rows))
        for layer, part in zip(layers, values, strict=True):
            views[layer][rows] = part

    def zero_blocks(self, layers: Sequence[int], blocks: Int64) -> None:
        zero = np.zeros(1, f"V{self.block_bytes}")
        for layer in layers:
            self._blocks[layer][blocks] = zero


class DeviceRows(KVRows):
    """Segments on any device, moved by torch."""

    def __init__(self, segments: Mapping[int, torch.Tensor]) -> None:
        super().__init__(segments)
        self._segments = dict(segments)
        self._device = next(iter(segments.values())).device

    def gather(self, layers: Sequence[int], rows: Int64, *, halves: bool) -> Frame:
        indices = torch.from_numpy(rows).to(self._device)
        parts = [self._view(layer, halves).index_select(0, indices) for layer in layers]
        return torch.stack(parts).cpu().view(torch.uint8).numpy().data.cast("B")

    def scatter(self, layers: Sequence[int], rows: Int64, data: Frame, *, halves: bool) -> None:
        indices = torch.from_numpy(rows).to(self._device)
        # As bytes until it is there: a tensor's elements must lie at multiples of their size.
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        values = values.view(self._segments[layers[0]].dtype).view(len(layers), len(rows), -1)
        for layer, part in zip(layers, values, strict=True):
            self._view(layer, halves).index_copy_(0, indices, part)

    def zero_blocks(self, layers: Sequence[int], blocks: Int64) -> None:
        indices = torch.from_numpy(blocks).to(self._device)
        for layer in layers:
            self._segments[layer].index_fill_(0, indices, 0)

    def _view(self, layer: int, halves: bool) -> torch.Tensor:
        return self._segments[layer].view(self.num_blocks * (2 * self.block_size if halves else 1), -1)
