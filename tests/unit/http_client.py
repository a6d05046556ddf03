"""A client of the application in this process, and what it reads of the answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
from fake_engine import FakeEngine

from flexpipe_serve.deployments.api import create_app


def client_of(engine: FakeEngine, **options: Any) -> httpx.AsyncClient:
    """Talks to an application over this engine; ``options`` are create_app's."""
    transport = httpx.ASGITransport(create_app(lambda: engine, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def json_of(response: httpx.Response, status: int = 200) -> Any:
    """The body of an answer with this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return response.json()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer with this status; its shape is OpenAI's."""
    body = json_of(response, status)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, without the last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
