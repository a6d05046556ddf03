"""Which requests are refused at the door, and in what words."""

from __future__ import annotations

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import InvalidRequestError, QueueFullError

_RETRY_AFTER_S = 1


def check_prompt(seq: Sequence, config: SchedulerConfig, *, num_kv_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the first output token (if one is wanted).

    Args:
        num_kv_tokens: what the whole KV cache can hold.

    Raises:
        InvalidRequestError: ``param`` is ``prompt``.
    """
    if seq.num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt has no tokens; send at least one.", param="prompt")
    max_len = min(config.max_model_len, num_kv_tokens)
    limit = max_len - min(1, seq.params.max_tokens)
    if seq.num_prompt_tokens > limit:
        binding = "the model's context (max_model_len)" if max_len == config.max_model_len else "the KV cache"
        raise InvalidRequestError(
            f"The prompt has {seq.num_prompt_tokens} tokens; at most {limit} fit, because {binding} has room for "
            f"{max_len} tokens of prompt and output. Shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )


def check_queue(num_new: int, config: SchedulerConfig, *, num_unfinished: int) -> None:
    """Refuse ``num_new`` sequences beyond the places and the waiting queue.

    Raises:
        InvalidRequestError: more than could ever be served; ``param`` is ``n``.
        QueueFullError: more than can be served now.
    """
    limit = config.max_num_seqs + config.max_waiting
    if num_new > limit:
        raise InvalidRequestError(
            f"The request asks for {num_new} sequences; at most {limit} can be served. Lower n.", param="n"
        )
    if num_unfinished + num_new > limit:
        raise QueueFullError(
            f"{num_unfinished} sequences are being served or waiting and {num_new} more were asked for; "
            f"the limit is {limit}. Try again later.",
            retry_after_s=_RETRY_AFTER_S,
        )
