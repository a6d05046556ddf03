"""A client that leaves: its sequences end at once, exactly once, and nothing is left behind."""

import asyncio
import json

import httpx
import pytest
from fake_engine import FakeEngine
from http_server import serve

from flexpipe_serve.deployments.api import create_app

BODIES = {
    "/v1/completions": {"prompt": "hi", "ignore_eos": True, "max_tokens": 200, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "temperature": 0},
}


class Connection:
    """Drives the application as an ASGI server would, step by step."""

    def __init__(self, engine, path, body):
        self.sent = []
        self.sending = asyncio.Condition()
        self.gone = asyncio.Event()
        self.may_send = asyncio.Semaphore(1_000_000)
        self.raise_on_send = False
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
        }
        self.task = asyncio.create_task(create_app(lambda: engine)(scope, self.receive, self.send))

    async def receive(self):
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.raise_on_send:
            raise OSError("closed")
        await self.may_send.acquire()
        async with self.sending:
            self.sent.append(message)
            self.sending.notify_all()

    async def sent_at_least(self, num_messages):
        async with self.sending:
            await self.sending.wait_for(lambda: len(self.sent) >= num_messages)

    async def ends(self):
        await asyncio.wait_for(self.task, 10)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("path", BODIES)
async def test_gone_while_the_engine_computes(path):
    engine = FakeEngine(gate=asyncio.Semaphore(3))
    connection = Connection(engine, path, {**BODIES[path], "stream": True})
    await connection.sent_at_least(4)  # the head and three pieces; the engine waits now
    assert engine.aborted == []
    connection.gone.set()
    await connection.ends()
    assert engine.aborted == engine.started
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("path", BODIES)
async def test_gone_while_the_answer_is_sent(path):
    engine = FakeEngine()
    connection = Connection(engine, path, {**BODIES[path], "stream": True})
    connection.may_send = asyncio.Semaphore(3)  # the network is stuck then
    await connection.sent_at_least(3)
    connection.gone.set()
    await connection.ends()
    assert engine.aborted == engine.started
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("path", BODIES)
async def test_gone_without_a_stream(path):
    engine = FakeEngine(gate=asyncio.Semaphore(3))
    connection = Connection(engine, path, BODIES[path])
    await engine.holds(1)
    connection.gone.set()
    await connection.ends()
    assert connection.sent == []
    assert engine.aborted == engine.started
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_gone_with_several_prompts(stream):
    engine = FakeEngine(gate=asyncio.Semaphore(7))
    body = {"prompt": ["a", "b", "c"], "n": 2, "ignore_eos": True, "max_tokens": 100, "stream": stream}
    connection = Connection(engine, "/v1/completions", body)
    await engine.holds(3)
    connection.gone.set()
    await connection.ends()
    assert sorted(engine.aborted) == sorted(engine.started)
    assert len(engine.aborted) == 3


async def test_gone_before_the_first_output():
    engine = FakeEngine(gate=asyncio.Semaphore(0))
    connection = Connection(engine, "/v1/completions", {"prompt": "x", "stream": True})
    await engine.holds(1)
    connection.gone.set()
    await connection.ends()
    assert connection.sent == []
    assert engine.aborted == engine.started


async def test_a_send_that_fails_is_a_client_that_left(caplog):
    engine = FakeEngine()
    connection = Connection(engine, "/v1/completions", {**BODIES["/v1/completions"], "stream": True})
    await connection.sent_at_least(2)
    connection.raise_on_send = True
    await connection.ends()
    assert engine.aborted == engine.started
    assert caplog.records == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_aborts_once(stream):
    """Ray Serve cancels the task of a request whose client left."""
    engine = FakeEngine(gate=asyncio.Semaphore(3))
    connection = Connection(engine, "/v1/completions", {"prompt": ["x", "y"], "stream": stream})
    await engine.holds(2)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.ends()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert sorted(engine.aborted) == sorted(engine.started)


async def test_gone_while_sending_the_body(caplog):
    engine = FakeEngine()
    connection = Connection(engine, "/v1/completions", {})
    connection._body = None
    connection.gone.set()
    await connection.ends()
    assert engine.started == []
    assert caplog.records == []


async def test_a_whole_answer_leaves_nothing_behind():
    engine = FakeEngine()
    for stream in (False, True):
        connection = Connection(engine, "/v1/completions", {"prompt": ["x", "y"], "stream": stream})
        await connection.ends()
        assert connection.sent[-1]["more_body"] is False
    assert engine.aborted == []
    assert len(engine.finished) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_over_a_socket(stream):
    engine = FakeEngine(token_delay_s=0.01)
    with serve(create_app(lambda: engine)) as url, httpx.Client(base_url=url) as client:
        body = {**BODIES["/v1/completions"], "max_tokens": 500, "stream": stream}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
        assert engine.has_aborted.wait(60)
        assert engine.aborted == engine.started
        # A neighbour on the same server is served.
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_streamed_pieces_arrive_one_by_one():
    engine = FakeEngine(token_delay_s=0.02)
    with serve(create_app(lambda: engine)) as url, httpx.Client(base_url=url) as client:
        body = {"prompt": "x", "max_tokens": 10, "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert engine.finished == []
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "P"
            assert engine.finished == []
            list(lines)
    assert len(engine.finished) == 1


def test_a_large_body_is_refused_over_a_socket():
    """The answer arrives although the body was not read to its end."""
    with serve(create_app(FakeEngine)) as url, httpx.Client(base_url=url) as client:

        def chunks():
            for _ in range(400):
                yield b" " * 65536

        assert client.post("/v1/completions", content=b" " * (9 << 20)).status_code == 413
        assert client.post("/v1/completions", content=chunks()).status_code == 413
        assert client.get("/health").status_code == 200
