"""A request on its way: its sequences, their text so far, and the queue that its client reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Protocol

from tokenizers import Tokenizer

from flexpipe_serve.engine.detokenizer import IncrementalDetokenizer
from flexpipe_serve.engine.outputs import SequenceOutput, TokenLogprob
from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.request import SequenceUpdate
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.pipeline.messages import LogprobResult, ResultHeader


class SequenceText:
    """Turns what steps bring to one sequence into outputs. Belongs to the engine thread."""

    def __init__(self, sequence: EngineSequence, backend: Tokenizer) -> None:
        params = sequence.params
        self.sequence = sequence
        self._detokenizer = IncrementalDetokenizer(
            backend,
            prompt_token_ids=sequence.prompt_token_ids,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )
        self._prompt_logprobs: list[TokenLogprob] = []
        self._is_first = True
        self.is_over = False

    def push(self, update: SequenceUpdate, result: ResultHeader) -> tuple[SequenceOutput | None, str | None]:
        """The output that an update makes, if any, and the stop string that its token completed."""
        if update.prompt_logprobs_index is not None:
            self._take_prompt_logprobs(result.prompt_logprobs[update.prompt_logprobs_index])
        if not update.new_token_ids and not update.finished:
            return None, None
        text, stop = "", None
        logprobs: tuple[TokenLogprob, ...] = ()
        for token in update.new_token_ids:
            text, stop = self._detokenizer.push(token)
            found = (
                result.logprobs[update.sample_index] if result.logprobs and update.sample_index is not None else None
            )
            if found is not None:
                logprobs = (_token_logprob(token, found),)
        if update.finished and stop is None:
            text += self._detokenizer.flush()
        return self._output(update.new_token_ids, text, logprobs, stop=stop), stop

    def end(self, error: str | None = None) -> SequenceOutput:
        """The last output of a sequence that ended outside a step."""
        return self._output((), self._detokenizer.flush(), (), error=error)

    def _output(
        self,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        *,
        stop: str | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        seq = self.sequence
        first, self._is_first = self._is_first, False
        finish_reason = seq.finish_reason
        if error is not None:
            finish_reason = "error"
        elif stop is not None:
            finish_reason = "stop"
        self.is_over = finish_reason is not None
        return SequenceOutput(
            index=seq.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=tuple(self._prompt_logprobs) if first and seq.params.prompt_logprobs else None,
            finish_reason=finish_reason,
            stop_reason=stop if stop is not None else seq.stop_reason,
            num_cached_tokens=seq.num_cached_tokens if first else 0,
            error=error or ("the sequence could not be computed." if finish_reason == "error" else None),
        )

    def _take_prompt_logprobs(self, results: Sequence[LogprobResult]) -> None:
        if not self._prompt_logprobs:
            self._prompt_logprobs.append(TokenLogprob(int(self.sequence.tokens[0]), None))
        for result in results:
            token = int(self.sequence.tokens[len(self._prompt_logprobs)])
            self._prompt_logprobs.append(_token_logprob(token, result))


def make_stream(
    *,
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    n: int,
    priority: int,
    eos_token_ids: Sequence[int],
    backend: Tokenizer,
    now: float,
) -> RequestStream:
    """A request of ``n`` sequences, not given to anybody yet; its client is in the event loop that runs."""
    sequences = [
        EngineSequence(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            index=index,
            priority=priority,
            eos_token_ids=eos_token_ids,
            arrival_time=now,
        )
        for index in range(n)
    ]
    return RequestStream(sequences, backend=backend)


class StreamHome(Protocol):
    """Where a request is served."""

    def abort(self, stream: RequestStream) -> Future[None]:
        """End a request whose client is gone; harmless if it is over already."""
        ...


class RequestStream:
    """All sequences of a request. The engine thread makes outputs, an asyncio task iterates over them."""

    home: StreamHome
    """Whom it was given to last."""

    def __init__(self, sequences: Sequence[EngineSequence], *, backend: Tokenizer) -> None:
        self.request_id = sequences[0].request_id
        self.sequences = tuple(sequences)
        self.texts = {seq.index: SequenceText(seq, backend) for seq in sequences}
        self.loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._num_open = len(sequences)

    @property
    def is_over(self) -> bool:
        """True once the client has read the end of every sequence."""
        return self._num_open == 0

    @property
    def max_len(self) -> int:
        """Prompt and output tokens that its longest sequence may come to have."""
        return max(seq.num_prompt_tokens + seq.params.max_tokens for seq in self.sequences)

    def leave(self) -> None:
        """The client reads no further: what still runs is aborted."""
        if not self.is_over:
            self.home.abort(self)

    def deliver(self, output: SequenceOutput) -> None:
        """Hand an output to the client; called in its event loop."""
        self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        while self._num_open:
            output = await self._outputs.get()
            self._num_open -= output.finish_reason is not None
            yield output


def _token_logprob(token: int, result: LogprobResult) -> TokenLogprob:
    return TokenLogprob(token, result.logprob, result.top)
