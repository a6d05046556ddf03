"""What dies is replaced: a killed Router, a killed stage."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
import openai
import psutil
import pytest
from served import Served, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RESTART_S = 120
"""10 s on a quiet machine; a busy one needs much longer for the imports alone."""


def test_a_killed_router_is_replaced_and_the_stages_survive(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    expected = served.complete("The capital of France is", num_tokens=20)
    before = served.status()
    router = wait_until(served.replica, timeout_s=90, what="the replica")
    psutil.Process(router["pid"]).kill()
    killed = time.monotonic()

    def answer() -> str | None:
        try:
            return served.complete("The capital of France is", num_tokens=20)
        except (httpx.HTTPError, AssertionError):
            return None

    answered = wait_until(answer, timeout_s=RESTART_S, what="an answer of the new Router")
    seconds = time.monotonic() - killed
    with capsys.disabled():
        print(f"\n    killed Router: the new one answered after {seconds:.1f} s")
    assert answered == expected
    after = served.status()
    assert [stage["pid"] for stage in after["stages"]] == [stage["pid"] for stage in before["stages"]]
    assert after["epoch"] == before["epoch"] + 1
    new_router = wait_until(served.replica, timeout_s=90, what="the replica")
    assert new_router["pid"] != router["pid"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_stage_is_replaced_and_no_request_notices(served: Served, index: int) -> None:
    rng = random.Random(index)
    prompts = [[rng.randrange(100, 49000) for _ in range(5 + 7 * i)] for i in range(8)]
    before = served.status()

    async def complete(client: openai.AsyncOpenAI, prompt: list[int], first: asyncio.Event) -> str:
        fields: dict[str, Any] = {"max_tokens": 900, "temperature": 0, "extra_body": {"ignore_eos": True}}
        text = ""
        async for chunk in await client.completions.create(model="small", prompt=prompt, stream=True, **fields):
            text += chunk.choices[0].text
            first.set()
        return text

    async def run(victim: psutil.Process | None) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            begun = [asyncio.Event() for _ in prompts]
            tasks = [asyncio.create_task(complete(client, *pair)) for pair in zip(prompts, begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))
            if victim is not None:
                assert not all(task.done() for task in tasks)
                victim.kill()
            return await asyncio.gather(*tasks)

    expected = asyncio.run(run(None))
    assert asyncio.run(run(served.stages()[index])) == expected
    after = served.wait_until_idle()
    assert after["epoch"] == before["epoch"] + 1
    same = [a["pid"] == b["pid"] for a, b in zip(after["stages"], before["stages"], strict=True)]
    assert same == [i != index for i in range(2)]
