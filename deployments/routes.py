"""The routes. Bodies are read with a bound and decoded here, not by FastAPI, so every error has OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from starlette.responses import Response

from flexpipe_serve.deployments.body import decode, read_body
from flexpipe_serve.deployments.chat import chat
from flexpipe_serve.deployments.completions import complete
from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.openapi import body, errors
from flexpipe_serve.deployments.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelList,
    ModelObject,
    TokenizeAnswer,
    TokenizeRequest,
)
from flexpipe_serve.deployments.tokenization import detokenize, tokenize
from flexpipe_serve.deployments.welcome import welcome_page
from flexpipe_serve.engine.client import EngineClient, ModelCard

_GENERATION_ERRORS = (400, 401, 404, 413, 429, 500, 503)
_BODY_ERRORS = (400, 401, 404, 413, 500, 503)
_Body = TypeVar("_Body", CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """What the routes find in ``app.state.context``; both are called for every request."""

    get_engine: Callable[[], EngineClient]
    get_limits: Callable[[], HttpLimits]


@router.post(
    "/v1/completions",
    tags=["generation"],
    responses=errors(*_GENERATION_ERRORS),
    openapi_extra=body(CompletionRequest, Completion, Completion),
)
async def create_completion(request: Request) -> Response:
    """Complete a text."""
    parsed, engine, limits = await _read(request, CompletionRequest)
    return await complete(parsed, engine, limits)


@router.post(
    "/v1/chat/completions",
    tags=["generation"],
    responses=errors(*_GENERATION_ERRORS),
    openapi_extra=body(ChatCompletionRequest, ChatCompletion, ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer in a conversation."""
    parsed, engine, limits = await _read(request, ChatCompletionRequest)
    return await chat(parsed, engine, limits)


@router.post(
    "/tokenize",
    tags=["tokenizer"],
    responses=errors(*_BODY_ERRORS),
    openapi_extra=body(TokenizeRequest, TokenizeAnswer),
)
async def create_tokens(request: Request) -> Response:
    """Token ids of a text or a conversation."""
    parsed, engine, _ = await _read(request, TokenizeRequest)
    return _json(await tokenize(parsed, engine))


@router.post(
    "/detokenize",
    tags=["tokenizer"],
    responses=errors(*_BODY_ERRORS),
    openapi_extra=body(DetokenizeRequest, DetokenizeAnswer),
)
async def create_text(request: Request) -> Response:
    """The text of token ids."""
    parsed, engine, _ = await _read(request, DetokenizeRequest)
    return _json(detokenize(parsed, engine))


@router.get("/v1/models", tags=["models"], responses=errors(401, 500, 503))
async def list_models(request: Request) -> Response:
    """The served model."""
    return _json(ModelList(data=[_model_object(_context(request).get_engine().model)]))


@router.get("/v1/models/{model_id:path}", tags=["models"], responses=errors(401, 404, 500, 503))
async def get_model(request: Request, model_id: str) -> Response:
    """The served model, by its name."""
    model = _context(request).get_engine().model
    _check_model(model_id, model)
    return _json(_model_object(model))


@router.get("/health", tags=["state"], responses=errors(500, 503))
async def health(request: Request) -> Response:
    """200 where a request would be served now."""
    await _context(request).get_engine().check_health()
    return _json({"status": "ok"})


@router.get("/flexpipe/status", tags=["state"], responses=errors(401, 500, 503))
async def status(request: Request) -> Response:
    """Layout, epoch, stages with their layers and memory, KV use, queue."""
    return _json(_context(request).get_engine().status())


@router.get("/", include_in_schema=False)
async def welcome(request: Request) -> Response:
    """A page for whoever opens the server in a browser."""
    return HTMLResponse(welcome_page(base_url=str(request.base_url).rstrip("/")))


def _context(request: Request) -> ApiContext:
    context: ApiContext = request.app.state.context
    return context


async def _read(request: Request, kind: type[_Body]) -> tuple[_Body, EngineClient, HttpLimits]:
    context = _context(request)
    limits = context.get_limits()
    parsed = decode(await read_body(request, max_bytes=limits.max_body_bytes), kind)
    engine = context.get_engine()
    if parsed.model is not None:
        _check_model(parsed.model, engine.model)
    return parsed, engine, limits


def _check_model(name: str, model: ModelCard) -> None:
    if name != model.name:
        raise ApiError(
            404,
            f"The model '{shorten(name)}' does not exist; this server has '{model.name}'.",
            param="model",
            code="model_not_found",
        )


def _model_object(model: ModelCard) -> ModelObject:
    return ModelObject(id=model.name, created=model.created, max_model_len=model.max_model_len)


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
