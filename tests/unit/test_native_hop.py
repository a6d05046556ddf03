"""Steps that the kernels take from message to message, between others that Python computes: the tokens are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_harness import NUM_BLOCKS, FakeSequence, Harness, harness, take

from flexpipe_serve.kernels.linear import available_kinds
from flexpipe_serve.pipeline import unix_channel
from flexpipe_serve.pipeline.messages import FailureHeader, ResultHeader, encode
from flexpipe_serve.pipeline.native_hop import NativeHop
from flexpipe_serve.pipeline.unix_channel import UnixOutlet

if "native" not in available_kinds(torch.device("cpu"), torch.float32):
    pytest.skip("the CPU kernels cannot be compiled here", allow_module_level=True)

PARTS = (("stage-0", 0, 1), ("stage-1", 1, 3), ("stage-2", 3, 4))
PROMPTS = ([9, 4, 77, 23, 5, 61], [1, 2, 3], list(range(1, 51)))
NUM_STEPS = 8


@pytest.fixture
def h(tied_model: Path) -> Iterator[Harness]:
    with harness(tied_model, linear="native", attention="native") as made:
        made.start(*PARTS)
        yield made


@pytest.fixture(scope="module")
def expected(tied_model: Path) -> list[tuple[list[int], list[float]]]:
    """Tokens and log probabilities of each prompt, computed by one stage, where there is no hop."""
    with harness(tied_model, linear="native", attention="native") as made:
        made.start(("stage-0", 0, 4))
        seqs = sequences(made)
        for seq in seqs:
            decode(made, seq, NUM_STEPS)
        return [(seq.tokens, seq.logprobs) for seq in seqs]


class Hops:
    """What the stages' hops did."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        """Of each one that ran: whether it waited for its message."""
        self._waits: set[tuple[int, int]] = set()
        self._changed = threading.Condition()

    def note_wait(self, hop: NativeHop) -> None:
        with self._changed:
            self._waits.add((hop.connection, hop.step.batch.header.step))
            self._changed.notify()

    def await_waits(self, step: int) -> None:
        """Until all stages behind the first wait for the step's hidden states."""

        def all_wait() -> bool:
            return sum(waited == step for _, waited in self._waits) == len(PARTS) - 1

        with self._changed:
            assert self._changed.wait_for(all_wait, timeout=60), "a stage took the step another way"


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> Hops:
    hops = Hops()
    wait, close = NativeHop.wait, NativeHop._close

    def note_wait(hop: NativeHop, *args: Any) -> memoryview | None:
        hops.note_wait(hop)
        return wait(hop, *args)

    def note_close(hop: NativeHop) -> None:
        hops.taken.append(hop.connection >= 0)
        close(hop)

    monkeypatch.setattr(NativeHop, "wait", note_wait)
    monkeypatch.setattr(NativeHop, "_close", note_close)
    return hops


def sequences(h: Harness) -> list[FakeSequence]:
    return [h.sequence(prompt, num_tokens=len(prompt) + NUM_STEPS + 1) for prompt in PROMPTS]


def decode(h: Harness, seq: FakeSequence, num_steps: int) -> None:
    for _ in range(num_steps):
        h.step(1, [seq])


def decode_prepared(h: Harness, hops: Hops, seq: FakeSequence) -> None:
    """A step that the stages behind the first prepare before its hidden states come, which else is a race."""
    step = h.next_step
    h.send(1, [seq], only=[name for name, _, _ in PARTS[1:]])
    hops.await_waits(step)
    h.next_step = step
    h.step(1, [seq], only=[PARTS[0][0]])


def of(seqs: list[FakeSequence]) -> list[tuple[list[int], list[float]]]:
    return [(seq.tokens, seq.logprobs) for seq in seqs]


def test_tokens_are_those_of_one_stage(h: Harness, expected: list, hops: Hops) -> None:
    seqs = sequences(h)
    h.step(1, [seqs[0]])  # shows the stages behind the first where hidden states come from
    for seq in seqs:
        for _ in range(NUM_STEPS - (seq is seqs[0])):
            decode_prepared(h, hops, seq)
    assert of(seqs) == expected
    for stage in h.stages.values():
        stage._loop.call(lambda: None)  # a hop's message is on its way before the hop ends
    num_steps = NUM_STEPS * len(seqs)
    assert hops.taken.count(False) == num_steps, "the first stage sends from the kernels"
    assert hops.taken.count(True) == (num_steps - 1) * 2


