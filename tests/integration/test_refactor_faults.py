"""A stage is lost in each phase of a refactoring: no request is lost with it, and nothing is left behind.

Run with ``-s`` for the table of phase and victim. Here stages are threads that end themselves unasked; in
``test_refactor_processes.py`` they are killed.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import LinearHost, running_engine
from leaks import check_idle, shared_files
from loads import Request, Transcript, load, make_requests, serve_all
from refactor_faults import before_answer, before_command, refactor

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.errors import EngineUnavailableError, RefactorRefusedError
from flexpipe_serve.kv import transfer_plan
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.pipeline.stage import Stage
from flexpipe_serve.pipeline.stage_types import StageHandle, StageSetup
from flexpipe_serve.refactor.commands import (
    BeginCopy,
    Command,
    Drain,
    EndStage,
    Prepare,
    Release,
    Switch,
    WaitCopied,
)
from flexpipe_serve.refactor.record import Mode, Outcome, RefactorRecord, RefactorRequest

pytestmark = pytest.mark.slow
NUM_REQUESTS = 16


@dataclass(frozen=True)
class Role:
    """A stage of a refactoring."""

    stage: str
    new: tuple[int, ...]
    """Boundaries; the old ones are (2, 4)."""


# stage-0 gives layer 1 to stage-1 | stage-3 starts and takes layer 3 | stage-2 ends.
VICTIMS = {
    "source": Role("stage-0", (1, 4)),
    "target": Role("stage-1", (1, 4)),
    "unconcerned": Role("stage-2", (1, 4)),
    "new": Role("stage-3", (2, 3, 4)),
    "retired": Role("stage-1", (3,)),
}
_ABORTED = dict.fromkeys(("source", "target", "unconcerned", "new", "retired"), Outcome.ABORTED)
_RECOVERED = dict.fromkeys(VICTIMS, Outcome.RECOVERED)
PHASES: dict[str, tuple[type[Command], dict[str, Outcome]]] = {
    "PREPARE": (Prepare, _ABORTED),
    "COPY": (WaitCopied, _ABORTED),
    "SWITCH": (Switch, _RECOVERED),
    "RETIRE, draining": (Drain, _RECOVERED),
    "RETIRE, releasing": (Release, _RECOVERED | {"retired": Outcome.DONE}),
    "RETIRE, ending": (EndStage, {"retired": Outcome.DONE}),
}
_ROWS: list[tuple[str, str, RefactorRecord]] = []


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(random.Random(5), NUM_REQUESTS)


@pytest.fixture(scope="module")
def expected(six_layers: Path, requests: list[Request]) -> dict[str, Transcript]:
    with running_engine(six_layers, host=LinearHost("native"), block_size=4) as engine:
        return serve_all(engine, requests)


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for phase, victim, record in _ROWS:
        print(f"| {phase:20} | {victim:12} | {record.outcome:9} | {record.num_replayed:3} replayed | {record.error}")


@pytest.fixture
def host() -> LocalStageHost:
    return LinearHost("native")


@pytest.fixture
def engine(six_layers: Path, host: LocalStageHost) -> Iterator[Engine]:
    """Three stages with memory of their own, for 2000 tokens."""
    with running_engine(
        six_layers,
        host=host,
        boundaries=(2, 4),
        private_kv=True,
        block_size=4,
        max_num_batched_tokens=64,
        max_tokens=2000,
    ) as engine:
        yield engine


@pytest.fixture
def check(
    engine: Engine, host: LocalStageHost, requests: list[Request], expected: dict[str, Transcript]
) -> Iterator[Any]:
    """Serves load around a function that may break things, and looks for what is left of it.

    It gives the layout there must be in the end: the old or the new one.
    """
    before = sum(name.endswith(".kv") for name in shared_files(engine))
    lock = str(engine._pipeline._folder.path / "lock")

    def run(act: Any, *, boundaries: tuple[int, ...]) -> Any:
        with load(engine, requests, expected) as running:
            found = act()
            num_served = running.num_served
        assert running.num_served >= num_served
        assert engine.status().state == "serving"
        assert engine.layout is not None
        assert engine.layout.boundaries == boundaries
        assert engine.status().kv.num_blocks == 500
        check_idle(engine, host)
        return found

    yield run
    assert engine.layout is not None
    if engine.layout.boundaries != (2, 4):
        assert refactor(engine, RefactorRequest(boundaries=(2, 4))).outcome is Outcome.DONE
        check_idle(engine, host)
    assert Counter(shared_files(engine))[lock] == len(engine.layout.stages) + 1
    assert sum(name.endswith(".kv") for name in shared_files(engine)) == before


@pytest.mark.parametrize(
    ("phase", "victim"), [(phase, victim) for phase, (_, outcomes) in PHASES.items() for victim in outcomes]
)
def test_a_lost_stage(phase: str, victim: str, engine: Engine, host: LocalStageHost, check: Any) -> None:
    command, outcomes = PHASES[phase]
    role = VICTIMS[victim]
    request = RefactorRequest(boundaries=role.new, max_bytes_per_s=2.5e6, timeout_s=30)

    def act() -> RefactorRecord:
        with before_command(command, lambda: host._alive[role.stage].stop()) as done:
            record = refactor(engine, request)
        assert done.is_set()
        return record

    outcome = outcomes[victim]
    record = check(act, boundaries=(2, 4) if outcome is Outcome.ABORTED else role.new)
    _ROWS.append((phase, victim, record))
    assert record.outcome is outcome, record.error
    assert (record.error is None) == (outcome is Outcome.DONE)


# ---------------------------------------------------------------------- other reasons to give up


def aborted(record: RefactorRecord, reason: str) -> None:
    assert record.outcome is Outcome.ABORTED
    assert record.error is not None
    assert reason in record.error
    assert record.num_replayed == 0
    assert record.num_blocks == 500


CANCELLABLE: dict[str, type[Command]] = {"PREPARE": Prepare, "COPY": BeginCopy, "MIRROR": WaitCopied}


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.WEIGHTS_ONLY, Mode.SYNC])
@pytest.mark.parametrize("phase", CANCELLABLE)
def test_a_cancelled_one_leaves_the_old_layout(phase: str, mode: Mode, engine: Engine, check: Any) -> None:
    def cancel() -> None:
        (running,) = [r for r in engine.refactorings() if not r.is_over]
        engine.cancel_refactoring(running.id)

    def act() -> RefactorRecord:
        at = before_answer if phase == "MIRROR" else before_command
        with at(CANCELLABLE[phase], cancel):
            return refactor(engine, RefactorRequest(boundaries=(1, 2, 5), mode=mode))

    aborted(check(act, boundaries=(2, 4)), "cancelled: asked for")


def test_a_cancellation_after_the_switch_comes_too_late(engine: Engine, check: Any) -> None:
    def cancel() -> None:
        engine.cancel_refactoring(engine.refactorings()[-1].id)

    def act() -> RefactorRecord:
        with before_command(Switch, cancel):
            return refactor(engine, RefactorRequest(boundaries=(1, 5)))

    assert check(act, boundaries=(1, 5)).outcome is Outcome.DONE


def test_a_copy_that_is_too_slow_is_given_up(engine: Engine, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_plan, "MAX_CHUNK_BYTES", 2000)  # there is little to copy, and one piece goes at once
    request = RefactorRequest(boundaries=(1, 5), max_bytes_per_s=1e3, timeout_s=1.0)
    record = check(lambda: refactor(engine, request), boundaries=(2, 4))
    aborted(record, "")
    assert "not ready to switch after 1 s" in str(record.error) or "within 1.0 s" in str(record.error)


@pytest.mark.parametrize("num_opened", [0, 1])
def test_full_shared_memory(num_opened: int, engine: Engine, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for an incoming layer's KV, or for the second one."""
    allocate, calls = os.posix_fallocate, []

    def allocate_or_fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) > num_opened:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(*args)

    def act() -> RefactorRecord:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", allocate_or_fail)
            return refactor(engine, RefactorRequest(boundaries=(4, 5)))

    aborted(check(act, boundaries=(2, 4)), ".kv cannot grow from 0 to 500 blocks")
    assert len(calls) > num_opened


