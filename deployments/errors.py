"""Every failure as an HTTP answer in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from flexpipe_serve.deployments.protocol import ErrorAnswer, ErrorDetail
from flexpipe_serve.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RefactorBusyError,
    RefactorRefusedError,
)

UNAVAILABLE_RETRY_AFTER_S = 5
"""A replaced Router serves again within about this time."""

_TYPES = {429: "rate_limit_error"}
_MAX_ECHO = 200


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status.
        message: what was seen, what is allowed, what to change.
        param: the request field to blame, such as ``messages[0].content``.
        code: machine-readable reason, OpenAI's where it has one.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """``{"error": {...}}`` as the ``openai`` client reads it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorAnswer(error=detail))

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body(), status_code=self.status, headers=self.headers, media_type="application/json")


FORESEEN: tuple[type[Exception], ...] = (
    ApiError,
    InvalidRequestError,
    QueueFullError,
    EngineUnavailableError,
    RefactorRefusedError,
    RefactorBusyError,
)
"""Those that ``as_api_error`` has an answer for."""


def shorten(text: str) -> str:
    """What a client sent, cut to a length fit for an error message."""
    return text if len(text) <= _MAX_ECHO else text[: _MAX_ECHO - 1] + "…"


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer to an error that was foreseen; None for any other, which is a bug or a broken machine."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFullError():
            retry_after = {"Retry-After": str(error.retry_after_s)}
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=retry_after)
        case EngineUnavailableError():
            retry_after = {"Retry-After": str(UNAVAILABLE_RETRY_AFTER_S)}
            return ApiError(503, str(error), code="engine_unavailable", headers=retry_after)
        case RefactorRefusedError():
            return ApiError(400, str(error), code="refactor_refused")
        case RefactorBusyError():
            return ApiError(409, str(error), code="refactor_busy")
        case _:
            return None


def internal_error(request_id: str) -> ApiError:
    """The answer to an unforeseen error; its details are in the log only."""
    return ApiError(500, f"Internal error; the server's log has it under request id {request_id}.", code="internal")
