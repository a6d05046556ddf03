"""A coordinator that looks for late answers while answers come."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.refactor.commands import Failed, Pause, Release
from flexpipe_serve.refactor.coordinator import Coordinator
from flexpipe_serve.refactor.protocol import Transition
from flexpipe_serve.refactor.record import Mode


def make_coordinator() -> Coordinator:
    transition = Transition(
        old=make_layout(num_layers=4, boundaries=[2]),
        new=make_layout(num_layers=4, boundaries=[1]),
        old_epoch=1,
        epoch=2,
        mode=Mode.LIVE,
        copies=(),
        num_blocks=8,
        num_blocks_during=8,
        num_blocks_after=8,
    )
    return Coordinator(
        transition,
        record=cast(Any, SimpleNamespace()),
        pipeline=cast(Any, None),
        step_loop=cast(Any, None),
        max_bytes_per_s=1.0,
        timeout_s=60.0,
        max_spare=lambda stage: 0,
        node_of={},
        hurry=False,
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
