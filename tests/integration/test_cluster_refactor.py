"""Refactorings of ``flexpipe serve``: over HTTP and the command line, under streams, and with what dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from served import Served, clean_environment, wait_until

from flexpipe_serve.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RESTART_S = 120
"""Of the Router: 10 s on a quiet machine."""
NUM_TOKENS = 300


def make_prompts(seed: int, count: int = 6) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 49000) for _ in range(5 + 7 * i)] for i in range(count)]


async def complete(client: openai.AsyncOpenAI, prompt: list[int], begun: asyncio.Event) -> str:
    fields: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = ""
    async for chunk in await client.completions.create(model="small", prompt=prompt, stream=True, **fields):
        text += chunk.choices[0].text
        begun.set()
    return text


def stream_during(served: Served, prompts: list[list[int]], act: Callable[[], Any] | None = None) -> list[str]:
    """Streams all prompts, and calls ``act`` when all have begun."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            begun = [asyncio.Event() for _ in prompts]
            tasks = [asyncio.create_task(complete(client, *pair)) for pair in zip(prompts, begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))
            if act is not None:
                await asyncio.to_thread(act)
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


def start(served: Served, **body: Any) -> dict[str, Any]:
    """POST a refactoring. Its record as of then."""
    response = httpx.post(f"{served.base_url}/flexpipe/refactor", json=body, timeout=60)
    assert response.status_code == 202, response.text
    return dict(response.json())


def record_of(served: Served, refactoring_id: str) -> dict[str, Any]:
    return dict(httpx.get(f"{served.base_url}/flexpipe/refactor/{refactoring_id}", timeout=30).json())


def wait_for(served: Served, record: dict[str, Any], *, phase: str | None = None) -> dict[str, Any]:
    """The record once it is over, or in a phase."""

    def reached() -> dict[str, Any] | None:
        found = record_of(served, record["id"])
        return found if found["outcome"] != "running" or found["phase"] == phase else None

    return dict(wait_until(reached, timeout_s=90, what=f"phase {phase}"))


def refactor(served: Served, **body: Any) -> dict[str, Any]:
    """Carry one out."""
    found = wait_for(served, start(served, **body))
    assert (found["outcome"], found["error"]) == ("done", None)
    return found


def stage_processes(served: Served) -> list[psutil.Process]:
    """All stages, also those that the Router does not know (any more)."""
    found = []
    for process in served.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "StageActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until_no_stage_is_left_over(served: Served, *, timeout_s: float) -> None:
    """Until there are no stages but those of the layout and the pool: who hears of no Router takes time to end."""

    def as_known() -> bool:
        status = served.status()
        known = {stage["pid"] for stage in status["stages"] + status["warm_stages"]}
        return {process.pid for process in stage_processes(served)} == known

    wait_until(as_known, timeout_s=timeout_s, what="the end of other stages")


@pytest.fixture
def private(any_served: Served, serve_config: dict[str, Any]) -> Served:
    """A server whose two stages have memory of their own."""
    config = copy.deepcopy(serve_config)
    config["applications"][0]["args"]["kv"] = {"max_tokens": 8192, "domain": "stage"}
    any_served.reset(config)
    return any_served


def test_over_http_under_streams(served: Served) -> None:
    prompts = make_prompts(1)
    expected = stream_during(served, prompts)
    before = served.status()
    records: list[dict[str, Any]] = []

    def act() -> None:
        records.extend(refactor(served, boundaries=boundaries) for boundaries in ([1], [1, 3], [3]))
        records.append(refactor(served, stages=2))

    assert stream_during(served, prompts, act) == expected
    after = served.wait_until_idle()
    assert after["epoch"] == before["epoch"] + 4
    assert after["layout"] == before["layout"]
    wait_until_no_stage_is_left_over(served, timeout_s=20)
    assert after["kv"]["num_blocks"] == before["kv"]["num_blocks"]
    assert not any(record["snapshot_bytes"] for record in records)


