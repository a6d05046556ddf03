"""Prompts of an exact number of tokens."""

import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from flexpipe_serve.errors import ConfigError

# Byte-level BPE writes a leading space as Ġ, SentencePiece as ▁.
_WORD = re.compile(r"^[Ġ▁]([a-z]{3,})$")
_MAX_WORDS = 4096


class PromptBuilder:
    """Makes prompts of random common words that a tokenizer turns into exactly so many tokens.

    Random words keep prompts distinct, so no server answers from a prefix cache.

    Args:
        folder: a model or tokenizer folder with a ``tokenizer.json``.

    Raises:
        ConfigError: the folder has no such file, or its vocabulary has no plain words.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; give a folder that holds the model's tokenizer.json")
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [" " + match[1] for token, _ in vocabulary if (match := _WORD.match(token))][:_MAX_WORDS]
        encodings = self._tokenizer.encode_batch(words, add_special_tokens=False)
        self._words = [word for word, encoding in zip(words, encodings, strict=True) if len(encoding.ids) == 1]
        if len(self._words) < 100:
            raise ConfigError(f"{file} has only {len(self._words)} plain words; at least 100 are needed for prompts")

    def build(self, num_tokens: int, rng: np.random.Generator) -> str:
        """A text that encodes to ``num_tokens`` tokens, special tokens that the tokenizer adds included.

        Raises:
            ConfigError: no such text was found (``num_tokens`` is below 1, or no more than the special tokens).
        """
        num_words = max(num_tokens, 0)
        words = [self._words[i] for i in rng.integers(len(self._words), size=num_words)]
        # The first try is exact unless special tokens are added or the first word loses its space.
        for _ in range(8):
            text = "".join(words)
            excess = len(self._tokenizer.encode(text).ids) - num_tokens
            if words and excess == 0:
                return text
            if excess > 0:
                words = words[:-excess]
            else:
                words += [self._words[i] for i in rng.integers(len(self._words), size=-excess)]
        raise ConfigError(f"no prompt of exactly {num_tokens} tokens was found; ask for a longer prompt")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as the server would compute them."""
        return list(self._tokenizer.encode(text).ids)
