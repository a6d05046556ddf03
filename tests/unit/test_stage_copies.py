"""KV that goes from stage to stage while steps run: real stages with private memories, messages written by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import stage_epoch_cases
from stage_epoch_cases import NUM_STEPS, OLD, assert_as_expected, sequences
from stage_harness import NODE, NUM_BLOCKS, FakeSequence, Harness, Part, harness, make_batch, take

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv.transfer import KVGiver
from flexpipe_serve.pipeline.inbox import connect
from flexpipe_serve.pipeline.messages import (
    CopyHeader,
    FailureHeader,
    PatchAckHeader,
    ResultHeader,
    decode_header,
    encode,
)
from flexpipe_serve.pipeline.stage_types import Assignment, Incoming

expected = stage_epoch_cases.expected


@pytest.fixture
def h(tied_model: Path) -> Iterator[Harness]:
    with harness(tied_model, private_kv=True) as made:
        yield made


def copy_header(h: Harness, *, target: str, layers: Sequence[int], max_bytes_per_s: float = 1e12) -> CopyHeader:
    endpoint = h.endpoint(target)
    return CopyHeader(
        epoch=2,
        old_epoch=1,
        layers=tuple(layers),
        target=target,
        node=endpoint.node,
        ipc=endpoint.ipc,
        tcp=endpoint.tcp,
        max_bytes_per_s=max_bytes_per_s,
    )


# (new layout, [(source, target, layers)])
MOVES: dict[str, tuple[tuple[Part, ...], list[tuple[str, str, list[int]]]]] = {
    "shift right": ((("stage-0", 0, 3), ("stage-1", 3, 4)), [("stage-1", "stage-0", [2])]),
    "merge": ((("stage-0", 0, 4),), [("stage-1", "stage-0", [2, 3])]),
    "split": (
        (("stage-0", 0, 1), ("stage-2", 1, 3), ("stage-1", 3, 4)),
        [("stage-0", "stage-2", [1]), ("stage-1", "stage-2", [2])],
    ),
    "both directions": (
        (("stage-1", 0, 2), ("stage-0", 2, 4)),
        [("stage-0", "stage-1", [0, 1]), ("stage-1", "stage-0", [2, 3])],
    ),
}


@pytest.mark.parametrize(("new", "moves"), MOVES.values(), ids=MOVES.keys())
def test_kv_moves_while_steps_go_on(
    h: Harness, expected: list, new: tuple[Part, ...], moves: list[tuple[str, str, list[int]]]
) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    in_flight: dict[int, FakeSequence] = {}
    last_taken = {1: 0, 2: 0}

    def send(epoch: int, seq: FakeSequence) -> None:
        patched_through = last_taken[1] if epoch == 2 else 0
        in_flight[h.send(epoch, [seq], patched_through=patched_through)] = seq

    def take_one() -> FakeSequence:
        header, tokens = h.answer()
        assert isinstance(header, ResultHeader), header
        seq = in_flight.pop(header.step)
        take([seq], header, tokens)
        last_taken[header.epoch] = max(last_taken[header.epoch], header.step)
        return seq

    for seq in seqs[:2]:
        send(1, seq)
    for _ in range(4):
        send(1, take_one())
    incoming: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for source, target, layers in moves:
        incoming.setdefault(target.replace("-", "_"), []).append((source, layers))
    h.add(2, *new, **incoming)
    blocks = np.array([block for seq in seqs[:2] for block in seq.blocks], np.int32)
    for source, target, layers in moves:
        header = copy_header(h, target=target, layers=layers, max_bytes_per_s=200_000)
        h.routes[1][source].send(encode(header, blocks.data.cast("B")))
    send(1, seqs[2])  # a sequence that begins during the copy
    for _ in range(5):
        send(1, take_one())
    targets = {target for _, target, _ in moves}
    with ThreadPoolExecutor() as pool:
        mirrored = [pool.submit(h.stages[t].wait_copied, 2, through_step=0, timeout_s=60) for t in targets]
        while not all(future.done() for future in mirrored):
            send(1, take_one()) if len(in_flight[min(in_flight)].logprobs) < 6 else time.sleep(0)
        for future in mirrored:
            future.result()
    # The switch, with old steps in flight: each sequence goes on in the new epoch when its old step is over.
    last_old_step = h.next_step - 1
    while in_flight:
        seq = take_one()
        if len(seq.logprobs) < NUM_STEPS:
            send(2, seq)
    for target in targets:
        h.stages[target].wait_copied(2, through_step=last_old_step, timeout_s=60)
        report = h.stages[target].report()
        assert 0 < report.patch_bytes < report.copied_bytes
    for stage in h.stages.values():
        stage.release(1)
    for seq in seqs:
        while len(seq.logprobs) < NUM_STEPS:
            h.step(2, [seq])
    assert_as_expected(seqs, expected)
    assert h.stages[moves[0][1]].report().copied_bytes > 0, "the figures outlive the copy"
    assert all(not stage._copies._giving for stage in h.stages.values())


def test_a_copy_that_was_given_up_is_still_told(h: Harness) -> None:
    """After an abort the newest assignment is the old one again, whose own copies are another refactoring's."""
    h.start(*OLD)
    seq = sequences(h)[0]
    h.step(1, [seq])
    num_bytes = []
    for epoch, layers in ((2, [2]), (3, [2, 3])):
        h.add(
            epoch,
            ("stage-0", 0, layers[-1] + 1),
            *([("stage-1", 3, 4)] if epoch == 2 else []),
            stage_0=[("stage-1", layers)],
        )
        header = msgspec.structs.replace(copy_header(h, target="stage-0", layers=layers), epoch=epoch)
        h.routes[1]["stage-1"].send(encode(header, np.array(seq.blocks, np.int32).data.cast("B")))
        h.stages["stage-0"].wait_copied(epoch, through_step=0, timeout_s=60)
        for stage in h.stages.values():
            stage.release(epoch)
        num_bytes.append(h.stages["stage-0"].report().copied_bytes)
    assert num_bytes[1] == 2 * num_bytes[0] > 0


