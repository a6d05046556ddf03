"""The planner's routes: what it would do now, and what it decided lately."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexpipe_serve.deployments.context import context_of, json_response
from flexpipe_serve.deployments.openapi import answer, errors
from flexpipe_serve.deployments.protocol import DecisionList
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.planner.wire import to_wire

router = APIRouter(prefix="/flexpipe")


@router.get("/plan", tags=["pipeline"], responses=answer(200, Decision) | errors(401, 500, 503))
async def get_plan(request: Request) -> Response:
    """What the planner would do now, and why; nothing comes of it. Times beyond a split's capacity are null."""
    decision = await asyncio.to_thread(context_of(request).get_engine().plan)
    return json_response(to_wire(decision))


@router.get("/decisions", tags=["pipeline"], responses=answer(200, DecisionList) | errors(401, 500, 503))
async def list_decisions(request: Request) -> Response:
    """The planner's latest decisions, also those to stay, the newest last; none while it is off."""
    decisions = context_of(request).get_engine().decisions()
    return json_response({"object": "list", "data": [to_wire(decision) for decision in decisions]})
