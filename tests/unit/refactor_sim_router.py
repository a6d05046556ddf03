"""The engine thread of the simulated world: the real scheduler, routes by epoch, and what a refactoring asks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from refactor_sim_network import InvariantError
from refactor_sim_stage import BLOCK_SIZE, ModelStep

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.messages import CopyHeader, StepBatch
from flexpipe_serve.refactor.moves import Move

VOCAB = 5
MAX_LEN = 20


def next_text(text: int, token: int) -> int:
    """The number that stands for a text with one more token."""
    return (text * 1000003 + (token + 1) * 7919) % (1 << 28) + 1


class ModelRouter:
    """Sends steps on the route in force and takes their results."""

    def __init__(self, *, num_blocks: int, send: Callable[..., None], bugs: frozenset[str]) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=5, max_waiting=100, max_model_len=MAX_LEN,
                            prefix_cache=True),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )  # fmt: skip
        self._send = send
        self._bugs = bugs
        self.now = 0.0
        self.epoch = 0
        self.routes: dict[int, Layout] = {}
        self.is_held = False
        self.is_down = True
        self.patching_epoch: int | None = None
        self.next_step = 1
        self.in_flight: dict[int, ModelStep] = {}
        self.last_sent: dict[int, int] = {}
        self.last_taken: dict[int, int] = {}
        self.sequences: list[Sequence] = []
        self._texts: dict[Sequence, list[int]] = {}
        self._conditions: list[tuple[Callable[[], Any], int]] = []
        self.seen: Counter[str] = Counter()
        self._early_blocks: np.ndarray | None = None

    # ------------------------------------------------------------------ for the world

    @property
    def layout(self) -> Layout:
        return self.routes[self.epoch]

    @property
    def num_blocks(self) -> int:
        return self.scheduler.stats().num_blocks

    def add(self, prompt: list[int], max_tokens: int) -> None:
        name = f"r{len(self.sequences)}"
        seq = Sequence(
            request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        )
        self.scheduler.add(seq)
        self.sequences.append(seq)
        self._texts[seq] = []
        self._after()

    def abort(self, index: int) -> None:
        if self.sequences:
            self.seen["aborted sequences"] += 1
            self.scheduler.abort(self.sequences[index % len(self.sequences)].request_id, now=self.now)
            self._after()

    def lose_all(self) -> None:
        """The KV is lost: steps in flight are forgotten, none is sent until ``bring_up``."""
        self.is_down = True
        for step in self.in_flight.values():
            step.is_void = True
        self.in_flight.clear()
        self.routes.clear()
        conditions, self._conditions = self._conditions, []
        for _, call in conditions:
            self._send("coordinator", "answer", call, "the pipeline was rebuilt meanwhile")

    def bring_up(self, layout: Layout, epoch: int, num_blocks: int) -> None:
        self.routes = {epoch: layout}
        self.epoch = epoch
        self.is_down = self.is_held = False
        self.patching_epoch = None
        self.scheduler.reset(num_blocks, now=self.now)
        self.fill()

    # ------------------------------------------------------------------ for the coordinator

    def call(self, number: int, method: str, *args: Any) -> None:
        answer = getattr(self, f"_{method}")(*args)
        if callable(answer):
            self._conditions.append((answer, number))
        else:
            self._send("coordinator", "answer", number, *(answer if isinstance(answer, tuple) else (answer,)))
        self._after()

    def _pause(self) -> Callable[[], Any]:
        self.is_held = True
        return lambda: not self.in_flight

    def _resume(self) -> None:
        self.is_held = False

    def _shrink(self, num_blocks: int) -> Callable[[], Any] | str:
        try:
            self.scheduler.shrink(num_blocks)
        except RefactorRefusedError as error:
            return str(error)
        if "shrunk before the blocks have moved" in self._bugs:
            return lambda: True
        return lambda: self.scheduler.is_shrunk

    def _grow(self, num_blocks: int) -> Callable[[], Any]:
        self.scheduler.grow(num_blocks, now=self.now)
        if "a shrink taken back is not awaited" in self._bugs:
            return lambda: True
        return lambda: self.scheduler.is_shrunk

    def _note_blocks(self) -> None:
        """For a bug: the blocks in use, long before the copy begins."""
        self._early_blocks = self.scheduler.blocks_in_use()

    def _begin_copy(self, move: Move, old_epoch: int, epoch: int, max_bytes_per_s: float) -> str | None:
        if old_epoch not in self.routes:
            return "the pipeline was rebuilt meanwhile"
        header = CopyHeader(
            epoch=epoch,
            old_epoch=old_epoch,
            layers=move.layers,
            target=move.target,
            node="",
            ipc="",
            tcp="",
            max_bytes_per_s=max_bytes_per_s,
        )
        blocks = self.scheduler.blocks_in_use()
        if "blocks are listed too early" in self._bugs and self._early_blocks is not None:
            blocks = self._early_blocks
        self._send(move.source, "data", "copy", header, blocks)
        return None

    def _switch(self, layout: Layout, epoch: int, old_epoch: int | None) -> tuple[None, int] | str:
        if self.is_down:
            return "the pipeline is down"
        self.routes[epoch] = layout
        self.epoch = epoch
        self.patching_epoch = old_epoch
        return None, self.next_step

    def _drain(self, epoch: int) -> Callable[[], Any]:
        if "the old epoch is not drained" in self._bugs:
            return lambda: (None, self.last_sent.get(epoch, 0))
        return lambda: (
            all(step.batch.header.epoch != epoch for step in self.in_flight.values())
            and (None, self.last_sent.get(epoch, 0))
        )

    def _end_patching(self) -> None:
        self.patching_epoch = None

    def _after(self) -> None:
        self._check_conditions()
        self.fill()
        self._check_conditions()  # scheduling a step may drop the last cached block that had to move

    def _check_conditions(self) -> None:
        for condition, call in list(self._conditions):
            answer = condition()
            if answer:
                self._conditions.remove((condition, call))
                self._send("coordinator", "answer", call, *(answer if isinstance(answer, tuple) else (None,)))

    # ------------------------------------------------------------------ steps

    def fill(self) -> None:
        """As many steps in flight as stages."""
        while not self.is_down and not self.is_held:
            patched_through = self.last_taken.get(self.patching_epoch or 0, 0)
            if "the gate is one step short" in self._bugs:
                patched_through = max(0, patched_through - 1)
            batch = self.scheduler.schedule(
                step=self.next_step,
                epoch=self.epoch,
                num_stages=self.layout.num_stages,
                now=self.now,
                patched_through=patched_through,
            )
            if batch is None:
                return
            step = self.in_flight[self.next_step] = self._make_step(batch)
            self.last_sent[self.epoch] = self.next_step
            self.next_step += 1
            for stage in self.layout.stages:
                self._send(stage, "data", "step", step)

    def receive(self, kind: str, step: ModelStep, is_alright: bool) -> None:
        assert kind == "result"
        header = step.batch.header
        if self.in_flight.pop(header.step, None) is None:
            return
        num_layers = self.routes[header.epoch].num_layers
        if is_alright and len(step.layers) != num_layers and "results are taken early" not in self._bugs:
            raise InvariantError(f"step {header.step} went through layers {step.layers}")
        self.last_taken[header.epoch] = header.step
        self.seen["steps"] += 1
        self.seen["steps of the old route after the switch"] += header.epoch != self.epoch
        self.seen["failed steps"] += not is_alright
        if is_alright:
            ends = np.cumsum(step.batch.num_new) - 1
            texts = step.written[0::2]
            tokens = [int(texts[ends[sample.row]]) % 1009 % VOCAB for sample in header.samples]
            self.scheduler.complete(header.step, tokens, now=self.now)
        else:
            self.scheduler.fail_step(header.step, now=self.now)
        self._after()

    def _make_step(self, batch: StepBatch) -> ModelStep:
        """The rows that each sequence of the step reads and writes, and what must be there."""
        rows: list[list[int]] = [[], []]
        values: list[list[int]] = [[], []]
        plan = self.scheduler._in_flight[batch.header.step]
        for i, chunk in enumerate(plan.chunks):
            table = batch.block_tables[i].tolist()
            num_computed = int(batch.num_computed[i])
            texts = self._texts_of(chunk.sequence, num_computed + chunk.num_new)
            for position, text in enumerate(texts):
                row = table[position // BLOCK_SIZE] * 2 * BLOCK_SIZE + position % BLOCK_SIZE
                is_new = position >= num_computed
                rows[is_new] += (row, row + BLOCK_SIZE)
                values[is_new] += (text, -text)
        reads, writes = (np.array(r, np.int64) for r in rows)
        expected, written = (np.array(v, np.int64) for v in values)
        signs = np.ones(len(reads) + len(writes), np.int64)
        signs[1::2] = -1
        return ModelStep(batch, reads, expected, writes, written, signs)

    def _texts_of(self, seq: Sequence, num: int) -> list[int]:
        texts = self._texts[seq]
        if len(texts) < num:
            text = texts[-1] if texts else 0
            for token in seq.tokens.view(len(texts), num).tolist():
                text = next_text(text, token)
                texts.append(text)
        return texts[:num]
