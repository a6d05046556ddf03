"""Prompts to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.protocol import MAX_SEQUENCES, ChatMessage
from flexpipe_serve.engine.client import EngineClient, Tokenizer

_MAX_INLINE_CHARS = 4096
"""Tokenising this much takes a few milliseconds; a longer text goes to a thread."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str | None
    """As the client sent it; None for a prompt of token ids."""


async def completion_prompts(prompt: str | list[str | int | list[int]], engine: EngineClient) -> list[Prompt]:
    """The prompts of a completion request.

    Raises:
        ApiError: 400 where ``prompt`` is empty, mixed, or has ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        return await _text_prompts([prompt], engine.tokenizer)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [_token_prompt(prompt, engine.model.vocab_size, param="prompt")]
    if len(kinds) != 1:
        seen = "is an empty list" if not prompt else "mixes kinds of entries"
        raise ApiError(400, f"prompt {seen}; give a string, strings, token ids, or lists of token ids.", param="prompt")
    if len(prompt) > MAX_SEQUENCES:
        raise ApiError(
            400, f"prompt has {len(prompt)} entries; at most {MAX_SEQUENCES} fit in one request.", param="prompt"
        )
    if kinds == {str}:
        return await _text_prompts([str(text) for text in prompt], engine.tokenizer)
    return [_token_prompt(ids, engine.model.vocab_size, param=f"prompt[{i}]") for i, ids in enumerate(prompt)]


async def chat_prompt(messages: Sequence[ChatMessage], tokenizer: Tokenizer, **template: Any) -> Prompt:
    """The conversation as the model's chat template renders it.

    Raises:
        ApiError: 400 where there is no message, or one without content.
        InvalidRequestError: the template refuses the conversation.
    """
    if not messages:
        raise ApiError(400, "messages is empty; give at least one.", param="messages")
    conversation = [_as_dict(message, f"messages[{i}]") for i, message in enumerate(messages)]
    num_chars = sum(len(turn["content"]) for turn in conversation)
    token_ids = await _off_loop(num_chars, lambda: tokenizer.apply_chat_template(conversation, **template))
    return Prompt(token_ids=token_ids, text=None)


async def encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[int]:
    """``tokenizer.encode``, in a thread where the text is long."""
    return await _off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises ApiError (400) for ids outside the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise ApiError(400, f"{param} has token id {wrong}; ids are from 0 to {vocab_size - 1}.", param=param)


async def _off_loop(num_chars: int, work: Callable[[], _T]) -> _T:
    return work() if num_chars <= _MAX_INLINE_CHARS else await asyncio.to_thread(work)


async def _text_prompts(texts: list[str], tokenizer: Tokenizer) -> list[Prompt]:
    # One by one they might be short enough to stay on the loop, all together not.
    num_chars = sum(map(len, texts))
    return await _off_loop(num_chars, lambda: [Prompt(token_ids=tokenizer.encode(text), text=text) for text in texts])


def _token_prompt(token_ids: Any, vocab_size: int, *, param: str) -> Prompt:
    check_token_ids(token_ids, vocab_size, param=param)
    return Prompt(token_ids=token_ids, text=None)


def _as_dict(message: ChatMessage, param: str) -> dict[str, str]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None:
        if message.role != "assistant":
            raise ApiError(400, f"{param} has no content.", param=f"{param}.content")
        content = ""
    # OpenAI renamed "system" for its newer models; templates know the old name.
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": content}
    return turn if message.name is None else {**turn, "name": message.name}
