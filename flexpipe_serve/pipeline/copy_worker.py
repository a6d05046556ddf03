"""A stage's KV copies in a thread of their own, so that no step waits for one."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from flexpipe_serve.pipeline.background import lower_priority
from flexpipe_serve.pipeline.messages import CopyHeader, Frame, PatchAckHeader, PatchHeader, StepBatch
from flexpipe_serve.pipeline.stage_copies import StageCopies

logger = logging.getLogger(__name__)
_LOWER_BY = 10
"""Steps of niceness. A waking thread of such a priority takes the core from nobody: copies use the moments in which a
step leaves a core idle, and a tenth of one where it leaves none (a third, where Ray has left but four steps), so that
a patch comes soon however busy the machine is."""
_LOOK_S = 0.2
_STEPS_AT_ONCE = 8
"""Heard of at one waking while a snapshot is on its way."""


class CopyWorker:
    """Does what the data loop tells it in the order told, and reads snapshots in between.

    Reading later than the loop executed is safe. A block leaves the pending set before it is read, and the steps of
    which the worker has not heard by then are mirrored behind it on the same channel: what they write while it reads
    comes once more. And the rows of a step are only written again by a step behind it, whose patch follows; so the
    rows of several steps may be read together.

    Args:
        on_applied: called in the worker's thread when patches for an epoch were applied.
    """

    def __init__(self, copies: StageCopies, *, name: str, on_applied: Callable[[int], None]) -> None:
        self._copies = copies
        self._on_applied = on_applied
        self._tasks: deque[Callable[[], object] | None] = deque()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._steps_at_once = 1
        """So many wake the thread."""
        self._num_gives = 0
        """Told by the data loop."""
        self._num_begun = 0
        """Of these, by the thread."""
        self._thread = threading.Thread(target=self._run, name=f"{name}-copies", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for the data loop

    def give(self, header: CopyHeader, buffers: Sequence[Frame], *, last_step: int) -> None:
        """See StageCopies.give."""

        def give() -> None:
            try:
                self._copies.give(header, buffers, last_step=last_step)
            finally:
                self._num_begun += 1

        self._num_gives += 1
        self._put(give)

    def on_step(self, epoch: int, step: int, batch: StepBatch | None) -> None:
        """See StageCopies.on_step. While nobody waits for a patch, the thread is not woken for each step."""
        if self._num_gives > self._num_begun or self._copies.is_giving:
            now = time.monotonic()
            self._tasks.append(lambda: self._copies.on_step(epoch, step, batch, now=now))
            if len(self._tasks) >= self._steps_at_once:
                self._wakes.put(None)

    def on_ack(self, header: PatchAckHeader) -> None:
        """See StageCopies.on_ack."""
        self._put(lambda: self._copies.on_ack(header))

    def apply(self, header: PatchHeader, buffers: Sequence[Frame]) -> None:
        """See StageCopies.apply."""

        def apply() -> None:
            self._copies.apply(header, buffers)
            self._on_applied(header.epoch)

        self._put(apply)

    # ------------------------------------------------------------------ for the control side

    def forget(self, epoch: int) -> None:
        """See StageCopies.forget. Afterwards nothing reads or writes for that epoch's copies."""
        self._wait_for(lambda: self._copies.forget(epoch))

    def forget_all(self) -> None:
        """See StageCopies.forget_all."""
        self._wait_for(self._copies.forget_all)

    def close(self) -> None:
        """Do what was told so far, forget everything, and end the thread."""
        self._put(self._copies.forget_all)
        self._put(None)
        self._thread.join()

    def _wait_for(self, task: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                task()
            finally:
                done.set_result(None)

        self._put(run)
        # A stage that ends has closed this already, and everything is forgotten.
        while not wait([done], _LOOK_S).done and self._thread.is_alive():
            pass

    def _put(self, task: Callable[[], object] | None) -> None:
        self._tasks.append(task)
        self._wakes.put(None)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        lower_priority(_LOWER_BY)
        while True:
            # What comes meanwhile waits for a piece of the snapshot: it must end also where steps come faster than
            # their patches go.
            for _ in range(len(self._tasks)):
                task = self._tasks.popleft()
                if task is None:
                    return
                try:
                    task()
                except Exception:  # thread edge: a copy that breaks is told by wait_copied, or by its missing patches
                    logger.exception("a copy met an error")
            now = time.monotonic()
            is_sent = self._copies.send_chunk(now)
            self._steps_at_once = _STEPS_AT_ONCE if self._copies.is_copying else 1
            if is_sent or self._tasks:  # a step may have gone by the number before
                continue
            ready_at = self._copies.ready_at(now)
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=None if ready_at is None else max(0.0, ready_at - now))
