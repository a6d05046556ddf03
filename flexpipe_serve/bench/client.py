"""The measuring client: one connection a request, and while tokens come it does nothing but note the time.

Client and server share the cores in a benchmark on one machine. So requests are serialised before the wave, bytes are
kept with their arrival time as they come, and answers are decoded after the wave (:mod:`flexpipe_serve.bench.stream`).
"""

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from flexpipe_serve.errors import ConfigError

# The end of a chunked body; a server may leave the connection open behind it.
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure.

    Args:
        name: how reports call it.
        url: ``http://host:port``, with or without ``/v1``; https too.
        model: name sent in the requests.
        api_key: bearer token, if it wants one.
        prompt_ids: send prompts as lists of token ids instead of text.
        extra_body: fields added to every request; a value of ``None`` removes the field.

    Raises:
        ConfigError: ``url`` is not an http(s) URL.
    """

    name: str
    url: str
    model: str
    api_key: str | None = None
    prompt_ids: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.address.scheme not in ("http", "https") or not self.address.hostname:
            raise ConfigError(f"{self.url!r} is not a URL such as http://127.0.0.1:8000")

    @property
    def address(self) -> SplitResult:
        """The URL without a trailing ``/v1``, in parts."""
        return urlsplit(self.url.rstrip("/").removesuffix("/v1"))

    def request(self, prompt: str | list[int], num_output_tokens: int) -> bytes:
        """A streamed greedy completion of exactly ``num_output_tokens`` tokens, as bytes for the socket."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        } | self.extra_body
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        lines = [
            f"POST {self.address.path}/v1/completions HTTP/1.1",
            f"Host: {self.address.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Accept: text/event-stream",
            "Connection: close",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass(slots=True)
class Recording:
    """The raw answer to one request.

    Args:
        sent_s: clock when the connection was begun.
        arrivals: clock and bytes, as they came.
        failure: why the exchange ended early, if it did.
    """

    sent_s: float
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


class _Exchange(asyncio.Protocol):
    def __init__(self, request: bytes, recording: Recording) -> None:
        self._request = request
        self._recording = recording
        self._transport: asyncio.Transport | None = None
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._recording.arrivals.append((time.perf_counter(), data))
        # Event data ends with a newline, so this cannot be the middle of a chunk.
        if data.endswith(b"\n" + _LAST_CHUNK) or data == _LAST_CHUNK:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.ended.done():
            self._recording.failure = f"connection lost: {exc!r}"
        self._finish()

    def _finish(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        if self._transport is not None:
            self._transport.close()


async def exchange(
    target: Target, request: bytes, *, timeout_s: float, recording: Recording | None = None
) -> Recording:
    """Sends one request over a connection of its own and records the answer until it ends.

    Never raises for what the server does: refusals, resets and time-outs stand in ``failure``.

    Args:
        target: the server.
        request: as bytes for the socket.
        timeout_s: a longer exchange is a failure.
        recording: is filled in; one of the caller's own also keeps what came before a cancellation.
    """
    address = target.address
    tls = ssl.create_default_context() if address.scheme == "https" else None
    recording = recording or Recording(time.perf_counter())
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, protocol = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(request, recording),
                str(address.hostname),
                address.port or (443 if tls else 80),
                ssl=tls,
            )
            await protocol.ended
    except TimeoutError:
        recording.failure = f"no complete answer within {timeout_s:g} s"
    except OSError as error:
        recording.failure = f"cannot connect: {error.strerror or error}"
    finally:
        if transport is not None:
            transport.close()
    return recording
