"""What all routes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.live_config import LiveConfig
from flexpipe_serve.engine.client import EngineClient


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """What the routes find in ``app.state.context``; the functions are called for every request."""

    get_engine: Callable[[], EngineClient]
    get_limits: Callable[[], HttpLimits]
    config: LiveConfig | None


def context_of(request: Request) -> ApiContext:
    """The application's context."""
    context: ApiContext = request.app.state.context
    return context


def json_response(content: Any, *, status: int = 200) -> Response:
    """``content``, which may be a struct, as JSON."""
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
