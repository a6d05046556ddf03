"""A model's chat template, with what transformers gives templates to work with.

Not transformers' own renderer, though that is no more than this over the same library: it cannot be imported without
0.8 s of CPU time, and the Router must start fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class ChatTemplate:
    """A conversation as text. A template is a program that comes with the model: it runs in a sandbox.

    Args:
        source: in Jinja; read when the first conversation is rendered.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of ``messages``; whatever the template may raise passes through.

        Args:
            variables: further ones that the template sees.

        Raises:
            TypeError: a message is no mapping.
            jinja2.TemplateError: the template is broken or refuses the messages.
        """
        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"a message is {message!r}, not a mapping with role and content")
        return self._template.render({"tools": None, "documents": None, **variables, "messages": list(messages)})

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self._source)


@lru_cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _PublicNamespace,
    }
    return environment


class _GenerationTag(Extension):
    """``{% generation %}`` tells training which tokens are the assistant's; for serving its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """``dict`` for templates: without the attributes of the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """``namespace`` for templates: without names that mean something to Python."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have an attribute {name!r}")
