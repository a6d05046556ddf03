"""How a handle reaches an application: over HTTP, or through Ray Serve. All else is the same for both."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from flexpipe_serve.errors import ConfigError, EngineUnavailableError
from flexpipe_serve.local_clusters import running_addresses

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_TIMEOUT = httpx.Timeout(600, connect=10)

Head = tuple[int, dict[str, str]]
"""An answer's status and headers, their names in lower case."""


class Transport(Protocol):
    """Sends requests. Of one event loop."""

    def send(self, method: str, path: str, body: bytes) -> AsyncGenerator[Head | bytes]:
        """The answer: its head, then its body in pieces. Close it early to abort the request.

        Raises:
            EngineUnavailableError: nobody answers.
        """
        ...

    async def close(self) -> None:
        """Let connections go."""
        ...


class HttpTransport:
    """To a URL.

    Args:
        url: of the server, with or without ``/v1``.
        api_key: bearer token, if it wants one.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT)

    async def send(self, method: str, path: str, body: bytes) -> AsyncGenerator[Head | bytes]:
        """See Transport."""
        try:
            async with self._client.stream(method, self._url + path, content=body) as response:
                yield response.status_code, dict(response.headers)
                async for piece in response.aiter_bytes():
                    yield piece
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self._url!r} is no URL: {error}.") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise EngineUnavailableError(f"{self._url} does not answer: {reason}.") from error

    async def close(self) -> None:
        """See Transport."""
        await self._client.aclose()


class ServeTransport:
    """To an application of the Ray cluster that this process is connected to; needs no API key.

    Args:
        handle: the application's.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._request = handle.options(stream=True).request

    async def send(self, method: str, path: str, body: bytes) -> AsyncGenerator[Head | bytes]:
        """See Transport."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        pieces = self._request.remote(method, path, body)
        try:
            async for piece in pieces:
                yield piece
        except (RayActorError, RayServeException) as error:
            raise EngineUnavailableError(f"The application does not answer: {error}") from error
        finally:
            pieces.cancel()

    async def close(self) -> None:
        """See Transport."""


def connect_to_app(app: str | None, *, address: str | None) -> DeploymentHandle[Any]:
    """Ray Serve's handle of an application, after connecting to the cluster where this process is not yet.

    Args:
        app: its name; None: the only one.
        address: the cluster's; None: ``RAY_ADDRESS``, or the one on this machine.

    Raises:
        EngineUnavailableError: there is no cluster, or it serves nothing.
        ConfigError: there is no such application, or several to choose from; or several clusters.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        _join_cluster(address or os.environ.get("RAY_ADDRESS"))
    try:
        applications = serve.status().applications
    except RayServeException as error:
        raise EngineUnavailableError(f"The Ray cluster serves nothing: {error}") from None
    ours = sorted(name for name, status in applications.items() if "Router" in status.deployments)
    if app is None and len(ours) == 1:
        app = ours[0]
    if app not in ours:
        wanted = "Name one" if app is None else f"There is no application {app!r}"
        raise ConfigError(f"{wanted}; the cluster serves {', '.join(map(repr, ours)) or 'none of flexpipe-serve'}.")
    return serve.get_app_handle(app)


def _join_cluster(address: str | None) -> None:
    import ray

    private = running_addresses()
    if address is None and len(private) > 1:
        raise ConfigError(f"flexpipe serve runs several times here; give one of its addresses: {', '.join(private)}.")
    if address is None and private:
        (address,) = private
    if address in private:
        # As the cluster has it; else its answers would be refused here, and wait forever.
        os.environ["RAY_AUTH_MODE"] = "disabled"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except ConnectionError as error:
        raise EngineUnavailableError(
            f"There is no Ray cluster to connect to: {error} Start one with 'flexpipe serve', set RAY_ADDRESS, or"
            " connect to a URL such as 'http://127.0.0.1:8000'."
        ) from None
