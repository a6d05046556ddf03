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
from flexpipe_serve.model.fused_weights import FusedShape, fuse_weights
from flexpipe_serve.model.layer import DecoderLayer
from flexpipe_serve.model.rotary import DefaultRotary, Rotary
from flexpipe_serve.model.source import ModelSpec

_FLOAT_BYTES = 4
_MAX_TABLE_BYTES = 16 << 20


class LayerMaker(Protocol):
    """Makes the layers of one model, and what they share in a step."""

    def prepare(
        self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """Ready weights of the layer with the global index ``layer`` from its checkpoint tensors, by their names within
        the layer: the slow part, whose result can be kept and copied.

        Args:
            tensors: owned by the result from now on.
            between: called after every few milliseconds of work; may wait, or raise to give up.

        Raises:
            UnsupportedModelError: the tensors do not match the architecture.
        """
        ...

    def make(self, layer: int, weights: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """The layer over ready weights, which it owns from now on."""
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
        self._linear = linear
        self._eps = spec.norm_eps
        self._rotary: Rotary
        self._table: torch.Tensor | None = None
        """Factors of all positions, where that is not much."""
        if spec.default_rope is not None:
            self._rotary = DefaultRotary(spec.default_rope, device=device)
            if spec.max_model_len * spec.default_rope.dim * _FLOAT_BYTES <= _MAX_TABLE_BYTES:
                self._table = self._factors(torch.empty(0, device=device), torch.arange(spec.max_model_len).to(device))
        else:
            from flexpipe_serve.model.skeleton import Skeleton

            self._rotary = Skeleton(spec).rotary(device)
        self._shape = FusedShape(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=2 * self._rotary.inv_freq.numel(),
        )

    def prepare(
        self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        return fuse_weights(tensors, self._shape, linear=self._linear, between=between)

    def make(self, layer: int, weights: Mapping[str, torch.Tensor]) -> DecoderLayer:
        return FusedLayer(weights, self._shape, eps=self._eps, linear=self._linear)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._table is not None:
            return self._table.index_select(0, positions)
        return self._factors(hidden, positions)

    def _factors(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rotary(hidden, positions.unsqueeze(0))
        return rotary_factors(cos[0], sin[0])


class _GenericLayerMaker:
    def __init__(self, spec: ModelSpec, *, device: torch.device, linear: str) -> None:
        from flexpipe_serve.model import generic_layer
        from flexpipe_serve.model.skeleton import Skeleton

        self._generic = generic_layer
        self._skeleton = Skeleton(spec)
        self._rotary: Rotary = self._skeleton.rotary(device)
        self._experts = spec.family.experts
        self._linear = linear

    def prepare(
        self, layer: int, tensors: Mapping[str, torch.Tensor], *, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        return self._generic.prepare_weights(
            self._skeleton.layer(layer), tensors, experts=self._experts, linear=self._linear, between=between
        )

    def make(self, layer: int, weights: Mapping[str, torch.Tensor]) -> DecoderLayer:
        return self._generic.GenericLayer(self._skeleton.layer(layer), weights, linear=self._linear)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotary(hidden, positions.unsqueeze(0))
