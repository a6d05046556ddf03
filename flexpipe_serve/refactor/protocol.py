"""The life of a refactoring as one pure state machine: events in, commands out (see commands.py for both).

A script of batches. All commands of a batch are issued together; when the last one is answered, the next batch is. A
failure, a lost stage, a cancellation or the time limit replaces the rest of the script: before the switch by the one
that undoes what was done, after it (or where KV of the layout in force is lost) by rebuilding from tokens.

Live::

    PREPARE  Shrink (if the union needs it) and Launch | ResizeKV on the old stages | Prepare on the new ones
    COPY     BeginCopy of each copied move | WaitCopied(0) on their targets
    MIRROR   nothing to ask for: patches follow step by step
    SWITCH   Switch
    RETIRE   Drain | WaitCopied(last old step) on the targets | EndPatching | Release the old epoch on the old stages |
             EndStage of those without layers | ResizeKV on the new stages | Grow

``weights_only`` pauses before COPY and ``sync`` before launching, both until the switch; ``restart`` pauses, then
rebuilds.
A ``sync`` shrinks before it pauses, because the copies of a shrink ride in steps.

What holds at every moment:

* capacity shrinks before the first Prepare and grows only when the old epoch (or, aborting, the new one) is released
  everywhere, so the budget is never overdrawn and capacity is constant from COPY to SWITCH;
* the old epoch is released nowhere before every target has all patches through its last step;
* the new epoch is released, aborting, on every stage that was ever told of it, also on those that only give layers;
* nothing but Switch decides which layout is in force: before it is issued all ends in the old one, from then on in the
  new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.refactor.commands import (
    BeginCopy,
    CancelRequested,
    Command,
    Done,
    Drain,
    Drained,
    EndPatching,
    EndStage,
    Event,
    Failed,
    Finish,
    Grow,
    Launch,
    Pause,
    Prepare,
    Rebuild,
    Release,
    ResizeKV,
    Resume,
    Shrink,
    StageLost,
    Switch,
    Switched,
    TimedOut,
    WaitCopied,
    describe,
)
from flexpipe_serve.refactor.moves import Move
from flexpipe_serve.refactor.record import Mode, Outcome, Phase


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What is to be done: the numbers of a plan that was found feasible."""

    old: Layout
    new: Layout
    old_epoch: int
    epoch: int
    """Of the new layout; never used before."""
    mode: Mode
    copies: tuple[Move, ...]
    """The moves between domains; the others need nothing."""
    num_blocks: int
    """KV capacity now."""
    num_blocks_during: int
    """At most ``num_blocks``."""
    num_blocks_after: int
    """At least ``num_blocks_during``."""


class _Course(Enum):
    FORWARD = auto()
    """Before the switch: a failure undoes."""
    COMMITTED = auto()
    """The switch was issued: a failure rebuilds the new layout."""
    UNDOING = auto()
    REBUILDING = auto()


_Batch = tuple[Phase | None, Callable[[], Sequence[Command]]]


