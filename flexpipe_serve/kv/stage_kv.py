"""The KV of all layers that one stage holds."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import torch

from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.kv.segment import BlockShape, DeviceSegment, KVMemoryError, Segment, SharedSegment


class StageKV(Mapping[int, torch.Tensor]):
    """The layers' committed KV by global index, each ``[num_blocks, 2, block_size, num_kv_heads, head_dim]``.

    Reading follows resizes: look a layer up anew in every step. One thread changes it, any may read.

    Args:
        folder: of the segments' files, on a CPU.
        stage: given, no other stage maps its segments.
    """

    def __init__(
        self, folder: DomainFolder, *, shape: BlockShape, max_blocks: int, device: torch.device, stage: str | None
    ) -> None:
        self._folder = folder
        self._shape = shape
        self._max_blocks = max_blocks
        self._device = device
        self._stage = stage
        self._segments: dict[int, Segment] = {}
        self.num_blocks = 0
        """Committed in every segment."""

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._segments[layer].tensor

    def __iter__(self) -> Iterator[int]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def committed_bytes(self) -> int:
        """KV memory of all layers, also what other stages map too."""
        return sum(segment.committed_bytes for segment in self._segments.values())

    def open(self, layers: Iterable[int], *, between: Callable[[], None]) -> None:
        """Have segments of ``layers``, each with ``num_blocks`` blocks. KV that the domain has of them is there.

        Args:
            between: called after every few MB; may wait, or raise to give up. What is done by then stays.

        Raises:
            KVMemoryError: the memory cannot be had. What is done by then stays.
        """
        for layer in layers:
            if layer not in self._segments:
                segment = self._make(layer)
                try:
                    segment.resize(self.num_blocks, between=between)
                except BaseException:
                    segment.close()
                    raise
                self._segments = {**self._segments, layer: segment}
                between()

    def resize(self, num_blocks: int, *, between: Callable[[], None]) -> None:
        """Have exactly ``num_blocks`` blocks in every segment.

        Args:
            between: called after every few MB; may wait, or raise to give up, and then the same call is to follow.

        Raises:
            KVMemoryError: the memory cannot be had; all is as before.
        """
        before = self.num_blocks
        if num_blocks < before:
            self.num_blocks = num_blocks  # first: nobody may count on blocks that go
        try:
            for segment in self._segments.values():
                segment.resize(num_blocks, between=between)
                between()
        except KVMemoryError:
            for segment in self._segments.values():
                segment.resize(before, between=lambda: None)
            raise
        self.num_blocks = num_blocks

    def keep(self, layers: Container[int]) -> None:
        """Let go of all other layers."""
        dropped = [segment for layer, segment in self._segments.items() if layer not in layers]
        self._segments = {layer: segment for layer, segment in self._segments.items() if layer in layers}
        for segment in dropped:
            segment.close()

    def clear(self) -> None:
        """Let go of everything; ``num_blocks`` is 0."""
        self.keep(())
        self.num_blocks = 0

    def _make(self, layer: int) -> Segment:
        if self._device.type != "cpu":
            return DeviceSegment(shape=self._shape, max_blocks=self._max_blocks, device=self._device)
        path = self._folder.segment_path(layer, stage=self._stage)
        return SharedSegment(path, shape=self._shape, max_blocks=self._max_blocks)
