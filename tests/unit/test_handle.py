"""``flexpipe_serve.connect()``: the same calls over HTTP and through Ray Serve's handle."""

import asyncio
import contextlib
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from fake_drains import NODES
from fake_engine import REPLY, FakeEngine
from http_server import serve

import flexpipe_serve
from flexpipe_serve import async_handle
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.deployments.asgi_call import call
from flexpipe_serve.errors import (
    ConfigError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RefactorBusyError,
    RefactorRefusedError,
)
from flexpipe_serve.handle import Handle
from flexpipe_serve.placement.drain import DrainRequest, DrainState
from flexpipe_serve.planner.types import CandidateScore, Decision, Demand, Prediction, Split, Trigger, Verdict
from flexpipe_serve.refactor.record import Mode, Outcome, Phase
from flexpipe_serve.transport import ServeTransport

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.serve")


class FakeServeHandle:
    """Ray Serve's handle, as far as a handle of ours uses it; the Router's method runs in this process."""

    def __init__(self, app):
        self._app = app
        self.request = self

    def options(self, *, stream):
        assert stream
        return self

    def remote(self, method, path, body):
        return Pieces(call(self._app, method, path, body))


class Pieces:
    def __init__(self, pieces):
        self._pieces = pieces
        self._ended = None

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._pieces)

    def cancel(self):
        self._ended = asyncio.ensure_future(self._pieces.aclose())


@contextlib.contextmanager
def connected(engine, transport):
    app = create_app(lambda: engine)
    if transport == "serve":
        with Handle(lambda: ServeTransport(FakeServeHandle(app))) as handle:
            yield handle
        return
    with serve(app) as url, flexpipe_serve.connect(url) as handle:
        yield handle


@pytest.fixture(params=["http", "serve"])
def transport(request):
    return request.param


@pytest.fixture
def handle(engine, transport):
    with connected(engine, transport) as handle:
        yield handle


@pytest.fixture(autouse=True)
def _no_pause_between_looks(monkeypatch):
    monkeypatch.setattr(async_handle, "_POLL_S", 0.0)


def test_status(handle, engine):
    assert handle.status() == engine.status()


def test_refactor_and_wait(handle, engine):
    job = handle.refactor(stages=3)
    assert job.plan.verdict == "fits"
    assert job.record().outcome is Outcome.RUNNING
    seen, threads = [], set()

    def on_progress(record):
        seen.append(record.phase)
        threads.add(threading.current_thread())

    record = job.wait(60, on_progress)
    assert (record.id, record.outcome) == (job.id, Outcome.DONE)
    assert list(dict.fromkeys(seen)) == list(Phase)[1:]
    assert threads == {threading.current_thread()}
    assert job.record() == record == job.wait()
    assert handle.refactorings() == [record]
    assert [event.kind for event in handle.events()][1:] == ["refactoring started", "refactoring ended"]


def test_every_argument_reaches_the_engine(handle, engine):
    job = handle.refactor(
        boundaries=[10, 20],
        pipeline=1,
        nodes=["a", "b", "a"],
        avoid=["c"],
        mode="sync",
        resize_kv=False,
        hurry=True,
        max_bytes_per_s=1e6,
        timeout_s=5,
        reason="because",
        wait=True,
    )
    assert job.record().is_over
    (request,) = engine.requests
    assert (request.boundaries, request.mode, request.resize_kv, request.hurry) == ((10, 20), Mode.SYNC, False, True)
    assert (request.pipeline, request.nodes, request.avoid) == (1, ("a", "b", "a"), ("c",))
    assert (request.max_bytes_per_s, request.timeout_s, request.reason) == (1e6, 5, "because")


def test_scale(handle, engine):
    record = handle.scale(pipelines=2)
    assert [(p.pipeline, p.boundaries, p.num_blocks) for p in record.pipelines] == [(0, (15,), 2000), (1, (15,), 2000)]
    record = handle.scale(layouts=[3, [9], []], reason="because")
    assert [p.boundaries for p in record.pipelines] == [(10, 20), (9,), ()]
    assert engine.scale_requests[1].reason == "because"
    with pytest.raises(InvalidRequestError, match="pipelines asks for 65 pipelines; there can be 1 to 64"):
        handle.scale(pipelines=65)
    with pytest.raises(InvalidRequestError, match="there are both"):
        handle.scale(pipelines=1, layouts=[1])
    with pytest.raises(RefactorRefusedError, match="boundary 40"):
        handle.scale(layouts=[[40]])
    engine.refuse_scale_with = RefactorBusyError("They come or go already.")
    with pytest.raises(RefactorBusyError, match="already"):
        handle.scale(pipelines=1)


