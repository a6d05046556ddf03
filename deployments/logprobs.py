"""Log probabilities in both of OpenAI's forms."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend

from flexpipe_serve.deployments.protocol import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from flexpipe_serve.engine.client import Tokenizer
from flexpipe_serve.engine.outputs import TokenLogprob
from flexpipe_serve.engine.token_bytes import token_bytes

_FLOOR = -9999.0
"""JSON has no infinity."""


class CompletionLogprobWriter:
    """The legacy form, for one choice; it remembers how far the choice's text has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        # Tokens that hold parts of one character share its offset.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, logprobs: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens. ``top_logprobs`` always has the chosen token too; a prompt's first token has none."""
        out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for item in logprobs:
            data = token_bytes(self._backend, item.token_id)
            token = _legacy_name(data)
            out.text_offset.append(self._offset)
            out.tokens.append(token)
            self._offset += len(self._utf8.decode(data))
            if item.logprob is None:
                out.token_logprobs.append(None)
                out.top_logprobs.append(None)
                continue
            top = {_legacy_name(token_bytes(self._backend, i)): _finite(p) for i, p in item.top}
            out.token_logprobs.append(_finite(item.logprob))
            out.top_logprobs.append(top | {token: _finite(item.logprob)})
        return out


def chat_logprobs(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """The chat form."""
    return ChatLogprobs(content=[_chat_token(item, tokenizer.backend) for item in logprobs])


def _chat_token(item: TokenLogprob, backend: Backend) -> ChatTokenLogprob:
    assert item.logprob is not None
    data = token_bytes(backend, item.token_id)
    tops = [(token_bytes(backend, i), p) for i, p in item.top]
    return ChatTokenLogprob(
        token=_name(data),
        logprob=_finite(item.logprob),
        bytes=list(data),
        top_logprobs=[TopLogprob(token=_name(d), logprob=_finite(p), bytes=list(d)) for d, p in tops],
    )


def _name(data: bytes) -> str:
    """The token's text; for a part of a character its bytes, as OpenAI writes them: ``\\xf0\\x9f``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{b:02x}" for b in data)


def _legacy_name(data: bytes) -> str:
    name = _name(data)
    return name if name.encode() == data else f"bytes:{name}"


def _finite(logprob: float) -> float:
    return max(_FLOOR, logprob)
