"""A stage in several epochs at once: real stages in threads, messages written by hand."""

from __future__ import annotations

import pytest
import stage_epoch_cases
from stage_epoch_cases import NEW_LAYOUTS, NUM_STEPS, OLD, assert_as_expected, decode, sequences
from stage_harness import NUM_BLOCKS, Harness, Part, take

from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    HiddenHeader,
    PatchAckHeader,
    ResultHeader,
    encode,
)

expected = stage_epoch_cases.expected
h = stage_epoch_cases.h


@pytest.mark.parametrize("new", NEW_LAYOUTS.values(), ids=NEW_LAYOUTS.keys())
def test_two_epochs_at_once_give_what_one_gives(h: Harness, expected: list, new: tuple[Part, ...]) -> None:
    """In a shared domain KV moves by being mapped: sequences change the epoch in the middle, one after the other."""
    h.start(*OLD)
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, 2)
    h.add(2, *new)
    epochs = [2, 1, 1]
    for at in range(2, NUM_STEPS):
        if at == 5:
            epochs = [2, 2, 1]
        for epoch, seq in zip(epochs, seqs, strict=True):  # all of them in flight together
            h.send(epoch, [seq])
        for _ in seqs:
            header, tokens = h.answer()
            assert isinstance(header, ResultHeader), header
            take([seqs[(header.step - 1) % 3]], header, tokens)
    assert_as_expected(seqs, expected)


def test_a_stage_runs_only_the_layers_of_the_steps_epoch(h: Harness, expected: list) -> None:
    h.start(*OLD)
    h.add(2, *NEW_LAYOUTS["shift right"])
    first, second = h.stages["stage-0"], h.stages["stage-1"]
    assert (first.computer.model.layers, second.computer.model.layers) == ((0, 1, 2), (2, 3))
    seqs = sequences(h)
    for at, seq in enumerate(seqs):
        decode(h, 1 + at % 2, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


# ---------------------------------------------------------------------- copies of blocks


def test_blocks_move_down_in_the_step_stream(h: Harness, expected: list) -> None:
    """As a shrink does it; in the new epoch a stage copies in its own layers, though others map them too: a chain of
    copies done twice would lose a block."""
    h.start(*OLD)
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, 3)
    h.add(2, *NEW_LAYOUTS["turn around"])
    for epoch in (1, 2):
        rest = sorted(block for seq in seqs for block in seq.blocks)
        targets = sorted(set(range(NUM_BLOCKS)) - set(rest))[: len(rest)]
        moves = dict(zip(rest, targets, strict=True))
        a, b = targets[0], targets[1]
        copies = [*moves.items(), (a, 60), (b, a), (60, b), (a, 60), (b, a), (60, b)]  # two exchanges, in order
        number = h.send(epoch, copies=copies)
        header, tokens = h.answer()
        assert (header.step, tokens) == (number, [])
        assert isinstance(header, ResultHeader)
        for seq in seqs:
            seq.blocks = [moves[block] for block in seq.blocks]
        for seq in seqs:
            decode(h, epoch, seq, 3)
    assert_as_expected(seqs, expected)


def test_copies_come_before_the_steps_own_tokens_and_also_where_it_fails(h: Harness, expected: list) -> None:
    h.start(*OLD)
    (seq, *_) = seqs = sequences(h)
    decode(h, 1, seq, 4)
    old = seq.blocks
    seq.blocks = [block for block in range(NUM_BLOCKS) if block not in old][: len(old)]
    h.step(1, [seq], copies=list(zip(old, seq.blocks, strict=True)))
    for corrupt in (False, True):
        old = seq.blocks
        seq.blocks = [block for block in range(NUM_BLOCKS) if block not in old][: len(old)]
        bad = h.sequence([5], num_tokens=4)
        bad.blocks = [NUM_BLOCKS]
        h.send(1, [bad], copies=list(zip(old, seq.blocks, strict=True)), corrupt=corrupt)
        header, _ = h.answer()
        assert isinstance(header, FailureHeader)
        assert header.stage == "stage-0"
        h.step(1, [seq])
    decode(h, 1, seq, NUM_STEPS - 7)
    for other in seqs[1:]:
        decode(h, 1, other, NUM_STEPS)
    assert_as_expected(seqs, expected)


# ---------------------------------------------------------------------- failures


def test_a_step_fails_while_another_epoch_goes_on(h: Harness, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    h.start(*OLD)
    h.add(2, *NEW_LAYOUTS["shift left"])
    computer = h.stages["stage-1"].computer
    real = computer.run

    def run(assignment, step, given, **kwargs):
        if assignment.epoch == 2 and step.batch.header.step % 4 == 0:
            raise RuntimeError("poison")
        return real(assignment, step, given, **kwargs)

    monkeypatch.setattr(computer, "run", run)
    seqs = sequences(h)
    others = sequences(h)
    num_failed = 0
    for _ in range(NUM_STEPS):
        for seq, other in zip(seqs, others, strict=True):
            sent = {h.send(1, [seq]): seq, h.send(2, [other]): other}
            for _ in range(2):
                header, tokens = h.answer()
                if isinstance(header, FailureHeader):
                    assert (header.epoch, header.stage, header.message) == (2, "stage-1", "RuntimeError: poison")
                    num_failed += 1
                else:
                    take([sent[header.step]], header, tokens)
    assert num_failed > 3
    assert_as_expected(seqs, expected)


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b""],
        encode(ResultHeader(epoch=1, step=1, stage_seconds=())),
        encode(PatchAckHeader(epoch=7, target="x", number=3)),
        encode(HiddenHeader(epoch=1, step=1, shape=(1, 48), dtype="float32"), bytes(8), b"123"),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(1, 48), dtype="float32"), b"", bytes(192)),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(1, 48), dtype="float32"), b"1234567", bytes(192)),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(-1, 48), dtype="float32"), bytes(8), b""),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(1, 48), dtype="nonsense"), bytes(8), b"", b""),
    ],
)
def test_whatever_comes_the_stage_goes_on(h: Harness, expected: list, frames: list) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    h.next_step = 2
    for outlet in h.routes[1].values():
        outlet.send(frames)
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


def test_steps_of_unknown_epochs_are_dropped(h: Harness, expected: list) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    h.routes[5] = h.routes[1]
    h.send(5, [seqs[0]])
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)
