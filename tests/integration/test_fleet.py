"""Pipelines that come and go under load: no request is lost, no token differs, nothing is left behind.

Batches differ from run to run here; the native kernels compute every row by itself, so that the bits do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import LinearHost, even_layout, running_engine
from fleets import running_fleet
from leaks import check_idle
from loads import Request, Transcript, load, make_requests, serve_all

from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scale_record import PipelineLayout, ScaleRecord, ScaleRequest
from flexpipe_serve.engine.status import StageStatus
from flexpipe_serve.errors import ConfigError, InvalidRequestError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.kernels.native import native_library
from flexpipe_serve.pipeline import stage as stage_module
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.refactor.record import RefactorRequest

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs kernels that compute every row by itself")
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(random.Random(5), 24)


@pytest.fixture(scope="module")
def expected(six_layers: Path, requests: list[Request]) -> dict[str, Transcript]:
    with running_engine(six_layers, host=LinearHost("native"), block_size=4) as engine:
        return serve_all(engine, requests)


@pytest.fixture
def host() -> LocalStageHost:
    return LinearHost("native")


def scale(fleet: Fleet, **fields: object) -> ScaleRecord:
    return asyncio.run(fleet.scale(ScaleRequest(**fields)))


def boundaries(fleet: Fleet) -> list[list[int]]:
    return [list(pipeline.layout.boundaries) for pipeline in fleet.status().pipelines]


def stages(fleet: Fleet) -> list[StageStatus]:
    return [stage for pipeline in fleet.status().pipelines for stage in pipeline.stages]


def kinds(fleet: Fleet) -> list[str]:
    return [event.kind for event in fleet.events()]


def test_one_two_one_under_load(
    six_layers: Path, host: LocalStageHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    with running_fleet(six_layers, host, num_stages=2, max_tokens=2000) as fleet:
        num_handed_over = 0
        with load(fleet, requests, expected, num_clients=8) as running:
            for _ in range(3):
                record = scale(fleet, layouts=(PipelineLayout(stages=2), PipelineLayout(boundaries=(1, 3))))
                assert [p.boundaries for p in record.pipelines] == [(3,), (1, 3)]
                wait_for_use_of_the_second(fleet)
                record = scale(fleet, pipelines=1)
                assert (record.num_before, len(record.pipelines)) == (2, 1)
                num_handed_over += record.num_handed_over
        assert num_handed_over > 0
        assert running.num_left > 0
        assert fleet._routing._open == fleet._routing._streams == {}
        check_idle(fleet.engines[0], host)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("p1-")]
        assert kinds(fleet).count("pipeline_ended") == 3


def wait_for_use_of_the_second(fleet: Fleet) -> None:
    """Returns when it computes."""
    loop = fleet.engines[1].loop
    loop.when(lambda: loop.scheduler.stats().num_running > 0).result(90)


def test_clients_that_leave_meanwhile_are_found(six_layers: Path, host: LocalStageHost) -> None:
    """Each leaves at another moment around the hand-over; whoever stays has all its tokens."""
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)

    async def client(fleet: Fleet, number: int, leaving: asyncio.Event) -> int:
        num_tokens = 0
        stream = fleet.generate(request_id=str(number), prompt_token_ids=[5 + number, 6, 7], params=params)
        async with contextlib.aclosing(stream):
            async for output in stream:
                num_tokens += len(output.token_ids)
                if number % 2 and leaving.is_set() and num_tokens % 7 == number % 7:
                    return -1
        return num_tokens

    async def run(fleet: Fleet) -> list[int]:
        leaving = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client(fleet, i, leaving)) for i in range(16)]
            loop = fleet.engines[1].loop
            await asyncio.wrap_future(loop.when(lambda: loop.scheduler.stats().num_running >= 2))
            leaving.set()
            await fleet.scale(ScaleRequest(pipelines=1))
        return [task.result() for task in clients]

    with running_fleet(six_layers, host, num_pipelines=2) as fleet:
        results = asyncio.run(run(fleet))
        assert [n for n in results if n != -1] == [300] * (16 - results.count(-1))
        assert results.count(-1) > 0
        check_idle(fleet.engines[0], host)


def test_requests_go_to_both_and_to_where_their_beginning_is(six_layers: Path, host: LocalStageHost) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 131) for _ in range(200)] for _ in range(4)]

    async def generate(fleet: Fleet, prompt: list[int], number: int) -> int:
        stream = fleet.generate(request_id=str(number), prompt_token_ids=prompt, params=params)
        return max([output.num_cached_tokens async for output in stream])

    async def run(fleet: Fleet) -> None:
        await asyncio.gather(*(generate(fleet, prompt, i) for i, prompt in enumerate(prompts)))
        assert all(engine.loop.scheduler.stats().num_prompt_tokens for engine in fleet.engines)
        for number, prompt in enumerate(prompts):
            assert await generate(fleet, [*prompt, 5], 10 + number) >= 190

    with running_fleet(six_layers, host, num_pipelines=2) as fleet:
        asyncio.run(run(fleet))


def test_a_pipeline_whose_stage_is_lost_hands_over(
    six_layers: Path, host: LocalStageHost, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    with running_fleet(six_layers, host, num_stages=2, num_pipelines=2) as fleet:
        with load(fleet, requests, expected, num_clients=6):
            for name in ("p1-stage-1", "stage-0"):
                wait_for_use_of_the_second(fleet)
                host._alive[name].stop()
                fleet.engines[name == "p1-stage-1"].loop.call(lambda: None).result()
                wait_for_event(fleet, "rebuilt", number=int(name == "p1-stage-1"))
        assert "handed_over" in kinds(fleet)
        assert all(engine.is_up for engine in fleet.engines)


def wait_for_event(fleet: Fleet, kind: str, *, number: int) -> None:
    engine = fleet.engines[number]
    while not any(event.kind == kind for event in engine.events()):
        engine._control.submit(lambda: None).result()
        engine.loop.call(lambda: None).result()


def test_pipelines_share_the_memory_and_give_it_back(
    six_layers: Path,
    host: LocalStageHost,
    requests: list[Request],
    expected: dict[str, Transcript],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_module, "private_bytes", lambda device: 0)  # this process is not the stage's alone
    with running_fleet(six_layers, host, memory_budget=16 << 20, max_tokens=1 << 30) as fleet:
        (alone,) = fleet.engines
        whole = alone.loop.scheduler.stats().num_blocks
        with load(fleet, requests, expected, num_clients=4):
            record = scale(fleet, pipelines=2)
        shares = [pipeline.num_blocks for pipeline in record.pipelines]
        assert 0 < abs(shares[0] - shares[1]) < whole // 20 or shares[0] == shares[1]
        assert sum(shares) < whole
        held = ("kv_bytes", "weights_bytes", "overhead_bytes")
        assert sum(getattr(stage, kind) for kind in held for stage in stages(fleet)) <= 16 << 20
        scale(fleet, pipelines=1)
        assert alone.loop.scheduler.stats().num_blocks == whole
        check_idle(alone, host)


def test_what_does_not_fit_is_refused_and_all_is_as_before(
    six_layers: Path, host: LocalStageHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "private_bytes", lambda device: 0)
    with running_fleet(six_layers, host, memory_budget=3 << 20, max_tokens=1 << 30) as fleet:
        before = fleet.status().kv
        with pytest.raises(RefactorRefusedError, match=r"no room for .*memory budget of domain 'local' is \d+ MiB"):
            scale(fleet, pipelines=8)
        assert "pipeline_started" in kinds(fleet)  # some would have fitted
        assert len(fleet.engines) == 1
        assert fleet.status().kv == before
        with pytest.raises(ConfigError, match="boundary 9 must lie between"):
            scale(fleet, layouts=(PipelineLayout(boundaries=(9,)),))
        check_idle(fleet.engines[0], host)


def test_each_pipeline_is_refactored_by_itself(six_layers: Path, host: LocalStageHost) -> None:
    with running_fleet(six_layers, host, num_stages=2, num_pipelines=2) as fleet:

        async def run() -> None:
            record = await fleet.refactor(RefactorRequest(boundaries=(2, 4), pipeline=1))
            assert all(stage.stage.startswith("p1-stage-") for stage in record.plan.new)
            with pytest.raises(RefactorBusyError, match="refactoring is running"):
                await fleet.scale(ScaleRequest(pipelines=1))
            with pytest.raises(InvalidRequestError, match="pipeline is 2; there are 2"):
                await fleet.refactor(RefactorRequest(stages=1, pipeline=2))

        asyncio.run(run())
        (record,) = fleet.refactorings()
        fleet.set_layout(even_layout(NUM_LAYERS, 3), num_pipelines=2).result(60)
        assert boundaries(fleet) == [[2, 4], [2, 4]]
        assert [engine.refactorings() != [] for engine in fleet.engines] == [True, True]
        scale(fleet, pipelines=1)
        assert fleet.refactoring(record.id) is not None
        assert {event.pipeline for event in fleet.events()} == {None, 1}


@pytest.fixture(autouse=True)
def _stages_end(host: LocalStageHost) -> Iterator[None]:
    yield
    assert all(stage.is_over for stage in host._alive.values())