# ---------------------------------------------------------------------- a source made of hand-written messages


class Ghost:
    """Gives stage-0's layers to stage-1, whose acknowledgements come to the Router's inbox."""

    def __init__(self, h: Harness) -> None:
        self.h = h
        h.start(("stage-0", 0, 4))
        h.launch("stage-1")
        incoming = (Incoming(source="ghost", endpoint=h.inbox.endpoint, layers=(0, 1, 2, 3)),)
        for epoch, taken in ((2, incoming), (3, ())):
            assignment = Assignment(
                epoch=epoch, start=0, stop=4, is_first=True, is_last=True, next=h.inbox.endpoint, incoming=taken
            )
            h.stages["stage-1"].prepare(assignment, num_blocks=NUM_BLOCKS, fresh=False)
            h.connect(epoch, [("stage-1", 0, 4)])
        self.outlet = connect(h.endpoint("stage-1"), node=NODE)
        self.seqs = sequences(h)
        for seq in self.seqs[:2]:
            for _ in range(3):
                h.step(1, [seq])
        self.giver = KVGiver(
            copy_header(h, target="stage-1", layers=range(4)),
            np.array([block for seq in self.seqs[:2] for block in seq.blocks], np.int32),
            source="ghost",
            last_step=h.next_step - 1,
            kv=h.stages["stage-0"]._kv.__getitem__,
        )

    def send_snapshot(self) -> None:
        while not self.giver.is_complete:
            frames = self.giver.next_chunk(time.monotonic())
            if frames is None:
                self.giver.on_ack(self.ack())
            else:
                self.outlet.send(frames)
        while self.ack().number < self.giver._last_number:
            pass

    def ack(self) -> PatchAckHeader:
        frames = self.h.inbox.receive(20)
        assert frames is not None
        header = decode_header(frames[0])
        assert isinstance(header, PatchAckHeader)
        return header

    def old_step(self, seq: FakeSequence) -> tuple[int, list]:
        """A step on stage-0; its number and its patch, not sent yet."""
        batch = make_batch(1, self.h.next_step, [seq])
        self.h.step(1, [seq])
        return batch.header.step, self.giver.on_step(batch.header.step, batch)


@pytest.fixture
def ghost(h: Harness) -> Iterator[Ghost]:
    made = Ghost(h)
    yield made
    made.outlet.close()


