"""What a stage runs: the interface of one decoder layer, and what all layers of a step share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flexpipe_serve.kernels.attention import AttentionBackend


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one step share."""

    rotary: Any
    """Rotary embedding of the step's positions, as the model's LayerMaker gives it."""
    attention: AttentionBackend
    plan: Any
    """Of the attention backend."""


class DecoderLayer(Protocol):
    """One decoder layer with its weights."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by name, ready to make the same layer of again (``LayerMaker.make``)."""
        ...

    def forward(self, hidden: torch.Tensor, context: StepContext, kv: torch.Tensor) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] after the layer; ``kv`` is the layer's segment."""
        ...