def test_drain(handle, engine):
    record = handle.drain(NODES[1], deadline_s=20, reason="spot")
    assert engine.drain_requests == [DrainRequest(node=NODES[1], deadline_s=20, reason="spot")]
    assert (record.state, record.stages) == (DrainState.DRAINING, ("stage-0", "stage-1"))
    assert [r.node for r in handle.drains()] == [NODES[1]]
    assert handle.drain(NODES[1], wait=True).state is DrainState.EMPTY
    assert handle.undrain(NODES[1]).node == NODES[1]
    assert handle.drains() == []
    with pytest.raises(InvalidRequestError, match="is not"):
        handle.undrain(NODES[1])
    with pytest.raises(InvalidRequestError, match="deadline_s is 0"):
        handle.drain(NODES[1], deadline_s=0)
    engine.drained_by_ray = NODES[0]
    with pytest.raises(RefactorRefusedError, match="Ray drains"):
        handle.undrain(NODES[0])


def test_plan(handle, engine):
    split = Split(boundaries=(10,), devices=())
    prediction = Prediction(
        ttft_s=math.inf, tpot_s=0.1, latency_s=math.inf, max_rate=1.5, utilisation=2.0, num_kv_tokens=100
    )
    current = CandidateScore(split=split, prediction=prediction, score=-1.0)
    decision = Decision(
        at=1.0,
        policy="gated",
        trigger=Trigger.ASKED,
        demand=Demand(
            at=1.0, rate=3.0, rate_gradient=0.0, cv=1.0, cv_by_window={"15s": 1.0}, prompt_tokens=9.0, output_tokens=9.0
        ),
        current=current,
        candidates=(current,),
        verdict=Verdict.STAY,
        chosen=None,
        sentence="Nothing is better.",
    )
    engine.plan = lambda: decision
    engine.decisions = lambda: [decision, decision]
    assert handle.plan() == decision
    assert handle.decisions() == [decision, decision]
    engine.plan = no_profile
    with pytest.raises(EngineUnavailableError, match="no profile"):
        handle.plan()


def no_profile():
    raise EngineUnavailableError("There is no profile yet.")


def test_a_dry_run_is_over_at_once(handle):
    job = handle.refactor(stages=11, dry_run=True)
    assert job.record().outcome is Outcome.REFUSED
    assert job.wait().plan.verdict == "refused"
    assert handle.refactorings() == []


def test_cancel(handle, engine):
    engine.hold_at = Phase.COPY
    job = handle.refactor(stages=3)
    with pytest.raises(TimeoutError, match=r"is in phase .* after 0 s; it goes on"):
        job.wait(timeout=0)
    job.cancel()
    record = job.wait()
    assert (record.outcome, record.error) == (Outcome.ABORTED, "it was cancelled.")


def test_somebody_elses_refactoring(handle, engine):
    engine.hold_at = Phase.COPY
    job = handle.refactoring(handle.refactor(stages=3).id)
    job.cancel()
    assert job.wait().outcome is Outcome.ABORTED
    with pytest.raises(InvalidRequestError) as raised:
        handle.refactoring("r-9")
    assert raised.value.code == "refactoring_not_found"


def test_errors_are_those_of_the_engine(handle, engine):
    with pytest.raises(RefactorRefusedError, match=r"node-a needs 5\.0 GiB"):
        handle.refactor(stages=11)
    handle.refactor(stages=3)
    with pytest.raises(RefactorBusyError, match="r-1 is running"):
        handle.refactor(stages=2)
    engine.refuse_refactor_with = EngineUnavailableError("Starting.")
    with pytest.raises(EngineUnavailableError, match=r"Starting\."):
        handle.refactor(stages=2)
    for arguments in ({}, {"stages": 2, "boundaries": [15]}, {"stages": 0}, {"stages": 2, "mode": "fast"}):
        with pytest.raises(InvalidRequestError):
            handle.refactor(**arguments)
    with pytest.raises(InvalidRequestError) as raised:
        handle.generate("hi", temprature=1)
    assert (raised.value.param, raised.value.code) == ("temprature", "unknown_parameter")
    engine.refuse_with = QueueFullError("Full.", retry_after_s=7)
    with pytest.raises(QueueFullError, match=r"Full\.") as full:
        handle.generate("hi")
    assert full.value.retry_after_s == 7


def test_generate(handle):
    assert handle.generate("hi", max_tokens=5, temperature=0) == "Paris"
    assert handle.generate([1, 2], max_tokens=5, temperature=0) == "Paris"
    with pytest.raises(InvalidRequestError, match="n is not for a handle"):
        handle.generate("hi", n=2)


def test_stream(handle, engine):
    pieces = list(handle.stream("hi", max_tokens=100, temperature=0))
    assert "".join(pieces) == REPLY
    assert len(pieces) > 10
    engine.error_after = 3
    stream = handle.stream("hi", max_tokens=100, temperature=0)
    assert [next(stream) for _ in range(3)] == ["P", "a", "r"]
    with pytest.raises(EngineUnavailableError, match=r"A stage was lost\."):
        next(stream)
    with pytest.raises(InvalidRequestError):
        next(handle.stream("x" * 600))


