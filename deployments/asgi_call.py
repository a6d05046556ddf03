"""Requests to an ASGI application of this process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from flexpipe_serve.transport import Head


async def call(app: ASGIApp, method: str, path: str, body: bytes) -> AsyncGenerator[Head | bytes]:
    """The status and the headers, then the answer's body in pieces as they come.

    Closing the iterator early is the client's leaving: the application is cancelled, and has ended when this returns.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    task = asyncio.create_task(_run(app, _scope(method, path), body, messages))
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            elif message["body"]:
                yield message["body"]
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _run(app: ASGIApp, scope: Scope, body: bytes, messages: asyncio.Queue[Message | None]) -> None:
    requests: asyncio.Queue[Message] = asyncio.Queue()  # after the body it holds nobody's leaving
    requests.put_nowait({"type": "http.request", "body": body, "more_body": False})
    try:
        await app(scope, requests.get, messages.put)
    finally:
        messages.put_nowait(None)


def _scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"flexpipe")],
        "client": None,
        "server": None,
    }
