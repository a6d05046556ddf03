"""A stage prepares a step before the hidden states come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_harness import NUM_BLOCKS, Harness, harness, make_batch, take

from flexpipe_serve.pipeline.messages import FailureHeader, ResultHeader
from flexpipe_serve.pipeline.prepared_step import PreparedStep, positions_of
from flexpipe_serve.pipeline.stage_types import Assignment
from flexpipe_serve.pipeline.step_compute import Hidden

PROMPT = [9, 4, 77, 23, 5, 61]


@pytest.fixture
def h(tied_model: Path) -> Iterator[Harness]:
    with harness(tied_model) as made:
        made.start(("stage-0", 0, 2), ("stage-1", 2, 4))
        yield made


def test_a_step_is_prepared_before_its_input_is_there(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = h.sequence(PROMPT, num_tokens=8)
    computer = h.stages["stage-1"].computer
    real, prepared = computer.prepare, threading.Event()

    def prepare(*args: Any, **kwargs: Any) -> PreparedStep:
        step = real(*args, **kwargs)
        prepared.set()
        return step

    monkeypatch.setattr(computer, "prepare", prepare)
    frames = make_batch(1, 1, [seq]).encode()
    h.routes[1]["stage-1"].send(frames)
    assert prepared.wait(10), "it waited for the stage before"
    assert h.inbox.receive(0.0) is None
    h.routes[1]["stage-0"].send(frames)
    header, tokens = h.answer()
    assert isinstance(header, ResultHeader)
    assert len(header.stage_seconds) == 2
    take([seq], header, tokens)


def test_a_step_that_cannot_be_prepared_fails_in_its_turn(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seq, other = (h.sequence(PROMPT, num_tokens=8) for _ in range(2))
    computer = h.stages["stage-1"].computer
    real = computer.prepare

    def prepare(batch: Any, **kwargs: Any) -> PreparedStep:
        if batch.header.step == 2:
            raise RuntimeError("poison")
        return real(batch, **kwargs)

    monkeypatch.setattr(computer, "prepare", prepare)
    sent = [h.send(1, [seq]), h.send(1, [other]), h.send(1, [other])]
    answers = [h.answer()[0] for _ in sent]
    assert [answer.step for answer in answers] == sent
    assert [type(answer) for answer in answers] == [ResultHeader, FailureHeader, ResultHeader]
    assert answers[1].message == "RuntimeError: poison"
    assert answers[1].stage == "stage-1"


def test_a_step_prepared_for_more_blocks_than_there_are_is_refused(h: Harness) -> None:
    """Its plan would read and write beyond the segments."""
    seq = h.sequence(PROMPT, num_tokens=8)
    stage = h.stages["stage-1"]
    computer = stage.computer
    assignment = Assignment(epoch=1, start=2, stop=4, is_first=False, is_last=True, next=h.inbox.endpoint)
    step = computer.prepare(make_batch(1, 1, [seq]), num_blocks=NUM_BLOCKS)
    given = Hidden(tensor=torch.zeros(len(PROMPT), computer.spec.hidden_size))
    with pytest.raises(ValueError, match="block_tables has"):
        computer.run(assignment, step, given, kv=stage._kv, num_blocks=min(seq.blocks), held_seconds=0.0)


def test_positions_of_chunks_and_decodes(h: Harness) -> None:
    seqs = [h.sequence(PROMPT, num_tokens=12) for _ in range(3)]
    for seq, num_computed in zip(seqs, (0, 2, 5), strict=True):
        seq.num_computed = num_computed
    assert positions_of(make_batch(1, 1, seqs)).tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 5]
    assert positions_of(make_batch(1, 1, seqs[2:])).tolist() == [5]
