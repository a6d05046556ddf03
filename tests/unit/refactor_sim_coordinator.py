"""The coordinator of the simulated world: the real protocol's commands become messages, their answers events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from refactor_sim_router import ModelRouter
from refactor_sim_stage import Route

from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.refactor.commands import (
    BeginCopy,
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
    WaitCopied,
)
from flexpipe_serve.refactor.protocol import Refactoring, Transition


class World(Protocol):
    """What the coordinator needs of the world."""

    router: ModelRouter
    bugs: frozenset[str]

    def send(self, source: str, target: str, lane: str, *message: Any) -> None: ...
    def is_alive(self, stage: str) -> bool: ...
    def launch(self, stage: str) -> None: ...
    def end(self, stage: str, *, can_park: bool) -> None: ...
    def finish_router_calls(self) -> None: ...
    def end_others(self, layout: Layout) -> None: ...
    def on_finish(self, transition: Transition, finish: Finish) -> None: ...
    def on_rebuilt(self, layout: Layout) -> None: ...


@dataclass
class _Rebuilding:
    """Bringing a layout up from tokens, for a refactoring's command or on the engine's own account."""

    layout: Layout
    command: Rebuild | None
    num_tries: int = 0
    calls: set[int] = field(default_factory=set)
    epoch: int = 0


def routes_of(layout: Layout, epoch: int, incoming: dict[str, Any] | None = None) -> dict[str, Route]:
    """Each stage's route."""
    nexts = [*layout.stages[1:], "router"]
    return {
        part.stage: Route(
            epoch=epoch,
            layers=part.layers,
            is_first=i == 0,
            next=nexts[i],
            is_last=i == layout.num_stages - 1,
            incoming=tuple((incoming or {}).get(part.stage, ())),
        )
        for i, part in enumerate(layout.slices)
    }


