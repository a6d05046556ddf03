"""The steps of one epoch on one stage: which may run, and how long a refactoring held it back. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

_Step = TypeVar("_Step")
_Input = TypeVar("_Input")


@dataclass(frozen=True)
class ReadyStep(Generic[_Step, _Input]):
    """A step that may run now."""

    number: int
    step: _Step
    given: _Input | None
    """What the stage before sent; None on a first stage."""
    held_seconds: float
    """Since all of its inputs were there."""


@dataclass(frozen=True)
class _Complete(Generic[_Step, _Input]):
    number: int
    step: _Step
    given: _Input | None
    patched_through: int
    since: float


class StepQueue(Generic[_Step, _Input]):
    """Steps run in the order in which their inputs are complete, which is the order sent: both the Router's messages
    and those of the stage before keep it. A step that must wait for patches holds up those behind it.

    Args:
        needs_input: a step runs on what the stage before sends; False on a first stage.
    """

    def __init__(self, *, needs_input: bool) -> None:
        self._needs_input = needs_input
        self._steps: dict[int, tuple[_Step, int]] = {}
        self._inputs: dict[int, _Input] = {}
        self._complete: deque[_Complete[_Step, _Input]] = deque()
        self._is_held = False
        self._opened = 0.0
        """When the last step that was held for patches was let go."""

    @property
    def has_complete(self) -> bool:
        """Whether a step has its inputs and has not been taken out."""
        return bool(self._complete)

    @property
    def next_waiting(self) -> tuple[_Step, int] | None:
        """The step whose input comes next, and the step of the epoch before up to which it needs patches; None while
        another one is complete, or has its input but no step."""
        if self._complete or self._inputs or not self._steps:
            return None
        return next(iter(self._steps.values()))

    def take_waiting(self) -> None:
        """Take :attr:`next_waiting` out: it got its input in another way."""
        del self._steps[next(iter(self._steps))]

    def add_step(self, number: int, step: _Step, *, patched_through: int, now: float) -> None:
        """The Router's message has come."""
        self._steps[number] = (step, patched_through)
        self._match(number, now)

    def add_input(self, number: int, given: _Input, *, now: float) -> None:
        """The message of the stage before has come."""
        self._inputs[number] = given
        self._match(number, now)

    def pop(self, is_patched: Callable[[int], bool], *, now: float) -> ReadyStep[_Step, _Input] | None:
        """The next step, taken out, if it may run.

        Args:
            is_patched: whether all patches up to a step of the epoch before are applied.
        """
        if not self._complete:
            return None
        if not is_patched(self._complete[0].patched_through):
            self._is_held = True
            return None
        if self._is_held:
            self._is_held = False
            self._opened = now
        head = self._complete.popleft()
        held = max(0.0, self._opened - head.since)
        return ReadyStep(number=head.number, step=head.step, given=head.given, held_seconds=held)

    def _match(self, number: int, now: float) -> None:
        if number not in self._steps or (self._needs_input and number not in self._inputs):
            return
        step, patched_through = self._steps.pop(number)
        given = self._inputs.pop(number, None)
        self._complete.append(_Complete(number, step, given, patched_through, now))
