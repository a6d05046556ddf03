"""Several pipelines of ``flexpipe serve``: started, taken away under streams, adopted by a new Router."""

from __future__ import annotations

import asyncio
import copy
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
from served import Served, alive_after, clean_environment, wait_until

from flexpipe_serve import connect

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NUM_TOKENS = 400


def stream_during(served: Served, prompts: list[list[int]], act: Callable[[], Any]) -> list[str]:
    """Texts of all prompts, streamed; ``act`` is called when all have begun."""

    async def complete(client: openai.AsyncOpenAI, prompt: list[int], begun: asyncio.Event) -> str:
        fields: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        text = ""
        async for chunk in await client.completions.create(model="small", prompt=prompt, stream=True, **fields):
            text += chunk.choices[0].text
            begun.set()
        return text

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            begun = [asyncio.Event() for _ in prompts]
            tasks = [asyncio.create_task(complete(client, *pair)) for pair in zip(prompts, begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))
            await asyncio.to_thread(act)
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


def processes(status: dict[str, Any]) -> list[psutil.Process]:
    """Stages of all pipelines."""
    return [psutil.Process(s["pid"]) for pipeline in status["pipelines"] for s in pipeline["stages"]]


def locked_folders(stage: psutil.Process) -> set[Path]:
    """Folders in shared memory that it uses."""
    return {Path(file.path).parent for file in stage.open_files() if Path(file.path).name == "lock"}


def test_pipelines_come_and_go_under_streams(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(8)
    prompts = [[rng.randrange(100, 49000) for _ in range(5 + 7 * i)] for i in range(8)]
    expected = stream_during(served, prompts, lambda: None)
    command = [str(Path(sys.executable).with_name("flexpipe")), "scale", "--layouts", "2", "1"]
    command += ["--url", served.base_url]
    shown = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.startswith("1 → 2 pipelines after")
    status = served.status()
    assert [len(pipeline["stages"]) for pipeline in status["pipelines"]] == [2, 1]
    assert [stage["name"] for stage in status["pipelines"][1]["stages"]] == ["p1-stage-0"]
    leaving = processes(status)[2]
    folders = locked_folders(leaving) - locked_folders(processes(status)[0])
    assert folders
    with connect(served.base_url) as handle:
        records = []
        texts = stream_during(served, prompts, lambda: records.append(handle.scale(pipelines=1)))
        (record,) = records
        events = [event.kind for event in handle.events()]
    assert texts == expected
    assert record.num_handed_over > 0
    assert [kind for kind in events if kind.startswith("pipeline_")] == ["pipeline_started", "pipeline_ended"]
    assert not alive_after([leaving], timeout_s=90)
    assert not [folder for folder in folders if folder.exists()]
    served.wait_until_idle()
    with capsys.disabled():
        print(f"\n    {shown.stdout.splitlines()[0]}; {record.num_handed_over} handed over in {record.seconds:.2f} s")


def test_the_configuration_says_how_many_and_a_new_router_adopts_them(
    served: Served, serve_config: dict[str, Any]
) -> None:
    config = copy.deepcopy(serve_config)
    config["applications"][0]["deployments"][0]["user_config"]["pipelines"] = 2
    before = served.deploy(config, until=lambda s: [len(p["stages"]) for p in s["pipelines"]] == [2, 2])
    pids = [process.pid for process in processes(before)]
    assert len(set(pids)) == 4
    text = served.complete("The capital of France is", num_tokens=20)
    router = wait_until(served.replica, timeout_s=90, what="the replica")
    process = psutil.Process(router["pid"])
    process.kill()
    process.wait(60)

    def answer() -> str | None:
        try:
            return served.complete("The capital of France is", num_tokens=20)
        except (httpx.HTTPError, AssertionError):
            return None

    assert wait_until(answer, timeout_s=60, what="an answer of the new Router") == text
    after = served.status()
    assert [process.pid for process in processes(after)] == pids
    metrics = httpx.get(f"{served.base_url}/flexpipe/status", timeout=30).json()["pipelines"][1]["metrics"]
    assert metrics["counters"]["steps"] >= 0
    ended = processes(after)[2:]
    served.deploy(serve_config, until=lambda s: len(s["pipelines"]) == 1)
    assert not alive_after(ended, timeout_s=90)
