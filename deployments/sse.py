"""Server-sent events, written without building an object for every token."""

from __future__ import annotations

import msgspec

from flexpipe_serve.deployments.generation import Generation
from flexpipe_serve.deployments.protocol import Usage

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect events
]
DONE = b"data: [DONE]\n\n"

encode_json = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    """One event; ``data`` is JSON, which has no line breaks."""
    return b"data: %b\n\n" % data


class ChunkWriter:
    """Chunks of one stream: all but the choice is the same in each, and rendered once.

    Args:
        object_name: the chunks' ``object``.
        include_usage: whether the stream ends with its usage; chunks before have ``"usage": null`` then.
    """

    def __init__(self, generation: Generation, *, object_name: str, include_usage: bool) -> None:
        common = {
            "id": generation.id,
            "object": object_name,
            "created": generation.created,
            "model": generation.model,
        }
        self._head = b'data: %b,"choices":[' % encode_json(common)[:-1]
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._include_usage = include_usage

    def chunk(self, choice: msgspec.Struct) -> bytes:
        """The event with this choice."""
        return b"%b%b%b" % (self._head, encode_json(choice), self._tail)

    def frame(self, choice: msgspec.Struct, *, field: str) -> tuple[bytes, bytes]:
        """The event around the value of ``field``, a string that is empty in ``choice``."""
        key = b'"%b":' % field.encode()
        before, empty, after = self.chunk(choice).partition(key + b'""')
        assert empty
        return before + key, after

    def end(self, usage: Usage) -> bytes:
        """The last events."""
        if not self._include_usage:
            return DONE
        return b'%b],"usage":%b}\n\n%b' % (self._head, encode_json(usage), DONE)
