"""How much memory weights take: packed, often less than their elements would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class WeightSizes:
    """Bytes of the weights that a stage holds."""

    layers: Mapping[int, int] = field(default_factory=dict)
    """By global index."""
    embedding: int = 0
    """0: not held."""
    head: int = 0
    """Final norm and LM head; 0: not held."""
    shared_ends: int = 0
    """What is saved where one matrix serves both ends."""

    @property
    def total(self) -> int:
        return sum(self.layers.values()) + self.embedding + self.head - self.shared_ends
