"""Outermost middleware: an id for every request, and an answer to every exception."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexpipe_serve.deployments.errors import internal_error

logger = logging.getLogger(__name__)

_HEADER = "x-request-id"
_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_MAX_LENGTH = 128


def request_id_of(scope: Scope) -> str:
    """The id that the middleware gave this request."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestIdMiddleware:
    """Takes ``X-Request-Id`` from the client, or makes one, and sends it back.

    An exception that nothing else answered is logged with the id and becomes a 500; if the answer has begun, it goes on
    to the server, which cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _UNSAFE.sub("", Headers(scope=scope).get(_HEADER, ""))[:_MAX_LENGTH] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (_HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the process edge: a client gets an answer whatever happened
            if started:
                raise
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            await internal_error(request_id).response()(scope, receive, send_with_id)
