"""What a pipeline's steps cost, from those that it made lately: pure code."""

from __future__ import annotations

from dataclasses import dataclass

_KEPT = 0.98
"""Of the weight of what was seen, at each further step: the last fifty steps count."""
_LEAST_WEIGHT = 7.0
"""The first steps say little: they warm caches up."""
_FRESH_S = 5.0
"""Without a step for so long nothing is known any more. Who was slow once would never be asked again otherwise."""


@dataclass(frozen=True)
class StepCost:
    """A step of n new tokens takes ``step_s + n * token_s`` seconds, from sending it to its result."""

    step_s: float
    token_s: float

    def seconds(self, num_tokens: float) -> float:
        """Of a step with so many new tokens, of prompts or of sequences that decode."""
        return self.step_s + self.token_s * num_tokens


class StepCosts:
    """A line through steps' times by their new tokens, by least squares; older steps count less and less."""

    def __init__(self) -> None:
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self._last_at = 0.0

    def note(self, num_tokens: int, seconds: float, *, now: float) -> None:
        """A step is over."""
        if now - self._last_at > _FRESH_S:
            self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self._last_at = now
        self._weight = _KEPT * self._weight + 1
        self._n = _KEPT * self._n + num_tokens
        self._nn = _KEPT * self._nn + num_tokens * num_tokens
        self._t = _KEPT * self._t + seconds
        self._nt = _KEPT * self._nt + num_tokens * seconds

    def fit(self, *, now: float) -> StepCost | None:
        """None before the first few steps, and when the last one was long ago. Neither term is negative: of a line that
        falls, or begins below 0, the nearest that does not."""
        if self._weight < _LEAST_WEIGHT or now - self._last_at > _FRESH_S:
            return None
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n**2
        token_s = 0.0
        if variance > 1e-9 * max(1.0, mean_n**2):
            token_s = max(0.0, (self._nt / self._weight - mean_n * mean_t) / variance)
        if token_s * mean_n > mean_t:
            return StepCost(0.0, self._nt / self._nn)
        return StepCost(mean_t - token_s * mean_n, token_s)
