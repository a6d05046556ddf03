"""A source that computes steps and copies its KV, a target, and an edge between them that delays and repeats."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch

from flexpipe_serve.kv import transfer_plan
from flexpipe_serve.kv.transfer import KVGiver, KVTaker
from flexpipe_serve.kv.transfer_plan import MAX_CHUNKS_IN_FLIGHT
from flexpipe_serve.pipeline.messages import (
    CopyHeader,
    Frame,
    PatchAckHeader,
    PatchHeader,
    StepBatch,
    StepHeader,
    decode_header,
)


def step_batch(
    step: int,
    *,
    num_computed: Sequence[int],
    num_new: Sequence[int],
    tables: Sequence[Sequence[int]],
    copies: tuple[tuple[int, int], ...] = (),
) -> StepBatch:
    """A step of epoch 1 that computes these tokens."""
    width = max((len(table) for table in tables), default=0)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    header = StepHeader(
        epoch=1, step=step, num_seqs=len(tables), num_tokens=sum(num_new), table_width=width, copies=copies
    )
    return StepBatch(
        header=header,
        token_ids=np.zeros(sum(num_new), np.int32),
        num_computed=np.array(num_computed, np.int32),
        num_new=np.array(num_new, np.int32),
        block_tables=np.array(padded, np.int32).reshape(len(tables), width),
        histories=np.zeros(0, np.int32),
        targets=np.zeros(0, np.int32),
    )


def copy_header(layers: Sequence[int], *, max_bytes_per_s: float = float("inf")) -> CopyHeader:
    return CopyHeader(
        epoch=2,
        old_epoch=1,
        layers=tuple(layers),
        target="new",
        node="n",
        ipc="i",
        tcp="",
        max_bytes_per_s=max_bytes_per_s,
    )


def decode_patch(frames: Sequence[Frame]) -> tuple[PatchHeader, list[memoryview]]:
    """A message as it comes off the wire: at odd addresses."""
    header = decode_header(frames[0])
    assert isinstance(header, PatchHeader)
    return header, [memoryview(bytearray(b"?" + bytes(frame)))[1:] for frame in frames[1:]]


@dataclass
class Seq:
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True)
class State:
    """The source after one step."""

    kv: dict[int, torch.Tensor]
    written: torch.Tensor
    """bool [num_blocks, block_size]: tokens that must be at the target."""
    begun: torch.Tensor
    """Slots that must be equal where attention zeroes the blocks it begins: all but those a dropped step wrote."""


class World:
    """Two stages in the middle of a copy; every choice is made by ``rng``."""

    def __init__(self, rng: random.Random, *, layers: tuple[int, ...], num_blocks: int, block_size: int) -> None:
        self.rng = rng
        self.layers = layers
        self.block_size = block_size
        self.zeroes_begun_blocks = rng.random() < 0.5
        shape = (num_blocks, 2, block_size, 1, 2)
        self._stamp = 0.0
        self.source = {layer: self._stamps(shape) for layer in layers}
        self.target = {layer: self._stamps(shape) for layer in layers}
        self.written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
        self.begun = torch.zeros(num_blocks, block_size, dtype=torch.bool)
        self.free = list(range(num_blocks))
        self.seqs: list[Seq] = []
        self.step = 0
        self.states: dict[int, State] = {}
        self.now = 0.0
        self.giver: KVGiver | None = None
        self.taker: KVTaker
        self.max_bytes_per_s = rng.choice((float("inf"), 1000.0))
        self.unsent: list[tuple[int, StepBatch | None]] = []
        self.edge: deque[list[Frame]] = deque()
        self.delivered: list[list[Frame]] = []
        self.acks: deque[PatchAckHeader] = deque()
        self.chunks_sent: list[tuple[float, int]] = []
        self.chunks_in_flight: list[int] = []

    # -------------------------------------------------------------- the source's steps

    def compute_step(self) -> None:
        """Some sequences get tokens, new ones among them; now and then the step fails half way."""
        self.step += 1
        dropped = self.rng.random() < 0.15
        chosen, num_new = self._choose_tokens()
        batch = step_batch(
            self.step,
            num_computed=[seq.num_tokens for seq in chosen],
            num_new=num_new,
            tables=[seq.blocks for seq in chosen],
        )
        for seq, count in zip(chosen, num_new, strict=True):
            self._write(seq, count, void=dropped)
            if not dropped:
                seq.num_tokens += count
        self.states[self.step] = self._state()
        if self.giver is not None:
            self.unsent.append((self.step, None if dropped else batch))
            if self.giver.is_complete or self.rng.random() < 0.5:
                self._send_patch()

    def finish_sequence(self) -> None:
        """Its blocks may be written by the very next step."""
        if self.seqs:
            seq = self.seqs.pop(self.rng.randrange(len(self.seqs)))
            self.free += seq.blocks

    def _choose_tokens(self) -> tuple[list[Seq], list[int]]:
        if self.rng.random() < 0.5:
            self.seqs.append(Seq())
        chosen, num_new = [], []
        for seq in self.seqs:
            count = self.rng.choice((0, 1, 1, self.rng.randint(1, 3 * self.block_size)))
            while len(seq.blocks) * self.block_size < seq.num_tokens + count and self.free:
                seq.blocks.append(self.free.pop(self.rng.randrange(len(self.free))))
            count = min(count, len(seq.blocks) * self.block_size - seq.num_tokens)
            if count:
                chosen.append(seq)
                num_new.append(count)
        return chosen, num_new

    def _write(self, seq: Seq, count: int, *, void: bool) -> None:
        """What the attention kernels do; a void step does it in the first layer only."""
        positions = range(seq.num_tokens, seq.num_tokens + count)
        for position in positions:
            block, offset = seq.blocks[position // self.block_size], position % self.block_size
            begins = offset == 0
            if begins:
                self.written[block] = False
                self.begun[block] = not void
            self.written[block, offset] = not void
            self.begun[block, offset] = not void
            for layer in self.layers[: 1 if void else None]:
                kv = self.source[layer]
                if begins and self.zeroes_begun_blocks:
                    kv[block] = 0
                kv[block, :, offset] = self._stamps((2, 1, 2))

    def _stamps(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers that were never used before."""
        start, self._stamp = self._stamp, self._stamp + torch.Size(shape).numel()
        return torch.arange(start, self._stamp, dtype=torch.float64).view(shape)

    def _state(self) -> State:
        kv = {layer: kv.clone() for layer, kv in self.source.items()}
        return State(kv, self.written.clone(), self.begun.clone())

    # -------------------------------------------------------------- the copy

    def begin_copy(self) -> None:
        # Blocks in use, and some that were freed but stay in the prefix cache.
        used = {block for seq in self.seqs for block in seq.blocks}
        cached = {block for block in self.free if self.written[block].any() and self.rng.random() < 0.5}
        listed = list(used | cached)
        self.rng.shuffle(listed)
        unlisted = [block for block in range(len(self.written)) if block not in used | cached]
        self.written[unlisted] = self.begun[unlisted] = False
        self.begun[listed] = True
        self.states[self.step] = self._state()
        header = copy_header(self.layers, max_bytes_per_s=self.max_bytes_per_s)
        self.giver = KVGiver(
            header, np.array(listed, np.int32), source="old", last_step=self.step, kv=self.source.__getitem__
        )
        self.taker = KVTaker(epoch=2, source="old", target="new", layers=self.layers, kv=self.target.__getitem__)

    def send_chunk(self) -> None:
        assert self.giver is not None
        self.now += self.rng.choice((0.0, 0.01, 1.0))
        ready_at = self.giver.ready_at(self.now)
        if ready_at is not None and ready_at <= self.now and self.giver.is_last_chunk and self.unsent:
            self._send_patch()
            if self.giver.is_complete:  # the snapshot was empty
                return
        frames = self.giver.next_chunk(self.now)
        assert (frames is not None) == (ready_at is not None and ready_at <= self.now)
        if frames is None:
            return
        header, buffers = decode_patch(frames)
        self.chunks_sent.append((self.now, sum(len(buffer) for buffer in buffers)))
        self.chunks_in_flight.append(header.number)
        assert len(self.chunks_in_flight) <= MAX_CHUNKS_IN_FLIGHT
        self.edge.append(frames)

    def _send_patch(self) -> None:
        assert self.giver is not None
        steps, self.unsent = self.unsent, []
        self.edge.append(self.giver.on_steps(steps))

    def deliver(self) -> None:
        if self.edge:
            self.delivered.append(self.edge.popleft())
            self._apply(self.delivered[-1], expected=True)

    def repeat(self) -> None:
        if self.delivered:
            self._apply(self.rng.choice(self.delivered), expected=False)

    def deliver_ack(self) -> None:
        if self.acks:
            assert self.giver is not None
            ack = self.acks.popleft()
            self.giver.on_ack(ack)
            self.chunks_in_flight = [number for number in self.chunks_in_flight if number > ack.number]

    def _apply(self, frames: list[Frame], *, expected: bool) -> None:
        header, buffers = decode_patch(frames)
        assert self.taker.apply(header, buffers) == expected
        if not header.is_snapshot:
            self.check_target()
            return
        ack = decode_header(self.taker.ack()[0])
        assert isinstance(ack, PatchAckHeader)
        self.acks.append(ack)
        self.check_target()

    # -------------------------------------------------------------- what must hold

    def check_target(self) -> None:
        """The target is the source as it was after ``through_step``."""
        if not self.taker.snapshot_complete:
            assert not self.taker.reached(0)
            return
        assert self.taker.reached(self.taker.through_step)
        assert not self.taker.reached(self.taker.through_step + 1)
        state = self.states[self.taker.through_step]
        equal_slots = state.begun if self.zeroes_begun_blocks else state.written
        for layer in self.layers:
            wrong = equal_slots & (self.target[layer] != state.kv[layer]).sum(dim=(1, 3, 4)).bool()
            assert not wrong.any(), f"layer {layer}, step {self.taker.through_step}: {wrong.nonzero().tolist()}"

    def check_rate(self) -> None:
        for i, (start, _) in enumerate(self.chunks_sent):
            num_bytes = 0
            for j in range(i, len(self.chunks_sent) - 1):
                num_bytes += self.chunks_sent[j][1]
                seconds = self.chunks_sent[j + 1][0] - start
                assert num_bytes / self.max_bytes_per_s <= seconds + 1e-9


def run_history(rng: random.Random, *, max_events: int = 150) -> World:
    """One copy from before its beginning to its end. Raises AssertionError where something does not hold."""
    layers = tuple(rng.sample(range(9), rng.randint(1, 4)))
    world = World(rng, layers=layers, num_blocks=rng.randint(2, 20), block_size=rng.choice((1, 2, 4)))
    for _ in range(rng.randint(0, 15)):
        rng.choice((world.compute_step, world.compute_step, world.compute_step, world.finish_sequence))()
    chunk_bytes = rng.choice((1, 1, 128, 600, 1 << 20))
    with patch.object(transfer_plan, "MAX_CHUNK_BYTES", chunk_bytes):
        world.begin_copy()
    events = (
        *(world.compute_step, world.finish_sequence, world.send_chunk, world.send_chunk),
        *(world.deliver, world.deliver, world.deliver, world.deliver_ack, world.deliver_ack, world.repeat),
    )
    for _ in range(rng.randint(0, max_events)):
        rng.choice(events)()
    while not world.taker.reached(world.step):
        world.send_chunk()
        world.deliver()
        world.deliver_ack()
        world.now += 1.0
    assert world.giver is not None
    assert world.giver.is_complete
    assert not world.edge
    world.check_rate()
    return world
