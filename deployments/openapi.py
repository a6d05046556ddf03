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
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorAnswer,
    TokenizeAnswer,
    TokenizeRequest,
)

_STRUCTS = (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorAnswer,
    TokenizeAnswer,
    TokenizeRequest,
)
_ERRORS = {
    400: "A parameter is wrong, unknown or not supported; `param` names it",
    401: "No valid API key",
    404: "No such model",
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


def body(
    request: type[msgspec.Struct], answer: type[msgspec.Struct], chunk: type[msgspec.Struct] | None = None
) -> dict[str, Any]:
    """``openapi_extra`` of a route: what it reads, and what it answers (``chunk``: each event of a stream)."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _ref(chunk)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


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
