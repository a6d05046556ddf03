"""Stage cores in threads, and a Router made of nothing but messages."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.pipeline.channel import Endpoint, Outlet
from flexpipe_serve.pipeline.inbox import Inbox, connect
from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    ResultHeader,
    SampleSpec,
    StepBatch,
    StepHeader,
    decode_header,
    decode_tokens,
)
from flexpipe_serve.pipeline.stage import Stage
from flexpipe_serve.pipeline.stage_types import Assignment, Incoming, StageSetup, folder_key

NODE = "local"
BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_BLOCKS = 128
_ANSWER_S = 60.0

Part = tuple[str, int, int]
"""Stage, first layer, first layer behind."""
Taken = tuple[str, Sequence[int]]
"""Source of incoming KV, and the layers."""


@dataclass
class FakeSequence:
    """A sequence as a scheduler sees it."""

    tokens: list[int]
    blocks: list[int]
    num_computed: int = 0
    logprobs: list[float] = field(default_factory=list)


class Harness:
    """Stages of one application, and the Router's side of any number of epochs."""

    def __init__(self, model: Path, *, num_layers: int = 4, **setup: Any) -> None:
        self.num_layers = num_layers
        self.setup = StageSetup(
            **{
                "name": "",
                "domain_key": uuid.uuid4().hex,
                "model_path": str(model),
                "max_model_len": 64,
                "dtype": "float32",
                "device": "cpu",
                "attention": "auto",
                "block_size": BLOCK_SIZE,
                "max_blocks": MAX_BLOCKS,
                "num_work_tokens": 64,
                "orphan_timeout_s": 60.0,
                "linear": "plain",
                **setup,
            }
        )
        self.folder = DomainFolder(folder_key(self.setup.domain_key, NODE))
        self.inbox = Inbox("router", folder=self.folder.path, node=NODE)
        self.stages: dict[str, Stage] = {}
        self._threads: dict[str, threading.Thread] = {}
        self.routes: dict[int, dict[str, Outlet]] = {}
        self.next_step = 1
        self._free = list(range(NUM_BLOCKS))

    def launch(self, *names: str) -> None:
        for name in names:
            stage = Stage(StageSetup(**{**_fields(self.setup), "name": name}), node=NODE)
            self.stages[name] = stage
            self._threads[name] = threading.Thread(target=stage.run, daemon=True)
            self._threads[name].start()

    def assignments(
        self,
        epoch: int,
        parts: Sequence[Part],
        incoming: Mapping[str, Sequence[tuple[str, Sequence[int]]]] | None = None,
    ) -> dict[str, Assignment]:
        endpoints = [self.stages[name].report().endpoint for name, _, _ in parts[1:]]
        return {
            name: Assignment(
                epoch=epoch,
                start=start,
                stop=stop,
                is_first=start == 0,
                is_last=stop == self.num_layers,
                next=next_,
                incoming=tuple(
                    Incoming(source=source, endpoint=self.endpoint(source), layers=tuple(layers))
                    for source, layers in (incoming or {}).get(name, ())
                ),
            )
            for (name, start, stop), next_ in zip(parts, [*endpoints, self.inbox.endpoint], strict=True)
        }

    def endpoint(self, name: str) -> Endpoint:
        return self.stages[name].report().endpoint

    def connect(self, epoch: int, parts: Sequence[Part]) -> None:
        self.routes[epoch] = {name: connect(self.endpoint(name), node=NODE) for name, _, _ in parts}

    def start(self, *parts: Part, epoch: int = 1) -> None:
        """Bring a layout up."""
        for name, _, _ in parts:
            if name not in self.stages:
                self.launch(name)
        assignments = self.assignments(epoch, parts)
        for name, assignment in assignments.items():
            self.stages[name].prepare(assignment, num_blocks=0, fresh=True)
        for name in assignments:
            self.stages[name].resize_kv(NUM_BLOCKS)
        self.connect(epoch, parts)

    def add(self, epoch: int, *parts: Part, **incoming: Sequence[Taken]) -> None:
        """Prepare a layout beside those that run."""
        for name, _, _ in parts:
            if name not in self.stages:
                self.launch(name)
        names = {name.replace("_", "-"): value for name, value in incoming.items()}
        for name, assignment in self.assignments(epoch, parts, names).items():
            self.stages[name].prepare(assignment, num_blocks=NUM_BLOCKS, fresh=False)
        self.connect(epoch, parts)

    def sequence(self, tokens: Sequence[int], *, num_tokens: int) -> FakeSequence:
        """A sequence with room for ``num_tokens``."""
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        # From the end and shuffled a little: block ids mean nothing.
        blocks = [self._free.pop(-1 - 2 * (i % 2)) for i in range(num_blocks)]
        return FakeSequence(list(tokens), blocks)

    def send(
        self,
        epoch: int,
        seqs: Sequence[FakeSequence] = (),
        *,
        copies: Sequence[tuple[int, int]] = (),
        patched_through: int = 0,
        only: Sequence[str] | None = None,
        corrupt: bool = False,
    ) -> int:
        """Send a step that computes all that is missing of ``seqs`` and samples greedily. Returns its number."""
        step, self.next_step = self.next_step, self.next_step + 1
        batch = make_batch(epoch, step, seqs, copies=copies, patched_through=patched_through)
        frames = batch.encode()
        if corrupt:
            frames = frames[:-1]
        for name, outlet in self.routes[epoch].items():
            if only is None or name in only:
                outlet.send(frames)
        return step

    def answer(self, timeout_s: float = _ANSWER_S) -> tuple[ResultHeader | FailureHeader, list[int]]:
        """The next message to the Router."""
        frames = self.inbox.receive(timeout_s)
        assert frames is not None, "no answer came"
        header = decode_header(frames[0])
        assert isinstance(header, ResultHeader | FailureHeader), header
        return header, decode_tokens(frames[1]) if isinstance(header, ResultHeader) else []

    def step(self, epoch: int, seqs: Sequence[FakeSequence], **options: Any) -> ResultHeader:
        """Send a step and take its result into the sequences."""
        number = self.send(epoch, seqs, **options)
        header, tokens = self.answer()
        assert isinstance(header, ResultHeader), header
        assert (header.epoch, header.step) == (epoch, number)
        take(seqs, header, tokens)
        return header

    def close(self) -> None:
        for outlets in self.routes.values():
            for outlet in outlets.values():
                outlet.close()
        for name in list(self.stages):
            self.stop(name)
        self.inbox.close()
        path = self.folder.path
        self.folder.close()
        assert not path.exists(), "something was left behind"

    def stop(self, name: str) -> None:
        self.stages.pop(name).close()
        self._threads.pop(name).join()

    def segment_files(self) -> set[str]:
        return {path.name for path in self.folder.path.glob("*.kv")}


