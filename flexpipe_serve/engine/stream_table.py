"""The requests that an engine thread serves, and what their clients are still to be told."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.metrics import EngineMetrics


class StreamTable:
    """Belongs to the engine thread."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._streams: dict[str, RequestStream] = {}
        self._outputs: list[tuple[RequestStream, SequenceOutput]] = []

    def __contains__(self, stream: RequestStream) -> bool:
        return self._streams.get(stream.request_id) is stream

    def add(self, stream: RequestStream) -> None:
        """Serve a request."""
        self._streams[stream.request_id] = stream

    def of(self, seq: EngineSequence) -> RequestStream:
        """The request of a sequence that is not over."""
        return self._streams[seq.request_id]

    def all(self) -> list[RequestStream]:
        """The requests that are not over."""
        return list(self._streams.values())

    def take_out(self) -> list[RequestStream]:
        """Let all requests go."""
        streams, self._streams = self.all(), {}
        return streams

    def put(self, seq: EngineSequence, output: SequenceOutput) -> None:
        """An output for the client; a request whose last sequence it ends is served no more."""
        stream = self._streams[seq.request_id]
        self._outputs.append((stream, output))
        if output.finish_reason is not None:
            self._metrics.on_sequence_finished(seq, output.finish_reason)
            if all(text.is_over for text in stream.texts.values()):
                del self._streams[stream.request_id]

    def end(self, seq: EngineSequence, error: str | None = None) -> None:
        """Tell the client of a sequence that ended outside a step's result."""
        self.put(seq, self._streams[seq.request_id].texts[seq.index].end(error))

    def deliver(self) -> None:
        """One call into each event loop for all outputs since the last time."""
        if not self._outputs:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, SequenceOutput]]] = defaultdict(list)
        for item in self._outputs:
            by_loop[item[0].loop].append(item)
        self._outputs = []
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver_all, items)


def _deliver_all(items: list[tuple[RequestStream, SequenceOutput]]) -> None:
    for stream, output in items:
        stream.deliver(output)