def test_a_stream_that_is_left_ends_on_the_server(transport):
    engine = FakeEngine(token_delay_s=0.001)
    with connected(engine, transport) as handle:
        stream = handle.stream("hi", max_tokens=400, temperature=0, ignore_eos=True)
        assert next(stream) == "P"
        stream.close()
        assert engine.has_aborted.wait(60)
    assert engine.finished == []


async def test_async(engine, transport):
    with connected(engine, transport) as handle:
        async with handle.aio as flexpipe:
            assert await flexpipe.status() == engine.status()
            job = await flexpipe.refactor(stages=3, wait=True)
            assert (await job.record()).outcome is Outcome.DONE
            seen = []
            assert (await (await flexpipe.refactor(stages=3)).wait(60, seen.append)).outcome is Outcome.DONE
            assert [record.outcome for record in seen[:-1]] == [Outcome.RUNNING] * (len(seen) - 1)
            assert await flexpipe.generate("hi", max_tokens=5, temperature=0) == "Paris"
            assert "".join([piece async for piece in flexpipe.stream("hi", max_tokens=5, temperature=0)]) == "Paris"
            assert len(await flexpipe.refactorings()) == 2
            assert len(await flexpipe.events()) == 5
        # The handle itself works inside a running loop, too.
        assert handle.generate("hi", max_tokens=5, temperature=0) == "Paris"


def test_an_api_key(engine):
    with serve(create_app(lambda: engine, api_keys=("key",))) as url:
        with flexpipe_serve.connect(f"{url}/v1/", api_key="key") as handle:
            assert handle.status()
        with flexpipe_serve.connect(url) as handle, pytest.raises(InvalidRequestError) as raised:
            handle.status()
    assert raised.value.code == "invalid_api_key"


async def test_nobody_answers():
    with (
        flexpipe_serve.connect("http://127.0.0.1:9") as handle,
        pytest.raises(EngineUnavailableError, match=r"http://127\.0\.0\.1:9 does not answer"),
    ):
        handle.status()
    with flexpipe_serve.connect("http://127.0.0.1:no") as handle, pytest.raises(ConfigError, match="is no URL"):
        handle.status()


@pytest.mark.parametrize("status", [200, 502])
def test_somebody_else_answers(status):
    async def other(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>hello"})

    with (
        serve(other) as url,
        flexpipe_serve.connect(url) as handle,
        pytest.raises(EngineUnavailableError, match=rf"status {status}.* is not one of flexpipe-serve: '<html>"),
    ):
        handle.status()


@pytest.mark.parametrize("content", [b'{"planer": {}}', b'{"layout": {"stages": 0}}', b"[]"])
def test_a_configuration_of_something_else(content):
    async def other(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    with (
        serve(other) as url,
        flexpipe_serve.connect(url) as handle,
        pytest.raises(EngineUnavailableError, match="is not one of flexpipe-serve"),
    ):
        handle.config()


def test_arguments_that_do_not_go_together():
    with pytest.raises(ConfigError, match="address"):
        flexpipe_serve.connect("http://127.0.0.1:9", address="auto")
    with pytest.raises(ConfigError, match="api_key"):
        flexpipe_serve.connect("flexpipe", api_key="key")


@pytest.mark.parametrize(
    ("app", "applications", "message"),
    [
        (None, {"a": ["Router"], "b": ["Router"], "c": ["Other"]}, "Name one; the cluster serves 'a', 'b'"),
        ("c", {"a": ["Router"], "c": ["Other"]}, "There is no application 'c'; the cluster serves 'a'"),
        (None, {}, "Name one; the cluster serves none of flexpipe-serve"),
    ],
)
def test_which_application(monkeypatch, app, applications, message):
    import ray
    from ray import serve as ray_serve

    listed = {name: SimpleNamespace(deployments=dict.fromkeys(names)) for name, names in applications.items()}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications=listed))
    monkeypatch.setattr(ray_serve, "get_app_handle", lambda name: pytest.fail("no such application"))
    with pytest.raises(ConfigError, match=message):
        flexpipe_serve.connect(app)


def test_the_only_application_is_the_default(monkeypatch, engine):
    import ray
    from ray import serve as ray_serve

    listed = {"chat": SimpleNamespace(deployments={"Router": None}), "other": SimpleNamespace(deployments={})}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications=listed))
    monkeypatch.setattr(ray_serve, "get_app_handle", {"chat": FakeServeHandle(create_app(lambda: engine))}.get)
    with flexpipe_serve.connect() as handle:
        assert handle.status() == engine.status()


def test_importing_the_package_imports_nothing_else():
    code = "import sys, flexpipe_serve; assert not {'httpx', 'msgspec', 'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError):
        flexpipe_serve.nothing  # noqa: B018


def test_an_iterator_left_at_the_end_of_the_program_does_not_hang(engine):
    with serve(create_app(lambda: engine)) as url:
        code = f"import flexpipe_serve; s = flexpipe_serve.connect({url!r}).stream('hi'); print(next(s))"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
