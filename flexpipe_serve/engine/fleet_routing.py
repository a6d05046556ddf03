"""Where requests go in a fleet, and what each pipeline has to do because of that."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.prefix_directory import PrefixDirectory
from flexpipe_serve.engine.request_ledger import OpenRequest, RequestLedger
from flexpipe_serve.engine.routing import Ask, PipelineLoad, rank_pipelines
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.errors import InvalidRequestError


class FleetRouting:
    """Keeps account of all requests that are open. Any thread may call its methods.

    Args:
        block_size: of the KV, for beginnings that pipelines have computed.
    """

    def __init__(self, block_size: int) -> None:
        self._lock = threading.Lock()
        self._ledger = RequestLedger()
        self._prefixes = PrefixDirectory(block_size)
        self._open: dict[str, OpenRequest] = {}
        self._streams: dict[str, RequestStream] = {}

    def admit(self, stream: RequestStream) -> None:
        """A request has come.

        Raises:
            InvalidRequestError: another one with its id is open.
        """
        with self._lock:
            if self._streams.setdefault(stream.request_id, stream) is not stream:
                raise InvalidRequestError(
                    f"A request with the id {stream.request_id!r} is being served; use another id."
                )

    def rank(self, engines: Sequence[Engine], stream: RequestStream) -> list[Engine]:
        """The engines, the one that should serve the request first."""
        if len(engines) == 1:
            return list(engines)
        first = stream.sequences[0]
        prompt = first.prompt_token_ids
        with self._lock:
            ask = Ask(
                num_prompt_tokens=len(first.tokens),  # output that it has is computed again
                num_output_tokens=min(first.params.max_tokens, self._ledger.mean_output_tokens),
                max_len=stream.max_len,
                num_sequences=len(stream.sequences),
            )
            loads = [self._load(engine) for engine in engines]
            cached = [self._prefixes.num_cached_tokens(engine.number, prompt) for engine in engines]
        return [engines[i] for i in rank_pipelines(loads, ask, num_cached_tokens=cached)]

    def assign(self, stream: RequestStream, pipeline: int) -> None:
        """A pipeline is given the request, perhaps instead of another one."""
        first = stream.sequences[0]
        with self._lock:
            request = self._open.get(stream.request_id)
            if request is not None:
                self._ledger.move(request, pipeline)
            else:
                request = OpenRequest(pipeline, first.num_prompt_tokens, len(stream.sequences))
                self._open[stream.request_id] = request
                self._ledger.open(request)
            self._prefixes.note(pipeline, first.prompt_token_ids)

    def note_output(self, stream: RequestStream) -> None:
        """The request has output."""
        request = self._open[stream.request_id]
        if not request.has_begun:
            with self._lock:
                self._ledger.begin(request)

    def close(self, stream: RequestStream, *, num_output_tokens: int | None) -> None:
        """The request is over; see RequestLedger.close."""
        with self._lock:
            if self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]
                request = self._open.pop(stream.request_id, None)
                if request is not None:
                    self._ledger.close(request, num_output_tokens=num_output_tokens)

    def forget(self, pipeline: int) -> None:
        """The pipeline's KV is gone."""
        with self._lock:
            self._prefixes.forget(pipeline)

    def _load(self, engine: Engine) -> PipelineLoad:
        config = engine.loop.scheduler.config
        return PipelineLoad(
            cost=engine.loop.costs.fit(now=time.monotonic()),
            num_sequences=self._ledger.num_sequences(engine.number),
            num_pending_tokens=self._ledger.num_pending_tokens(engine.number),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_len=engine.loop.scheduler.max_len,
            is_up=engine.is_up,
        )
