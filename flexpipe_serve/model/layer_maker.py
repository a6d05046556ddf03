"""Makes a model's decoder layers, fused or transformers' own.

transformers' modelling code and accelerate take seconds to import, so they are imported only for a model that needs
them: a stage of a fused model without scaled rope starts without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from flexpipe_serve.kernels.elementwise import rotary_factors
from flexpipe_serve.model.fused_layer import FusedLayer
from flexpipe_serve.model.layer import DecoderLayer
from flexpipe_serve.model.rotary import DefaultRotary, Rotary
from flexpipe_serve.model.source import ModelSpec


class LayerMaker(Protocol):
    """Makes the layers of one model, and what they share in a step."""

    def make(self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]) -> DecoderLayer:
        """Layer with the global index ``layer`` from its checkpoint tensors, by their names within the layer.

        Args:
            between: called after every few milliseconds of work; may wait, or raise to give up.

        Raises:
            UnsupportedModelError: the tensors do not match the architecture.
        """
        ...

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embedding of ``positions`` int64 [num_tokens], as the layers take it.

        Args:
            hidden: hidden states, whose dtype and device count.
        """
        ...


def make_layer_maker(spec: ModelSpec, *, device: torch.device, linear: str) -> LayerMaker:
    """The maker for the model ``spec``; ``linear`` is the kind of its linear maps."""
    if spec.fused:
        return _FusedLayerMaker(spec, device=device, linear=linear)
    return _GenericLayerMaker(spec, device=device, linear=linear)


class _FusedLayerMaker:
    def __init__(self, spec: ModelSpec, *, device: torch.device, linear: str) -> None:
        self._spec = spec
        self._linear = linear
        self._rotary: Rotary
        if spec.default_rope is not None:
            self._rotary = DefaultRotary(spec.default_rope, device=device)
        else:
            from flexpipe_serve.model.skeleton import Skeleton

            self._rotary = Skeleton(spec).rotary(device)

    def make(self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]) -> DecoderLayer:
        return FusedLayer(
            tensors,
            num_heads=self._spec.num_heads,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_dim,
            rotary_dim=2 * self._rotary.inv_freq.numel(),
            eps=self._spec.norm_eps,
            linear=self._linear,
            between=between,
        )

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rotary(hidden, positions.unsqueeze(0))
        return rotary_factors(cos[0], sin[0])


class _GenericLayerMaker:
    def __init__(self, spec: ModelSpec, *, device: torch.device, linear: str) -> None:
        from flexpipe_serve.model.generic_layer import GenericLayer
        from flexpipe_serve.model.skeleton import Skeleton

        self._layer_class = GenericLayer
        self._skeleton = Skeleton(spec)
        self._rotary: Rotary = self._skeleton.rotary(device)
        self._experts = spec.family.experts
        self._linear = linear

    def make(self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]) -> DecoderLayer:
        module = self._skeleton.layer(layer)
        return self._layer_class(module, tensors, experts=self._experts, linear=self._linear, between=between)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotary(hidden, positions.unsqueeze(0))
