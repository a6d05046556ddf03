"""The load generator end to end, against a small streaming server in a thread."""

import argparse
import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_bench_arrivals import write_tokenizer

from flexpipe_serve.bench import serve
from flexpipe_serve.errors import ConfigError

# Requests of this length are the warm-up, which no mode of the server disturbs.
WARM_UP_TOKENS = 16


class FakeServer:
    """Answers completions with so many pieces; counts what it sees."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[str] = []
        self.num_running = 0
        self.max_running = 0
        self.mode = "good"
        self.all_arrived: threading.Event | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        try:
            if head.startswith("GET /v1/models "):
                body = json.dumps({"data": [{"id": "tiny"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            else:
                assert head.startswith("POST /v1/completions ")
                length = next(int(line[15:]) for line in head.splitlines() if line.startswith("Content-Length:"))
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.num_running += 1
                self.max_running = max(self.max_running, self.num_running)
                if self.mode == "hang" and body["max_tokens"] != WARM_UP_TOKENS:
                    await reader.read()  # until the client gives up
                else:
                    await self.complete(body, writer)
                self.num_running -= 1
            await writer.drain()
        finally:
            writer.close()

    async def complete(self, body: dict, writer: asyncio.StreamWriter) -> None:
        is_measured = body["max_tokens"] != WARM_UP_TOKENS
        if is_measured and self.mode == "busy" and len(self.bodies) % 2:
            writer.write(b'HTTP/1.1 429 Busy\r\n\r\n{"error": {"message": "queue is full"}}')
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send(message: dict | str) -> None:
            text = message if isinstance(message, str) else json.dumps(message)
            data = f"data: {text}\n\n".encode()
            # Two chunks for one event: the client must not count it twice.
            for part in (data[:9], data[9:]):
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))

        for _ in range(body["max_tokens"]):
            send({"choices": [{"text": "x"}]})
            await writer.drain()
            await asyncio.sleep(0)
        if is_measured and self.mode == "cut":
            return
        prompt = body["prompt"]
        num_prompt_tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": body["max_tokens"]}
        send({"choices": [{"text": "", "finish_reason": "length"}]})
        send({"choices": [], "usage": usage})
        send("[DONE]")
        writer.write(b"0\r\n\r\n")


@pytest.fixture
def servers() -> Iterator[list[tuple[str, FakeServer]]]:
    """Two servers and their URLs, in one thread."""
    loop = asyncio.new_event_loop()
    started, found = threading.Event(), []
    stop = asyncio.Event()

    async def run() -> None:
        listeners = []
        for _ in range(2):
            fake = FakeServer()
            listeners.append(await asyncio.start_server(fake.handle, "127.0.0.1", 0))
            found.append((f"http://127.0.0.1:{listeners[-1].sockets[0].getsockname()[1]}", fake))
        started.set()
        await stop.wait()
        for listener in listeners:
            listener.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert started.wait(60)
    yield found
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture
def bench(tmp_path: Path):
    write_tokenizer(tmp_path, num_special=0)

    def run(*options: str) -> tuple[int, dict]:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        out = tmp_path / "out.json"
        code = serve.main(parser.parse_args(["--tokenizer", str(tmp_path), "--json", str(out), "--requests", *options]))
        return code, json.loads(out.read_text())

    return run


def test_closed_loop(servers, bench, tmp_path: Path) -> None:
    url, fake = servers[0]
    plot = tmp_path / "p.png"
    code, data = bench(
        "--url", url, "--concurrency", "3", "--num-requests", "10", "--prompt-tokens", "40", "--output-tokens", "20",
        "--plot", str(plot),
    )  # fmt: skip
    figures = data["targets"][url]["all_rounds"]
    assert code == 0
    assert (figures["num_requests"], figures["num_errors"], figures["num_output_tokens"]) == (10, 0, 200)
    assert figures["num_wrong_prompts"] == 0
    assert figures["ttft_ms"]["p50"] > 0
    assert figures["gap_ms"]["count"] == 10 * 19
    assert figures["client_cpu_us_per_token"] > 0
    assert 1 <= fake.max_running <= 3
    assert len(fake.bodies) == 11  # the warm-up too
    measured = fake.bodies[1:]
    assert len({body["prompt"] for body in measured}) == 10
    assert {body["model"] for body in measured} == {"tiny"}
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in measured)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for request in data["targets"][url]["requests"][0]:
        assert request["start_s"] <= request["sent_s"] < request["token_times_s"][0] <= request["end_s"]


def test_servers_take_turns_and_get_the_same_prompts(servers, bench) -> None:
    (url_a, fake_a), (url_b, fake_b) = servers
    code, data = bench(
        "--url", f"a={url_a}/v1", "--url", f"b={url_b}", "--rounds", "3", "--concurrency", "2", "--num-requests", "4",
        "--prompt-ids", "--extra-body", '{"ignore_eos": null, "top_k": 1}', "--model", "m", "--api-key", "secret",
    )  # fmt: skip
    assert code == 0
    assert [len(data["targets"][name]["rounds"]) for name in "ab"] == [3, 3]
    assert "secret" not in json.dumps(data)
    assert all("Authorization: Bearer secret" in head for head in fake_a.headers)
    prompts_a, prompts_b = ([tuple(body["prompt"]) for body in fake.bodies] for fake in (fake_a, fake_b))
    assert sorted(prompts_a) == sorted(prompts_b)
    assert len(set(prompts_a)) == 1 + 3 * 4
    assert all("ignore_eos" not in body and body["top_k"] == 1 for body in fake_a.bodies)


def test_open_loop_keeps_to_the_arrivals(servers, bench) -> None:
    url, _ = servers[0]
    code, data = bench("--url", url, "--rate", "200", "--cv", "0", "--num-requests", "20", "--output-tokens", "2")
    assert code == 0
    requests = data["targets"][url]["requests"][0]
    assert [request["start_s"] for request in requests] == pytest.approx([0.005 * i for i in range(1, 21)])
    assert all(request["sent_s"] >= request["start_s"] for request in requests)


def test_trace(servers, bench, tmp_path: Path) -> None:
    url, fake = servers[0]
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,30,4\n1,50,6\n2,9,9\n")
    _, data = bench("--url", url, "--trace", str(trace), "--time-scale", "0.01", "--num-requests", "2")
    requests = data["targets"][url]["requests"][0]
    assert [request["start_s"] for request in requests] == pytest.approx([0.0, 0.01])
    assert [len(body["prompt"].split()) for body in fake.bodies[1:]] == [30, 50]
    assert [body["max_tokens"] for body in fake.bodies[1:]] == [4, 6]


@pytest.mark.parametrize(
    ("mode", "num_errors", "reason"), [("busy", 4, "HTTP 429: queue is full"), ("cut", 8, "broke off after 5")]
)
def test_failures_are_counted_with_their_reason(servers, bench, mode: str, num_errors: int, reason: str) -> None:
    url, fake = servers[0]
    fake.mode = mode
    code, data = bench("--url", url, "--concurrency", "1", "--num-requests", "8", "--output-tokens", "5")
    figures = data["targets"][url]["all_rounds"]
    assert code == 1
    assert figures["num_errors"] == num_errors
    assert sum(figures["errors"].values()) == num_errors
    assert all(reason in found for found in figures["errors"])
    assert figures["ttft_ms"]["count"] == 8 - num_errors


def test_a_server_that_is_not_there_is_refused_before_the_run(bench) -> None:
    with pytest.raises(ConfigError, match=r"warm-up request to x .* failed: cannot connect"):
        bench("--url", "x=http://127.0.0.1:9", "--model", "m", "--concurrency", "1")
    with pytest.raises(ConfigError, match="names no model"):
        bench("--url", "http://127.0.0.1:9", "--concurrency", "1")


def test_a_slow_server_times_out(servers, bench) -> None:
    url, fake = servers[0]
    fake.mode = "hang"
    code, data = bench("--url", url, "--concurrency", "2", "--num-requests", "2", "--timeout", "0.2")
    assert code == 1
    assert data["targets"][url]["all_rounds"]["errors"] == {"no complete answer within 0.2 s": 2}


@pytest.mark.parametrize(
    "options",
    [
        ["--url", "ftp://x"],
        ["--cv", "2"],
        ["--time-scale", "2"],
        ["--extra-body", "[]"],
        ["--url", "a=http://127.0.0.1:9", "--url", "a=http://127.0.0.1:8"],
    ],
)
def test_options_that_make_no_sense_are_refused(bench, options: list[str]) -> None:
    with pytest.raises(ConfigError):
        bench("--concurrency", "1", "--model", "m", *options)