def test_on_the_command_line(served: Served) -> None:
    command = [str(Path(sys.executable).with_name("flexpipe")), "refactor", "--boundaries", "1"]
    done = subprocess.run(
        [*command, "--url", served.base_url], env=clean_environment(), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert served.status()["layout"]["boundaries"] == [1]
    refactor(served, stages=2)


def test_a_configured_layout_comes_live(served: Served, serve_config: dict[str, Any]) -> None:
    prompts = make_prompts(2)
    expected = stream_during(served, prompts)
    config = copy.deepcopy(serve_config)
    config["applications"][0]["deployments"][0]["user_config"]["layout"] = {"boundaries": [1]}

    def act() -> None:
        served.deploy(config, until=lambda s: s["layout"]["boundaries"] == [1])

    assert stream_during(served, prompts, act) == expected
    (record,) = [
        r for r in httpx.get(f"{served.base_url}/flexpipe/refactor").json()["data"] if r["reason"] == "configuration"
    ][-1:]
    assert (record["mode"], record["outcome"], record["num_replayed"]) == ("live", "done", 0)
    served.deploy(serve_config, until=lambda s: s["layout"]["boundaries"] == [2])


def test_a_router_killed_while_stages_start(served: Served) -> None:
    """The new Router brings the configured layout up, with the stages that it finds under the names it needs."""
    expected = served.complete("Once upon a time", num_tokens=20)
    before, known = served.status(), {process.pid for process in stage_processes(served)}
    record = wait_for(served, start(served, stages=4), phase="prepare")
    assert record["outcome"] == "running"
    kill_router(served)
    after = wait_for_new_router(served)
    assert after["layout"] == before["layout"]
    assert known & {stage["pid"] for stage in after["stages"]}
    assert served.complete("Once upon a time", num_tokens=20) == expected


def kill_router(served: Served) -> None:
    router = wait_until(served.replica, timeout_s=90, what="the replica")
    psutil.Process(router["pid"]).kill()


def wait_for_new_router(served: Served) -> dict[str, Any]:
    def serving() -> dict[str, Any] | None:
        status = served.try_status()
        return status if status is not None and status["state"] == "serving" else None

    return dict(wait_until(serving, timeout_s=RESTART_S, what="the new Router"))


def test_what_dies_while_kv_is_copied(private: Served) -> None:
    """Between stages with memory of their own: a stage is killed, a user cancels, and the Router is killed."""
    served = private
    prompts = make_prompts(3)
    long = [[random.Random(i).randrange(100, 49000) for _ in range(900)] for i in range(6)]
    for prompt in long:  # more cached KV than one piece of a copy
        served.complete(prompt, num_tokens=1)
    expected = stream_during(served, prompts)
    slow = {"boundaries": [1], "max_bytes_per_s": 1000}

    def kill_the_target() -> None:
        record = wait_for(served, start(served, **slow), phase="copy")
        assert record["outcome"] == "running"
        served.stages()[1].kill()
        record = wait_for(served, record)
        assert record["outcome"] == "aborted"
        assert "stage-1" in record["error"]

    assert stream_during(served, prompts, kill_the_target) == expected
    assert served.wait_until_idle()["layout"]["boundaries"] == [2]

    for prompt in long:
        served.complete(prompt, num_tokens=1)

    def cancel() -> None:
        record = wait_for(served, start(served, **slow), phase="copy")
        assert record["outcome"] == "running"
        httpx.delete(f"{served.base_url}/flexpipe/refactor/{record['id']}").raise_for_status()
        assert wait_for(served, record)["outcome"] == "aborted"

    assert stream_during(served, prompts, cancel) == expected
    copied = refactor(served, boundaries=[1])
    assert copied["snapshot_bytes"] > 0
    assert stream_during(served, prompts) == expected
    refactor(served, boundaries=[2])

    record = wait_for(served, start(served, **slow), phase="copy")
    assert record["outcome"] == "running"
    pids = [process.pid for process in served.stages()]
    kill_router(served)
    after = wait_for_new_router(served)
    assert [stage["pid"] for stage in after["stages"]] == pids
    assert after["layout"]["boundaries"] == [2]
    assert stream_during(served, prompts) == expected
    served.wait_until_idle()
    wait_until_no_stage_is_left_over(served, timeout_s=60)


def test_bench_refactor(any_served: Served, serve_config: dict[str, Any], longer_model: Path, tmp_path: Path) -> None:
    """The benchmark's command, on a server with enough layers for it."""
    config = copy.deepcopy(serve_config)
    config["applications"][0]["args"]["kv"] = {"max_tokens": 8192, "domain": "stage", "prefix_cache": False}
    config["applications"][0]["args"]["model"]["source"] = str(longer_model)
    any_served.reset(config)
    out = tmp_path / "out.json"
    code = main(
        ["bench", "refactor", "--url", any_served.base_url, "--tokenizer", str(longer_model), "--modes", "live",
         "--kinds", "shift", "--idle", "0.5", "--concurrency", "2", "--prompt-tokens", "24", "--output-tokens", "40",
         "--json", str(out)]
    )  # fmt: skip
    data = json.loads(out.read_text())
    (section,) = data["sections"]
    (trial,) = section["trials"]
    assert code == 0
    assert trial["record"]["outcome"] == "done"
    assert trial["record"]["snapshot_bytes"] > 0
    assert trial["window"]["start_s"] < trial["switched_s"] <= trial["window"]["end_s"]
    assert trial["figures"]["gaps_ms"]["count"] > 0
    assert "extra_memory_bytes" in trial  # None where the window was shorter than a look at the memory
    assert (section["num_dropped"], section["differences"]) == (0, [])
