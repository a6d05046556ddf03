"""Nodes emptied under load, over stages in threads that stand on nodes of their own: no token differs."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leaks import check_scheduler, check_stages, settle
from loads import Request, Transcript, load, make_requests, serve_all
from refactor_faults import before_command, refactor
from served import wait_until
from thread_nodes import NodesHost, engine_on

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.errors import InvalidRequestError, RefactorRefusedError
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest, DrainState
from flexpipe_serve.refactor.commands import Prepare
from flexpipe_serve.refactor.record import Mode, Outcome, RefactorRequest

NUM_LAYERS = 6
NODES = ("node-a", "node-b", "node-c")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(random.Random(3), 10)


@pytest.fixture
def host() -> NodesHost:
    return NodesHost(NODES)


@pytest.fixture
def engine(host: NodesHost, six_layers: Path) -> Iterator[Engine]:
    with engine_on(host, six_layers, num_layers=NUM_LAYERS, num_stages=3) as engine:
        stand_on(engine, *NODES)
        yield engine


@pytest.fixture(scope="module")
def expected(six_layers: Path, requests: list[Request]) -> dict[str, Transcript]:
    with engine_on(NodesHost(NODES), six_layers, num_layers=NUM_LAYERS, num_stages=3) as engine:
        return serve_all(engine, requests)


def stand_on(engine: Engine, *nodes: str) -> None:
    """Stages that split the layers evenly, on these nodes, wherever they were."""
    if nodes_of(engine) != list(nodes):
        assert refactor(engine, RefactorRequest(stages=len(nodes), nodes=nodes)).outcome is Outcome.DONE


def drain(engine: Engine, node: str, *, deadline_s: float = 60.0) -> DrainRecord:
    return asyncio.run(engine.drain(DrainRequest(node=node, deadline_s=deadline_s)))


def drained(engine: Engine, node: str) -> DrainRecord:
    """Its record, when the node is empty (or gone)."""

    def over() -> DrainRecord | None:
        (record,) = [record for record in engine.drains() if record.node == node]
        return record if record.is_over else None

    record = wait_until(over, timeout_s=60, what="an empty node")
    assert isinstance(record, DrainRecord)
    return record


def check_idle(engine: Engine, host: NodesHost) -> None:
    """Nothing is left of earlier layouts, on any node."""
    settle(engine)
    check_scheduler(engine)
    check_stages(engine, host)
    assert engine._pipeline.is_complete
    assert list(engine._pipeline._routes) == [engine._pipeline.epoch]


def nodes_of(engine: Engine) -> list[str]:
    """The nodes of the stages of the layout in force, in order."""
    layout = engine.layout
    assert layout is not None
    return [engine._pipeline.node_of[name] for name in layout.stages]


def kinds(engine: Engine) -> list[str]:
    return [event.kind for event in engine.events()]


def test_a_node_is_emptied_under_load_and_kept_empty(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    num_launched = len(host.launched)
    with load(engine, requests, expected):
        drain(engine, "node-b")
        record = drained(engine, "node-b")
        assert record.state is DrainState.EMPTY
        refactoring = engine.refactoring(record.refactorings[-1])
        assert refactoring is not None
        assert (refactoring.outcome, refactoring.mode, refactoring.plan.new[0].node) == (
            Outcome.DONE, Mode.LIVE, "node-a",
        )  # fmt: skip
        assert "node-b" not in nodes_of(engine)
        # Whatever is asked for now, nothing goes there.
        for request in (RefactorRequest(stages=2), RefactorRequest(stages=6)):
            assert refactor(engine, request).outcome is Outcome.DONE
            assert "node-b" not in nodes_of(engine)
        with pytest.raises(RefactorRefusedError, match="node-b"):
            refactor(engine, RefactorRequest(stages=1, nodes=("node-b",)))
    assert ("drain_started" in kinds(engine), "drained" in kinds(engine)) == (True, True)
    assert "node-b" not in [node for _, node in host.launched[num_launched:]]
    status = {node.id: node for node in engine.status().nodes}
    assert (status["node-b"].draining, status["node-b"].stages) == (True, ())
    assert status["node-a"].stages
    check_idle(engine, host)


def test_the_same_split_on_other_nodes(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    with load(engine, requests, expected):
        record = refactor(engine, RefactorRequest(stages=3, nodes=("node-c", "node-b", "node-a.example")))
        assert record.outcome is Outcome.DONE
        assert nodes_of(engine) == ["node-c", "node-b", "node-a"]
        record = refactor(engine, RefactorRequest(boundaries=(4,), nodes=("node-b", "node-b"), hurry=True))
        assert (record.outcome, record.hurry) == (Outcome.DONE, True)
        assert [stage.node for stage in record.plan.new] == nodes_of(engine) == ["node-b", "node-b"]
    with pytest.raises(RefactorRefusedError, match="nothing is to be done"):
        refactor(engine, RefactorRequest(boundaries=(4,), nodes=("node-b", "node-b")))
    with pytest.raises(InvalidRequestError, match="node-x"):
        refactor(engine, RefactorRequest(boundaries=(), nodes=("node-x",)))
    assert refactor(engine, RefactorRequest(boundaries=(4,), avoid=("node-b",))).outcome is Outcome.DONE
    assert "node-b" not in nodes_of(engine)
    check_idle(engine, host)


def test_what_ray_takes_away_is_left_by_itself(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    with load(engine, requests, expected):
        host.say("node-c", is_draining=True, deadline=time.time() + 60)
        wait_until(lambda: engine.drains(), timeout_s=90, what="the notice to be seen")
        assert drained(engine, "node-c").state is DrainState.EMPTY
        assert "node-c" not in nodes_of(engine)
        host.say("node-c", is_alive=False)
        with pytest.raises(InvalidRequestError, match="node-c"):
            drain(engine, "node-c")
    check_idle(engine, host)


def test_too_little_time_to_start_a_stage_merges_its_layers_into_those_that_run(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    num_launched = len(host.launched)
    with load(engine, requests, expected):
        drain(engine, "node-b", deadline_s=3)
        assert drained(engine, "node-b").state is DrainState.EMPTY
        assert nodes_of(engine) == ["node-a", "node-c"]
        assert len(host.launched) == num_launched
    check_idle(engine, host)


def test_too_little_time_for_a_live_copy_costs_a_replay_and_no_request(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    stand_on(engine, "node-b", "node-b")
    with load(engine, requests, expected):
        drain(engine, "node-b", deadline_s=0.5)
        record = drained(engine, "node-b")
        assert record.state is DrainState.EMPTY
        refactoring = engine.refactoring(record.refactorings[-1])
        assert refactoring is not None
        assert (refactoring.mode, refactoring.outcome) == (Mode.RESTART, Outcome.DONE)
        assert "node-b" not in nodes_of(engine)
    assert "drain_late" in kinds(engine)
    check_idle(engine, host)


def test_a_refactoring_in_the_way_is_cancelled_first(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go_on.wait(60)

    with load(engine, requests, expected), before_command(Prepare, hold):
        record = engine._control.submit(engine._start_refactoring, RefactorRequest(boundaries=(5,))).result()
        assert held.wait(60)
        drain(engine, "node-b")
        asked = wait_until(
            lambda: engine._refactorings._running is not None and not engine._refactorings._running._events.empty(),
            timeout_s=90,
            what="the cancellation",
        )
        assert asked
        go_on.set()
        assert drained(engine, "node-b").state is DrainState.EMPTY
        cancelled = engine.refactoring(record.id)
        assert cancelled is not None
        assert cancelled.outcome is Outcome.ABORTED
        assert "emptied" in (cancelled.error or "")
    check_idle(engine, host)


def test_a_warm_stage_leaves_too_and_another_takes_its_place(engine: Engine, host: NodesHost) -> None:
    stand_on(engine, "node-a", "node-a", "node-a")
    engine.set_refactor_limits(max_bytes_per_s=4e7, num_warm_stages=1)
    engine._control.submit(lambda: None).result()
    drain(engine, "node-b")
    assert drained(engine, "node-b").state is DrainState.EMPTY
    layout = engine.layout
    assert layout is not None
    wait_until(lambda: len(engine._pipeline.stages) == 4, timeout_s=90, what="a warm stage elsewhere")
    assert "node-b" not in engine._pipeline.node_of.values()


def test_what_does_not_fit_elsewhere_is_said_and_tried_again(host: NodesHost, six_layers: Path) -> None:
    host.free_bytes |= {"node-b": 1, "node-c": 1}
    with engine_on(host, six_layers, num_layers=NUM_LAYERS, num_stages=1, memory_budget=None) as engine:
        stand_on(engine, "node-a")
        record = drain(engine, "node-a")
        assert record.holds_router
        blocked: Callable[[], Any] = lambda: [record for record in engine.drains() if record.error]  # noqa: E731
        (found,) = wait_until(blocked, timeout_s=90, what="a refusal")
        assert found.state is DrainState.DRAINING
        assert "has 0 MiB" in found.error
        assert kinds(engine).count("drain_blocked") == 1
        assert nodes_of(engine) == ["node-a"]
        undone = asyncio.run(engine.undrain("node-a"))
        assert undone is not None
        assert engine.drains() == []
        assert asyncio.run(engine.undrain("node-a")) is None
        assert host.kept == {}


def test_the_last_node_is_not_drained(engine: Engine, host: NodesHost) -> None:
    for name in ("node-b", "node-c"):
        drain(engine, name)
        assert drained(engine, name).state is DrainState.EMPTY
    with pytest.raises(RefactorRefusedError, match="only one left"):
        drain(engine, "node-a")
    assert set(host.kept) == {"node-b", "node-c"}
    assert asyncio.run(engine.undrain("node-b")) is not None
    assert drain(engine, "node-a").holds_router
    assert drained(engine, "node-a").state is DrainState.EMPTY
    assert "The Router itself runs there" in drained(engine, "node-a").message


def test_a_new_router_keeps_empty_what_the_former_one_was_told_to(host: NodesHost, six_layers: Path) -> None:
    host.kept = {"node-b": 0.0, "gone": 0.0}
    with engine_on(host, six_layers, num_layers=NUM_LAYERS, num_stages=2) as engine:
        record = drained(engine, "node-b")
        assert (record.state, record.deadline_at) == (DrainState.EMPTY, None)
        assert "node-b" not in nodes_of(engine)
        assert [record.node for record in engine.drains()] == ["node-b"]


def test_a_stage_that_is_lost_comes_back_elsewhere(
    engine: Engine, host: NodesHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    stand_on(engine, "node-a", "node-c")
    assert engine.layout is not None
    lost = engine.layout.stages[1]
    with load(engine, requests, expected):
        drain(engine, "node-b")
        assert drained(engine, "node-b").state is DrainState.EMPTY
        num_launched = len(host.launched)
        host._alive[lost].stop()
        wait_until(lambda: "rebuilt" in kinds(engine), timeout_s=90, what="the stage to be replaced")
        assert [(name, node != "node-b") for name, node in host.launched[num_launched:]] == [(lost, True)]
    check_idle(engine, host)
