"""The rotary embedding of a model: cosines and sines of positions."""

from __future__ import annotations

from typing import Protocol

import torch

from flexpipe_serve.model.source import DefaultRope


class Rotary(Protocol):
    """The interface of transformers' rotary modules."""

    inv_freq: torch.Tensor
    """Radians a token, float32 [rotary_dim / 2]."""

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, n, rotary_dim], both halves alike, of ``position_ids`` [1, n] in the dtype of ``x``."""
        ...


class DefaultRotary:
    """Rotations that are not scaled: to the bit those of transformers' modules."""

    def __init__(self, rope: DefaultRope, *, device: torch.device) -> None:
        # On the CPU, as transformers does: another device's powers may differ in the last bit.
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
        self.inv_freq = (1.0 / rope.theta**exponents).to(device)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
