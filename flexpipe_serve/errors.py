"""Errors a user can cause: each names the number seen, the limit and the remedy.

The ``ValueError``s become a 400 over HTTP.
"""


class InvalidRequestError(ValueError):
    """A request that can never be served as it stands.

    Args:
        message: what was seen, what is allowed, what to change.
        param: name of the offending request field, if one is to blame.
        code: OpenAI-style error code such as ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ConfigError(ValueError):
    """A configuration that cannot be served; raised at start, never while serving."""


class UnsupportedModelError(ConfigError):
    """A model whose architecture would not be computed rightly; the message says why."""


class QueueFullError(Exception):
    """The waiting queue is at its limit (HTTP 429).

    Args:
        retry_after_s: seconds after which a retry has a chance.
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(Exception):
    """The pipeline cannot serve now: starting, shutting down, or its stages are lost (HTTP 503)."""


class RefactorRefusedError(ValueError):
    """A refactoring that cannot be done as asked; nothing was touched (HTTP 400)."""


class RefactorBusyError(Exception):
    """Another refactoring is running (HTTP 409); the message names it."""


class CopyError(Exception):
    """KV did not get to its new stage; the refactoring is aborted."""
