"""What a stage does with one step: its layers' part of the forward pass, and on the last stage the next tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexpipe_serve.kernels.attention import RaggedBatch
from flexpipe_serve.kernels.native import set_native_threads
from flexpipe_serve.kernels.native_layer import LayerRun
from flexpipe_serve.kernels.registry import check_block_size, get_attention_backend
from flexpipe_serve.kernels.sampling import prompt_logprobs, sample
from flexpipe_serve.kv.segment import BlockShape
from flexpipe_serve.model.fastest_linear import fastest_linear
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.pipeline.channel import Outlet
from flexpipe_serve.pipeline.messages import (
    Frame,
    HiddenHeader,
    LogprobResult,
    ResultHeader,
    StepBatch,
    encode,
)
from flexpipe_serve.pipeline.native_hop import HiddenSource, NativeHop
from flexpipe_serve.pipeline.prepared_step import PreparedStep, positions_of
from flexpipe_serve.pipeline.stage_types import Assignment, StageSetup
from flexpipe_serve.pipeline.step_check import check_batch
from flexpipe_serve.pipeline.unix_channel import UnixOutlet

_LOGIT_ROWS = 64
"""Rows of logits made at once: those of a whole prompt would take gigabytes."""


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What the stage before sent for a step."""

    tensor: torch.Tensor
    stage_seconds: tuple[float, ...] = ()
    held_seconds: float = 0.0