class ModelCoordinator:
    """Drives one refactoring at a time, and rebuilds the pipeline where stages are lost."""

    def __init__(self, world: World, *, num_blocks: int) -> None:
        self._world = world
        self._num_blocks = num_blocks
        self.machine: Refactoring | None = None
        self.rebuilding: _Rebuilding | None = None
        self.last_epoch = 0
        self.layout: Layout | None = None
        """In force, or to be brought up."""
        self.call_faults: dict[str, int] = {}
        """'lose' or 'late': how many of the next calls to stages."""
        self.max_bytes_per_s = 1e12
        self.past_events: list[Event] = []
        self._calls: dict[int, Command | None] = {}
        """Those without an answer."""
        self._stage_of: dict[int, str] = {}
        self._next_call = 0

    # ------------------------------------------------------------------ for the world

    def start(self, layout: Layout) -> None:
        self.layout = layout
        self._begin_rebuild(layout, None)

    @property
    def is_idle(self) -> bool:
        return self.machine is None and self.rebuilding is None

    def begin(self, transition: Transition) -> None:
        self.machine = Refactoring(transition)
        self._carry_out(self.machine.start())

    def tell(self, event: Event) -> None:
        self.past_events.append(event)
        if self.machine is not None:
            self._carry_out(self.machine.handle(event))

    def receive(self, number: int, error: str | None, value: int = 0) -> None:
        """An answer to a call; who answers second is not heard."""
        if number not in self._calls:
            return
        command = self._calls.pop(number)
        self._stage_of.pop(number, None)
        if self.rebuilding is not None and number in self.rebuilding.calls:
            self._on_rebuild_answer(number, error)
        elif command is not None:
            self.tell(_event(command, error, value))

    def on_dead(self, stage: str) -> None:
        """Its calls fail."""
        for number in [number for number, name in self._stage_of.items() if name == stage]:
            self._world.send("coordinator", "coordinator", "answer", number, "the stage is lost")

    def let_time_pass(self) -> bool:
        """Nothing goes on any more: who waits for a copy that lost a message waits until its time is over."""
        waiting = [number for number, command in self._calls.items() if isinstance(command, WaitCopied)]
        for number in waiting:
            self._world.send("coordinator", "coordinator", "answer", number, "no answer in time")
        return bool(waiting)

    def on_lost(self, stage: str) -> None:
        """The failure detector."""
        if self.machine is not None:
            self.tell(StageLost(stage, "killed"))
        elif self.rebuilding is None and self.layout is not None and stage in self.layout.stages:
            self._begin_rebuild(self.layout, None)

    # ------------------------------------------------------------------ commands

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Finish):
                self._finish(command)
            elif isinstance(command, Rebuild):
                self._begin_rebuild(command.layout, command)
            else:
                self._issue(command)

    def _issue(self, command: Command) -> None:
        assert self.machine is not None
        t, bugs = self.machine.transition, self._world.bugs
        old_epoch = t.old_epoch if t.copies else None
        match command:
            case Launch(stage):
                self._world.launch(stage)
                self._to_stage(command, stage, "report")
            case Prepare(stage, num_blocks):
                incoming = [(move.source, move.layers) for move in t.copies if move.target == stage]
                route = routes_of(t.new, t.epoch, {stage: incoming})[stage]
                if "blocks are listed too early" in bugs:
                    self._to_router(None, "note_blocks")
                self._to_stage(command, stage, "prepare", route, num_blocks, False)
            case ResizeKV(stage, num_blocks):
                self._to_stage(command, stage, "resize_kv", num_blocks)
            case WaitCopied(stage, through_step):
                if through_step and "patches are not awaited" in bugs:
                    through_step = 0
                self._to_stage(command, stage, "wait_copied", t.epoch, through_step, lane="wait")
            case Release(stage, epoch):
                if epoch == t.epoch and stage not in t.new.stages and "an abort forgets who gives" in bugs:
                    self._world.send("coordinator", "coordinator", "answer", self._new_call(command), None)
                    return
                self._to_stage(command, stage, "release", epoch)
            case EndStage(stage, can_park):
                self._world.end(stage, can_park=can_park)
                self._world.send("coordinator", "coordinator", "answer", self._new_call(command), None)
            case BeginCopy(move):
                self._to_router(command, "begin_copy", move, t.old_epoch, t.epoch, self.max_bytes_per_s)
            case Pause() | Resume():
                self._to_router(command, type(command).__name__.lower())
            case Shrink(num_blocks) | Grow(num_blocks):
                self._to_router(command, type(command).__name__.lower(), num_blocks)
            case Switch():
                self._to_router(command, "switch", t.new, t.epoch, old_epoch)
                if "capacity grows at the switch" in bugs:
                    self._to_router(None, "grow", t.num_blocks_after)
            case Drain():
                self._to_router(command, "drain", t.old_epoch)
            case EndPatching():
                self._to_router(command, "end_patching")
            case _:
                raise AssertionError(command)

    def _to_router(self, command: Command | None, method: str, *args: Any) -> None:
        self._world.send("coordinator", "router", "control", self._new_call(command), method, *args)

    def _to_stage(self, command: Command | None, stage: str, method: str, *args: Any, lane: str = "control") -> int:
        number = self._new_call(command)
        self._stage_of[number] = stage
        fault = next((f for f, num in self.call_faults.items() if num and command is not None), None)
        if not self._world.is_alive(stage):
            self._world.send("coordinator", "coordinator", "answer", number, "the stage is lost")
            return number
        if fault is not None:
            self.call_faults[fault] -= 1
            self._world.send("coordinator", "coordinator", "answer", number, "no answer in time")
        if fault != "lose":
            self._world.send("coordinator", stage, lane, number, method, *args)
        return number

    def _new_call(self, command: Command | None) -> int:
        self._next_call += 1
        self._calls[self._next_call] = command
        return self._next_call

    def _finish(self, finish: Finish) -> None:
        assert self.machine is not None
        transition, self.machine = self.machine.transition, None
        self.layout = finish.layout
        if not finish.is_rebuilt or not all(self._world.is_alive(stage) for stage in finish.layout.stages):
            self._begin_rebuild(finish.layout, None)
        else:
            if finish.num_blocks is not None:
                self._num_blocks = finish.num_blocks
            self._world.on_finish(transition, finish)

    # ------------------------------------------------------------------ rebuilding

    def _begin_rebuild(self, layout: Layout, command: Rebuild | None) -> None:
        self._world.finish_router_calls()
        self._world.router.lose_all()
        self._world.end_others(layout)
        self.rebuilding = _Rebuilding(layout, command)
        self._try_rebuild()

    def _try_rebuild(self) -> None:
        rebuilding = self.rebuilding
        assert rebuilding is not None
        rebuilding.num_tries += 1
        self.last_epoch += 1
        rebuilding.epoch = self.last_epoch
        rebuilding.calls.clear()
        for stage, route in routes_of(rebuilding.layout, self.last_epoch).items():
            self._world.launch(stage)
            rebuilding.calls.add(self._to_stage(None, stage, "prepare", route, self._num_blocks, True))

    def _on_rebuild_answer(self, number: int, error: str | None) -> None:
        rebuilding = self.rebuilding
        assert rebuilding is not None
        rebuilding.calls.remove(number)
        if error is not None:
            if rebuilding.command is not None and rebuilding.num_tries == 2:
                self.rebuilding = None
                self.tell(Failed(rebuilding.command, error))
            else:
                self._try_rebuild()
        elif not rebuilding.calls:
            self.rebuilding = None
            self._world.router.bring_up(rebuilding.layout, rebuilding.epoch, self._num_blocks)
            self._world.on_rebuilt(rebuilding.layout)
            if rebuilding.command is not None:
                self.tell(Done(rebuilding.command))
            elif not all(self._world.is_alive(stage) for stage in rebuilding.layout.stages):
                self._begin_rebuild(rebuilding.layout, None)


def _event(command: Command, error: str | None, value: int) -> Event:
    if error is not None:
        return Failed(command, error)
    if isinstance(command, Switch):
        return Switched(value)
    return Drained(value) if isinstance(command, Drain) else Done(command)
