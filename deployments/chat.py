"""``/v1/chat/completions``: the request's meaning, and its two forms of answer."""

from __future__ import annotations

from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.generation import Generation, Renderer, UsageCounter
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.logprobs import chat_logprobs
from flexpipe_serve.deployments.prompts import chat_prompt
from flexpipe_serve.deployments.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
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
from flexpipe_serve.engine.outputs import SequenceOutput


async def chat(request: ChatCompletionRequest, engine: EngineClient, limits: HttpLimits) -> GenerationResponse:
    """The answer to a checked body.

    Raises:
        ApiError, InvalidRequestError: a parameter is wrong or the conversation does not fit.
    """
    usage_wanted = include_usage(request)
    n = num_sequences(request, num_prompts=1)
    num_logprobs = _num_logprobs(request)
    requested = _max_tokens(request)
    prompt = await chat_prompt(request.messages, engine.tokenizer, add_generation_prompt=True)
    max_tokens = fit_into_context(
        prompt, requested=requested, default=None, model=engine.model, limits=limits, param="messages"
    )
    params = sampling_params(
        request, max_tokens=max_tokens, num_logprobs=num_logprobs, prompt_logprobs=False, model=engine.model
    )
    generation = Generation(
        id=Generation.new_id("chatcmpl"),
        model=engine.model.name,
        prompts=[prompt],
        params=[params],
        n=n,
        priority=priority(request),
    )
    renderer: Renderer
    if request.stream:
        writer = ChunkWriter(generation, object_name="chat.completion.chunk", include_usage=usage_wanted)
        renderer = _ChatStream(generation, engine.tokenizer, writer)
    else:
        renderer = _WholeChat(generation, engine.tokenizer)
    return GenerationResponse(engine, generation, renderer)


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    return None


def _max_tokens(request: ChatCompletionRequest) -> int | None:
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens are both given; leave the older max_tokens out.",
            param="max_tokens",
            code="invalid_parameter_combination",
        )
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


class _ChatStream:
    streaming = True

    def __init__(self, generation: Generation, tokenizer: Tokenizer, writer: ChunkWriter) -> None:
        self._tokenizer = tokenizer
        self._writer = writer
        self._usage = UsageCounter(generation)
        self._with_logprobs = generation.params[0].num_logprobs is not None
        self._begun = [False] * generation.n
        self._frames = [
            writer.frame(ChatChunkChoice(index=i, delta=Delta(content="")), field="content")
            for i in range(generation.n)
        ]

    def add(self, prompt_index: int, output: SequenceOutput) -> bytes:
        self._usage.add(output)
        if self._begun[output.index]:
            return self._piece(output)
        self._begun[output.index] = True
        role = ChatChunkChoice(index=output.index, delta=Delta(role="assistant", content=""))
        return self._writer.chunk(role) + self._piece(output)

    def end(self) -> bytes:
        return self._writer.end(self._usage.usage())

    def _piece(self, output: SequenceOutput) -> bytes:
        if output.finish_reason is None and not self._with_logprobs:
            if not output.text:
                return b""
            before, after = self._frames[output.index]
            return before + encode_json(output.text) + after
        if not (output.text or output.finish_reason or output.token_ids):
            return b""
        choice = ChatChunkChoice(
            index=output.index,
            delta=Delta(content=output.text) if output.text or not output.finish_reason else Delta(),
            logprobs=chat_logprobs(output.logprobs, self._tokenizer) if self._with_logprobs else None,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        return self._writer.chunk(choice)


class _WholeChat:
    streaming = False

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._usage = UsageCounter(generation)
        self._outputs: list[list[SequenceOutput]] = [[] for _ in range(generation.n)]

    def add(self, prompt_index: int, output: SequenceOutput) -> bytes:
        self._usage.add(output)
        self._outputs[output.index].append(output)
        return b""

    def end(self) -> bytes:
        return encode_json(
            ChatCompletion(
                id=self._generation.id,
                created=self._generation.created,
                model=self._generation.model,
                choices=[self._choice(outputs) for outputs in self._outputs],
                usage=self._usage.usage(),
            )
        )

    def _choice(self, outputs: list[SequenceOutput]) -> ChatChoice:
        last = outputs[-1]
        logprobs: ChatLogprobs | None = None
        if self._generation.params[0].num_logprobs is not None:
            logprobs = chat_logprobs((item for output in outputs for item in output.logprobs), self._tokenizer)
        return ChatChoice(
            index=last.index,
            message=AssistantMessage(content="".join(output.text for output in outputs)),
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )
