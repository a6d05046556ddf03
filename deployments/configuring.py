"""The routes under ``/flexpipe/config``: what changes without a restart."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from flexpipe_serve.deployments.body import read_body
from flexpipe_serve.deployments.context import context_of, json_response
from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.live_config import LiveConfig
from flexpipe_serve.deployments.openapi import errors
from flexpipe_serve.errors import ConfigError

router = APIRouter(prefix="/flexpipe/config", tags=["pipeline"])


@router.get("", responses=errors(401, 404, 500, 503))
async def get_config(request: Request) -> Response:
    """The ``user_config`` in force, with the defaults of what is not set."""
    return json_response(_config_of(request).in_force.model_dump(mode="json"))


@router.patch("", responses=errors(400, 401, 404, 413, 500, 503))
async def change_config(request: Request) -> Response:
    """Change some keys of the ``user_config``, such as {"planner": {"mode": "on"}}; null: the default. Answers with all
    of it when it is in force, though a layout that it asks for takes its time; the status tells if it cannot be had.

    It is kept by Serve, so the next Router has it too, until a ``serve deploy`` sets what its file says.
    """
    config = _config_of(request)
    body = await read_body(request, max_bytes=context_of(request).get_limits().max_body_bytes)
    try:
        changes = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON object: {error}.", code="invalid_json") from None
    try:
        return json_response((await config.change(changes)).model_dump(mode="json"))
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_config") from None


def _config_of(request: Request) -> LiveConfig:
    config = context_of(request).config
    if config is None:
        raise ApiError(404, "This server has no configuration that could change.", code="no_config")
    return config
