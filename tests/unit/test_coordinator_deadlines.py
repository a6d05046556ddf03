"""A coordinator that looks for late answers while answers come; and when stages load without rests."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flexpipe_serve.pipeline.channel import Endpoint
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.pipeline.stage_types import Assignment
from flexpipe_serve.refactor.commands import Failed, Pause, Release
from flexpipe_serve.refactor.coordinator import Coordinator
from flexpipe_serve.refactor.protocol import Transition
from flexpipe_serve.refactor.record import Mode


def make_coordinator(*, mode: Mode = Mode.LIVE, hurry: bool = False, pipeline: Any = None) -> Coordinator:
    transition = Transition(
        old=make_layout(num_layers=4, boundaries=[2]),
        new=make_layout(num_layers=4, boundaries=[1]),
        old_epoch=1,
        epoch=2,
        mode=mode,
        copies=(),
        num_blocks=8,
        num_blocks_during=8,
        num_blocks_after=8,
    )
    return Coordinator(
        transition,
        record=cast(Any, SimpleNamespace(plan=SimpleNamespace(moves=()))),
        pipeline=pipeline,
        step_loop=cast(Any, None),
        max_bytes_per_s=1.0,
        timeout_s=60.0,
        max_spare=lambda stage: 0,
        node_of={},
        hurry=hurry,
        rebuild=lambda layout: 0,
    )


class AnsweredMeanwhile(float):
    """A deadline during whose check an answer to another command comes."""

    on_look: Any = None

    def __lt__(self, other: float) -> bool:
        self.on_look()
        return float(self) < other


def test_an_answer_during_the_look_is_no_error() -> None:
    coordinator = make_coordinator()
    deadline = AnsweredMeanwhile(time.monotonic() - 1)
    answered = Release("stage-0", 1)
    deadline.on_look = lambda: coordinator._deadlines.pop(answered, None)
    coordinator._deadlines = {Pause(): deadline, answered: time.monotonic() - 1}
    assert coordinator._next_event() == Failed(Pause(), "no answer in time")
    assert coordinator._deadlines == {}


def test_a_command_that_was_answered_is_not_late() -> None:
    coordinator = make_coordinator()
    late, answered = Pause(), Release("stage-0", 1)
    deadline = AnsweredMeanwhile(time.monotonic() - 1)
    deadline.on_look = lambda: coordinator._deadlines.pop(late, None)
    coordinator._deadlines = {late: deadline, answered: time.monotonic() - 1}
    assert coordinator._next_event() == Failed(answered, "no answer in time")


@pytest.mark.parametrize(
    ("mode", "hurry", "expected"),
    [(Mode.LIVE, False, False), (Mode.LIVE, True, True), (Mode.WEIGHTS_ONLY, False, False), (Mode.SYNC, False, True)],
)
def test_stages_load_without_rests_where_steps_wait_for_them(mode: Mode, hurry: bool, expected: bool) -> None:
    """With a second pipeline on the machine a synchronous refactoring would be stopped by rests for that one's sake."""
    told: list[bool] = []
    part = Assignment(epoch=2, start=0, stop=1, is_first=True, is_last=False, next=Endpoint("", ""))
    pipeline = SimpleNamespace(
        assignments=lambda *_: {"stage-0": part},
        stage=lambda _: SimpleNamespace(prepare=lambda assignment, **_: told.append(assignment.hurry)),
    )
    make_coordinator(mode=mode, hurry=hurry, pipeline=pipeline)._prepare("stage-0", 8)
    assert told == [expected]
