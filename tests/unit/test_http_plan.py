"""The planner's routes."""

from __future__ import annotations

import httpx
from fake_engine import FakeEngine

from flexpipe_serve.planner.types import Verdict
from flexpipe_serve.planner.wire import from_wire


async def test_what_would_be_done_now(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.get("/flexpipe/plan")
    assert answer.status_code == 200
    decision = from_wire(answer.json())
    assert decision == engine.plan()
    assert decision.verdict is Verdict.MOVE


async def test_what_was_decided(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.get("/flexpipe/decisions")
    assert [from_wire(item) for item in answer.json()["data"]] == engine.decisions()
