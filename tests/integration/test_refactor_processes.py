"""Refactorings with stages in processes of their own, which are killed in the middle (SIGKILL)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engines import LinearHost, running_engine
from leaks import check_pipeline, check_scheduler, settle
from loads import Request, Transcript, load, make_requests, serve_all
from refactor_faults import before_command, refactor

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.pipeline.process_host import ProcessStage, ProcessStageHost
from flexpipe_serve.pipeline.stage_types import StageHandle, StageSetup
from flexpipe_serve.refactor.commands import Command, Drain, Prepare, Release, Switch, WaitCopied
from flexpipe_serve.refactor.record import Outcome, RefactorRequest

pytestmark = pytest.mark.slow
NUM_REQUESTS = 16


class NativeProcessHost(ProcessStageHost):
    """With kernels that compute every row by itself."""

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        return super().launch(replace(setup, linear="native"), node=node)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(random.Random(5), NUM_REQUESTS)


@pytest.fixture(scope="module")
def expected(six_layers: Path, requests: list[Request]) -> dict[str, Transcript]:
    with running_engine(six_layers, host=LinearHost("native"), block_size=4) as engine:
        return serve_all(engine, requests)


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "private"])
def engine(request: pytest.FixtureRequest, six_layers: Path) -> Iterator[Engine]:
    with running_engine(
        six_layers, host=NativeProcessHost(), boundaries=(3,), private_kv=request.param, block_size=4, max_tokens=2000
    ) as engine:
        yield engine
    assert not stage_processes()


def stage_processes() -> list[psutil.Process]:
    """Children that run a stage."""
    found = psutil.Process().children()
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(p.cmdline())]


def check_idle(engine: Engine) -> None:
    settle(engine)
    check_scheduler(engine)
    check_pipeline(engine)
    pids = {report.pid for report in engine._pipeline.reports().values()}
    assert {process.pid for process in stage_processes()} == pids
    for report in engine._pipeline.reports().values():
        assert report.num_blocks == engine.status().kv.num_blocks


def kill(engine: Engine, stage: str) -> None:
    handle = engine._pipeline.stage(stage)
    assert isinstance(handle, ProcessStage)
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)


def test_every_kind_of_move(engine: Engine, requests: list[Request], expected: dict[str, Transcript]) -> None:
    with load(engine, requests, expected):
        for boundaries in [(1,), (5,), (), (2, 4), (1, 5), (3,)]:
            record = refactor(engine, RefactorRequest(boundaries=boundaries, max_bytes_per_s=1.25e7))
            assert (record.outcome, record.error) == (Outcome.DONE, None)
    check_idle(engine)


@pytest.mark.parametrize(
    ("command", "victim", "outcome"),
    [
        (Prepare, "stage-1", Outcome.ABORTED),
        (WaitCopied, "stage-0", Outcome.ABORTED),
        (Switch, "stage-1", Outcome.RECOVERED),
        (Drain, "stage-0", Outcome.RECOVERED),
        (Release, "stage-1", Outcome.RECOVERED),
    ],
)
def test_a_killed_stage(
    command: type[Command],
    victim: str,
    outcome: Outcome,
    engine: Engine,
    requests: list[Request],
    expected: dict[str, Transcript],
) -> None:
    if command is not Switch and not engine._pipeline._setup.private_kv:
        pytest.skip("starting processes takes long; where the KV is makes no difference to what follows from a loss")
    assert engine.layout is not None
    old = engine.layout.boundaries
    new = (2,) if old == (3,) else (3,)
    with load(engine, requests, expected), before_command(command, lambda: kill(engine, victim)) as done:
        record = refactor(engine, RefactorRequest(boundaries=new))
    assert done.is_set()
    # That a stage is gone may be noticed only when all is done; then it is replaced as at any other time.
    assert record.outcome in (outcome, Outcome.DONE) if command is Release else record.outcome is outcome
    assert engine.layout.boundaries == (old if outcome is Outcome.ABORTED else new)
    check_idle(engine)
