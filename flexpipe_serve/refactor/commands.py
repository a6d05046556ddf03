"""What a refactoring asks its coordinator to do, and what the coordinator tells it: frozen values.

The rule for the coordinator is one: carry out every command, and answer it **exactly once**, with :class:`Done` when
it is carried out or :class:`Failed` when it was not. Two commands have answers of their own instead of Done, because
the machine needs a number: ``Switch`` (:class:`Switched`) and ``Drain`` (:class:`Drained`). ``Finish`` is not answered.

No command may stay unanswered for ever: the coordinator gives each a time limit and answers ``Failed`` behind it.
Answers may come in any order; repeated ones are ignored, and those to commands that an abort has made pointless.

Order: commands to one stage are carried out in the order issued, and so are those for the scheduler and the engine
thread. Only ``WaitCopied`` runs beside the others (a ``Release`` ends it). A stage must ignore a ``CopyHeader`` whose
new epoch it has released, or whose old epoch it does not serve: that message comes on the data channel and may arrive
behind the ``Release`` of an abort.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.refactor.moves import Move
from flexpipe_serve.refactor.record import Outcome

# ---------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Launch:
    """Have a stage of this name: take it from the pool or start it. Done when it answers."""

    stage: str


@dataclass(frozen=True)
class Pause:
    """Scheduler: send no more steps. Done when no step is in flight."""


@dataclass(frozen=True)
class Resume:
    """Scheduler: send steps again. Also ends a ``Pause`` whose steps are still in flight."""


@dataclass(frozen=True)
class Shrink:
    """Scheduler: hand out no block id from ``num_blocks`` on and move the used ones down, by copies that ride in steps.

    Done when the results of all those steps are there, so that no stage touches those blocks any more. Failed when the
    sequences need more blocks than that.
    """

    num_blocks: int


@dataclass(frozen=True)
class Grow:
    """Scheduler: hand out all block ids below ``num_blocks``. Also ends a ``Shrink`` under way.

    Done when no step in flight copies blocks any more (``Scheduler.is_shrunk``): a step that took another route could
    otherwise read a block before an older step has moved it, and a copy of KV must not meet one.
    """

    num_blocks: int


@dataclass(frozen=True)
class ResizeKV:
    """Stage: ``resize_kv(num_blocks)``."""

    stage: str
    num_blocks: int


@dataclass(frozen=True)
class Prepare:
    """Stage: ``prepare(its assignment of the new epoch, num_blocks=num_blocks, fresh=False)``.

    Its ``incoming`` are the copied moves that have the stage as their target. All stages are launched by then, so that
    all endpoints are known.
    """

    stage: str
    num_blocks: int


@dataclass(frozen=True)
class BeginCopy:
    """Engine thread: send the source a ``CopyHeader`` on the old route, with the blocks that hold KV at that moment
    (used and cached). Done when it is sent."""

    move: Move


@dataclass(frozen=True)
class WaitCopied:
    """Stage: ``wait_copied(new epoch, through_step=through_step)``."""

    stage: str
    through_step: int


@dataclass(frozen=True)
class Switch:
    """Engine thread, at a step boundary: steps scheduled from now on take the new route and the new epoch, and their
    ``patched_through`` is the newest step of the old epoch whose result has been taken (0 where nothing is copied).

    Answered by :class:`Switched`, at once: a paused or idle scheduler sends its next step whenever. Failed only if
    nothing was switched.
    """


@dataclass(frozen=True)
class Drain:
    """Router: wait until no step of the old epoch is in flight. Answered by :class:`Drained`."""


@dataclass(frozen=True)
class EndPatching:
    """Engine thread: ``patched_through`` is 0 from the next step on."""


@dataclass(frozen=True)
class Release:
    """Stage: ``release(epoch)``. The machine sends it also to stages that only gave layers, and to stages whose
    ``prepare`` failed or has not answered yet: calls to one stage are carried out in the order sent."""

    stage: str
    epoch: int


@dataclass(frozen=True)
class EndStage:
    """Put a stage that holds no layer any more into the pool, or end it.

    Its launch may still be under way, or it may be lost or unknown: then there is nothing to do. Done when its memory
    is free (or it is in the pool).
    """

    stage: str
    can_park: bool
    """It answered, has released every epoch, and may go into the pool; else it must be ended."""


@dataclass(frozen=True)
class Rebuild:
    """The way out when KV is lost, the same that the engine takes when a stage dies unasked.

    Send no more steps and forget those in flight; end every stage that is not in ``layout``, launch those that are
    missing, ``prepare(fresh=True)`` all under an epoch of its own, with as many blocks as fit; reset the scheduler to
    these, so that sequences are replayed from their tokens; send steps again, also if the scheduler was paused. Done
    when that is so. Stages lost meanwhile are the rebuilder's affair: it starts them again, or fails.
    """

    layout: Layout


@dataclass(frozen=True)
class Finish:
    """The refactoring is over; nothing else follows."""

    outcome: Outcome
    """DONE, ABORTED or RECOVERED."""
    error: str | None
    """Why it was aborted or had to recover, or what went wrong though it was done."""
    num_blocks: int | None
    """The scheduler's capacity; None: what the last ``Rebuild`` found."""
    is_rebuilt: bool
    """False: a ``Rebuild`` failed, no pipeline runs, and the engine must go on trying to bring ``layout`` up."""
    layout: Layout
    """The layout in force."""


Command = (
    Launch | Pause | Resume | Shrink | Grow | ResizeKV | Prepare | BeginCopy | WaitCopied | Switch | Drain | EndPatching
    | Release | EndStage | Rebuild | Finish
)  # fmt: skip


def describe(command: Command) -> str:
    """What was being done, for messages."""
    match command:
        case Launch(stage):
            return f"starting stage {stage!r}"
        case Prepare(stage):
            return f"preparing stage {stage!r}"
        case ResizeKV(stage, num_blocks):
            return f"resizing the KV of stage {stage!r} to {num_blocks} blocks"
        case BeginCopy(move):
            return f"beginning the copy from stage {move.source!r} to {move.target!r}"
        case WaitCopied(stage):
            return f"copying KV to stage {stage!r}"
        case Release(stage, epoch):
            return f"releasing epoch {epoch} on stage {stage!r}"
        case EndStage(stage):
            return f"ending stage {stage!r}"
        case Shrink(num_blocks):
            return f"shrinking the KV to {num_blocks} blocks"
        case Rebuild(layout):
            return f"rebuilding {layout.num_stages} stages"
        case _:
            return type(command).__name__.lower()


# ---------------------------------------------------------------------- events


@dataclass(frozen=True)
class Done:
    """The command is carried out."""

    command: Command


@dataclass(frozen=True)
class Failed:
    """The command was not carried out, or nobody knows."""

    command: Command
    reason: str


@dataclass(frozen=True)
class Switched:
    """Answer to ``Switch``."""

    step: int
    """The first step that takes the new route (not necessarily sent yet)."""


@dataclass(frozen=True)
class Drained:
    """Answer to ``Drain``."""

    last_step: int
    """The last step sent on the old route; 0: there was none."""


@dataclass(frozen=True)
class StageLost:
    """A stage ended unasked. Comes in addition to the failure of its commands, in any order with them."""

    stage: str
    reason: str


@dataclass(frozen=True)
class CancelRequested:
    """Somebody wants it aborted; ignored from the switch on."""

    reason: str


@dataclass(frozen=True)
class TimedOut:
    """The time to the switch is over; ignored from the switch on."""

    seconds: float


Event = Done | Failed | Switched | Drained | StageLost | CancelRequested | TimedOut
