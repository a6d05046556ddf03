"""The core of a stage: runs its layers on each step that comes. Knows no Ray; hosts put it into an actor, a
process or a thread.

Two sides: the control methods (any thread, may load weights for seconds) and the data loop (one thread). They share
only the route in force, which the control side hands over as a whole.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexpipe_serve.kernels.attention import RaggedBatch
from flexpipe_serve.kernels.registry import check_block_size, get_attention_backend
from flexpipe_serve.kernels.sampling import prompt_logprobs, sample
from flexpipe_serve.kv.domain import DomainFolder, free_bytes, sweep_stale
from flexpipe_serve.kv.segment import BlockShape, DeviceSegment, Segment, SharedSegment
from flexpipe_serve.model.fastest_linear import fastest_linear
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.pipeline.channel import Outlet, ZmqInbox, ZmqOutlet
from flexpipe_serve.pipeline.memory import available_bytes, private_bytes, work_bytes
from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    Frame,
    HiddenHeader,
    LogprobResult,
    ResultHeader,
    StepBatch,
    StepHeader,
    decode_header,
    decode_step,
    encode,
)
from flexpipe_serve.pipeline.stage_types import Assignment, StageReport, StageSetup

logger = logging.getLogger(__name__)
_POLL_S = 1.0
_LOGIT_ROWS = 64
"""Rows of logits made at once: those of a whole prompt would take gigabytes."""


@dataclass(frozen=True)
class _Route:
    """All that the data loop needs for steps of one epoch."""

    assignment: Assignment
    outlet: Outlet
    kv: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class _Hidden:
    """What the stage before sent for a step."""

    tensor: torch.Tensor
    stage_seconds: tuple[float, ...]


class Stage:
    """One stage. Call :meth:`run` in a thread of its own; :meth:`close` ends it."""

    def __init__(self, setup: StageSetup, *, node: str | None = None) -> None:
        self.setup = setup
        self.node = node or socket.gethostname()
        self._device = torch.device(setup.device)
        self._dtype = getattr(torch, setup.dtype)
        self._spec = load_spec(Path(setup.model_path), max_model_len=setup.max_model_len)
        self._attention = get_attention_backend(setup.attention, device=self._device, dtype=self._dtype)
        check_block_size(self._attention, setup.block_size)
        self._linear = setup.linear
        if setup.linear == "auto":
            self._linear = fastest_linear(self._spec, dtype=self._dtype, device=self._device)
        self._block_shape = BlockShape(
            block_size=setup.block_size,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_dim,
            dtype=self._dtype,
        )
        sweep_stale()
        self._folder = DomainFolder(setup.domain_key)
        self._inbox = ZmqInbox(setup.name, folder=self._folder.path, node=self.node, keys=setup.keys)
        self._model: StageModel | None = None
        self._segments: dict[int, Segment] = {}
        self._assignment: Assignment | None = None
        self._num_blocks = 0
        self._control = threading.Lock()
        self._new_routes: queue.SimpleQueue[tuple[_Route | None, threading.Event]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # Below: the data loop's own.
        self._route: _Route | None = None
        self._steps: dict[tuple[int, int], StepBatch] = {}
        self._inputs: dict[tuple[int, int], _Hidden | FailureHeader] = {}
        self._num_steps = 0
        self._busy_seconds = 0.0

    # ------------------------------------------------------------------ control

    def configure(self, assignment: Assignment) -> StageReport:
        """Hold exactly the assignment's layers. Steps of older epochs are void from now on."""
        with self._control:
            self._install(None)  # the loop lets go of layers before they are dropped
            if self._model is None:
                self._model = StageModel(
                    self._spec,
                    layers=assignment.layers,
                    is_first=assignment.is_first,
                    is_last=assignment.is_last,
                    device=self._device,
                    dtype=self._dtype,
                    attention=self._attention,
                    linear=self._linear,
                )
            else:
                self._model.hold(assignment.layers, is_first=assignment.is_first, is_last=assignment.is_last)
            for layer in set(self._segments) - set(assignment.layers):
                self._segments.pop(layer).close()
            self._num_blocks = 0
            self._assignment = assignment
            return self._report()

    def commit_kv(self, num_blocks: int) -> None:
        """Commit the KV of the held layers and start taking steps.

        Raises:
            KVMemoryError: the memory cannot be had.
        """
        with self._control:
            assert self._assignment is not None, "commit_kv before configure"
            for layer in self._assignment.layers:
                if layer not in self._segments:
                    self._segments[layer] = self._open_segment(layer)
                self._segments[layer].resize(num_blocks)
            self._num_blocks = num_blocks
            outlet = ZmqOutlet(self._assignment.next, node=self.node, keys=self.setup.keys)
            kv = {layer: segment.tensor for layer, segment in self._segments.items()}
            self._install(_Route(self._assignment, outlet, kv))

    def report(self) -> StageReport:
        """The state now."""
        with self._control:
            return self._report()

    def close(self) -> None:
        """End the data loop and let go of everything; the last stage of the domain removes the shared memory."""
        self._stopping.set()
        with self._control:
            self._inbox.wake()

    def _open_segment(self, layer: int) -> Segment:
        if self._device.type != "cpu":
            return DeviceSegment(shape=self._block_shape, max_blocks=self.setup.max_blocks, device=self._device)
        path = self._folder.segment_path(layer)
        try:
            return SharedSegment(path, shape=self._block_shape, max_blocks=self.setup.max_blocks, create=True)
        except FileExistsError:
            return SharedSegment(path, shape=self._block_shape, max_blocks=self.setup.max_blocks, create=False)

    def _install(self, route: _Route | None) -> None:
        """Hand a route to the data loop and wait until it has taken it."""
        taken = threading.Event()
        self._new_routes.put((route, taken))
        self._inbox.wake()
        while not taken.wait(_POLL_S):
            if self._stopping.is_set():
                raise RuntimeError(f"stage {self.setup.name!r} is stopping.")

    def _report(self) -> StageReport:
        weights = self._model.weights_bytes if self._model else 0
        held = self._assignment
        return StageReport(
            name=self.setup.name,
            setup=self.setup,
            pid=os.getpid(),
            node=self.node,
            device=str(self._device),
            domain=self.node if self._device.type == "cpu" else f"{self.node}/{self._device}",
            domain_free_bytes=min(available_bytes(self._device), free_bytes(self._folder.path))
            if self._device.type == "cpu"
            else available_bytes(self._device),
            endpoint=self._inbox.endpoint,
            epoch=held.epoch if held else 0,
            start=held.start if held else 0,
            stop=held.stop if held else 0,
            weights_bytes=weights,
            overhead_bytes=max(0, private_bytes(self._device) - weights)
            + work_bytes(self._spec, num_tokens=self.setup.num_work_tokens, itemsize=self._dtype.itemsize),
            kv_bytes=sum(segment.committed_bytes for segment in self._segments.values()),
            num_blocks=self._num_blocks,
            num_steps=self._num_steps,
            busy_seconds=self._busy_seconds,
        )

    # ------------------------------------------------------------------ data loop

    def run(self) -> None:
        """Take steps until :meth:`close`."""
        with torch.inference_mode():
            while not self._stopping.is_set():
                frames = self._inbox.receive(_POLL_S)
                self._take_routes()
                if frames is not None:
                    self._take(frames)
        if self._route is not None:
            self._route.outlet.close()
        self._inbox.close()
        for segment in self._segments.values():
            segment.close()
        self._folder.close()

    def _take_routes(self) -> None:
        while not self._new_routes.empty():
            route, taken = self._new_routes.get()
            if self._route is not None:
                self._route.outlet.close()
            self._route = route
            epoch = route.assignment.epoch if route else None
            self._steps = {key: step for key, step in self._steps.items() if key[0] == epoch}
            self._inputs = {key: item for key, item in self._inputs.items() if key[0] == epoch}
            taken.set()

    def _take(self, frames: Sequence[Frame]) -> None:
        header = decode_header(frames[0])
        route = self._route
        if route is None or header.epoch != route.assignment.epoch:
            logger.info("%s: dropped a message of epoch %d", self.setup.name, header.epoch)
            return
        key = (header.epoch, header.step)
        if isinstance(header, StepHeader):
            self._steps[key] = decode_step(header, frames[1:])
        elif isinstance(header, HiddenHeader):
            self._inputs[key] = _Hidden(_to_tensor(header, frames[1], self._device), header.stage_seconds)
        elif isinstance(header, FailureHeader):
            self._inputs[key] = header
        if key in self._steps and (route.assignment.is_first or key in self._inputs):
            self._run_step(route, self._steps.pop(key), self._inputs.pop(key, None))

    def _run_step(self, route: _Route, batch: StepBatch, given: _Hidden | FailureHeader | None) -> None:
        if isinstance(given, FailureHeader):
            route.outlet.send(encode(given))  # travels on, so that every stage drops the step in order
            return
        started = time.perf_counter()
        try:
            frames = self._compute(route, batch, given, started)
        except Exception as error:  # process edge: a step that fails must not take the stage with it
            logger.exception("%s: step %d failed", self.setup.name, batch.header.step)
            header = batch.header
            failure = FailureHeader(
                epoch=header.epoch, step=header.step, stage=self.setup.name, message=f"{type(error).__name__}: {error}"
            )
            frames = encode(failure)
        route.outlet.send(frames)
        self._num_steps += 1
        self._busy_seconds += time.perf_counter() - started

    def _compute(self, route: _Route, batch: StepBatch, given: _Hidden | None, started: float) -> list[Frame]:
        assert self._model is not None
        header = batch.header
        if header.num_threads and self._device.type == "cpu" and torch.get_num_threads() != header.num_threads:
            torch.set_num_threads(header.num_threads)
        ragged = RaggedBatch(
            num_computed=batch.num_computed,
            num_new=batch.num_new,
            block_tables=batch.block_tables,
            block_size=self.setup.block_size,
        )
        plan = self._attention.plan(ragged, device=self._device)
        starts = torch.from_numpy(batch.num_new.cumsum() - batch.num_new)
        num_new = torch.from_numpy(batch.num_new).long()
        offsets = torch.arange(header.num_tokens) - starts.repeat_interleave(num_new)
        positions = (torch.from_numpy(batch.num_computed).long().repeat_interleave(num_new) + offsets).to(self._device)
        inputs = given.tensor if given else torch.from_numpy(batch.token_ids).long().to(self._device)
        hidden = self._model.forward(inputs, positions=positions, plan=plan, kv=route.kv)
        passed = given.stage_seconds if given else ()
        if not route.assignment.is_last:
            body = hidden.contiguous().cpu()  # on CUDA this waits for the KV writes too
            seconds = (*passed, time.perf_counter() - started)
            out = HiddenHeader(
                epoch=header.epoch,
                step=header.step,
                shape=(body.shape[0], body.shape[1]),
                dtype=self.setup.dtype,
                stage_seconds=seconds,
            )
            return encode(out, _to_buffer(body))
        return self._finish(batch, hidden, starts, passed, started)

    def _finish(
        self,
        batch: StepBatch,
        hidden: torch.Tensor,
        starts: torch.Tensor,
        passed: tuple[float, ...],
        started: float,
    ) -> list[Frame]:
        """The last stage's part: logits of the rows that need them, sampling, log probabilities of the prompt."""
        assert self._model is not None
        header = batch.header
        ends = starts + torch.from_numpy(batch.num_new) - 1
        rows = ends[[spec.row for spec in header.samples]].to(self._device)
        tokens: Frame = b""
        logprobs: tuple[LogprobResult | None, ...] = ()
        if header.samples:
            output = sample(self._model.logits(hidden[rows]), header.samples, batch.histories)
            tokens, logprobs = output.tokens.data.cast("B"), output.logprobs
        prompts = []
        offset = 0
        for spec in header.prompt_logprobs:
            first = int(starts[spec.row])
            targets = batch.targets[offset : offset + spec.num_targets]
            offset += spec.num_targets
            found: list[LogprobResult] = []
            for at in range(0, spec.num_targets, _LOGIT_ROWS):
                piece = targets[at : at + _LOGIT_ROWS]
                logits = self._model.logits(hidden[first + at : first + at + len(piece)])
                found += prompt_logprobs(logits, piece, spec.num_logprobs)
            prompts.append(tuple(found))
        seconds = (*passed, time.perf_counter() - started)
        result = ResultHeader(
            epoch=header.epoch,
            step=header.step,
            stage_seconds=seconds,
            logprobs=logprobs,
            prompt_logprobs=tuple(prompts),
        )
        return encode(result, tokens)


def _to_buffer(tensor: torch.Tensor) -> Frame:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _to_tensor(header: HiddenHeader, frame: Frame, device: torch.device) -> torch.Tensor:
    # A copy: the frame may lie at any address, and layers work in place.
    flat = torch.frombuffer(bytearray(frame), dtype=getattr(torch, header.dtype))
    return flat.view(header.shape).to(device)
