"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.prompts import chat_prompt, check_token_ids, encode
from flexpipe_serve.deployments.protocol import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from flexpipe_serve.engine.client import EngineClient
from flexpipe_serve.engine.token_bytes import token_bytes


async def tokenize(request: TokenizeRequest, engine: EngineClient) -> TokenizeAnswer:
    """Token ids of a text, or of a conversation as the chat template renders it.

    Raises:
        ApiError: 400 unless exactly one of the two is given.
    """
    if request.prompt is not None and request.messages is None:
        special = request.add_special_tokens is not False
        token_ids = await encode(request.prompt, engine.tokenizer, add_special_tokens=special)
    elif request.messages is not None and request.prompt is None:
        if request.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens is for a prompt, not for messages.", param="add_special_tokens")
        generation_prompt = request.add_generation_prompt is not False
        prompt = await chat_prompt(request.messages, engine.tokenizer, add_generation_prompt=generation_prompt)
        token_ids = prompt.token_ids
    else:
        raise ApiError(400, "Give either prompt or messages.", param="prompt")
    strings = None
    if request.return_token_strs:
        strings = [token_bytes(engine.tokenizer.backend, i).decode(errors="replace") for i in token_ids]
    return TokenizeAnswer(
        count=len(token_ids), max_model_len=engine.model.max_model_len, tokens=token_ids, token_strs=strings
    )


def detokenize(request: DetokenizeRequest, engine: EngineClient) -> DetokenizeAnswer:
    """The text of token ids. Raises ApiError (400) for ids outside the vocabulary."""
    check_token_ids(request.tokens, engine.model.vocab_size, param="tokens")
    return DetokenizeAnswer(prompt=engine.tokenizer.decode(request.tokens))
