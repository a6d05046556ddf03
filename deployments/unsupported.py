"""Parameters that other servers know and this one does not: refused by name, unless their value says nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest, StreamOptions

# Metadata: accepted with any value and without effect.
_IGNORED = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"})

# Name: the values, besides null, that ask for nothing.
_COMMON: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_NEUTRAL: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: {**_COMMON, "suffix": ("",)},
    ChatCompletionRequest: {
        **_COMMON,
        "add_generation_prompt": (True,),
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    },
}
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
# What an answer's message holds when a client sends it back as part of the conversation.
_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def drop_unsupported(body: Any, kind: type[msgspec.Struct]) -> Any:
    """``body`` without what has no effect here.

    Raises:
        ApiError: 400 for a parameter that is not supported, or not known at all.
    """
    if not isinstance(body, dict):
        return body
    if kind in _NEUTRAL:
        body = {name: value for name, value in body.items() if name not in _IGNORED}
    body = _drop(body, kind.__struct_fields__, _NEUTRAL.get(kind, {}), path="")
    if isinstance(body.get("stream_options"), dict):
        known = StreamOptions.__struct_fields__
        body["stream_options"] = _drop(body["stream_options"], known, _STREAM_OPTIONS, path="stream_options.")
    if isinstance(body.get("messages"), list):
        known = ChatMessage.__struct_fields__
        body["messages"] = [
            _drop(message, known, _MESSAGE, path=f"messages[{i}].") if isinstance(message, dict) else message
            for i, message in enumerate(body["messages"])
        ]
    return body


def _drop(
    fields: dict[str, Any], known: tuple[str, ...], neutral: Mapping[str, tuple[Any, ...]], *, path: str
) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name not in neutral:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            param = shorten(path + name)
            raise ApiError(400, f"Unknown parameter '{param}'.{hint}", param=param, code="unknown_parameter")
        elif value is not None and value not in neutral[name]:
            raise ApiError(
                400,
                f"'{path}{name}' is not supported by this server; leave it out.",
                param=path + name,
                code="unsupported_parameter",
            )
    return kept