def test_a_stage_that_cannot_be_started(
    engine: Engine, host: LocalStageHost, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(setup: StageSetup, **options: Any) -> StageHandle:
        raise EngineUnavailableError("no room on any node")

    def act() -> RefactorRecord:
        with monkeypatch.context() as patch:
            patch.setattr(host, "launch", launch)
            return refactor(engine, RefactorRequest(boundaries=(1, 2, 4)))

    aborted(check(act, boundaries=(2, 4)), "starting stage 'stage-3' failed: no room on any node")


def test_a_stage_that_ends_while_it_starts(engine: Engine, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Stage.report

    def end_or_report(stage: Stage) -> Any:
        if stage.setup.name == "stage-3":
            stage.close()
            raise EngineUnavailableError("stage 'stage-3' is gone.")
        return report(stage)

    def act() -> RefactorRecord:
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "report", end_or_report)
            return refactor(engine, RefactorRequest(boundaries=(1, 2, 4)))

    aborted(check(act, boundaries=(2, 4)), "stage-3")


def test_weights_that_cannot_be_read(engine: Engine, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load_layers = StageModel.load

    def load_or_fail(model: StageModel, layers: range, **kwargs: Any) -> None:
        if 2 in layers and not kwargs["head"]:
            raise OSError("the disk is gone")
        load_layers(model, layers, **kwargs)

    def act() -> RefactorRecord:
        with monkeypatch.context() as patch:
            patch.setattr(StageModel, "load", load_or_fail)
            return refactor(engine, RefactorRequest(boundaries=(3, 4)))

    aborted(check(act, boundaries=(2, 4)), "the disk is gone")


def test_a_refused_plan_touches_nothing(engine: Engine, check: Any) -> None:
    epoch = engine.status().epoch
    engine._pipeline.budgets["local/stage-1"] = 1 << 20

    def act() -> None:
        with pytest.raises(RefactorRefusedError, match=r"domain 'local/stage-1' has 1 MiB"):
            refactor(engine, RefactorRequest(boundaries=(1, 4)))

    check(act, boundaries=(2, 4))
    assert engine.status().epoch == epoch
    assert engine.refactorings() == []
