"""The routes. Bodies are read with a bound and decoded here, not by FastAPI, so every error has OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.responses import Response

from flexpipe_serve import __version__
from flexpipe_serve.deployments.body import decode, read_body
from flexpipe_serve.deployments.chat import chat
from flexpipe_serve.deployments.completions import complete
from flexpipe_serve.deployments.context import context_of, json_response
from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.openapi import answer, errors, request_body, stream_of
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
from flexpipe_serve.prometheus_text import CONTENT_TYPE

_GENERATION_ERRORS = (400, 401, 404, 413, 429, 500, 503)
_BODY_ERRORS = (400, 401, 404, 413, 500, 503)
_Body = TypeVar("_Body", CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)

router = APIRouter()


@router.post(
    "/v1/completions",
    tags=["generation"],
    responses=stream_of(Completion, Completion) | errors(*_GENERATION_ERRORS),
    openapi_extra=request_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Complete a text."""
    parsed, engine, limits = await _read(request, CompletionRequest)
    return await complete(parsed, engine, limits)


@router.post(
    "/v1/chat/completions",
    tags=["generation"],
    responses=stream_of(ChatCompletion, ChatCompletionChunk) | errors(*_GENERATION_ERRORS),
    openapi_extra=request_body(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer in a conversation."""
    parsed, engine, limits = await _read(request, ChatCompletionRequest)
    return await chat(parsed, engine, limits)


@router.post(
    "/tokenize",
    tags=["tokenizer"],
    responses=answer(200, TokenizeAnswer) | errors(*_BODY_ERRORS),
    openapi_extra=request_body(TokenizeRequest),
)
async def create_tokens(request: Request) -> Response:
    """Token ids of a text or a conversation."""
    parsed, engine, _ = await _read(request, TokenizeRequest)
    return json_response(await tokenize(parsed, engine))


@router.post(
    "/detokenize",
    tags=["tokenizer"],
    responses=answer(200, DetokenizeAnswer) | errors(*_BODY_ERRORS),
    openapi_extra=request_body(DetokenizeRequest),
)
async def create_text(request: Request) -> Response:
    """The text of token ids."""
    parsed, engine, _ = await _read(request, DetokenizeRequest)
    return json_response(detokenize(parsed, engine))


@router.get("/v1/models", tags=["models"], responses=errors(401, 500, 503))
async def list_models(request: Request) -> Response:
    """The served model."""
    return json_response(ModelList(data=[_model_object(context_of(request).get_engine().model)]))


@router.get("/v1/models/{model_id:path}", tags=["models"], responses=errors(401, 404, 500, 503))
async def get_model(request: Request, model_id: str) -> Response:
    """The served model, by its name."""
    model = context_of(request).get_engine().model
    _check_model(model_id, model)
    return json_response(_model_object(model))


@router.get("/health", tags=["state"], responses=errors(500, 503))
@router.head("/health", include_in_schema=False)
@router.get("/ping", include_in_schema=False)  # what some load balancers and hosts ask
@router.post("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 where a request would be served now."""
    await context_of(request).get_engine().check_health()
    return json_response({"status": "ok"})


@router.get("/metrics", tags=["state"], responses=errors(401, 500, 503), response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """What the engine measures, in Prometheus' text format; Ray has the same for its dashboard."""
    # Ray is told of all that came in since the last time, too: milliseconds.
    text = await asyncio.to_thread(context_of(request).get_engine().metrics_text)
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/version", tags=["state"], responses=errors(401, 500))
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})


@router.get("/", include_in_schema=False)
async def welcome(request: Request) -> Response:
    """A page for whoever opens the server in a browser."""
    return HTMLResponse(welcome_page(base_url=str(request.base_url).rstrip("/")))


async def _read(request: Request, kind: type[_Body]) -> tuple[_Body, EngineClient, HttpLimits]:
    context = context_of(request)
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
