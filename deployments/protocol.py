"""The JSON bodies of the API: OpenAI's fields, and those of vLLM's extras that this server has.

A field that is null is a field left out. What is not named here is refused (``unsupported.py``).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flexpipe_serve.engine.status import Event
from flexpipe_serve.placement.drain import DrainRecord
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.refactor.record import RefactorRecord

MAX_SEQUENCES = 256
"""Prompts times ``n`` in one request: bounds what one body can make the server do."""

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request have in common; ranges are checked by ``SamplingParams``."""

    model: str | None = None
    n: Int | None = None
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Int | None = None
    user: str | None = None


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``: one prompt or several, as text or as token ids."""

    prompt: str | list[str | Int | list[Int]]
    logprobs: Int | None = None
    echo: bool | None = None
    best_of: Int | None = None


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A piece of a message's content; other kinds (images, audio) are refused."""

    text: str


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /tokenize``: either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    """The prompt's tokens as a completion would see them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Int]


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """The text of the tokens."""

    prompt: str


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a whole request: each prompt counts once, whatever ``n`` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """One entry a token. ``text_offset`` counts characters from the beginning of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One sequence, or in a stream a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/completions``, and one chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(msgspec.Struct, kw_only=True):
    """A likely token. ``bytes`` may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob, kw_only=True):
    """The token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """One entry a token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One sequence."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to the message; ``role`` only in the first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one sequence."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of the stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class ModelObject(msgspec.Struct, kw_only=True):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flexpipe-serve"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class RefactorList(msgspec.Struct, kw_only=True):
    """The answer of ``GET /flexpipe/refactor``, the newest last."""

    object: Literal["list"] = "list"
    data: list[RefactorRecord]


class DrainList(msgspec.Struct, kw_only=True):
    """The answer of ``GET /flexpipe/drain``."""

    object: Literal["list"] = "list"
    data: list[DrainRecord]


class EventList(msgspec.Struct, kw_only=True):
    """The answer of ``GET /flexpipe/events``, the newest last."""

    object: Literal["list"] = "list"
    data: list[Event]


class DecisionList(msgspec.Struct, kw_only=True):
    """The answer of ``GET /flexpipe/decisions``, the newest last."""

    object: Literal["list"] = "list"
    data: list[Decision]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong and which field is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail
