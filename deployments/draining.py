"""The routes under ``/flexpipe/drain``: emptying a node before it goes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexpipe_serve.deployments.body import decode, read_body
from flexpipe_serve.deployments.context import context_of, json_response
from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.openapi import answer, errors, request_body
from flexpipe_serve.deployments.protocol import DrainList
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest

router = APIRouter(prefix="/flexpipe/drain", tags=["pipeline"])


@router.post(
    "",
    status_code=202,
    responses=answer(202, DrainRecord, "It is being emptied; its record as of now") | errors(400, 401, 413, 500, 503),
    openapi_extra=request_body(DrainRequest),
)
async def drain(request: Request) -> Response:
    """Empty a node before its deadline, by refactorings that move its stages elsewhere, and keep it empty.

    Asked again for the same node it gets the new deadline.
    """
    context = context_of(request)
    body = await read_body(request, max_bytes=context.get_limits().max_body_bytes)
    return json_response(await context.get_engine().drain(decode(body, DrainRequest)), status=202)


@router.get("", responses=answer(200, DrainList) | errors(401, 500, 503))
async def list_drains(request: Request) -> Response:
    """Records of all nodes that are being emptied or kept empty."""
    return json_response(DrainList(data=context_of(request).get_engine().drains()))


@router.get("/{node}", responses=answer(200, DrainRecord) | errors(401, 404, 500, 503))
async def get_drain(request: Request, node: str) -> Response:
    """How far a node, named by its id, is with being emptied."""
    for record in context_of(request).get_engine().drains():
        if record.node == node:
            return json_response(record)
    raise _not_drained(node)


@router.delete("/{node}", responses=answer(200, DrainRecord, "Its last record") | errors(400, 401, 404, 500, 503))
async def undrain(request: Request, node: str) -> Response:
    """Let stages be launched on a node, named by its id, again; a refactoring made for it that runs is cancelled."""
    record = await context_of(request).get_engine().undrain(node)
    if record is None:
        raise _not_drained(node)
    return json_response(record)


def _not_drained(node: str) -> ApiError:
    return ApiError(
        404,
        f"Node '{shorten(node)}' is not being drained; GET /flexpipe/drain lists those that are.",
        code="drain_not_found",
    )
