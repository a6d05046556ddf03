"""Tokens to text, one token at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import Tokenizer

from flexpipe_serve.engine.stop_strings import StopStringMatcher

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are no character, or not yet one."""

_MIN_CONTEXT, _MAX_CONTEXT = 4, 8
_MAX_PENDING = 8
_MAX_CHAR_TOKENS = 4
"""A character has at most four bytes, and every pending token at least one."""


class IncrementalDetokenizer:
    """The text of one sequence: what each token adds to it.

    The pieces joined are the text of all tokens, no piece ends inside a character or inside what may become a
    stop string, and the first piece has the leading space that it needs after the prompt. A token costs the same
    however long the sequence is: only a window of the last tokens is ever decoded.

    Args:
        backend: the tokenizer; only ``decode``, ``id_to_token`` and its added tokens are used.
        prompt_token_ids: its last tokens are the context of the first piece.
        stop: strings that end the sequence.
        include_stop_str_in_output: whether the text ends with the stop string or before it.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._special_ids = _special_ids(backend) if skip_special_tokens else frozenset[int]()
        self._matcher = StopStringMatcher(stop, include=include_stop_str_in_output)
        # Tokens whose text was given out, so that the decoder takes what follows for a continuation.
        self._context = self._prompt_context(prompt_token_ids)
        self._num_shown = len(self._decode(self._context))
        """Characters of the decoded window (context and pending tokens) that were given out."""
        self._pending: list[int] = []

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that ``token_id`` makes certain, and the stop string if it completed one.

        After a stop string nothing more may be pushed; ``flush`` has nothing then.
        """
        if not self._is_visible(token_id):
            return "", None
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if not text.endswith(REPLACEMENT):
            certain = text[self._num_shown :]
            self._move_context(len(text))
        elif len(self._pending) < _MAX_PENDING:
            return "", None
        else:
            certain = self._cut_before_last_character(text)
        shown, stop = self._matcher.feed(certain)
        if stop is not None:
            self._pending.clear()
        return shown, stop

    def flush(self) -> str:
        """The rest, when the sequence ended without a stop string: half a character shows as U+FFFD."""
        if self._pending:
            rest = self._decode(self._context + self._pending)[self._num_shown :]
            self._pending.clear()
            shown, stop = self._matcher.feed(rest)
            if stop is not None:
                return shown
            return shown + self._matcher.flush()
        return self._matcher.flush()

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _is_visible(self, token_id: int) -> bool:
        # Models have more output rows than their tokenizer has tokens: such an id has no text.
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def _prompt_context(self, token_ids: Sequence[int]) -> list[int]:
        context: list[int] = []
        for token_id in reversed(token_ids):
            if self._is_visible(token_id):
                context.insert(0, token_id)
                # More tokens where the first ones begin inside a character.
                if len(context) >= _MIN_CONTEXT and not self._decode(context).endswith(REPLACEMENT):
                    break
                if len(context) == _MAX_CONTEXT:
                    break
        # A prompt that ends inside a character: the output stands for itself.
        return [] if self._decode(context).endswith(REPLACEMENT) else context

    def _move_context(self, num_chars: int) -> None:
        if len(self._context) + len(self._pending) <= _MAX_CONTEXT:
            self._context += self._pending
            self._num_shown = num_chars
        else:
            # Begin anew at the first pending token: a character begins there.
            self._context = self._pending
            self._num_shown = len(self._decode(self._context))
        self._pending = []

    def _cut_before_last_character(self, text: str) -> str:
        """Bytes that are no characters have piled up: give out all but those that may still become one.

        A cut between two tokens is harmless where both sides decode to the same text apart as together: if a
        character spanned it, its second half alone would decode to more.
        """
        window = self._context + self._pending
        for cut in range(len(window) - 1, len(window) - 1 - _MAX_CHAR_TOKENS, -1):
            rest = self._decode(window[cut:])
            if self._decode(window[:cut]) + rest == text:
                break
        certain = text[self._num_shown : len(text) - len(rest)]
        self._context, self._num_shown, self._pending = [], 0, window[cut:]
        return certain


@functools.lru_cache(maxsize=4)
def _special_ids(backend: Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