def make_batch(
    epoch: int,
    step: int,
    seqs: Sequence[FakeSequence],
    *,
    copies: Sequence[tuple[int, int]] = (),
    patched_through: int = 0,
) -> StepBatch:
    """The step that computes all tokens of ``seqs`` that are not computed yet."""
    num_new = [len(seq.tokens) - seq.num_computed for seq in seqs]
    width = max((len(seq.blocks) for seq in seqs), default=0)
    tables = np.zeros((len(seqs), width), np.int32)
    for row, seq in zip(tables, seqs, strict=True):
        row[: len(seq.blocks)] = seq.blocks
    samples = tuple(SampleSpec(row=row, position=len(seq.tokens), num_logprobs=0) for row, seq in enumerate(seqs))
    return StepBatch(
        header=StepHeader(
            epoch=epoch,
            step=step,
            num_seqs=len(seqs),
            num_tokens=sum(num_new),
            table_width=width,
            num_threads=1,
            copies=tuple(copies),
            patched_through=patched_through,
            samples=samples,
        ),
        token_ids=np.array([token for seq in seqs for token in seq.tokens[seq.num_computed :]], np.int32),
        num_computed=np.array([seq.num_computed for seq in seqs], np.int32),
        num_new=np.array(num_new, np.int32),
        block_tables=tables,
        histories=np.empty(0, np.int32),
        targets=np.empty(0, np.int32),
    )


def take(seqs: Sequence[FakeSequence], header: ResultHeader, tokens: Sequence[int]) -> None:
    """Append a step's tokens and the bits of their log probabilities."""
    for seq, token, logprob in zip(seqs, tokens, header.logprobs, strict=True):
        assert logprob is not None
        seq.num_computed = len(seq.tokens)
        seq.tokens.append(token)
        seq.logprobs.append(logprob.logprob)


def _fields(setup: StageSetup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in setup.__dataclass_fields__}


@contextlib.contextmanager
def harness(model: Path, **setup: Any) -> Iterator[Harness]:
    """A harness whose stages end with the block."""
    made = Harness(model, **setup)
    try:
        yield made
    finally:
        made.close()
