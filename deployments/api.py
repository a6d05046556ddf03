"""The HTTP application: an OpenAI-compatible API over an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from flexpipe_serve import __version__
from flexpipe_serve.deployments import admin, configuring, draining, planning, routes
from flexpipe_serve.deployments.auth import ApiKeyMiddleware
from flexpipe_serve.deployments.context import ApiContext
from flexpipe_serve.deployments.errors import FORESEEN, ApiError, as_api_error
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.live_config import LiveConfig
from flexpipe_serve.deployments.openapi import publish_schemas
from flexpipe_serve.deployments.request_id import RequestIdMiddleware
from flexpipe_serve.engine.client import EngineClient


def create_app(
    get_engine: Callable[[], EngineClient],
    *,
    get_limits: Callable[[], HttpLimits] = HttpLimits,
    config: LiveConfig | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        get_engine: called for every request; may raise EngineUnavailableError.
        get_limits: called for every request, so limits can change live.
        config: what ``/flexpipe/config`` shows and changes; None: nothing.
        api_keys: accepted bearer tokens; empty: no authentication.
    """
    app = FastAPI(
        title="flexpipe-serve",
        summary="OpenAI-compatible API of a model served through a live pipeline",
        version=__version__,
        redirect_slashes=False,
    )
    app.state.context = ApiContext(get_engine=get_engine, get_limits=get_limits, config=config)
    app.include_router(routes.router)
    app.include_router(admin.router)
    app.include_router(planning.router)
    app.include_router(draining.router)
    app.include_router(configuring.router)
    publish_schemas(app)
    for kind in FORESEEN:
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_unknown_url)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    # The one added last is the outermost.
    if api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=api_keys)
    app.add_middleware(RequestIdMiddleware)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    assert answer is not None
    return answer.response()


async def _answer_unknown_url(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"Invalid URL ({request.method} {request.url.path}): {error.detail}. The API is described at /docs."
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    # The client left while it sent its body; the server drops this.
    return Response(status_code=400)
