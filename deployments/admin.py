"""The routes under ``/flexpipe``: what the pipeline is, and changing it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexpipe_serve.deployments.body import decode, read_body
from flexpipe_serve.deployments.context import context_of, json_response
from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.openapi import answer, errors, request_body
from flexpipe_serve.deployments.protocol import EventList, RefactorList
from flexpipe_serve.engine.scale_record import ScaleRecord, ScaleRequest
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import ConfigError, RefactorRefusedError
from flexpipe_serve.refactor.record import Outcome, RefactorRecord, RefactorRequest

router = APIRouter(prefix="/flexpipe")


@router.get("/status", tags=["pipeline"], responses=answer(200, ServerStatus) | errors(401, 500, 503))
async def status(request: Request) -> Response:
    """Layout, epoch, stages with their layers and memory, KV use, queue."""
    return json_response(context_of(request).get_engine().status())


@router.get("/events", tags=["pipeline"], responses=answer(200, EventList) | errors(401, 500, 503))
async def list_events(request: Request) -> Response:
    """What happened to the pipeline lately, the newest last."""
    return json_response(EventList(data=context_of(request).get_engine().events()))


@router.post(
    "/refactor",
    tags=["pipeline"],
    status_code=202,
    responses=answer(202, RefactorRecord, "It is planned and has started; its record as of now")
    | answer(200, RefactorRecord, "Of a dry run: the plan, and whether it would be done")
    | errors(400, 401, 409, 413, 500, 503),
    openapi_extra=request_body(RefactorRequest),
)
async def start_refactoring(request: Request) -> Response:
    """Change the pipeline's split while it serves: 'stages' splits evenly, 'boundaries' where you say."""
    context = context_of(request)
    body = await read_body(request, max_bytes=context.get_limits().max_body_bytes)
    parsed = decode(body, RefactorRequest)
    try:
        record = await context.get_engine().refactor(parsed)
    except ConfigError as error:  # no layout of this model
        raise RefactorRefusedError(str(error)) from None
    if parsed.dry_run:
        return json_response(record)
    if record.outcome is Outcome.REFUSED:
        raise RefactorRefusedError(record.error or record.plan.reason)
    return json_response(record, status=202)


@router.get("/refactor", tags=["pipeline"], responses=answer(200, RefactorList) | errors(401, 500, 503))
async def list_refactorings(request: Request) -> Response:
    """Records of the latest refactorings, the newest last."""
    return json_response(RefactorList(data=context_of(request).get_engine().refactorings()))


@router.get(
    "/refactor/{refactoring_id}",
    tags=["pipeline"],
    responses=answer(200, RefactorRecord) | errors(401, 404, 500, 503),
)
async def get_refactoring(request: Request, refactoring_id: str) -> Response:
    """What is known of a refactoring: its phase and progress, or how it ended, with times and bytes."""
    record = context_of(request).get_engine().refactoring(refactoring_id)
    return json_response(_found(record, refactoring_id))


@router.delete(
    "/refactor/{refactoring_id}",
    tags=["pipeline"],
    status_code=202,
    responses=answer(202, RefactorRecord, "It was asked to stop; its record as of now") | errors(401, 404, 500, 503),
)
async def cancel_refactoring(request: Request, refactoring_id: str) -> Response:
    """Ask a refactoring to stop: before the switch the old layout serves on, after it this is without effect."""
    record = context_of(request).get_engine().cancel_refactoring(refactoring_id)
    return json_response(_found(record, refactoring_id), status=202)


@router.post(
    "/scale",
    tags=["pipeline"],
    responses=answer(200, ScaleRecord, "What serves now") | errors(400, 401, 409, 413, 500, 503),
    openapi_extra=request_body(ScaleRequest),
)
async def scale(request: Request) -> Response:
    """Let pipelines come and go while they serve, also of unequal granularity; answers when they have."""
    context = context_of(request)
    body = await read_body(request, max_bytes=context.get_limits().max_body_bytes)
    try:
        return json_response(await context.get_engine().scale(decode(body, ScaleRequest)))
    except ConfigError as error:  # no layout of this model
        raise RefactorRefusedError(str(error)) from None


def _found(record: RefactorRecord | None, refactoring_id: str) -> RefactorRecord:
    if record is None:
        raise ApiError(
            404,
            f"There is no refactoring '{shorten(refactoring_id)}'; GET /flexpipe/refactor lists the latest ones.",
            code="refactoring_not_found",
        )
    return record
