"""The bytes that one token stands for."""

from __future__ import annotations

import functools
import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(backend: Tokenizer, token_id: int) -> bytes:
    """What ``token_id`` adds to a text, in UTF-8; a token may hold only a part of a character.

    Empty for an id that the tokenizer does not know.
    """
    token = backend.id_to_token(token_id)
    if token is None:
        return b""
    if _is_byte_level(backend):
        byte_of = _byte_of_char()
        try:
            return bytes(byte_of[char] for char in token)
        except KeyError:  # an added token stands as it is
            return token.encode()
    byte_token = _BYTE_TOKEN.fullmatch(token)
    if byte_token:
        return bytes.fromhex(byte_token[1])
    return token.replace("\u2581", " ").encode()


@functools.lru_cache(maxsize=4)
def _is_byte_level(backend: Tokenizer) -> bool:
    decoder = backend.decoder
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
