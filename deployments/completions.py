"""``/v1/completions``: the request's meaning, and its two forms of answer."""

from __future__ import annotations

from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.generation import Generation, Renderer, UsageCounter
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.logprobs import CompletionLogprobWriter
from flexpipe_serve.deployments.prompts import completion_prompts
from flexpipe_serve.deployments.protocol import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from flexpipe_serve.deployments.response import GenerationResponse
from flexpipe_serve.deployments.sampling import (
    fit_into_context,
    include_usage,
    num_sequences,
    priority,
    sampling_params,
)
from flexpipe_serve.deployments.sse import ChunkWriter, encode_json
from flexpipe_serve.engine.client import EngineClient, Tokenizer
from flexpipe_serve.engine.outputs import SequenceOutput, TokenLogprob

_DEFAULT_MAX_TOKENS = 16


async def complete(request: CompletionRequest, engine: EngineClient, limits: HttpLimits) -> GenerationResponse:
    """The answer to a checked body.

    Raises:
        ApiError, InvalidRequestError: a parameter is wrong or the prompt does not fit.
    """
    usage_wanted = include_usage(request)
    prompts = await completion_prompts(request.prompt, engine)
    n = num_sequences(request, num_prompts=len(prompts))
    if request.best_of is not None and request.best_of != n:
        raise ApiError(
            400, f"best_of is {request.best_of} and n is {n}; only equal values are supported.", param="best_of"
        )
    echo = bool(request.echo)
    params = [
        sampling_params(
            request,
            max_tokens=fit_into_context(
                prompt,
                requested=request.max_tokens,
                default=_DEFAULT_MAX_TOKENS,
                model=engine.model,
                limits=limits,
                param="prompt",
            ),
            num_logprobs=request.logprobs,
            prompt_logprobs=echo and request.logprobs is not None,
            model=engine.model,
        )
        for prompt in prompts
    ]
    generation = Generation(
        id=Generation.new_id("cmpl"),
        model=engine.model.name,
        prompts=prompts,
        params=params,
        n=n,
        priority=priority(request),
    )
    choices = _Choices(generation, engine.tokenizer, echo=echo)
    renderer: Renderer
    if request.stream:
        writer = ChunkWriter(generation, object_name="text_completion", include_usage=usage_wanted)
        renderer = _CompletionStream(generation, choices, writer)
    else:
        renderer = _WholeCompletion(generation, choices)
    return GenerationResponse(engine, generation, renderer)


class _Choices:
    """What is the same for streams and whole answers: what an output adds to its choice."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, *, echo: bool) -> None:
        self.num = len(generation.prompts) * generation.n
        self._generation = generation
        self._with_logprobs = generation.params[0].num_logprobs is not None
        self._writers = [CompletionLogprobWriter(tokenizer) for _ in range(self.num)] if self._with_logprobs else []
        self._echoes: list[str | None] = [None] * self.num
        if echo:
            for i in range(self.num):
                prompt = generation.prompts[i // generation.n]
                self._echoes[i] = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def index(self, prompt_index: int, output: SequenceOutput) -> int:
        return prompt_index * self._generation.n + output.index

    def is_plain(self, index: int, output: SequenceOutput) -> bool:
        """Text only: the common case of a stream."""
        return output.finish_reason is None and not self._with_logprobs and self._echoes[index] is None

    def piece(self, index: int, output: SequenceOutput) -> CompletionChoice:
        """The output as a chunk's choice; the first one begins with the echoed prompt."""
        text, self._echoes[index] = (self._echoes[index] or "") + output.text, None
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, output),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )

    def _logprobs(self, index: int, output: SequenceOutput) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        tokens: tuple[TokenLogprob, ...] = (output.prompt_logprobs or ()) + output.logprobs
        return self._writers[index].write(tokens)


class _CompletionStream:
    streaming = True

    def __init__(self, generation: Generation, choices: _Choices, writer: ChunkWriter) -> None:
        self._choices = choices
        self._writer = writer
        self._usage = UsageCounter(generation)
        self._frames = [writer.frame(CompletionChoice(index=i, text=""), field="text") for i in range(choices.num)]

    def add(self, prompt_index: int, output: SequenceOutput) -> bytes:
        self._usage.add(output)
        index = self._choices.index(prompt_index, output)
        if self._choices.is_plain(index, output):
            if not output.text:
                return b""
            before, after = self._frames[index]
            return before + encode_json(output.text) + after
        piece = self._choices.piece(index, output)
        if not (piece.text or piece.finish_reason or output.token_ids):
            return b""
        return self._writer.chunk(piece)

    def end(self) -> bytes:
        return self._writer.end(self._usage.usage())


class _WholeCompletion:
    streaming = False

    def __init__(self, generation: Generation, choices: _Choices) -> None:
        self._generation = generation
        self._choices = choices
        self._usage = UsageCounter(generation)
        self._pieces: list[list[CompletionChoice]] = [[] for _ in range(choices.num)]

    def add(self, prompt_index: int, output: SequenceOutput) -> bytes:
        self._usage.add(output)
        index = self._choices.index(prompt_index, output)
        self._pieces[index].append(self._choices.piece(index, output))
        return b""

    def end(self) -> bytes:
        return encode_json(
            Completion(
                id=self._generation.id,
                created=self._generation.created,
                model=self._generation.model,
                choices=[_join(pieces) for pieces in self._pieces],
                usage=self._usage.usage(),
            )
        )


def _join(pieces: list[CompletionChoice]) -> CompletionChoice:
    last = pieces[-1]
    logprobs = None
    if last.logprobs is not None:
        parts = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        logprobs = CompletionLogprobs(
            text_offset=[x for part in parts for x in part.text_offset],
            token_logprobs=[x for part in parts for x in part.token_logprobs],
            tokens=[x for part in parts for x in part.tokens],
            top_logprobs=[x for part in parts for x in part.top_logprobs],
        )
    return CompletionChoice(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
