"""Copies KV of moving layers from the stage that gives them away to the one that takes them, while steps go on.

One :class:`KVGiver` at the source and one :class:`KVTaker` at the target make one copy, for one new epoch. Neither has
a thread, a lock, a clock or a socket: the stage's data loop calls them between steps, sends the frames they return and
passes the time in. Snapshot chunks and patches are made by that one thread and travel on one edge in order, so
what arrives later is never older.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from flexpipe_serve.pipeline.messages import CopyHeader, Frame, PatchAckHeader, PatchHeader, StepBatch

KVOfLayer = Callable[[int], torch.Tensor]
"""A layer's committed KV, [num_blocks, 2, block_size, num_kv_heads, head_dim]; asked anew for every message."""


class KVGiver:
    """Source side of one copy.

    The loop calls :meth:`on_step` after every step of ``old_epoch`` and sends what it returns before anything else; in
    idle moments, and now and then where there are none, :meth:`next_chunk`.
    """

    def __init__(
        self, header: CopyHeader, blocks: npt.NDArray[np.int32], *, source: str, last_step: int, kv: KVOfLayer
    ) -> None:
        """Begin mirroring.

        Args:
            header: the command to copy.
            blocks: that came with it: ids of the blocks that hold KV, in any order.
            source: name of this stage.
            last_step: last step of the old epoch that this stage executed (0: none).
            kv: of the layers in ``header``.

        Raises:
            CopyError: a block is not in the segments.
        """
        self.epoch = header.epoch
        self.old_epoch = header.old_epoch
        self.target = header.target
        raise NotImplementedError

    @property
    def is_complete(self) -> bool:
        """The last snapshot message is made; steps still make patches."""
        raise NotImplementedError

    def on_step(self, step: int, batch: StepBatch | None) -> list[Frame]:
        """The patch of a step of the old epoch that was just executed; None: it was dropped and wrote nothing that
        counts. There is a patch for every step, so that ``through_step`` advances."""
        raise NotImplementedError

    def next_chunk(self, now: float) -> list[Frame] | None:
        """The next snapshot message; None where :meth:`ready_at` is later than ``now`` or None."""
        raise NotImplementedError

    def ready_at(self, now: float) -> float | None:
        """When the next snapshot message may be made, ``now`` at the earliest. None: an acknowledgement must come
        first, or the snapshot is complete."""
        raise NotImplementedError

    def on_ack(self, header: PatchAckHeader) -> None:
        """The target applied every message up to ``header.number``."""
        raise NotImplementedError


class KVTaker:
    """Target side of one copy.

    For every message the loop calls :meth:`apply` and sends :meth:`ack` back, also where the number was a repeated one.
    """

    epoch: int
    through_step: int
    """Last step of the old epoch whose writes are in; 0 before the first message. It counts only once the snapshot is
    complete: see :meth:`reached`."""
    snapshot_complete: bool
    snapshot_bytes: int
    patch_bytes: int

    def __init__(self, *, epoch: int, source: str, target: str, layers: Sequence[int], kv: KVOfLayer) -> None:
        """Expect message 1.

        Args:
            epoch: the new one.
            source: stage that gives the layers.
            target: name of this stage.
            layers: that it gives.
            kv: of those layers.
        """
        raise NotImplementedError

    def apply(self, header: PatchHeader, buffers: Sequence[Frame]) -> bool:
        """Write one message's KV into the segments; False (and nothing is done) for a number that came before.

        Raises:
            CopyError: a message is missing, or this one is malformed. Nothing was written; the copy is broken.
        """
        raise NotImplementedError

    def ack(self) -> list[Frame]:
        """The acknowledgement of everything applied so far."""
        raise NotImplementedError

    def reached(self, step: int) -> bool:
        """The snapshot and the patches of every old step up to ``step`` are applied (0: the snapshot alone)."""
        raise NotImplementedError
