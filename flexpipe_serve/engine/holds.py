"""How long refactorings hold steps back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Hold:
    """No steps are sent."""

    since: float | None = None
    """When the first step that could have run was not sent."""


@dataclass
class HoldTimes:
    """How long steps that could have run were held back, in Router and stages, since the count began."""

    total_seconds: float = 0.0
    longest_seconds: float = 0.0
    num_tokens: int = 0
    """Sampled meanwhile."""

    def add(self, seconds: float) -> None:
        """Note one step's wait."""
        self.total_seconds += seconds
        self.longest_seconds = max(self.longest_seconds, seconds)
