"""A stage's part in KV copies: what it gives away and what it takes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv.copy_rate import CopyRate
from flexpipe_serve.kv.stage_kv import StageKV
from flexpipe_serve.kv.transfer import KVGiver, KVTaker
from flexpipe_serve.pipeline.channel import Endpoint, Outlet
from flexpipe_serve.pipeline.messages import CopyHeader, Frame, PatchAckHeader, PatchHeader, StepBatch
from flexpipe_serve.pipeline.stage_types import Assignment

logger = logging.getLogger(__name__)
_STEPS_AT_ONCE = 8
"""In one patch while the snapshot is on its way: nobody waits for it, and each message costs both stages time."""


@dataclass
class _Giving:
    giver: KVGiver
    outlet: Outlet
    steps: list[tuple[int, StepBatch | None]] = field(default_factory=list)
    """Executed, and in no patch so far."""


@dataclass
class _Taking:
    taker: KVTaker
    outlet: Outlet
    """For acknowledgements."""
    error: str | None = None


class StageCopies:
    """All copies of one stage. :meth:`expect` and :meth:`is_patched` belong to the data loop, :meth:`wait` and
    :meth:`num_bytes` may be called by any thread, the rest by the one that copies. A copy that breaks is only
    remembered as broken: steps go on.

    Args:
        stage: name of this one.
        connect: makes the channel to another stage.
    """

    def __init__(self, *, stage: str, kv: StageKV, connect: Callable[[Endpoint], Outlet]) -> None:
        self._stage = stage
        self._kv = kv
        self._connect = connect
        self._giving: dict[tuple[int, str], _Giving] = {}
        """By new epoch and target."""
        self._rate: CopyRate | None = None
        """Of all that is given; None where it has no limit, or nothing is given."""
        self._taking: dict[int, dict[str, _Taking]] = {}
        """By new epoch and source."""
        self._num_bytes: dict[int, tuple[int, int]] = {}
        """Of copies that are over, by new epoch."""
        self._forgotten: set[int] = set()
        self._changed = threading.Condition()

    # ------------------------------------------------------------------ taking

    def expect(self, assignment: Assignment) -> None:
        """From now on take the KV that ``assignment`` names."""
        taking = {}
        for incoming in assignment.incoming:
            taker = KVTaker(
                epoch=assignment.epoch,
                source=incoming.source,
                target=self._stage,
                layers=incoming.layers,
                kv=self._kv.__getitem__,
            )
            taking[incoming.source] = _Taking(taker, self._connect(incoming.endpoint))
        with self._changed:
            self._taking[assignment.epoch] = taking

    def apply(self, header: PatchHeader, buffers: Sequence[Frame]) -> None:
        """Take a snapshot chunk or a patch."""
        taking = self._taking.get(header.epoch, {}).get(header.source)
        if taking is None or taking.error is not None:
            return
        try:
            taking.taker.apply(header, buffers)
            if header.is_snapshot:
                taking.outlet.send(taking.taker.ack())
        except Exception as error:  # process edge: a broken copy must not take the stage with it
            logger.exception("%s: the copy from %s is broken", self._stage, header.source)
            taking.error = f"{type(error).__name__}: {error}"
        with self._changed:
            self._changed.notify_all()

    def is_patched(self, epoch: int, step: int) -> bool:
        """Whether steps of ``epoch`` may rely on what steps up to ``step`` of the epoch before wrote."""
        return all(t.error is None and t.taker.reached(step) for t in self._taking.get(epoch, {}).values())

    def wait(self, epoch: int, *, through_step: int, timeout_s: float) -> None:
        """Wait until all that ``epoch`` takes has come, up to a step of the epoch before.

        Raises:
            CopyError: a copy is broken, the epoch is not (or no longer) known, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                taking = self._taking.get(epoch)
                if taking is None:
                    raise CopyError(f"stage {self._stage!r} takes no KV for epoch {epoch}: it was released.")
                for source, copy in taking.items():
                    if copy.error is not None:
                        raise CopyError(f"the copy from {source!r} to {self._stage!r} is broken: {copy.error}")
                late = [source for source, copy in taking.items() if not copy.taker.reached(through_step)]
                if not late:
                    return
                if not self._changed.wait(deadline - time.monotonic()):
                    raise CopyError(
                        f"the copy from {late[0]!r} to {self._stage!r} was not through step {through_step} within "
                        f"{timeout_s:.1f} s."
                    )

    def num_bytes(self, epoch: int) -> tuple[int, int]:
        """Bytes of snapshots and of patches taken for ``epoch``."""
        with self._changed:
            takers = [copy.taker for copy in self._taking.get(epoch, {}).values()]
            snapshots, patches = self._num_bytes.get(epoch, (0, 0))
        return snapshots + sum(t.snapshot_bytes for t in takers), patches + sum(t.patch_bytes for t in takers)

    # ------------------------------------------------------------------ giving

    @property
    def is_giving(self) -> bool:
        """Whether steps have to be mirrored."""
        return bool(self._giving)

    @property
    def is_copying(self) -> bool:
        """Whether a snapshot is still to be sent."""
        return any(not giving.giver.is_complete for giving in self._giving.values())

    def give(self, header: CopyHeader, buffers: Sequence[Frame], *, last_step: int) -> None:
        """Begin to give layers away; not for an epoch that is forgotten already: the word to copy comes with the steps
        and may be overtaken by the release of an abort.

        Args:
            last_step: last step of the old epoch that this stage executed.
        """
        if header.epoch in self._forgotten:
            return
        (blocks,) = buffers
        giver = KVGiver(
            header,
            np.frombuffer(blocks, np.int32),
            source=self._stage,
            last_step=last_step,
            kv=self._kv.__getitem__,
        )
        outlet = self._connect(Endpoint(node=header.node, ipc=header.ipc, tcp=header.tcp))
        if self._rate is None and math.isfinite(header.max_bytes_per_s):
            self._rate = CopyRate(max_bytes_per_s=header.max_bytes_per_s)
        self._giving[header.epoch, header.target] = _Giving(giver, outlet)

    def on_step(self, epoch: int, step: int, batch: StepBatch | None, *, now: float) -> None:
        """See to the patches of a step that was executed, or dropped (None), at ``now``: while a snapshot is on its way
        those of several steps go together, then each at once."""
        if self._rate is not None:
            self._rate.on_step(now, num_tokens=0 if batch is None else batch.header.num_tokens)
        for key, giving in list(self._giving.items()):
            if giving.giver.old_epoch == epoch:
                giving.steps.append((step, batch))
                if len(giving.steps) >= _STEPS_AT_ONCE:
                    self._send_patch(key)
        self._send_patches_if_complete()

    def on_ack(self, header: PatchAckHeader) -> None:
        """A target has applied something."""
        giving = self._giving.get((header.epoch, header.target))
        if giving is not None:
            giving.giver.on_ack(header)

    def send_chunk(self, now: float) -> bool:
        """Send a piece of a snapshot, if one may be sent now. Returns whether it did."""
        if self._rate is not None and self._rate.ready_at(now) > now:
            return False
        for key, giving in list(self._giving.items()):
            ready_at = giving.giver.ready_at(now)
            if ready_at is None or ready_at > now:
                continue
            if giving.steps and giving.giver.is_last_chunk:
                self._send_patch(key)
            if key in self._giving and self._send_next_chunk(key, now):
                self._giving[key] = self._giving.pop(key)  # several copies take turns
                self._send_patches_if_complete()
                return True
        return False

    def _send_next_chunk(self, key: tuple[int, str], now: float) -> bool:
        giving = self._giving[key]
        try:
            chunk = giving.giver.next_chunk(now)
            if chunk is None:  # a patch has completed an empty snapshot
                return False
            giving.outlet.send(chunk)
        except Exception:  # process edge: the target will wait in vain
            self._break(key)
            return False
        if self._rate is not None:
            self._rate.on_sent(sum(len(frame) for frame in chunk), now=now)
        return True

    def ready_at(self, now: float) -> float | None:
        """When the next piece of a snapshot may be sent; None: not before a message comes."""
        times = [at for giving in self._giving.values() if (at := giving.giver.ready_at(now)) is not None]
        if not times:
            return None
        return min(times) if self._rate is None else max(min(times), self._rate.ready_at(now))

    def _send_patches_if_complete(self) -> None:
        """Once all snapshots are sent somebody may wait for each step."""
        if self.is_copying:
            return
        for key, giving in list(self._giving.items()):
            if giving.steps:
                self._send_patch(key)

    def _send_patch(self, key: tuple[int, str]) -> None:
        giving = self._giving[key]
        steps, giving.steps = giving.steps, []
        try:
            giving.outlet.send(giving.giver.on_steps(steps))
        except Exception:  # process edge: the steps are done; the target will miss the patch
            self._break(key)

    def _break(self, key: tuple[int, str]) -> None:
        logger.exception("%s: the copy to %s is broken", self._stage, self._giving[key].giver.target)
        self._drop(key)

    # ------------------------------------------------------------------ end

    def forget(self, epoch: int) -> None:
        """Drop all that is given by or to ``epoch`` and all that it takes, and end what newer ones took from it."""
        self._forgotten.add(epoch)
        for key, giving in list(self._giving.items()):
            if epoch in (giving.giver.epoch, giving.giver.old_epoch):
                self._drop(key)
        with self._changed:
            ended = [copy for new, taking in self._taking.items() if new >= epoch for copy in taking.values()]
            for new in [new for new in self._taking if new >= epoch]:
                self._num_bytes[new] = self.num_bytes(new)
                self._taking[new] = {}
            self._taking.pop(epoch, None)
            self._num_bytes = {new: counts for new, counts in self._num_bytes.items() if new >= epoch}
            self._changed.notify_all()
        for copy in ended:
            copy.outlet.close()

    def forget_all(self) -> None:
        """:meth:`forget` every epoch."""
        for epoch in {*self._taking, *(epoch for epoch, _ in self._giving)}:
            self.forget(epoch)

    def _drop(self, key: tuple[int, str]) -> None:
        self._giving.pop(key).outlet.close()
        if not self._giving:
            self._rate = None
