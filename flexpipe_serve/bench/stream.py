"""Reads a streamed HTTP/1.1 answer after the fact: bytes with their arrival times in, timed server-sent events out.

While a server is being measured the client only notes when bytes came (:mod:`flexpipe_serve.bench.client`); everything
here runs afterwards, so that reading costs the server none of the cores both share.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class StreamError(Exception):
    """An answer that is not a complete, successful stream; the text is the reason shown to the user."""


@dataclass(slots=True)
class Completion:
    """What one streamed completion delivered.

    Args:
        token_times_s: when each piece of text came, on the clock of the arrivals.
        num_output_tokens: from the server's ``usage`` where given, else the number of pieces.
        num_prompt_tokens: from ``usage``; ``None`` where the server gives none.
        finish_reason: the server's, if any.
        pieces: the text, as it came.
    """

    token_times_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_prompt_tokens: int | None = None
    finish_reason: str | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All pieces joined."""
        return "".join(self.pieces)


class HttpBody:
    """Incremental decoder of one HTTP/1.1 response: head, then a chunked, sized or close-delimited body."""

    def __init__(self) -> None:
        self.status = 0
        self._buffer = b""
        self._in_head = True
        self._chunked = False
        self._left: int | None = None  # bytes left of the body (sized) or of the chunk (chunked)
        self._ended = False

    def feed(self, data: bytes) -> bytes:
        """Decodes the next bytes off the socket and returns the body bytes among them."""
        self._buffer += data
        if self._in_head:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return b""
            self._read_head(head)
            self._buffer = rest
        return self._read_chunks() if self._chunked else self._read_plain()

    @property
    def complete(self) -> bool:
        """Whether a body whose length the server declared came whole; a close-delimited one always is."""
        return not self._in_head and (self._ended or (not self._chunked and self._left in (None, 0)))

    def _read_head(self, head: bytes) -> None:
        status_line, *lines = head.split(b"\r\n")
        parts = status_line.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise StreamError(f"not an HTTP answer: {status_line[:80]!r}")
        self.status = int(parts[1])
        headers = {
            name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines)
        }
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        if not self._chunked and b"content-length" in headers:
            self._left = int(headers[b"content-length"])
        self._in_head = False

    def _read_plain(self) -> bytes:
        body, self._buffer = self._buffer, b""
        if self._left is not None:
            body = body[: self._left]
            self._left -= len(body)
        return body

    def _read_chunks(self) -> bytes:
        body = b""
        while not self._ended:
            if self._left is None:
                line, separator, rest = self._buffer.partition(b"\r\n")
                if not separator:
                    break
                self._left = int(line.partition(b";")[0], 16)
                self._buffer = rest
                if self._left == 0:
                    self._ended = True
                    break
            if len(self._buffer) < self._left + 2:
                break
            body += self._buffer[: self._left]
            self._buffer = self._buffer[self._left + 2 :]
            self._left = None
        return body


class EventStream:
    """Incremental splitter of a body into the ``data`` of server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[str]:
        """The data of each event that these bytes complete."""
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events


def read_completion(arrivals: Iterable[tuple[float, bytes]]) -> Completion:
    """Reads the recorded answer to a streamed ``/v1/completions`` request.

    Args:
        arrivals: (time, bytes) as they came off the socket, from the first byte to the close.

    Raises:
        StreamError: the status is not 200, an error event came, the stream broke off or carried no token.
    """
    completion, failure = read_stream(arrivals)
    if failure is not None:
        raise StreamError(failure)
    return completion


def read_stream(arrivals: Iterable[tuple[float, bytes]]) -> tuple[Completion, str | None]:
    """As ``read_completion``, but of a stream that failed, or was given up, also what came before.

    Returns:
        What was delivered, and why it is not a whole answer; None if it is.
    """
    result = Completion()
    try:
        return result, _read(arrivals, result)
    except StreamError as error:
        return result, str(error)
    except (ValueError, KeyError, AttributeError) as error:
        return result, f"unreadable answer: {error!r}"


def _read(arrivals: Iterable[tuple[float, bytes]], result: Completion) -> str | None:
    body, events = HttpBody(), EventStream()
    plain = b""  # all body bytes, for the message of an error that is not a stream
    done = False
    for time_s, data in arrivals:
        part = body.feed(data)
        if body.status != 200:
            plain += part
            continue
        for event in events.feed(part):
            if event == "[DONE]":
                done = True
                continue
            message = json.loads(event)
            if message.get("error"):
                return f"error in the stream: {_error_text(message)}"
            usage = message.get("usage") or {}
            result.num_output_tokens = usage.get("completion_tokens") or result.num_output_tokens
            result.num_prompt_tokens = usage.get("prompt_tokens") or result.num_prompt_tokens
            for choice in message.get("choices", []):
                if choice.get("text"):
                    result.pieces.append(choice["text"])
                    result.token_times_s.append(time_s)
                result.finish_reason = choice.get("finish_reason") or result.finish_reason
    result.num_output_tokens = result.num_output_tokens or len(result.pieces)
    if body.status == 0:
        return "closed without an answer"
    if body.status != 200:
        return f"HTTP {body.status}: {_plain_error_text(plain)}"
    if not done and not (body.complete and result.finish_reason):
        return f"the stream broke off after {len(result.pieces)} pieces of text"
    return None if result.pieces else "the stream carried no text"


def _plain_error_text(body: bytes) -> str:
    text = body.decode(errors="replace").strip()
    try:
        return _error_text(json.loads(text))
    except (ValueError, AttributeError):
        return text[:200] or "(empty body)"


def _error_text(message: dict[str, Any]) -> str:
    error = message.get("error", message.get("detail", message))
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:200]