def test_a_step_is_held_until_its_patch_is_there_and_others_go_on(ghost: Ghost, h: Harness, expected: list) -> None:
    first, second, third = ghost.seqs
    ghost.send_snapshot()
    h.stages["stage-1"].wait_copied(2, through_step=0, timeout_s=0)
    number, patch = ghost.old_step(first)
    sent = time.perf_counter()
    held = h.send(2, [first], patched_through=number)
    behind = h.send(2, [second])
    for _ in range(3):
        assert h.step(3, [third]).held_seconds == 0
    with pytest.raises(CopyError, match=f"not through step {number} within"):
        h.stages["stage-1"].wait_copied(2, through_step=number, timeout_s=0)
    ghost.outlet.send(patch)
    for step, seq in ((held, first), (behind, second)):
        header, tokens = h.answer()
        assert header.step == step, "steps of one epoch keep their order"
        assert isinstance(header, ResultHeader)
        assert 0 < header.held_seconds < time.perf_counter() - sent
        take([seq], header, tokens)
    h.stages["stage-1"].wait_copied(2, through_step=number, timeout_s=0)
    for seq in ghost.seqs:
        while len(seq.logprobs) < NUM_STEPS:
            h.step(2, [seq], patched_through=number)
    assert_as_expected(ghost.seqs, expected)


def test_a_copy_that_lacks_a_message_fails_and_the_stage_goes_on(ghost: Ghost, h: Harness, expected: list) -> None:
    ghost.send_snapshot()
    ghost.old_step(ghost.seqs[0])
    _, patch = ghost.old_step(ghost.seqs[0])
    stage = h.stages["stage-1"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stage.wait_copied, 2, through_step=10**6, timeout_s=60)
        ghost.outlet.send(patch)
        with pytest.raises(CopyError, match=r"'ghost' to 'stage-1' is broken.*one is missing"):
            waiting.result(60)
    h.send(2, [ghost.seqs[0]])  # stays where it is
    for _ in range(NUM_STEPS):
        h.step(3, [ghost.seqs[2]])
    assert_as_expected(ghost.seqs[2:], expected[2:])
    stage.release(2)
    with pytest.raises(CopyError, match="released"):
        stage.wait_copied(2, through_step=0, timeout_s=60)


def test_a_release_ends_the_wait(ghost: Ghost, h: Harness) -> None:
    stage = h.stages["stage-1"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stage.wait_copied, 2, through_step=0, timeout_s=60)
        stage.release(2)
        with pytest.raises(CopyError, match="released"):
            waiting.result(60)
    number, patch = ghost.old_step(ghost.seqs[0])
    ghost.outlet.send(patch)  # of an epoch that is gone
    h.step(3, [ghost.seqs[2]])
    assert number


def test_a_source_sends_a_patch_for_every_step_also_for_failed_ones(h: Harness, expected: list) -> None:
    h.start(("stage-0", 0, 4))
    h.add(2, ("stage-1", 0, 4), stage_1=[("stage-0", range(4))])
    (seq, bad, _) = sequences(h)
    h.step(1, [seq])
    bad.blocks = [NUM_BLOCKS]
    header = copy_header(h, target="stage-1", layers=range(4))
    h.routes[1]["stage-0"].send(encode(header, np.array(seq.blocks, np.int32).data.cast("B")))
    h.send(1, [bad])
    assert isinstance(h.answer()[0], FailureHeader)
    failed = h.send(1, corrupt=True)
    assert isinstance(h.answer()[0], FailureHeader)
    h.stages["stage-1"].wait_copied(2, through_step=failed, timeout_s=60)
    while len(seq.logprobs) < NUM_STEPS:
        h.step(2, [seq], patched_through=failed)
    assert_as_expected([seq], expected[:1])


def test_a_copy_of_unknown_blocks_or_to_nowhere_breaks_nothing(h: Harness, expected: list) -> None:
    h.start(("stage-0", 0, 4))
    h.launch("stage-1")
    seqs = sequences(h)
    outlet = h.routes[1]["stage-0"]
    header = copy_header(h, target="stage-1", layers=range(4))
    outlet.send(encode(header, np.array([NUM_BLOCKS], np.int32).data.cast("B")))
    outlet.send(encode(header, b"123"))
    outlet.send(encode(header))
    outlet.send(encode(copy_header(h, target="stage-1", layers=[17]), np.array([1], np.int32).data.cast("B")))
    for seq in seqs:
        while len(seq.logprobs) < NUM_STEPS:
            h.step(1, [seq])
    assert_as_expected(seqs, expected)
