"""The published schema: bodies are decoded by msgspec, so FastAPI is told what they are."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from flexpipe_serve.deployments.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DecisionList,
    DetokenizeAnswer,
    DetokenizeRequest,
    DrainList,
    ErrorAnswer,
    EventList,
    RefactorList,
    TokenizeAnswer,
    TokenizeRequest,
)
from flexpipe_serve.engine.scale_record import ScaleRecord, ScaleRequest
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest

_STRUCTS = (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    Decision,
    DecisionList,
    DetokenizeAnswer,
    DetokenizeRequest,
    DrainList,
    DrainRecord,
    DrainRequest,
    ErrorAnswer,
    EventList,
    RefactorList,
    RefactorRecord,
    RefactorRequest,
    ScaleRecord,
    ScaleRequest,
    ServerStatus,
    TokenizeAnswer,
    TokenizeRequest,
)
_ERRORS = {
    400: "A parameter is wrong, unknown or not supported; `param` names it",
    401: "No valid API key",
    404: "No such model, no such refactoring, or a node that is not drained",
    409: "Another refactoring is running",
    413: "The body is too large",
    429: "The waiting queue is full; see Retry-After",
    500: "Internal error; the log has it under the request's X-Request-Id",
    503: "The pipeline cannot serve now; see Retry-After",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that may answer with these statuses."""
    return {
        status: {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(ErrorAnswer)}}}
        for status in statuses
    }


def answer(
    status: int, struct: type[msgspec.Struct], description: str = "The answer"
) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that answers with ``struct``."""
    return {status: {"description": description, "content": {"application/json": {"schema": _ref(struct)}}}}


def request_body(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads ``struct``."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(struct)}}}}


def stream_of(whole: type[msgspec.Struct], chunk: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that answers with ``whole``, or with events each of which is a ``chunk``."""
    responses = answer(200, whole)
    responses[200]["content"]["text/event-stream"] = {"schema": _ref(chunk)}
    return responses


def publish_schemas(app: FastAPI) -> None:
    """Add the structs to ``/openapi.json``, so that references to them resolve."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()  # cached by FastAPI: adding again changes nothing
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}
