"""A model stage: real givers and takers of KV and a real queue of steps, but model layers.

KV of a layer is an int32 segment in the real shape; a token's key is a number that stands for the whole text up to it,
plus the layer's own number, and its value is the negative of that. So whatever a step reads that is wrong, stale,
from another layer or not there is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from refactor_sim_network import InvariantError

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv.transfer import KVGiver, KVTaker
from flexpipe_serve.pipeline.messages import CopyHeader, PatchHeader, StepBatch, decode_header
from flexpipe_serve.pipeline.step_queue import StepQueue

_STEPS_AT_ONCE = 3
"""In one patch while the snapshot is on its way."""

BLOCK_SIZE = 2
LAYER_NUMBER = 40503
GARBAGE = -1


@dataclass
class ModelStep:
    """A step with what it must read and write, as rows of a segment ([num_blocks * 2 * BLOCK_SIZE])."""

    batch: StepBatch
    reads: np.ndarray
    expected: np.ndarray
    writes: np.ndarray
    written: np.ndarray
    signs: np.ndarray
    """1 for keys, -1 for values: of reads, then of writes."""
    layers: list[int] = field(default_factory=list)
    """That have executed it."""
    is_void: bool = False
    """The Router has forgotten it: what it reads no longer counts."""


class Segment:
    """A layer's KV in one domain."""

    def __init__(self, num_blocks: int) -> None:
        self.mappers: set[str] = set()
        self._set(torch.full((num_blocks, 2, BLOCK_SIZE, 1, 1), GARBAGE, dtype=torch.int32))

    def _set(self, kv: torch.Tensor) -> None:
        self.kv = kv
        self.rows = kv.numpy().reshape(-1)
        self.epochs = np.zeros(len(self.rows), np.int64)
        """Of the step that wrote the row; 0: it came with a copy."""

    @property
    def num_blocks(self) -> int:
        return len(self.kv)

    def resize(self, num_blocks: int) -> None:
        if num_blocks != self.num_blocks:
            kv, kept = self.kv, min(num_blocks, self.num_blocks)
            self._set(torch.full((num_blocks, 2, BLOCK_SIZE, 1, 1), GARBAGE, dtype=torch.int32))
            self.kv[:kept] = kv[:kept]


