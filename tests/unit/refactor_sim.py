"""One simulated history: stages, Router and coordinator in a network, and what is done to them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from refactor_sim_checks import check_router, check_stages
from refactor_sim_coordinator import ModelCoordinator
from refactor_sim_network import InvariantError, Network
from refactor_sim_router import ModelRouter
from refactor_sim_stage import ModelStage, Segment

from flexpipe_serve.kv import transfer_plan
from flexpipe_serve.pipeline.layout import Layout, make_layout
from flexpipe_serve.refactor.commands import CancelRequested, Finish, TimedOut
from flexpipe_serve.refactor.moves import moves_between, name_stages
from flexpipe_serve.refactor.protocol import Transition
from flexpipe_serve.refactor.record import Mode, Outcome, Phase

MAX_EVENTS = 6000


@dataclass(frozen=True)
class Op:
    """Something that happens: ``kind(*args)``, so many events after the start, or after a phase begins."""

    after: int
    phase: Phase | None
    kind: str
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        since = f"{self.after} events" + (f" into {self.phase}" if self.phase else "")
        return f"{since}: {self.kind}{self.args}"


@dataclass(frozen=True)
class History:
    """What determines a run."""

    seed: int
    num_layers: int
    boundaries: tuple[int, ...]
    domains: str
    """'shared', 'private' or 'nodes' (two)."""
    num_blocks: int
    has_pool: bool
    snapshot_bytes: int
    slow_lane: str
    """Whose messages take longer than others; '' for none."""
    ops: tuple[Op, ...]


class World:
    """Runs one history."""

    def __init__(self, history: History, *, bugs: frozenset[str] = frozenset()) -> None:
        self.history = history
        self.bugs = bugs
        self._rng = Random(history.seed)
        self.network = Network(self._rng, slow_lane=history.slow_lane)
        self.send = self.network.send
        self.router = ModelRouter(num_blocks=history.num_blocks, send=self._send_as("router"), bugs=bugs)
        self.coordinator = ModelCoordinator(self, num_blocks=history.num_blocks)
        self.stages: dict[str, ModelStage] = {}
        self.parked: set[str] = set()
        self.domains: dict[str, dict[int, Segment]] = {}
        self.num_events = 0
        self.outcomes: list[tuple[str, str]] = []
        """(mode, outcome) of each refactoring."""
        self.seen: Counter[str] = Counter()
        """What the history came by."""
        self.trace: deque[tuple[Any, ...]] = deque(maxlen=60)
        """What happened last, but for steps: (event, op) or (event, channel, message)."""
        self._phase: Phase | None = None
        self._phase_since = 0
        self._ops = list(history.ops)

    # ------------------------------------------------------------------ for the coordinator

    def is_alive(self, stage: str) -> bool:
        return stage in self.stages

    def launch(self, name: str) -> None:
        self.parked.discard(name)
        if name not in self.stages:
            domain = self.domains.setdefault(self.domain_of(name), {})
            self.stages[name] = ModelStage(name, domain=domain, send=self._send_as(name), bugs=self.bugs)

    def end(self, name: str, *, can_park: bool) -> None:
        if name in self.stages and can_park and self.history.has_pool:
            self.parked.add(name)
        elif name in self.stages:
            self._remove(name)

    def finish_router_calls(self) -> None:
        for message in self.network.take_all(("coordinator", "router", "control")):
            self.router.call(*message)

    def end_others(self, layout: Layout) -> None:
        for name in set(self.stages) - set(layout.stages) - self.parked:
            self._remove(name)

    def on_rebuilt(self, layout: Layout) -> None:
        self._check_stages(layout)

    def on_finish(self, transition: Transition, finish: Finish) -> None:
        self.outcomes.append((transition.mode.value, finish.outcome.value))
        self.seen[f"{finish.outcome} in {self._phase}"] += 1
        is_old = finish.outcome is Outcome.ABORTED
        if finish.layout != (transition.old if is_old else transition.new) or self.router.layout != finish.layout:
            raise InvariantError(f"{finish.outcome} with the layout {self.router.layout}")
        if finish.num_blocks not in (None, self.router.num_blocks):
            raise InvariantError(f"{finish.num_blocks} blocks reported, {self.router.num_blocks} there")
        if is_old and finish.num_blocks not in (None, transition.num_blocks) and "resizing" not in (finish.error or ""):
            raise InvariantError(f"aborted with {finish.num_blocks}, not {transition.num_blocks} blocks")
        self._check_stages(finish.layout)

    # ------------------------------------------------------------------ run

    def run(self) -> None:
        """To the end. Raises InvariantError (or whatever the code under test raises)."""
        history = self.history
        names = [f"stage-{i}" for i in range(len(history.boundaries) + 1)]
        self.coordinator.start(make_layout(num_layers=history.num_layers, boundaries=history.boundaries, stages=names))
        while self._step():
            self.num_events += 1
            if self.num_events > MAX_EVENTS:
                raise InvariantError(f"no end; waiting for {self._waiting_for()}")
        if not self.coordinator.is_idle:
            raise InvariantError(f"stuck; waiting for {self._waiting_for()}")
        check_router(self.router, is_over=True)
        self._check_stages(self.router.layout)
        self.seen.update(self.router.seen)
        for stage in self.stages.values():
            self.seen.update(stage.seen)

    def _step(self) -> bool:
        self._note_phase()
        for op in self._ops:
            if op.phase is not None and op.phase is not self._phase:
                continue
            since = 0 if op.phase is None else self._phase_since
            if self.num_events >= since + op.after and self._do(op):
                self._ops.remove(op)
                self.trace.append((self.num_events, op))
                return True
        self.router.now += 1
        givers = [s for s in self.stages.values() if s.givers and s.has_chunk(self.router.now)]
        if givers and self._rng.random() < 0.2:
            self._rng.choice(givers).send_chunk(self.router.now)
            return True
        found = self.network.deliver()
        if found is not None:
            self._deliver(*found)
            return True
        if givers:
            givers[0].send_chunk(self.router.now)
            return True
        return self._do_next() or (self.network.num_lost > 0 and self.coordinator.let_time_pass())

    def _do_next(self) -> bool:
        """Nothing goes on until something is done."""
        for op in self._ops:
            if op.phase is None and self._do(op):
                self._ops.remove(op)
                return True
        return False

    def _deliver(self, channel: tuple[str, str, str], message: Any) -> None:
        _, target, lane = channel
        if lane != "data":
            self.trace.append((self.num_events, channel, message))
        if target == "coordinator":
            if lane == "watch":
                self.coordinator.on_lost(*message)
            else:
                self.coordinator.receive(*message)
        elif target == "router":
            if lane == "control":
                self.router.call(*message)
            else:
                self.router.receive(*message)
        elif target in self.stages:
            if lane in ("control", "wait"):
                self.stages[target].call(*message)
            else:
                self.stages[target].receive(*message)

    def _note_phase(self) -> None:
        phase = self.coordinator.machine.phase if self.coordinator.machine else None
        if phase is not self._phase:
            self._phase, self._phase_since = phase, self.num_events

    def _waiting_for(self) -> object:
        machine = self.coordinator.machine
        return machine.waiting_for if machine else self.coordinator.rebuilding

    def _send_as(self, name: str) -> Any:
        send = self.network.send
        return lambda target, lane, *message: send(name, target, lane, *message)

    def domain_of(self, stage: str) -> str:
        if self.history.domains == "private":
            return stage
        return "node" if self.history.domains == "shared" else f"node-{int(stage[-1]) % 2}"

    def _remove(self, name: str) -> None:
        stage = self.stages.pop(name)
        self.parked.discard(name)
        for layer in list(stage.segments):
            stage.unmap(layer)
        self.network.cut(name)
        self.coordinator.on_dead(name)

    def _check_stages(self, layout: Layout) -> None:
        check_stages(
            layout,
            epoch=self.router.epoch,
            num_blocks=self.router.num_blocks,
            stages=self.stages,
            parked=self.parked,
            domains=self.domains,
        )
        check_router(self.router, is_over=False)

    # ------------------------------------------------------------------ what is done

    def _do(self, op: Op) -> bool:
        """False: not now."""
        return bool(getattr(self, f"_do_{op.kind}")(*op.args) is not False)

    def _do_add(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.router.add(list(prompt), max_tokens)

    def _do_abort(self, index: int) -> None:
        self.router.abort(index)

    def _do_refactor(self, boundaries: tuple[int, ...], mode: str, shrink: float, grow: int) -> bool:
        if not self.coordinator.is_idle or self.router.is_down:
            return False
        old = self.router.layout
        spare = sorted(self.parked)
        new = name_stages(old, boundaries, num_layers=old.num_layers, spare=spare)
        if new == old and mode != "restart":
            return True
        before = self.router.num_blocks
        needed = min(before, max(self.router.scheduler.num_blocks_needed, 10))
        during = before - int(shrink * (before - needed))
        self.coordinator.last_epoch += 1
        copies = tuple(
            move for move in moves_between(old, new) if self.domain_of(move.source) != self.domain_of(move.target)
        )
        self.coordinator.begin(
            Transition(
                old=old,
                new=new,
                old_epoch=self.router.epoch,
                epoch=self.coordinator.last_epoch,
                mode=Mode(mode),
                copies=copies,
                num_blocks=before,
                num_blocks_during=during,
                num_blocks_after=during + grow,
            )
        )
        return True

    def _do_cancel(self) -> None:
        self.coordinator.tell(CancelRequested("asked"))

    def _do_time_out(self) -> None:
        self.coordinator.tell(TimedOut(1.0))

    def _do_kill(self, index: int) -> None:
        names = sorted(self.stages)
        if names:
            name = names[index % len(names)]
            self.seen[f"{self._role(name)} killed in {self._phase}"] += 1
            self._remove(name)
            self.send("coordinator", "coordinator", "watch", name)

    def _role(self, name: str) -> str:
        machine = self.coordinator.machine
        if machine is None:
            return "stage"
        t = machine.transition
        sources, targets = {m.source for m in t.copies}, {m.target for m in t.copies}
        role = "source" if name in sources else "target" if name in targets else "other"
        if name in t.old.stages and name not in t.new.stages:
            return f"leaving {role}"
        return f"new {role}" if name not in t.old.stages else f"staying {role}"

    def _do_fail_step(self, index: int) -> None:
        if self.stages:
            self.stages[sorted(self.stages)[index % len(self.stages)]].fails_next_step = True

    def _do_fail_growth(self, index: int) -> None:
        if self.stages:
            self.stages[sorted(self.stages)[index % len(self.stages)]].fails_next_growth = True

    def _do_lose(self, kind: str) -> None:
        self.network.faults[f"lose {kind}"] = self.network.faults.get(f"lose {kind}", 0) + 1

    def _do_repeat(self, kind: str) -> None:
        self.network.faults[f"repeat {kind}"] = self.network.faults.get(f"repeat {kind}", 0) + 1

    def _do_repeat_event(self, index: int) -> None:
        if self.coordinator.past_events:
            self.coordinator.tell(self.coordinator.past_events[-1 - index % len(self.coordinator.past_events)])

    def _do_call_fault(self, kind: str) -> None:
        self.coordinator.call_faults[kind] = self.coordinator.call_faults.get(kind, 0) + 1

    def _do_slow_down(self, lane: str, num: int) -> None:
        self.network.slow_down(lane, num)

    def _do_limit_copies(self, bytes_per_event: float) -> None:
        self.coordinator.max_bytes_per_s = bytes_per_event


@contextmanager
def small_snapshots(num_bytes: int) -> Iterator[None]:
    """Messages of a snapshot that hold a block or two instead of all."""
    before = transfer_plan.MAX_CHUNK_BYTES
    transfer_plan.MAX_CHUNK_BYTES = num_bytes
    try:
        yield
    finally:
        transfer_plan.MAX_CHUNK_BYTES = before


def run(history: History, *, bugs: frozenset[str] = frozenset()) -> World:
    """Run a history; the world afterwards. Raises what is wrong."""
    world = World(history, bugs=bugs)
    with small_snapshots(history.snapshot_bytes):
        try:
            world.run()
        except BaseException as error:
            error.world = world  # type: ignore[attr-defined]
            raise
    return world
