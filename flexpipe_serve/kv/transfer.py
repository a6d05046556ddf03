"""Copies KV of moving layers from the stage that gives them away to the one that takes them, while steps go on.

One :class:`KVGiver` at the source and one :class:`KVTaker` at the target make one copy, for one new epoch. Neither has
a thread, a lock, a clock or a socket: the stage's data loop calls them between steps, sends the frames they return and
passes the time in. Snapshot chunks and patches are made by that one thread and travel on one edge in order, so
what arrives later is never older.

What holds at the target once ``snapshot_complete``: in every block that held KV at the beginning or was written since,
each token that was written is the source's, byte for byte, as it was after ``through_step``. So are the slots of
such a block that no token was written to where the source's attention zeroes a block when it begins it, as torch's
does. Where it leaves there what the block's former owner wrote, those slots may differ: a patch that begins a
block zeroes it. Nothing is said of tokens of a step that was dropped, which are written anew before they count, and of
blocks that no message named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv.rows import kv_rows
from flexpipe_serve.kv.transfer_plan import (
    Int32,
    Int64,
    Pace,
    Snapshot,
    begun_blocks,
    places_of_new_tokens,
    rows_of_places,
)
from flexpipe_serve.pipeline.messages import CopyHeader, Frame, PatchAckHeader, PatchHeader, StepBatch, encode

KVOfLayer = Callable[[int], torch.Tensor]
"""A layer's committed KV, [num_blocks, 2, block_size, num_kv_heads, head_dim]. It is asked for once, at the beginning:
the number of blocks never changes during a copy. Whoever holds a giver or a taker holds the memory."""


class KVGiver:
    """Source side of one copy.

    The loop calls :meth:`on_step` after every step of ``old_epoch``, or :meth:`on_steps` after some, and sends what it
    returns before anything else; in idle moments, and now and then where there are none, :meth:`next_chunk`.
    """

    def __init__(self, header: CopyHeader, blocks: Int32, *, source: str, last_step: int, kv: KVOfLayer) -> None:
        """Begin mirroring.

        Args:
            header: the command to copy.
            blocks: that came with it: ids of the blocks that hold KV, in any order.
            source: name of this stage.
            last_step: last step of the old epoch that this stage executed or dropped (0: none).
            kv: of the layers in ``header``.

        Raises:
            CopyError: a block is not in the segments.
        """
        self.epoch = header.epoch
        self.old_epoch = header.old_epoch
        self.target = header.target
        self.is_complete = False
        """The last snapshot message is made; steps still make patches."""
        self._layers = header.layers
        self._source = source
        self._rows = kv_rows({layer: kv(layer) for layer in header.layers})
        self._last_step = last_step
        self._last_number = 0
        num_blocks = self._rows.num_blocks
        if not ((blocks >= 0) & (blocks < num_blocks)).all():
            raise CopyError(
                f"stage {source!r} was told to copy blocks {blocks.min()} to {blocks.max()}, but its segments have "
                f"{num_blocks} blocks."
            )
        self._snapshot = Snapshot(
            blocks, num_blocks=num_blocks, layers=header.layers, block_bytes=self._rows.block_bytes
        )
        self._pace = Pace(max_bytes_per_s=header.max_bytes_per_s)

    def on_step(self, step: int, batch: StepBatch | None) -> list[Frame]:
        """The patch of a step of the old epoch that was just executed; None: it was dropped and wrote nothing that
        counts. Every step is in some patch, so that ``through_step`` advances."""
        return self.on_steps([(step, batch)])

    def on_steps(self, steps: Sequence[tuple[int, StepBatch | None]]) -> list[Frame]:
        """One patch for some steps that follow one another, as they left the KV together."""
        block_size = self._rows.block_size
        written = [np.empty(0, np.int64)]
        for step, batch in steps:
            assert self._last_step in (0, step - 1), f"step {step} after step {self._last_step}: one is missing"
            self._last_step = step
            if batch is not None:
                assert not batch.header.copies, "blocks are moved down before a copy begins, never during one"
                written.append(
                    places_of_new_tokens(batch.num_computed, batch.num_new, batch.block_tables, block_size=block_size)
                )
        places = np.concatenate(written)
        if len(steps) > 1:
            places = np.unique(places)  # a block that was freed may have been written twice
        places = self._snapshot.without_pending(places, block_size=block_size)
        return self._message(self._layers, places, is_snapshot=False)

    @property
    def is_last_chunk(self) -> bool:
        """The next snapshot message is the last: all steps so far are to be in patches before it."""
        return self._snapshot.is_last

    def next_chunk(self, now: float) -> list[Frame] | None:
        """The next snapshot message; None where :meth:`ready_at` is later than ``now`` or None."""
        ready_at = self.ready_at(now)
        if ready_at is None or ready_at > now:
            return None
        chunk = self._snapshot.take()
        frames = self._message(chunk.layers, chunk.blocks, is_snapshot=True)
        self._pace.on_sent(self._last_number, num_bytes=sum(len(frame) for frame in frames), now=now)
        return frames

    def ready_at(self, now: float) -> float | None:
        """When the next snapshot message may be made, ``now`` at the earliest. None: an acknowledgement must come
        first, or the snapshot is complete."""
        return None if self.is_complete else self._pace.ready_at(now)

    def on_ack(self, header: PatchAckHeader) -> None:
        """The target applied every message up to ``header.number``."""
        self._pace.on_ack(header.number)

    def _message(self, layers: tuple[int, ...], places: Int64, *, is_snapshot: bool) -> list[Frame]:
        self._last_number += 1
        self.is_complete = self._snapshot.is_taken
        header = PatchHeader(
            epoch=self.epoch,
            source=self._source,
            number=self._last_number,
            through_step=self._last_step,
            layers=layers,
            is_snapshot=is_snapshot,
            snapshot_complete=self.is_complete,
        )
        if not places.size:
            return encode(header, b"", b"")
        rows = places if is_snapshot else rows_of_places(places, block_size=self._rows.block_size)
        kv = self._rows.gather(layers, rows, halves=not is_snapshot)
        return encode(header, places.astype(np.int32).data.cast("B"), kv)


class KVTaker:
    """Target side of one copy.

    For every message the loop calls :meth:`apply`, and after a snapshot's it sends :meth:`ack` back, also where the
    number was a repeated one.
    """

    def __init__(self, *, epoch: int, source: str, target: str, layers: Sequence[int], kv: KVOfLayer) -> None:
        """Expect message 1.

        Args:
            epoch: the new one.
            source: stage that gives the layers.
            target: name of this stage.
            layers: that it gives.
            kv: of those layers.
        """
        self.epoch = epoch
        self.source = source
        self.through_step = 0
        """Last step of the old epoch whose writes are in; it counts only once the snapshot is complete."""
        self.snapshot_complete = False
        self.snapshot_bytes = 0
        self.patch_bytes = 0
        self._target = target
        self._layers = frozenset(layers)
        self._rows = kv_rows({layer: kv(layer) for layer in layers})
        self._last_number = 0

    def apply(self, header: PatchHeader, buffers: Sequence[Frame]) -> bool:
        """Write one message's KV into the segments; False (and nothing is done) for a number that came before.

        Raises:
            CopyError: a message is missing, or this one is malformed. Nothing was written; the copy is broken.
        """
        if header.number <= self._last_number:
            return False
        self._check_order(header)
        places = self._places(header, buffers)
        if header.is_snapshot:
            self.snapshot_bytes += len(buffers[1])
            self._write(header.layers, places, buffers[1], halves=False)
        else:
            self.patch_bytes += len(buffers[1])
            self._write(header.layers, places, buffers[1], halves=True)
        self._last_number = header.number
        self.through_step = header.through_step
        self.snapshot_complete |= header.snapshot_complete
        return True

    def ack(self) -> list[Frame]:
        """The acknowledgement of everything applied so far."""
        return encode(PatchAckHeader(epoch=self.epoch, target=self._target, number=self._last_number))

    def reached(self, step: int) -> bool:
        """The snapshot and the patches of every old step up to ``step`` are applied (0: the snapshot alone)."""
        return self.snapshot_complete and self.through_step >= step

    def _check_order(self, header: PatchHeader) -> None:
        if header.number > self._last_number + 1:
            raise self._error(header, f"came after message {self._last_number}: one is missing")
        if header.through_step < self.through_step:
            raise self._error(header, f"goes through step {header.through_step}, after step {self.through_step}")

    def _places(self, header: PatchHeader, buffers: Sequence[Frame]) -> Int64:
        """The places, once it is sure that the message can be written."""
        if not header.layers or not self._layers.issuperset(header.layers):
            raise self._error(header, f"has layers {header.layers}, but {sorted(self._layers)} are to come")
        if len(buffers) != 2 or len(buffers[0]) % 4:
            raise self._error(header, f"has buffers of {[len(buffer) for buffer in buffers]} bytes")
        if header.is_snapshot:
            num_places, place_bytes = self._rows.num_blocks, self._rows.block_bytes
        else:
            num_places, place_bytes = self._rows.num_blocks * self._rows.block_size, 2 * self._rows.half_bytes
        places = np.frombuffer(buffers[0], np.int32).astype(np.int64)
        if places.size and (places.min() < 0 or places.max() >= num_places):
            raise self._error(header, f"has places that are not within 0 to {num_places - 1}")
        num_layers, num_bytes = len(header.layers), len(buffers[1])
        if num_bytes != num_layers * places.size * place_bytes:
            raise self._error(header, f"has {num_bytes} bytes of KV for {places.size} places in {num_layers} layers")
        return places

    def _write(self, layers: tuple[int, ...], places: Int64, kv: Frame, *, halves: bool) -> None:
        if not places.size:
            return
        rows = places
        if halves:
            rows = rows_of_places(places, block_size=self._rows.block_size)
            begun = begun_blocks(places, block_size=self._rows.block_size)
            if begun.size:
                self._rows.zero_blocks(layers, begun)
        self._rows.scatter(layers, rows, kv, halves=halves)

    def _error(self, header: PatchHeader, what: str) -> CopyError:
        return CopyError(f"KV from stage {self.source!r} for epoch {self.epoch}: message {header.number} {what}.")