class Refactoring:
    """One refactoring. Call :meth:`start` once, then :meth:`handle` for every event, in one thread; carry out the
    commands in the order given, for each stage and for the engine thread. After ``Finish`` nothing more comes."""

    def __init__(self, transition: Transition) -> None:
        self.transition = transition
        self.phase = Phase.PLAN
        """The present or the last one; it stays while undoing or rebuilding."""
        self.error: str | None = None
        """Why it is being aborted or had to recover, or what else went wrong."""
        self.outcome = Outcome.RUNNING
        self.switch_step: int | None = None
        """First step on the new route."""
        self._course = _Course.FORWARD
        self._script: deque[_Batch] = deque()
        self._pending: dict[Command, None] = {}  # in the order issued
        self._issued: dict[Command, None] = {}
        self._answers: set[Command] = set()
        self._lost: set[str] = set()
        self._unclean: set[str] = set()
        self._is_patched = False
        self._is_rebuilt = True
        self._resize_failed = False
        self._num_blocks: int | None = transition.num_blocks
        self._layout = transition.old

    # ------------------------------------------------------------------ to look at

    @property
    def is_over(self) -> bool:
        """Whether ``Finish`` was issued."""
        return self.outcome is not Outcome.RUNNING

    @property
    def can_cancel(self) -> bool:
        """Whether ``CancelRequested`` and ``TimedOut`` would still abort it."""
        return self._course is _Course.FORWARD and not self.is_over

    @property
    def is_undoing(self) -> bool:
        """Whether it has been aborted and puts things back (or rebuilds)."""
        return self._course in (_Course.UNDOING, _Course.REBUILDING) and self.error is not None and not self.is_over

    @property
    def waiting_for(self) -> tuple[Command, ...]:
        """The commands whose answers it waits for."""
        return tuple(self._pending)

    # ------------------------------------------------------------------ to drive

    def start(self) -> list[Command]:
        """The first commands."""
        assert self.phase is Phase.PLAN, "start is called once"
        self._script.extend(self._restart_script() if self.transition.mode is Mode.RESTART else self._forward_script())
        return self._advance()

    def handle(self, event: Event) -> list[Command]:
        """The commands that follow from ``event``; none where it is late, repeated or of no concern."""
        if self.is_over:
            return []
        match event:
            case Done(command) if command in self._pending and not isinstance(command, Switch | Drain):
                return self._answered(command)
            case Switched(step) if Switch() in self._pending:
                self.switch_step = step
                self._layout = self.transition.new
                return self._answered(Switch())
            case Drained(last_step) if Drain() in self._pending:
                self._await_patches(last_step)
                return self._answered(Drain())
            case Failed(command, reason) if command in self._pending:
                del self._pending[command]
                return self._failed(command, f"{describe(command)} failed: {reason}")
            case StageLost(stage, reason):
                return self._stage_lost(stage, f"stage {stage!r} was lost: {reason}")
            case CancelRequested(reason) if self.can_cancel:
                return self._abort(f"cancelled: {reason}")
            case TimedOut(seconds) if self.can_cancel:
                return self._abort(f"not ready to switch after {seconds:g} s; it was in phase {self.phase}")
            case _:
                return []

    # ------------------------------------------------------------------ scripts

    def _forward_script(self) -> list[_Batch]:
        t = self.transition
        pause: list[_Batch] = [(None, lambda: [Pause()])]
        launches = [Launch(stage) for stage in t.new.stages if stage not in t.old.stages]
        shrink = [Shrink(t.num_blocks_during)] if t.num_blocks_during < t.num_blocks else []
        shrinks = [ResizeKV(stage, t.num_blocks_during) for stage in t.old.stages] if shrink else []
        targets = dict.fromkeys(move.target for move in t.copies)
        is_sync = t.mode is Mode.SYNC
        return [
            (Phase.PREPARE, lambda: shrink if is_sync else [*shrink, *launches]),
            *(pause if is_sync else []),
            (Phase.PREPARE, lambda: launches if is_sync else []),
            (Phase.PREPARE, lambda: shrinks),
            (Phase.PREPARE, lambda: [Prepare(stage, t.num_blocks_during) for stage in t.new.stages]),
            *(pause if t.mode is Mode.WEIGHTS_ONLY else []),
            (Phase.COPY, lambda: [BeginCopy(move) for move in t.copies]),
            (Phase.COPY, lambda: [WaitCopied(stage, 0) for stage in targets]),
            (Phase.MIRROR, lambda: []),
            (Phase.SWITCH, self._switch),
            (Phase.SWITCH, lambda: [Resume()] if Pause() in self._issued else []),
            (Phase.RETIRE, lambda: [Drain()]),  # followed by the patches of the old steps, see _await_patches
            (Phase.RETIRE, lambda: [EndPatching()] if t.copies else []),
            (Phase.RETIRE, self._release_old),
            (Phase.RETIRE, lambda: self._end_stages(set(t.old.stages) - set(t.new.stages))),
            *self._capacity_script(t.new.stages, since=t.num_blocks_during, to=t.num_blocks_after),
            (None, lambda: self._finish(Outcome.DONE)),
        ]

    def _restart_script(self) -> list[_Batch]:
        return [
            (Phase.PREPARE, lambda: [Pause()]),
            (Phase.SWITCH, lambda: self._begin_rebuild(self.transition.new)),
            (None, lambda: self._finish(Outcome.DONE)),
        ]

    def _undo_script(self) -> list[_Batch]:
        t = self.transition
        told = [c.stage for c in self._issued if isinstance(c, Prepare)]
        told += [s for c in self._issued if isinstance(c, BeginCopy) for s in (c.move.source, c.move.target)]
        launched = {c.stage for c in self._issued if isinstance(c, Launch)}
        resized = [stage for stage in t.old.stages if ResizeKV(stage, t.num_blocks_during) in self._issued]
        has_shrunk = Shrink(t.num_blocks_during) in self._issued
        return [
            (None, lambda: [Resume()] if Pause() in self._issued else []),
            (None, lambda: [Release(stage, t.epoch) for stage in sorted(set(told) - self._lost)]),
            (None, lambda: self._end_stages(launched)),
            *(self._capacity_script(resized, since=t.num_blocks_during, to=t.num_blocks) if has_shrunk else []),
            (None, lambda: self._finish(Outcome.ABORTED)),
        ]

    def _capacity_script(self, stages: Sequence[str], *, since: int, to: int) -> list[_Batch]:
        """Give ``stages`` room for more blocks and hand these out; where one cannot have it, all stay as they were."""

        def resize() -> list[Command]:
            self._num_blocks = since
            return [ResizeKV(stage, to) for stage in stages] if to > since else []

        def settle() -> list[Command]:
            if self._resize_failed:
                return [ResizeKV(stage, since) for stage in stages]
            if to == since:
                return []
            self._num_blocks = to
            return [Grow(to)]

        return [(None, resize), (None, settle)]

    # ------------------------------------------------------------------ batches

    def _switch(self) -> list[Command]:
        self._course = _Course.COMMITTED
        return [Switch()]

    def _await_patches(self, last_step: int) -> None:
        """Next: the targets' patches through the last old step."""
        targets = dict.fromkeys(move.target for move in self.transition.copies)
        self._script.appendleft((None, lambda: [WaitCopied(stage, last_step) for stage in targets]))

    def _release_old(self) -> list[Command]:
        self._is_patched = True
        return [Release(stage, self.transition.old_epoch) for stage in self.transition.old.stages]

    def _end_stages(self, stages: set[str]) -> list[Command]:
        """Also those that are lost: the news may be of a former stage of that name."""
        launching = {c.stage for c in self._issued if isinstance(c, Launch) and c not in self._answers}
        kept_out = self._lost | self._unclean | launching
        return [EndStage(stage, can_park=stage not in kept_out) for stage in sorted(stages)]

    def _begin_rebuild(self, layout: Layout) -> list[Command]:
        self._course = _Course.REBUILDING
        self._layout = layout
        self._num_blocks = None
        self._is_rebuilt = True
        return [Rebuild(layout)]

    def _finish(self, outcome: Outcome) -> list[Command]:
        self.outcome = outcome
        return [
            Finish(
                outcome=outcome,
                error=self.error,
                num_blocks=self._num_blocks,
                is_rebuilt=self._is_rebuilt,
                layout=self._layout,
            )
        ]

    # ------------------------------------------------------------------ transitions

    def _advance(self) -> list[Command]:
        """Issue batches until one has to be waited for."""
        issued: list[Command] = []
        while not self._pending and self._script:
            phase, make = self._script.popleft()
            self.phase = phase or self.phase
            batch = make()
            self._pending.update(dict.fromkeys(c for c in batch if not isinstance(c, Finish)))
            self._issued.update(dict.fromkeys(batch))
            issued += batch
        return issued

    def _answered(self, command: Command) -> list[Command]:
        del self._pending[command]
        self._answers.add(command)
        return self._advance()

    def _replace_script(self, script: Sequence[_Batch]) -> list[Command]:
        self._pending.clear()
        self._script = deque(script)
        return self._advance()

    def _abort(self, error: str) -> list[Command]:
        self._course = _Course.UNDOING
        self.error = error
        return self._replace_script(self._undo_script())

    def _rebuild(self, layout: Layout, outcome: Outcome, error: str) -> list[Command]:
        self._note(error)
        return self._replace_script(
            [(None, lambda: self._begin_rebuild(layout)), (None, lambda: self._finish(outcome))]
        )

    def _failed(self, command: Command, error: str) -> list[Command]:
        t = self.transition
        match self._course, command:
            case _Course.FORWARD, _:
                return self._abort(error)
            case _Course.COMMITTED, Switch():
                return self._abort(error)
            case _Course.REBUILDING, Rebuild(layout):
                if t.mode is Mode.RESTART and layout == t.new:
                    return self._rebuild(t.old, Outcome.ABORTED, error)
                self._is_rebuilt = False
            case ((_Course.COMMITTED | _Course.UNDOING), Release(stage)) if stage not in self._layout.stages:
                self._unclean.add(stage)  # and is ended now
                return self._advance()
            case ((_Course.COMMITTED | _Course.UNDOING), ResizeKV()):
                self._resize_failed = True
            case ((_Course.COMMITTED | _Course.UNDOING), (EndStage() | Grow())):
                pass
            case _Course.COMMITTED, _:
                return self._rebuild(t.new, Outcome.RECOVERED, error)
            case _:
                return self._rebuild(t.old, Outcome.ABORTED, error)
        self._note(error)
        return self._advance()

    def _stage_lost(self, stage: str, error: str) -> list[Command]:
        t = self.transition
        self._lost.add(stage)
        if stage not in (*t.old.stages, *t.new.stages) or self._course is _Course.REBUILDING:
            return []
        if self._course is _Course.COMMITTED:
            # Without a stage of the old layout alone one can do as soon as it has given all that it had to give.
            if stage in t.new.stages or not self._is_patched:
                return self._rebuild(t.new, Outcome.RECOVERED, error)
        elif stage in t.old.stages:
            return self._rebuild(t.old, Outcome.ABORTED, error)
        elif self._course is _Course.FORWARD:
            return self._abort(error)
        for command in [c for c in self._pending if isinstance(c, Release) and c.stage == stage]:
            del self._pending[command]
        return self._advance()

    def _note(self, error: str) -> None:
        self.error = error if self.error is None else f"{self.error}; {error}"
