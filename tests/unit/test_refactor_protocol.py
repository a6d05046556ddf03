"""The protocol's machine: its order of commands, what an abort undoes, and that every history ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.refactor.commands import (
    BeginCopy,
    CancelRequested,
    Done,
    Drain,
    Drained,
    EndPatching,
    EndStage,
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
)
from flexpipe_serve.refactor.moves import moves_between
from flexpipe_serve.refactor.protocol import Refactoring, Transition
from flexpipe_serve.refactor.record import Mode, Outcome, Phase

OLD = make_layout(num_layers=6, boundaries=[3], stages=["a", "b"])
NEW = make_layout(num_layers=6, boundaries=[2], stages=["a", "c"])
MOVES = moves_between(OLD, NEW)


def transition(mode=Mode.LIVE, *, copies=MOVES, before=10, during=8, after=12):
    return Transition(
        old=OLD,
        new=NEW,
        old_epoch=4,
        epoch=7,
        mode=mode,
        copies=copies,
        num_blocks=before,
        num_blocks_during=during,
        num_blocks_after=after,
    )


def answer(command):
    if command == Switch():
        return Switched(step=41)
    return Drained(last_step=43) if command == Drain() else Done(command)


class Driver:
    """Answers the oldest open command, unless told otherwise."""

    def __init__(self, machine):
        self.machine = machine
        self.commands = machine.start()
        self.open = [c for c in self.commands if not isinstance(c, Finish)]

    def tell(self, event):
        issued = self.machine.handle(event)
        self.commands += issued
        self.open += [c for c in issued if not isinstance(c, Finish)]
        return issued

    def run(self, until=lambda command: False):
        """Answer all; stops before answering a command that ``until`` accepts, and gives it back."""
        while self.open:
            if until(self.open[0]):
                return self.open[0]
            self.tell(answer(self.open.pop(0)))
        return None


def finish(outcome, *, error=None, num_blocks=None, layout=NEW, is_rebuilt=True):
    return Finish(outcome=outcome, error=error, num_blocks=num_blocks, is_rebuilt=is_rebuilt, layout=layout)


def test_a_live_refactoring():
    driver = Driver(Refactoring(transition()))
    phases = []
    while driver.open:
        phases.append(driver.machine.phase)
        driver.tell(answer(driver.open.pop(0)))
    assert driver.commands == [
        Shrink(8), Launch("c"),
        ResizeKV("a", 8), ResizeKV("b", 8),
        Prepare("a", 8), Prepare("c", 8),
        *[BeginCopy(move) for move in MOVES],
        WaitCopied("c", 0),
        Switch(),
        Drain(), WaitCopied("c", 43), EndPatching(),
        Release("a", 4), Release("b", 4), EndStage("b", can_park=True),
        ResizeKV("a", 12), ResizeKV("c", 12), Grow(12),
        finish(Outcome.DONE, num_blocks=12),
    ]  # fmt: skip
    assert list(dict.fromkeys(phases)) == [Phase.PREPARE, Phase.COPY, Phase.SWITCH, Phase.RETIRE]
    assert driver.machine.switch_step == 41
    assert driver.machine.is_over


def test_what_is_not_needed_is_not_asked_for():
    driver = Driver(Refactoring(transition(copies=(), before=8, after=8)))
    driver.run()
    kinds = {type(c) for c in driver.commands}
    assert kinds == {Launch, Prepare, Switch, Drain, Release, EndStage, Finish}


@pytest.mark.parametrize(
    ("mode", "pause_before", "resume_after"), [(Mode.SYNC, Launch, Switch), (Mode.WEIGHTS_ONLY, BeginCopy, Switch)]
)
def test_other_modes_pause(mode, pause_before, resume_after):
    driver = Driver(Refactoring(transition(mode)))
    driver.run()
    kinds = [type(c) for c in driver.commands]
    assert kinds.count(Pause) == kinds.count(Resume) == 1
    assert kinds.index(Shrink) < kinds.index(Pause) == kinds.index(pause_before) - 1
    assert kinds.index(Resume) == kinds.index(resume_after) + 1
    assert driver.commands[-1] == finish(Outcome.DONE, num_blocks=12)


def test_restart():
    driver = Driver(Refactoring(transition(Mode.RESTART)))
    driver.run()
    assert driver.commands == [Pause(), Rebuild(NEW), finish(Outcome.DONE)]
    driver = Driver(Refactoring(transition(Mode.RESTART)))
    driver.run(until=lambda c: isinstance(c, Rebuild))
    assert driver.tell(CancelRequested("late")) == []
    driver.open.clear()
    driver.tell(Failed(Rebuild(NEW), "no memory"))
    driver.run()
    error = "rebuilding 2 stages failed: no memory"
    assert driver.commands[2:] == [Rebuild(OLD), finish(Outcome.ABORTED, error=error, layout=OLD)]


def test_an_abort_undoes_exactly_what_was_done():
    undone = {
        Launch: [EndStage("c", can_park=False), Grow(10)],
        ResizeKV: [EndStage("c", can_park=True), ResizeKV("a", 10), ResizeKV("b", 10), Grow(10)],
        Prepare: [
            Release("a", 7), Release("c", 7), EndStage("c", can_park=True), ResizeKV("a", 10), ResizeKV("b", 10),
            Grow(10),
        ],
        BeginCopy: [
            Release("a", 7), Release("b", 7), Release("c", 7), EndStage("c", can_park=True), ResizeKV("a", 10),
            ResizeKV("b", 10), Grow(10),
        ],
    }  # fmt: skip
    undone[WaitCopied] = undone[BeginCopy]
    for event in (CancelRequested("no more"), TimedOut(3.0), None):
        for kind, expected in undone.items():
            driver = Driver(Refactoring(transition()))
            command = driver.run(until=lambda c, kind=kind: isinstance(c, kind))
            late, driver.open = driver.open, []
            num_before = len(driver.commands)
            driver.tell(event or Failed(command, "broken"))
            assert driver.machine.is_undoing
            for lost in late:
                driver.tell(answer(lost))  # harmless
            driver.run()
            end = driver.commands[-1]
            assert driver.commands[num_before:-1] == expected
            assert (end.outcome, end.layout, end.num_blocks) == (Outcome.ABORTED, OLD, 10)
            assert end.error


def test_an_abort_ends_the_pause_first():
    driver = Driver(Refactoring(transition(Mode.SYNC)))
    driver.run(until=lambda c: isinstance(c, Pause))
    driver.open.clear()
    assert driver.tell(CancelRequested("x")) == [Resume()]


def test_after_the_switch_there_is_only_forward():
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: isinstance(c, Switch))
    assert not driver.machine.can_cancel
    assert driver.tell(CancelRequested("late")) == driver.tell(TimedOut(1)) == []
    assert driver.tell(StageLost("c", "killed")) == [Rebuild(NEW)]
    driver.run()
    assert driver.commands[-1] == finish(Outcome.RECOVERED, error="stage 'c' was lost: killed")


@pytest.mark.parametrize("kind", [Drain, WaitCopied, EndPatching])
def test_a_stage_of_the_old_layout_is_needed_until_its_patches_are_there(kind):
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: isinstance(c, Drain))
    driver.run(until=lambda c: isinstance(c, kind))
    assert driver.tell(StageLost("b", "killed")) == [Rebuild(NEW)]


@pytest.mark.parametrize("kind", [Release, EndStage, ResizeKV])
def test_and_not_from_then_on(kind):
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: isinstance(c, EndPatching))
    driver.run(until=lambda c: isinstance(c, kind))
    driver.tell(StageLost("b", "killed"))
    driver.run()
    assert driver.commands[-1] == finish(Outcome.DONE, num_blocks=12)


def test_a_stage_of_the_old_layout_lost_before_the_switch_costs_a_rebuild():
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: isinstance(c, BeginCopy))
    assert driver.tell(StageLost("x", "no concern")) == []
    assert driver.tell(StageLost("a", "killed")) == [Rebuild(OLD)]
    driver.open.clear()
    driver.tell(Failed(Rebuild(OLD), "stage 'a' does not start"))
    error = "stage 'a' was lost: killed; rebuilding 2 stages failed: stage 'a' does not start"
    assert driver.commands[-1] == finish(Outcome.ABORTED, error=error, layout=OLD, is_rebuilt=False)


def test_a_launched_stage_that_is_lost_is_ended_all_the_same():
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: isinstance(c, BeginCopy))
    assert driver.tell(StageLost("c", "killed")) == [Release("a", 7), Release("b", 7)]
    driver.open = [Release("a", 7), Release("b", 7)]
    driver.run()
    assert EndStage("c", can_park=False) in driver.commands
    assert driver.commands[-1].outcome is Outcome.ABORTED


def test_growth_that_fails_is_given_up_everywhere():
    driver = Driver(Refactoring(transition()))
    driver.run(until=lambda c: c == ResizeKV("c", 12))
    driver.open.clear()
    driver.tell(Failed(ResizeKV("c", 12), "shared memory is full"))
    driver.run()
    assert driver.commands[-3:-1] == [ResizeKV("a", 8), ResizeKV("c", 8)]
    end = driver.commands[-1]
    assert (end.outcome, end.num_blocks) == (Outcome.DONE, 8)
    assert "shared memory is full" in end.error


@settings(max_examples=300)
@given(data=st.data(), mode=st.sampled_from(Mode), copies=st.sampled_from([(), MOVES]))
def test_every_history_ends_and_no_command_is_issued_to_the_dead(data, mode, copies):
    driver = Driver(Refactoring(transition(mode, copies=copies)))
    answered, lost = [], set()
    for _ in range(200):
        if driver.machine.is_over:
            break
        assert driver.machine.waiting_for
        assert set(driver.machine.waiting_for) <= set(driver.open)
        kind = data.draw(st.sampled_from(["answer"] * 6 + ["fail", "lose", "cancel", "timeout", "repeat"]))
        if kind == "lose":
            lost.add(stage := data.draw(st.sampled_from("abc")))
            issued = driver.tell(StageLost(stage, "killed"))
            assert not any(getattr(c, "stage", None) in lost for c in issued if not isinstance(c, EndStage))
            assert not any(c.can_park for c in issued if isinstance(c, EndStage) and c.stage in lost)
        elif kind == "cancel":
            driver.tell(CancelRequested("why not"))
        elif kind == "timeout":
            driver.tell(TimedOut(1.0))
        elif kind == "repeat" and answered:
            before = driver.machine.waiting_for
            event = data.draw(st.sampled_from(answered))
            if not driver.open or getattr(event, "command", None) not in driver.open:
                driver.tell(event)
                assert driver.machine.waiting_for == before
        elif driver.open:
            command = driver.open.pop(data.draw(st.integers(0, len(driver.open) - 1)))
            answered.append(answer(command) if kind != "fail" else Failed(command, "broken"))
            driver.tell(answered[-1])
    driver.run()
    assert driver.machine.is_over
    ends = [c for c in driver.commands if isinstance(c, Finish)]
    assert ends == driver.commands[-1:]
    assert (ends[0].layout == NEW) == (ends[0].outcome is not Outcome.ABORTED)
    assert driver.machine.handle(CancelRequested("after")) == []
