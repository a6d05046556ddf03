"""From a request's fields to the engine's ``SamplingParams``."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from flexpipe_serve.deployments.errors import ApiError
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.deployments.prompts import Prompt, check_token_ids
from flexpipe_serve.deployments.protocol import MAX_SEQUENCES, SamplingFields
from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.sampling_params import SamplingParams

_MAX_STOP_CHARS = 1024
_MAX_STOP_TOKEN_IDS = 256
_MAX_LOGIT_BIASES = 1024
"""They travel with every step."""
_MAX_PRIORITY = 2**31 - 1
# Seeds in use leave room for seed + i in 64 bits.
_SEED_MASK = (1 << 62) - 1


def num_sequences(request: SamplingFields, *, num_prompts: int) -> int:
    """``n``. Raises ApiError (400) where it is below one or makes too many sequences."""
    n = 1 if request.n is None else request.n
    if n < 1:
        raise ApiError(400, f"n is {n}; it must be at least 1.", param="n")
    if n * num_prompts > MAX_SEQUENCES:
        raise ApiError(
            400, f"n is {n} for {num_prompts} prompts; at most {MAX_SEQUENCES} sequences fit in one request.", param="n"
        )
    return n


def priority(request: SamplingFields) -> int:
    """``priority``; 0 by default. Raises ApiError (400) outside 32 bits."""
    value = request.priority or 0
    if abs(value) > _MAX_PRIORITY:
        raise ApiError(400, f"priority is {value}; it must be within ±{_MAX_PRIORITY}.", param="priority")
    return value


def fit_into_context(
    prompt: Prompt, *, requested: int | None, default: int | None, model: ModelCard, limits: HttpLimits, param: str
) -> int:
    """How many tokens may be generated.

    Args:
        requested: what the client asked for: granted or refused.
        default: otherwise this many, or as many as fit; None: as many as fit.
        param: the field that holds the prompt.

    Raises:
        ApiError: 400 where the prompt is empty or too long, or does not fit together with ``requested``.
    """
    num_prompt, context = len(prompt.token_ids), model.max_model_len
    if num_prompt == 0:
        raise ApiError(400, f"{param} has no tokens; give at least one.", param=param)
    if limits.max_prompt_tokens is not None and num_prompt > limits.max_prompt_tokens:
        raise ApiError(
            400,
            f"{param} has {num_prompt} tokens; this server accepts at most {limits.max_prompt_tokens}"
            " (limits.max_prompt_tokens). Shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    room = context - num_prompt
    if room < (1 if requested is None else 0):
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, {param} has {num_prompt} tokens."
            " Shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested"
            f" {num_prompt + requested} tokens ({num_prompt} in {param}, {requested} for the completion)."
            f" Shorten {param}, or set max_tokens to at most {room}.",
            param=param if room == 0 else "max_tokens",
            code="context_length_exceeded",
        )
    return requested


def sampling_params(
    request: SamplingFields, *, max_tokens: int, num_logprobs: int | None, prompt_logprobs: bool, model: ModelCard
) -> SamplingParams:
    """The engine's parameters for one prompt.

    Without a seed each call draws one, so equal prompts of one request differ.

    Raises:
        ApiError: 400 for a field that is out of range.
        InvalidRequestError: the same, found by ``SamplingParams`` itself.
    """
    stop_token_ids = request.stop_token_ids or []
    _check_count("stop_token_ids", stop_token_ids, _MAX_STOP_TOKEN_IDS)
    check_token_ids(stop_token_ids, model.vocab_size, param="stop_token_ids")
    logit_bias = request.logit_bias or {}
    _check_count("logit_bias", list(logit_bias), _MAX_LOGIT_BIASES)
    check_token_ids(list(logit_bias), model.vocab_size, param="logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        # More than the vocabulary is no limit, and may be more than the wire carries.
        top_k=min(request.top_k or 0, model.vocab_size),
        seed=secrets.randbits(62) if request.seed is None else request.seed & _SEED_MASK,
        logit_bias=logit_bias,
        stop=_stop(request.stop),
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=bool(request.ignore_eos),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def include_usage(request: SamplingFields) -> bool:
    """Whether the stream ends with its usage. Raises ApiError (400) for stream options without a stream."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise ApiError(400, "stream_options needs stream to be true.", param="stream_options")
    return bool(request.stream_options.include_usage)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    longest = max(map(len, strings), default=0)
    if longest > _MAX_STOP_CHARS:
        raise ApiError(
            400, f"stop has a string of {longest} characters; at most {_MAX_STOP_CHARS} are allowed.", param="stop"
        )
    return strings


def _check_count(name: str, values: Sequence[int], limit: int) -> None:
    if len(values) > limit:
        raise ApiError(400, f"{name} has {len(values)} entries; at most {limit} are allowed.", param=name)