@dataclass
class Route:
    """A stage's part in the layout of an epoch."""

    epoch: int
    layers: range
    is_first: bool
    next: str
    is_last: bool
    incoming: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(source, layers)."""


@dataclass
class Waiter:
    epoch: int
    through_step: int
    call: int


class ModelStage:
    """One stage's process. ``domain`` maps layers to segments and may be shared with other stages."""

    def __init__(self, name: str, *, domain: dict[int, Segment], send: Callable[..., None], bugs: frozenset[str]):
        self.name = name
        self.domain = domain
        self._send = send
        self._bugs = bugs
        self.routes: dict[int, Route] = {}
        self.segments: dict[int, Segment] = {}
        self.givers: list[KVGiver] = []
        self._unsent: dict[KVGiver, list[tuple[int, StepBatch | None]]] = {}
        """Steps that are in no patch so far."""
        self.takers: dict[int, list[KVTaker]] = {}
        self.fails_next_step = False
        self.fails_next_growth = False
        self._released: set[int] = set()
        self._broken: dict[int, str] = {}
        self._waiters: list[Waiter] = []
        self._queues: dict[int, StepQueue[ModelStep, bool]] = {}
        self._last_step: dict[int, int] = {}
        self._late: dict[int, tuple[PatchHeader, Any]] = {}
        self.seen: Counter[str] = Counter()

    # ------------------------------------------------------------------ control

    def call(self, number: int, method: str, *args: Any) -> None:
        if method == "wait_copied":
            self._waiters.append(Waiter(*args, call=number))
            self._check_waiters()
            return
        error = getattr(self, method)(*args)
        self._send("coordinator", "answer", number, error)

    def report(self) -> None:
        return None

    def prepare(self, route: Route, num_blocks: int, fresh: bool) -> str | None:
        if route.epoch in self._released:
            return "the epoch was released"
        if fresh:
            for epoch in list(self.routes):
                self.release(epoch)
            self.givers.clear()
        for layer in route.layers:
            segment = self.domain.get(layer)
            if segment is None:
                segment = self.domain[layer] = Segment(num_blocks)
            elif fresh:
                segment.resize(num_blocks)
            if segment.num_blocks != num_blocks:
                raise InvariantError(
                    f"{self.name} maps layer {layer} with {segment.num_blocks}, not {num_blocks} blocks"
                )
            segment.mappers.add(self.name)
            self.segments[layer] = segment
        self.routes[route.epoch] = route
        self._queues[route.epoch] = StepQueue(needs_input=not route.is_first)
        self.takers[route.epoch] = [
            KVTaker(epoch=route.epoch, source=source, target=self.name, layers=layers, kv=self._kv)
            for source, layers in route.incoming
        ]
        return None

    def resize_kv(self, num_blocks: int) -> str | None:
        if self.fails_next_growth and any(s.num_blocks < num_blocks for s in self.segments.values()):
            self.fails_next_growth = False
            return "no memory"
        for segment in self.segments.values():
            segment.resize(num_blocks)
        return None

    def release(self, epoch: int) -> None:
        self._released.add(epoch)
        self.routes.pop(epoch, None)
        self._queues.pop(epoch, None)
        self.takers.pop(epoch, None)
        self._broken.pop(epoch, None)
        self.givers = [g for g in self.givers if epoch not in (g.epoch, g.old_epoch)]
        kept = {layer for route in self.routes.values() for layer in route.layers}
        for layer in set(self.segments) - kept:
            self.unmap(layer)
        self._check_waiters()

    def unmap(self, layer: int) -> None:
        """Who lets go last removes the segment."""
        segment = self.segments.pop(layer)
        segment.mappers.discard(self.name)
        if not segment.mappers:
            del self.domain[layer]

    def _check_waiters(self) -> None:
        for waiter in list(self._waiters):
            takers = self.takers.get(waiter.epoch)
            error = None
            if takers is None:
                error = "the epoch was released"
            elif waiter.epoch in self._broken:
                error = self._broken[waiter.epoch]
            elif not all(taker.reached(waiter.through_step) for taker in takers):
                continue
            self._waiters.remove(waiter)
            self._send("coordinator", "answer", waiter.call, error)

    # ------------------------------------------------------------------ data

    def receive(self, kind: str, *message: Any) -> None:
        getattr(self, f"_on_{kind}")(*message)

    def _on_step(self, step: ModelStep) -> None:
        header = step.batch.header
        if header.epoch in self.routes:
            queue = self._queues[header.epoch]
            queue.add_step(header.step, step, patched_through=header.patched_through, now=0.0)
            self._run(self.routes[header.epoch])

    def _on_hidden(self, epoch: int, step: int, is_alright: bool) -> None:
        if epoch in self.routes:
            self._queues[epoch].add_input(step, is_alright, now=0.0)
            self._run(self.routes[epoch])

    def _on_copy(self, header: CopyHeader, blocks: np.ndarray) -> None:
        is_late = header.epoch in self._released or header.old_epoch not in self.routes
        if is_late and ("late copies begin" not in self._bugs or not set(header.layers) <= set(self.segments)):
            self.seen["late copies ignored"] += 1
            return
        last_step = self._last_step.get(header.old_epoch, 0)
        self.givers.append(KVGiver(header, blocks, source=self.name, last_step=last_step, kv=self._kv))

    def _on_patch(self, frames: list[Any]) -> None:
        header = decode_header(frames[0])
        assert isinstance(header, PatchHeader)
        for taker in self.takers.get(header.epoch, ()):
            if taker.source == header.source:
                self._apply(taker, header, frames[1:])
                if header.is_snapshot:
                    ack = taker.ack()
                    self._send(header.source, "copy", "ack", decode_header(ack[0]))
        self._check_waiters()
        if header.epoch in self.routes:
            self._run(self.routes[header.epoch])

    def _on_ack(self, header: Any) -> None:
        for giver in self.givers:
            if (giver.epoch, giver.target) == (header.epoch, header.target):
                giver.on_ack(header)

    def _apply(self, taker: KVTaker, header: PatchHeader, buffers: list[Any]) -> None:
        if header.number > taker._last_number:
            self._check_not_newer(header, buffers)
        if "gaps are ignored" in self._bugs:
            taker._last_number = max(taker._last_number, header.number - 1)
        if "patches count on arrival" in self._bugs and not header.is_snapshot:
            self._apply_late(taker, header, buffers)
            return
        try:
            taker.apply(header, buffers)
        except CopyError as error:
            self._broken[header.epoch] = str(error)

    def _apply_late(self, taker: KVTaker, header: PatchHeader, buffers: list[Any]) -> None:
        """The bug: a patch counts when it arrives and is written when the next one comes."""
        before = self._late.pop(id(taker), None)
        if before is not None:
            taker._last_number = before[0].number - 1
            taker.apply(*before)
        self._late[id(taker)] = (header, buffers)
        taker._last_number = header.number
        taker.through_step = header.through_step
        taker.snapshot_complete |= header.snapshot_complete

    def _check_not_newer(self, header: PatchHeader, buffers: list[Any]) -> None:
        places = np.frombuffer(buffers[0], np.int32)
        size = 1 if not header.is_snapshot else BLOCK_SIZE
        rows = places // BLOCK_SIZE * 2 * BLOCK_SIZE + places % BLOCK_SIZE if size == 1 else places * 2 * BLOCK_SIZE
        for layer in header.layers:
            if (self.segments[layer].epochs[rows] >= header.epoch).any():
                raise InvariantError(f"{self.name}: an old patch overwrites newer tokens of layer {layer}")

    def _kv(self, layer: int) -> torch.Tensor:
        return self.segments[layer].kv

    # ------------------------------------------------------------------ steps

    def _run(self, route: Route) -> None:
        """Run what can be run of an epoch, in the order sent."""
        queue = self._queues[route.epoch]
        while ready := queue.pop(lambda step: self._is_patched(route.epoch, step), now=0.0):
            self._execute(route, ready.step, is_alright=ready.given is not False)

    def _is_patched(self, epoch: int, step: int) -> bool:
        if not step or "no patch gate" in self._bugs:
            return True
        is_patched = all(taker.reached(step) for taker in self.takers[epoch])
        self.seen["steps held for a patch"] += not is_patched
        return is_patched

    def _execute(self, route: Route, step: ModelStep, *, is_alright: bool) -> None:
        header = step.batch.header
        for layer in route.layers:
            for source, target in header.copies:
                segment = self.segments[layer]
                segment.kv[target] = segment.kv[source]
        if is_alright and self.fails_next_step:
            self.fails_next_step = is_alright = False
            for layer in route.layers:
                self.segments[layer].rows[step.writes] = GARBAGE
        if is_alright:
            for layer in route.layers:
                self._compute(layer, step)
        for giver in self.givers:
            if giver.old_epoch == header.epoch:
                self._mirror(giver, step if is_alright else None, header.step)
        self._last_step[header.epoch] = header.step
        self.seen["steps with copies down"] += bool(header.copies) and route.is_first
        self.seen["steps while copying"] += any(not giver.is_complete for giver in self.givers)
        is_early = "results are taken early" in self._bugs and route.is_first
        if is_early or (route.is_last and ("results are taken early" not in self._bugs)):
            self._send("router", "data", "result", step, is_alright)
        if not route.is_last:
            self._send(route.next, "data", "hidden", header.epoch, header.step, is_alright)

    def _compute(self, layer: int, step: ModelStep) -> None:
        rows, number = self.segments[layer].rows, layer * LAYER_NUMBER
        num_reads = len(step.reads)
        try:
            read = rows[step.reads]
            rows[step.writes] = step.written + number * step.signs[num_reads:]
        except IndexError as error:
            if step.is_void:
                return
            raise InvariantError(f"{self.name} step {step.batch.header.step} layer {layer}: no such block") from error
        self.segments[layer].epochs[step.writes] = step.batch.header.epoch
        wrong = read != step.expected + number * step.signs[:num_reads]
        if wrong.any() and not step.is_void:
            header = step.batch.header
            at = sorted({int(row) // (2 * BLOCK_SIZE) for row in step.reads[wrong]})
            raise InvariantError(
                f"{self.name} reads wrong KV in step {header.step} of epoch {header.epoch}, blocks {at}"
            )
        if step.layers and step.layers[-1] != layer - 1 and not step.is_void:
            raise InvariantError(f"step {step.batch.header.step} comes to layer {layer} after {step.layers}")
        step.layers.append(layer)

    # ------------------------------------------------------------------ giving

    def _mirror(self, giver: KVGiver, step: ModelStep | None, number: int) -> None:
        batch = step.batch if step else None
        if "nothing is mirrored" in self._bugs:
            batch = None
        if "mirroring begins behind the snapshot" in self._bugs and not giver.is_complete:
            batch = None
        unsent = self._unsent.setdefault(giver, [])
        unsent.append((number, batch))
        if giver.is_complete or len(unsent) >= _STEPS_AT_ONCE:
            self._send_patch(giver)

    def _send_patch(self, giver: KVGiver) -> None:
        self._send(giver.target, "copy", "patch", giver.on_steps(self._unsent.pop(giver)))

    def has_chunk(self, now: float) -> bool:
        """Whether there is a chunk to send, now or later, without anything coming first."""
        return any(giver.ready_at(now) is not None for giver in self.givers)

    def send_chunk(self, now: float) -> None:
        """What the loop does when it is idle."""
        for giver in self.givers:
            ready_at = giver.ready_at(now)
            if ready_at is not None and ready_at <= now and giver.is_last_chunk and giver in self._unsent:
                self._send_patch(giver)
            frames = giver.next_chunk(now)
            if frames is not None:
                self._send(giver.target, "copy", "patch", frames)
                return
