"""When the thread of a stage's copies hears of steps, and with what priority."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flexpipe_serve.pipeline.copy_worker import _STEPS_AT_ONCE, CopyWorker
from flexpipe_serve.pipeline.messages import CopyHeader, PatchAckHeader

COPY = CopyHeader(epoch=2, old_epoch=1, layers=(0,), target="t", node="n", ipc="i", tcp="", max_bytes_per_s=1.0)
ACK = PatchAckHeader(epoch=2, target="t", number=1)
_HEARD_S = 20.0


class FakeCopies:
    """Notes what it is told. An acknowledgement completes the snapshot."""

    def __init__(self) -> None:
        self.is_giving = False
        self.is_copying = False
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.niceness = 0
        self.may_forget = threading.Event()
        self.follow: Callable[[], None] | None = None
        """Called for each step, while the snapshot got no turn."""

    def next_heard(self, num: int) -> list[Any]:
        return [self.heard.get(timeout=_HEARD_S) for _ in range(num)]

    def give(self, header: CopyHeader, buffers: object, *, last_step: int) -> None:
        self.is_giving = self.is_copying = True
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.heard.put("give")

    def on_step(self, epoch: int, step: int, batch: object, *, now: float) -> None:
        self.heard.put(step)
        if self.follow is not None:
            self.follow()

    def send_chunk(self, now: float) -> bool:
        self.follow = None
        return False

    def on_ack(self, header: PatchAckHeader) -> None:
        self.is_copying = False
        self.heard.put("ack")

    def ready_at(self, now: float) -> None:
        return None

    def forget(self, epoch: int) -> None:
        self.heard.put("forget")
        self.may_forget.wait(_HEARD_S)

    def forget_all(self) -> None:
        pass


class CountingQueue:
    """Another queue, and how often something was put into it."""

    def __init__(self, inner: Any) -> None:
        self.num_put = 0
        self.get = inner.get
        self._put = inner.put

    def put(self, item: object) -> None:
        self.num_put += 1
        self._put(item)


@pytest.fixture
def copies() -> FakeCopies:
    return FakeCopies()


@pytest.fixture
def worker(copies: FakeCopies) -> Iterator[CopyWorker]:
    made = CopyWorker(copies, name="stage-0", on_applied=lambda epoch: None)  # type: ignore[arg-type]
    made.on_step(1, 1, None)  # nothing is given: nobody hears of it
    made.give(COPY, [], last_step=1)
    assert copies.next_heard(1) == ["give"]
    while made._steps_at_once == 1:
        pass
    yield made
    made.close()


def test_it_hears_of_several_steps_at_once_while_a_snapshot_is_on_its_way(
    worker: CopyWorker, copies: FakeCopies
) -> None:
    wakes = worker._wakes = CountingQueue(worker._wakes)  # type: ignore[assignment]
    for step in range(_STEPS_AT_ONCE - 1):
        worker.on_step(1, step, None)
    assert wakes.num_put == 0
    for step in range(_STEPS_AT_ONCE - 1, 2 * _STEPS_AT_ONCE):
        worker.on_step(1, step, None)
    assert copies.next_heard(_STEPS_AT_ONCE) == [*range(_STEPS_AT_ONCE)]


def test_it_hears_of_each_step_when_the_snapshot_is_complete_and_of_all_in_order(
    worker: CopyWorker, copies: FakeCopies
) -> None:
    for step in range(3):
        worker.on_step(1, step, None)
    worker.on_ack(ACK)
    assert copies.next_heard(4) == [0, 1, 2, "ack"]
    for step in range(3, 6):
        worker.on_step(1, step, None)
        assert copies.next_heard(1) == [step]


def test_the_snapshot_gets_its_turn_where_steps_come_faster_than_their_patches_go(
    worker: CopyWorker, copies: FakeCopies
) -> None:
    """A busy machine starved a copy until its test's time was over."""
    left = iter(range(1000))

    def follow() -> None:
        if next(left, None) is not None:
            worker.on_step(1, 1, None)

    copies.follow = follow
    for step in range(_STEPS_AT_ONCE):
        worker.on_step(1, step, None)
    copies.next_heard(2 * _STEPS_AT_ONCE)
    worker.on_ack(ACK)
    while copies.heard.get(timeout=_HEARD_S) != "ack":
        pass
    assert next(left, None) is not None


def test_steps_are_mirrored_from_the_word_to_copy_on_also_where_an_epoch_is_forgotten_then(copies: FakeCopies) -> None:
    """The thread that forgot, with no copy begun so far, let the steps behind the word to copy go unheard."""
    worker = CopyWorker(copies, name="stage-0", on_applied=lambda epoch: None)  # type: ignore[arg-type]
    forgetting = threading.Thread(target=worker.forget, args=(1,), daemon=True)
    forgetting.start()
    assert copies.next_heard(1) == ["forget"]
    worker.give(COPY, [], last_step=1)
    copies.may_forget.set()
    forgetting.join(_HEARD_S)
    assert copies.next_heard(1) == ["give"]
    worker.on_step(1, 2, None)
    worker.on_ack(ACK)
    assert copies.next_heard(2) == [2, "ack"]
    worker.close()


def test_it_gives_way_to_steps(worker: CopyWorker, copies: FakeCopies) -> None:
    assert copies.niceness > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_whoever_comes_after_the_end_does_not_wait() -> None:
    """A stage that ended waited for a release, which waited for the copies' thread, which had ended."""
    worker = CopyWorker(FakeCopies(), name="s", on_applied=lambda epoch: None)  # type: ignore[arg-type]
    worker.close()
    late = threading.Thread(target=worker.forget, args=(1,), daemon=True)
    late.start()
    late.join(_HEARD_S)
    assert not late.is_alive()
