"""The steady load against a small server, and the configuration of a server of the benchmark's own."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from status_samples import pipeline_status, server_status, stage
from test_bench_serve import FakeServer

from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.load import SteadyLoad, StreamRecord, find_stalled
from flexpipe_serve.bench.memory import LocalMemory
from flexpipe_serve.bench.server import adapt_config, read_config
from flexpipe_serve.errors import ConfigError

PROMPTS = ["a b", "c d", "e f"]


@contextlib.asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[Target]:
    listener = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    async with listener:
        yield Target("fake", f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", model="tiny")


class CountingServer(FakeServer):
    """Tells of each request."""

    seen: asyncio.Semaphore

    async def complete(self, body: dict, writer: asyncio.StreamWriter) -> None:
        self.seen.release()
        await super().complete(body, writer)


class SlowServer(FakeServer):
    """Gives one token, then waits."""

    async def complete(self, body: dict, writer: asyncio.StreamWriter) -> None:
        data = b'data: {"choices": [{"text": "x"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5)


async def run_until(fake: CountingServer, num_requests: int, load: SteadyLoad) -> list[StreamRecord]:
    """The load, until the server has seen so many requests."""
    fake.seen = asyncio.Semaphore(0)
    await load.start()
    for _ in range(num_requests):
        await fake.seen.acquire()
    return await load.stop()


async def test_finished_streams_are_replaced_and_the_rest_given_up() -> None:
    fake = CountingServer()
    async with serving(fake) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=2, num_tokens=6, spread=False)
        streams = await run_until(fake, 12, load)
    assert fake.max_running <= 2
    assert {stream.error for stream in streams} == {None}
    done = [stream for stream in streams if not stream.was_ended]
    assert len(done) >= 10
    assert all(stream.pieces == ("x",) * 6 and len(stream.token_times_s) == 6 for stream in done)
    assert [stream.prompt for stream in streams] == [i % 3 for i in range(len(streams))]
    assert sum(stream.was_ended for stream in streams) <= 2
    assert {body["max_tokens"] for body in fake.bodies} == {6}


async def test_the_first_streams_can_be_of_different_lengths() -> None:
    fake = CountingServer()
    async with serving(fake) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=3, num_tokens=30, spread=True)
        await run_until(fake, 5, load)
    assert [body["max_tokens"] for body in fake.bodies[:3]] == [10, 20, 30]
    assert {body["max_tokens"] for body in fake.bodies[3:]} == {30}


async def test_a_spread_load_is_steady_when_each_place_is_at_its_second_stream() -> None:
    async with serving(FakeServer()) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=3, num_tokens=30, spread=True)
        await load.start()
        streams = await load.stop()
    assert {stream.slot for stream in streams if not stream.was_ended} == {0, 1, 2}


async def test_a_stream_given_up_keeps_what_it_said() -> None:
    async with serving(SlowServer()) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=2, num_tokens=50, spread=False)
        await load.start()
        streams = await load.stop()
    assert [(stream.pieces, stream.was_ended, stream.error) for stream in streams] == [(("x",), True, None)] * 2
    assert [stream.slot for stream in streams] == [0, 1]


async def test_waiting_for_every_stream() -> None:
    async with serving(SlowServer()) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=2, num_tokens=5, spread=False)
        await load.start()
        load.timeout_s = 0.1  # not of the streams, which have begun
        await load.wait_for_tokens(0.0)
        with pytest.raises(TimeoutError):
            await load.wait_for_tokens(time.perf_counter())
        await load.stop()


async def test_failures_are_kept_with_their_reason() -> None:
    fake = CountingServer()
    fake.mode = "cut"
    async with serving(fake) as target:
        load = SteadyLoad(target, PROMPTS, concurrency=1, num_tokens=5, spread=False)
        streams = await run_until(fake, 3, load)
    assert streams[0].error == "the stream broke off after 5 pieces of text"
    assert not streams[0].was_ended


def stream(*, sent_s: float, end_s: float, times: tuple[float, ...], was_ended: bool) -> StreamRecord:
    return StreamRecord(0, 0, 9, sent_s, end_s, times, ("x",) * len(times), was_ended)


def test_silent_streams_are_stalled() -> None:
    lost = stream(sent_s=0, end_s=10, times=(1, 2), was_ended=True)
    never_began = stream(sent_s=3, end_s=10, times=(), was_ended=True)
    alive = stream(sent_s=0, end_s=10, times=(1, 9), was_ended=True)
    over = stream(sent_s=0, end_s=10, times=(1,), was_ended=False)
    young = stream(sent_s=9, end_s=10, times=(), was_ended=True)
    assert find_stalled([lost, never_began, alive, over, young], after_s=3) == [lost, never_began]


CONFIG = {
    "applications": [
        {
            "name": "flexpipe",
            "args": {"memory_budget": "4GiB", "kv": {"prefix_cache": True}},
            "deployments": [{"name": "Router", "user_config": {"layout": {"stages": 2}, "limits": {"max_waiting": 9}}}],
        }
    ]
}


def test_configurations_are_adapted() -> None:
    args = {"kv": {"domain": "stage"}, "memory_budget": {"stage-0": 5}}
    adapted = adapt_config(CONFIG, args=args, user_config={"layout": {"boundaries": [15]}, "warm_stages": 1})
    app = adapted["applications"][0]
    assert app["args"] == {"memory_budget": {"stage-0": 5}, "kv": {"prefix_cache": True, "domain": "stage"}}
    assert app["deployments"] == [
        {
            "name": "Router",
            "user_config": {"layout": {"boundaries": [15]}, "limits": {"max_waiting": 9}, "warm_stages": 1},
        }
    ]
    assert CONFIG["applications"][0]["args"]["kv"] == {"prefix_cache": True}  # the original is left alone
    bare = adapt_config({"applications": [{}]}, args={}, user_config={"warm_stages": 1})
    assert bare["applications"][0]["deployments"] == [{"name": "Router", "user_config": {"warm_stages": 1}}]


@pytest.mark.parametrize("text", ["", "applications: 3", "a: [", "applications: [{}, {}]"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        read_config(tmp_path / "missing.yaml")


def test_memory_of_local_stages() -> None:
    size = 50 << 20
    code = f"import sys; held = bytearray(b'x') * {size}; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "ray::StageActor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        status = server_status(pipeline_status(stages=[stage(pid=child.pid)]))
        memory = LocalMemory(status)
        assert child.pid in memory.pids()
        assert memory.num_stage_processes() == 1
        held = memory.total_bytes()
        child.stdin.close()
        child.wait()
        assert held - memory.total_bytes() > size
    with pytest.raises(ProcessLookupError):
        LocalMemory(status)