class StepComputer:
    """A stage's model and kernels. Making one does all the slow work that does not depend on the layers."""

    def __init__(self, setup: StageSetup) -> None:
        self.device = torch.device(setup.device)
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        self.spec = load_spec(Path(setup.model_path), max_model_len=setup.max_model_len)
        self._dtype_name = setup.dtype
        self._block_size = setup.block_size
        self._num_cores = len(setup.cores)
        self._cpu_share = setup.cpu_share
        self._attention = get_attention_backend(setup.attention, device=self.device, dtype=self.dtype)
        check_block_size(self._attention, setup.block_size)
        linear = setup.linear
        if linear == "auto":
            linear = fastest_linear(self.spec, dtype=self.dtype, device=self.device)
        self.model = StageModel(
            self.spec, device=self.device, dtype=self.dtype, attention=self._attention, linear=linear
        )

    @property
    def block_shape(self) -> BlockShape:
        """Of the stage's KV."""
        return BlockShape(
            block_size=self._block_size,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
        )

    def read_hidden(self, header: HiddenHeader, buffers: Sequence[Frame]) -> Hidden:
        """The message of the stage before. Raises ValueError where it is malformed."""
        times, frame = buffers
        num_tokens, width = header.shape
        if width != self.spec.hidden_size or header.dtype != self._dtype_name:
            raise ValueError(
                f"hidden states of width {width} in {header.dtype}; "
                f"the model has {self.spec.hidden_size} in {self._dtype_name}."
            )
        if len(frame) != num_tokens * width * self.dtype.itemsize:
            raise ValueError(f"hidden states {header.shape} in {len(frame)} bytes.")
        if not times:
            raise ValueError("hidden states without the time they were held.")
        held_seconds, *stage_seconds = np.frombuffer(times, np.float64).tolist()
        if num_tokens:
            # A copy: the frame may lie at any address, and layers work in place.
            tensor = torch.frombuffer(bytearray(frame), dtype=self.dtype).view(header.shape)
        else:
            tensor = torch.empty(0, width, dtype=self.dtype)
        if self.device.type != "cpu":
            tensor = tensor.to(self.device)
        return Hidden(tensor=tensor, stage_seconds=tuple(stage_seconds), held_seconds=held_seconds)

    @torch.inference_mode()
    def prepare(self, batch: StepBatch, *, num_blocks: int) -> PreparedStep:
        """Do what needs no hidden states.

        Args:
            num_blocks: committed in the stage's KV.

        Raises:
            ValueError: the step does not hold together.
        """
        started = time.perf_counter()
        rotary, plan = None, None
        if batch.header.num_seqs:
            self._check(batch, num_blocks=num_blocks)
            ragged = RaggedBatch(
                num_computed=batch.num_computed,
                num_new=batch.num_new,
                block_tables=batch.block_tables,
                block_size=self._block_size,
            )
            rotary = self.model.rotary(torch.from_numpy(positions_of(batch)).to(self.device))
            plan = self._attention.plan(ragged, device=self.device)
        seconds = time.perf_counter() - started
        return PreparedStep(batch=batch, num_blocks=num_blocks, rotary=rotary, plan=plan, seconds=seconds)

    @torch.inference_mode()
    def run(
        self,
        assignment: Assignment,
        step: PreparedStep,
        given: Hidden | None,
        *,
        kv: Mapping[int, torch.Tensor],
        num_blocks: int,
        held_seconds: float,
    ) -> list[Frame]:
        """Compute a step's part.

        Args:
            assignment: of the step's epoch.
            given: None on a first stage.
            num_blocks: committed in ``kv``.
            held_seconds: how long this stage held the step back.

        Returns:
            The message for the next stage, or on the last one for the Router.

        Raises:
            ValueError: the step does not hold together.
        """
        started, worked = time.perf_counter(), time.thread_time()
        batch = step.batch
        header = batch.header
        if header.num_seqs:
            if num_blocks < step.num_blocks:
                self._check(batch, num_blocks=num_blocks)
            if given is not None and len(given.tensor) != header.num_tokens:
                raise ValueError(f"hidden states of {len(given.tensor)} tokens, the step has {header.num_tokens}.")
            self._set_num_threads(header.num_threads)
            hidden = self._forward(assignment, step, given, kv)
        else:
            hidden = torch.empty(0, self.spec.hidden_size, dtype=self.dtype)
        held_seconds += given.held_seconds if given else 0.0
        passed = given.stage_seconds if given else ()
        # The others prepare a step while those before them compute.
        unseen = step.seconds if assignment.is_first else 0.0
        if assignment.is_last:
            seconds = unseen + time.perf_counter() - started
            return self._finish(batch, hidden, (held_seconds, *passed, seconds), worked=worked)
        body = hidden.contiguous().cpu()  # on CUDA this waits for the KV writes too
        self._rest(worked)
        out = HiddenHeader(
            epoch=header.epoch,
            step=header.step,
            shape=(body.shape[0], body.shape[1]),
            dtype=self._dtype_name,
        )
        times = np.array((held_seconds, *passed, unseen + time.perf_counter() - started))
        return encode(out, times.data.cast("B"), body.view(torch.uint8).numpy().data.cast("B") if len(body) else b"")

    def layer_run(self, assignment: Assignment, kv: Mapping[int, torch.Tensor]) -> LayerRun | None:
        """The stage's part for :meth:`make_hop`, as long as it has these layers; None where hops cannot be native."""
        return self.model.layer_run(assignment.layers, kv) if self._cpu_share == 1 else None

    def make_hop(
        self,
        step: PreparedStep,
        run: LayerRun,
        *,
        source: HiddenSource | None,
        outlet: Outlet | None,
        used: NativeHop | None,
    ) -> NativeHop | None:
        """The step as a :class:`NativeHop`; None where :meth:`run` must do it.

        Args:
            used: a hop of the same route whose step is done, to be used again if it will do.
        """
        header = step.batch.header
        if not header.num_seqs or not header.num_threads or header.copies:
            return None
        if outlet is not None and not isinstance(outlet, UnixOutlet):
            return None
        num_threads = self._num_cores or header.num_threads
        if used is not None and used.take(step, run, source=source, num_threads=num_threads):
            return used
        return NativeHop(
            step,
            run,
            source=source,
            hidden_size=self.spec.hidden_size,
            num_threads=num_threads,
            outlet=outlet,
        )

    def start(self, hop: NativeHop, *, held_seconds: float) -> None:
        """Run a first stage's hop."""
        started = time.perf_counter()
        hop.times[0] = held_seconds
        ids = torch.from_numpy(hop.step.batch.token_ids.astype(np.int64))
        torch.from_numpy(hop.hidden).copy_(self.model.embed(ids))
        hop.run(seconds=hop.step.seconds + time.perf_counter() - started)

    @torch.inference_mode()
    def finish(self, hop: NativeHop) -> list[Frame]:
        """The message for the Router of a last stage's hop that is done."""
        worked = time.thread_time()
        self._set_num_threads(hop.step.batch.header.num_threads)
        times = (*hop.times.tolist(), hop.seconds)
        return self._finish(hop.step.batch, torch.from_numpy(hop.hidden), times, worked=worked)

    def _check(self, batch: StepBatch, *, num_blocks: int) -> None:
        check_batch(
            batch,
            num_blocks=num_blocks,
            block_size=self._block_size,
            vocab_size=self.spec.vocab_size,
            max_model_len=self.spec.max_model_len,
        )

    def _rest(self, since: float) -> None:
        """Emulate a slower device: answer as late as that would. The time is this thread's own, so that a core which
        somebody else took meanwhile is not counted as slow work."""
        if self._cpu_share < 1:
            time.sleep((time.thread_time() - since) * (1 / self._cpu_share - 1))

    def _set_num_threads(self, num_threads: int) -> None:
        if not num_threads or self.device.type != "cpu":
            return
        num_threads = self._num_cores or num_threads  # the Router knows of the shared cores only
        if self.model.is_native:
            set_native_threads(num_threads)
            num_threads = 1
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)

    def _forward(
        self, assignment: Assignment, step: PreparedStep, given: Hidden | None, kv: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        assert step.rotary is not None, "the step computes nothing"
        return self.model.forward(
            given.tensor if given else torch.from_numpy(step.batch.token_ids.astype(np.int64)).to(self.device),
            layers=assignment.layers,
            is_first=assignment.is_first,
            rotary=step.rotary,
            plan=step.plan,
            kv=kv,
        )

    def _finish(
        self, batch: StepBatch, hidden: torch.Tensor, times: tuple[float, ...], *, worked: float
    ) -> list[Frame]:
        """The last stage's message.

        Args:
            times: held seconds, and compute seconds of all stages up to here.
            worked: the thread's time when it began to work on the step.
        """
        started = time.perf_counter()
        held_seconds, *passed, seconds = times
        tokens, logprobs, prompts = self._sample(batch, hidden)
        self._rest(worked)
        result = ResultHeader(
            epoch=batch.header.epoch,
            step=batch.header.step,
            stage_seconds=(*passed, seconds + time.perf_counter() - started),
            held_seconds=held_seconds,
            logprobs=logprobs,
            prompt_logprobs=prompts,
        )
        return encode(result, tokens)

    def _sample(
        self, batch: StepBatch, hidden: torch.Tensor
    ) -> tuple[Frame, tuple[LogprobResult | None, ...], tuple[tuple[LogprobResult, ...], ...]]:
        """Logits of the rows that need them, sampling, log probabilities of the prompt."""
        header = batch.header
        ends = batch.num_new.cumsum()
        tokens: Frame = b""
        logprobs: tuple[LogprobResult | None, ...] = ()
        if header.samples:
            rows = ends[[spec.row for spec in header.samples]] - 1
            if len(rows) < len(hidden) or (rows != np.arange(len(hidden))).any():
                hidden_rows = hidden.index_select(0, torch.from_numpy(rows).to(self.device))
            else:  # every token is a sequence's last: nothing but decodes
                hidden_rows = hidden
            output = sample(self.model.logits(hidden_rows), header.samples, batch.histories)
            tokens, logprobs = output.tokens.data.cast("B"), output.logprobs
        prompts = []
        offset = 0
        for spec in header.prompt_logprobs:
            first = int(ends[spec.row] - batch.num_new[spec.row])
            targets = batch.targets[offset : offset + spec.num_targets]
            offset += spec.num_targets
            found: list[LogprobResult] = []
            for at in range(0, spec.num_targets, _LOGIT_ROWS):
                piece = targets[at : at + _LOGIT_ROWS]
                logits = self.model.logits(hidden[first + at : first + at + len(piece)])
                found += prompt_logprobs(logits, piece, spec.num_logprobs)
            prompts.append(tuple(found))
        return tokens, logprobs, tuple(prompts)
