"""What a copy of KV sends and when: the order of its snapshot, its pace, the places a step writes. No tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.ma  # else np.unique imports it on its first call: 25 ms in the middle of a step
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

MAX_CHUNK_BYTES = 256 * 1024
"""Of a snapshot message, unless one block of one layer is larger: all that is done for it takes a few tenths of a
millisecond, on cores that steps want, and little more for each byte than larger ones would."""
MAX_CHUNKS_IN_FLIGHT = 2
"""Unacknowledged: one is applied while the next is on its way, and no more than that waits before a patch."""


@dataclass(frozen=True)
class Chunk:
    """One piece of a snapshot."""

    layers: tuple[int, ...]
    blocks: Int64


class Snapshot:
    """The blocks still to be read, and the order they are read in.

    A chunk is some blocks of all layers, or where one block of all layers is too much, one block of some of them. So
    blocks leave the pending set for all layers at once; while a block is half read, its new tokens are mirrored also
    for layers still to be read, which does no harm: what is read later holds them too.
    """

    def __init__(self, blocks: Int32, *, num_blocks: int, layers: tuple[int, ...], block_bytes: int) -> None:
        """
        Args:
            blocks: ids to read, below ``num_blocks``.
            num_blocks: of a segment.
            layers: at least one.
            block_bytes: size of one block of one layer.
        """
        self._blocks = np.unique(blocks).astype(np.int64)
        self._layers = layers
        self._pending = np.zeros(num_blocks, bool)
        self._pending[self._blocks] = True
        self._blocks_at_once = max(1, MAX_CHUNK_BYTES // (block_bytes * len(layers)))
        self._layers_at_once = min(len(layers), max(1, MAX_CHUNK_BYTES // block_bytes))
        self._next_block = 0
        self._next_layer = 0

    @property
    def is_taken(self) -> bool:
        """Nothing is left to read."""
        return self._next_block >= len(self._blocks)

    @property
    def is_last(self) -> bool:
        """Nothing is left behind the next chunk."""
        return self._next_block + self._blocks_at_once >= len(
            self._blocks
        ) and self._next_layer + self._layers_at_once >= len(self._layers)

    def take(self) -> Chunk:
        """The next chunk, which the caller reads before any further step; without blocks where there are none."""
        blocks = self._blocks[self._next_block : self._next_block + self._blocks_at_once]
        layers = self._layers[self._next_layer : self._next_layer + self._layers_at_once]
        self._pending[blocks] = False
        self._next_layer += len(layers)
        if self._next_layer == len(self._layers):
            self._next_layer = 0
            self._next_block += len(blocks)
        return Chunk(layers, blocks)

    def without_pending(self, places: Int64, *, block_size: int) -> Int64:
        """Those of the ``places`` (``block * block_size + offset``) that no later chunk will hold."""
        kept: Int64 = places[~self._pending[places // block_size]]
        return kept


class Pace:
    """When the next snapshot message may go: few at once, and never faster than the limit.

    After a message of n bytes the next is at least n / max_bytes_per_s away, and lost time is not made up: in any d
    seconds go at most ``max_bytes_per_s * d`` bytes and one message.
    """

    def __init__(self, *, max_bytes_per_s: float) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._not_before = float("-inf")
        self._in_flight: deque[int] = deque()

    def ready_at(self, now: float) -> float | None:
        """When, ``now`` at the earliest; None: not before an acknowledgement."""
        return None if len(self._in_flight) >= MAX_CHUNKS_IN_FLIGHT else max(now, self._not_before)

    def on_sent(self, number: int, *, num_bytes: int, now: float) -> None:
        """Message ``number``, higher than all before, went at ``now``."""
        self._in_flight.append(number)
        self._not_before = now + num_bytes / self._max_bytes_per_s

    def on_ack(self, number: int) -> None:
        """Every message up to ``number`` has arrived."""
        while self._in_flight and self._in_flight[0] <= number:
            self._in_flight.popleft()


def places_of_new_tokens(num_computed: Int32, num_new: Int32, block_tables: Int32, *, block_size: int) -> Int64:
    """``block * block_size + offset`` of every new token of a step, in order. Arguments as in StepBatch."""
    counts = num_new.astype(np.int64)
    seqs = np.repeat(np.arange(len(counts)), counts)
    firsts = num_computed - (np.cumsum(counts) - counts)
    positions = np.arange(len(seqs)) + firsts[seqs]
    places: Int64 = block_tables[seqs, positions // block_size] * np.int64(block_size) + positions % block_size
    return places


def begun_blocks(places: Int64, *, block_size: int) -> Int64:
    """Blocks whose first token is among the ``places`` of a step, unless the step also fills them."""
    begun: Int64 = places[places % block_size == 0] // block_size
    if begun.size == 0:
        return begun
    blocks, num_tokens = np.unique(places // block_size, return_counts=True)
    partial: Int64 = np.intersect1d(begun, blocks[num_tokens < block_size])
    return partial


def rows_of_places(places: Int64, *, block_size: int) -> Int64:
    """Key row and value row of each of the ``places``, in a segment seen as [num_blocks * 2 * block_size] rows."""
    keys = places // block_size * (2 * block_size) + places % block_size
    rows: Int64 = np.stack((keys, keys + block_size), axis=1).ravel()
    return rows
