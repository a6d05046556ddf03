"""Copies of whole blocks inside the segments: how used blocks move down before a segment shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def copy_blocks(segments: Sequence[torch.Tensor], copies: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in every segment, as if one after the other in the order given.

    Raises:
        ValueError: a block is not in the segments; nothing was copied.
    """
    for segment in segments:
        if bad := [block for pair in copies for block in pair if not 0 <= block < len(segment)]:
            raise ValueError(f"block {bad[0]} is to be copied, but the segment has {len(segment)} blocks.")
    for run in independent_runs(copies):
        sources, targets = (torch.tensor(blocks) for blocks in zip(*run, strict=True))
        for segment in segments:
            segment[targets.to(segment.device)] = segment[sources.to(segment.device)]


def independent_runs(copies: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """The copies cut into runs that may read everything before they write anything."""
    start = 0
    written: set[int] = set()
    for index, (source, target) in enumerate(copies):
        if source in written or target in written:
            yield copies[start:index]
            start, written = index, set()
        written.add(target)
    if start < len(copies):
        yield copies[start:]
