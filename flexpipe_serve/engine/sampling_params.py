"""Sampling parameters of one request, checked once at the edge."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexpipe_serve.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token of a sequence is chosen and when the sequence ends.

    ``seed`` and a token's position in its sequence determine every random choice, so the same request gives the
    same tokens whatever it is batched with and however the model is split.

    Raises:
        InvalidRequestError: a value is out of range; ``param`` names it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    num_logprobs: int | None = None
    """None: no log probabilities. k >= 0: the chosen token's and the k most likely ones'."""
    prompt_logprobs: bool = False
    """Also the log probabilities of the prompt's tokens (``echo`` with ``logprobs``)."""

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 0, None)
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, -1, None)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        if self.num_logprobs is not None:
            _check_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed.", param="stop"
            )
        if any(not s for s in self.stop):
            raise InvalidRequestError("stop must not contain an empty string.", param="stop")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    f"logit_bias[{token}] is {bias}; it must be between -100 and 100.", param="logit_bias"
                )

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """True where a penalty depends on the tokens seen so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def _check_range(name: str, value: float, low: float | None, high: float | None, *, low_open: bool = False) -> None:
    too_low = low is not None and (value <= low if low_open else value < low)
    if value != value or too_low or (high is not None and value > high):
        bounds = [] if low is None else [f"{'more than' if low_open else 'at least'} {low:g}"]
        bounds += [] if high is None else [f"at most {high:g}"]
        raise InvalidRequestError(f"{name} is {value}; it must be {' and '.join(bounds)}.", param=name)
