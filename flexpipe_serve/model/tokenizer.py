"""Text to token ids and back, and a model's chat template, without importing torch.

transformers' ``AutoTokenizer`` would import torch (2 s and 300 MB in the Router). The part of it that matters here
comes without: the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from flexpipe_serve.errors import ConfigError, InvalidRequestError
from flexpipe_serve.model.chat_template import ChatTemplate

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What a template raises for some messages is about those messages.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ModelTokenizer:
    """The tokenizer of a model folder; safe to use from several threads.

    Args:
        path: folder with ``tokenizer.json``, and ``tokenizer_config.json`` and ``chat_template.jinja`` where the
            model has them.

    Raises:
        ConfigError: the folder has no fast tokenizer, or a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json; load its tokenizer with transformers' AutoTokenizer and save it "
                "there with save_pretrained()."
            )
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        # A file may carry the truncation and padding of its training; neither has a place in serving.
        self.backend.no_truncation()
        self.backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = {
            name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None
        }
        source = _chat_template_source(folder, config)
        self._chat_template = None if source is None else ChatTemplate(source)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens`` what the model wants around a text is added."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens left out."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of the conversation, ready for the assistant's answer.

        Args:
            kwargs: further variables of the template, ``add_generation_prompt`` (true unless given) among them.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions with a prompt.", param="messages"
            )
        variables = {"add_generation_prompt": True, **self._special_tokens, **kwargs}
        try:
            text = self._chat_template.render(messages, **variables)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        # Several by name, as in [{"name": "default", "template": "..."}, ...].
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    return content