def test_times_pass_along(h: Harness) -> None:
    (seq, *_) = sequences(h)
    for _ in range(NUM_STEPS):
        sent = time.perf_counter()
        header = h.step(1, [seq])
        assert len(header.stage_seconds) == 3
        assert all(seconds > 0 for seconds in header.stage_seconds)
        assert sum(header.stage_seconds) < time.perf_counter() - sent
        assert header.held_seconds == 0


def test_several_steps_in_flight(h: Harness, expected: list) -> None:
    seqs = sequences(h)
    for _ in range(NUM_STEPS):
        for seq in seqs:
            h.send(1, [seq])
        for seq in seqs:
            header, tokens = h.answer()
            take([seq], header, tokens)
    assert of(seqs) == expected


def test_hidden_states_that_the_kernel_does_not_take_at_once(
    tied_model: Path, expected: list, hops: Hops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix_channel, "_SEND_BUFFER_BYTES", 1)  # the kernel makes some thousand of it
    num_rests, send_rest = 0, UnixOutlet.send_rest

    def note(*args: Any, **kwargs: Any) -> None:
        nonlocal num_rests
        num_rests += 1
        send_rest(*args, **kwargs)

    monkeypatch.setattr(UnixOutlet, "send_rest", note)
    with harness(tied_model, linear="native", attention="native") as made:
        made.start(*PARTS)
        seqs = sequences(made)
        made.step(1, [seqs[0]])
        for seq in seqs:
            for _ in range(NUM_STEPS - (seq is seqs[0])):
                decode_prepared(made, hops, seq)
    assert of(seqs) == expected
    assert hops.taken.count(True) > 0
    assert num_rests > 0


def test_a_failure_in_the_place_of_hidden_states(h: Harness, expected: list, hops: Hops) -> None:
    """The hop reads it, sees that it is not its message, and gives it to Python."""
    seqs = sequences(h)
    (poor, *_) = sequences(h)
    h.step(1, [seqs[0]])
    for at in range(NUM_STEPS):
        for seq in seqs if at else seqs[1:]:
            decode_prepared(h, hops, seq)
        h.send(1, [poor], only=["stage-1", "stage-2"])
        hops.await_waits(h.next_step - 1)
        failure = FailureHeader(epoch=1, step=h.next_step - 1, stage="stage-0", message="no")
        route = next(iter(h.stages["stage-0"]._loop._routes.values()))
        h.stages["stage-0"]._loop.call(partial(route.outlet.send, encode(failure)))
        assert h.answer() == (failure, [])
    assert of(seqs) == expected


def test_copies_and_native_hops_in_turn(h: Harness, expected: list) -> None:
    seqs = sequences(h)
    for at in range(NUM_STEPS):
        if at == 3:
            old = [block for seq in seqs for block in seq.blocks]
            new = sorted(set(range(NUM_BLOCKS)) - set(old))[: len(old)]
            moves = dict(zip(old, new, strict=True))
            h.send(1, copies=list(moves.items()))
            assert isinstance(h.answer()[0], ResultHeader)
            for seq in seqs:
                seq.blocks = [moves[block] for block in seq.blocks]
        for seq in seqs:
            h.step(1, [seq])
    assert of(seqs) == expected


def test_segments_that_grow_and_shrink(h: Harness, expected: list) -> None:
    seqs = sequences(h)
    for at in range(NUM_STEPS):
        for stage in h.stages.values():
            stage.resize_kv(NUM_BLOCKS + 16 * (at % 3))
        for seq in seqs:
            h.step(1, [seq])
    assert of(seqs) == expected


def test_refused_where_its_blocks_are_gone(h: Harness) -> None:
    seqs = sequences(h)
    for seq in seqs:
        decode(h, seq, 2)
    for stage in h.stages.values():
        stage.resize_kv(min(seqs[0].blocks))
    h.send(1, [seqs[0]])
    header, _ = h.answer()
    assert isinstance(header, FailureHeader)
    assert "block_tables has" in header.message
