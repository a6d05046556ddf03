"""An LLM server on Ray Serve whose pipeline split is live."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpipe_serve.handle import connect as connect

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "connect":  # only when it is used: stages import this package too
        from flexpipe_serve.handle import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
