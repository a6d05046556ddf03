"""The real application on a real Ray cluster: the official client, bad input, clients that leave, status, metrics."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import collect, running_engine
from http_fuzz import fuzz
from served import Served, wait_until

from flexpipe_serve.engine.sampling_params import SamplingParams

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NUM_STREAMS = 16
NUM_TOKENS = 24
GREEDY = {"max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(100, 49000) for _ in range(4 + 5 * i)] for i in range(NUM_STREAMS)]


@pytest.fixture(scope="module")
def expected(small_model: Path, prompts: list[list[int]]) -> list[str]:
    """What an engine in this process says."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

    async def run(engine: Any) -> list[str]:
        answers = await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts))
        return ["".join(output.text for output in answer[0]) for answer in answers]

    with running_engine(small_model) as engine:
        return asyncio.run(run(engine))


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0, timeout=60)


def test_many_streams_at_once_say_what_an_engine_in_this_process_says(
    served: Served, prompts: list[list[int]], expected: list[str]
) -> None:
    async def stream(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
        chunks = [
            chunk
            async for chunk in await client.completions.create(model="small", prompt=prompt, stream=True, **GREEDY)
        ]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len(chunks) > NUM_TOKENS // 2  # it was a stream
        return "".join(chunk.choices[0].text for chunk in chunks)

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    assert asyncio.run(run()) == expected


def test_the_official_client(served: Served, prompts: list[list[int]], expected: list[str]) -> None:
    with client_of(served) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        whole = client.completions.create(model="small", prompt=prompts[0], **GREEDY)
        assert whole.choices[0].text == expected[0]
        assert whole.usage.completion_tokens == NUM_TOKENS
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        answer = client.chat.completions.create(model="small", messages=messages, **GREEDY)
        chunks = list(
            client.chat.completions.create(
                model="small", messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
        )
    assert answer.choices[0].message.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS


def test_status(served: Served) -> None:
    status = served.wait_until_idle()
    assert status["model"] == "small"
    assert status["config_error"] is None
    assert status["layout"] == {"num_layers": 4, "num_stages": 2, "boundaries": [2]}
    assert [stage["layers"] for stage in status["stages"]] == [[0, 2], [2, 4]]
    assert {stage["device"] for stage in status["stages"]} == {"cpu"}
    assert len({stage["pid"] for stage in status["stages"]}) == 2
    assert status["kv"]["max_tokens"] == 8192
    assert status["kv"]["num_free_blocks"] + status["kv"]["num_cached_blocks"] == status["kv"]["num_blocks"]
    assert status["queue"]["num_waiting"] == 0


def test_bad_input_never_gives_a_5xx_and_harms_no_neighbour(served: Served) -> None:
    report = fuzz(served.base_url, max_examples=80)
    assert report.statuses[200] >= 8
    assert report.statuses[400] >= 8
    assert report.num_neighbours >= 2
    served.wait_until_idle()


@pytest.mark.parametrize("num_bytes", [0, 1, 2000])
def test_a_client_that_leaves_in_mid_stream_gives_all_blocks_back(served: Served, num_bytes: int) -> None:
    def ends(status: dict[str, Any]) -> dict[str, int]:
        return {"abort": 0, **status["metrics"]["counters"]["sequences_finished"]}

    before = served.wait_until_idle()
    body = json.dumps(
        {"prompt": [7] * 40, "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head + body)
        if num_bytes == 0:  # before the first byte of the answer
            wait_until(lambda: served.status()["queue"]["num_running"], timeout_s=90, what="the request")
        else:
            assert connection.recv(num_bytes, socket.MSG_WAITALL)
    after = served.wait_until_idle()
    assert ends(after) == {**ends(before), "abort": ends(before)["abort"] + 1}


def test_metrics_stand_at_rays_endpoint(served: Served) -> None:
    served.complete([5, 6, 7], num_tokens=2)
    targets = httpx.get(f"{served.dashboard}/api/prometheus/sd", timeout=30).json()[0]["targets"]

    def series() -> dict[str, str] | None:
        pages = [httpx.get(f"http://{target}/metrics", timeout=30).text for target in targets]
        lines = [line for page in pages for line in page.splitlines() if line.startswith("ray_flexpipe_")]
        found = {line.split("{")[0]: line for line in lines}
        return found if "ray_flexpipe_generation_tokens_total" in found else None

    found = wait_until(series, timeout_s=90, what="Ray's metrics")
    assert 'app="flexpipe"' in found["ray_flexpipe_generation_tokens_total"]
    for name in ("epoch", "stage_layers", "kv_used_ratio", "running_sequences", "time_to_first_token_seconds_count"):
        assert f"ray_flexpipe_{name}" in found, sorted(found)
