"""From the checkpoint's tensors of a Llama-like layer to the weights that FusedLayer computes with: merged,
interleaved, packed. This is most of the work of loading a layer; its result can be kept and copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexpipe_serve.errors import UnsupportedModelError
from flexpipe_serve.kernels.elementwise import interleave_halves
from flexpipe_serve.kernels.linear import nothing, pack_weight

QKV, OUTPUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
INPUT_NORM, POST_ATTENTION_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
HEAD_NORMS = "self_attn.head_norms"


@dataclass(frozen=True, kw_only=True)
class FusedShape:
    """Sizes of a Llama-like layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    """How many dimensions of a head are rotated."""

    @property
    def num_rotated(self) -> int:
        """Heads of queries and keys."""
        return self.num_heads + self.num_kv_heads

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the merged linear maps, by name."""
        return {
            QKV: ((self.num_rotated + self.num_kv_heads) * self.head_dim, self.hidden_size),
            OUTPUT: (self.hidden_size, self.num_heads * self.head_dim),
            GATE_UP: (2 * self.intermediate_size, self.hidden_size),
            DOWN: (self.hidden_size, self.intermediate_size),
        }


def fuse_weights(
    tensors: Mapping[str, torch.Tensor], shape: FusedShape, *, linear: str, between: Callable[[], None] = nothing
) -> dict[str, torch.Tensor]:
    """The layer's weights, ready for FusedLayer.

    Args:
        tensors: by their names within the layer; owned by the result from now on.
        linear: kind of the linear maps (``flexpipe_serve.kernels.linear``).
        between: called after every few milliseconds of packing; may wait, or raise to give up.

    Returns:
        By name: the packed weight ``<map>.weight`` of each linear map and its ``<map>.bias`` if any, the norms, and
        with norms of queries and keys ``self_attn.head_norms`` [num_heads + num_kv_heads, head_dim].

    Raises:
        UnsupportedModelError: the tensors do not match the architecture.
    """
    weights = _Weights(tensors)
    _merge(weights, into=QKV, parts=[f"self_attn.{name}_proj" for name in "qkv"])
    _merge(weights, into=GATE_UP, parts=["mlp.gate_proj", "mlp.up_proj"])

    def interleave(weight: torch.Tensor) -> torch.Tensor:
        return interleave_halves(weight, head_dim=shape.head_dim, rotary_dim=shape.rotary_dim)

    for name in (f"{QKV}.weight", f"{QKV}.bias"):
        if name in weights:
            rotated, values = torch.tensor_split(weights[name], [shape.num_rotated * shape.head_dim])
            weights[name] = torch.cat((interleave(rotated), values))
    ready = {}
    for name, expected in shape.linear_shapes.items():
        between()
        weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None)
        if weight.shape != expected:
            raise UnsupportedModelError(
                f"The checkpoint's layer has {name} of {tuple(weight.shape)}; by its configuration it is {expected}."
            )
        ready[f"{name}.weight"] = pack_weight(weight, kind=linear, between=between)
        if bias is not None:
            ready[f"{name}.bias"] = bias
        del weight
    ready[INPUT_NORM] = weights.pop(INPUT_NORM)
    ready[POST_ATTENTION_NORM] = weights.pop(POST_ATTENTION_NORM)
    if "self_attn.q_norm.weight" in weights:
        q_norm, k_norm = (interleave(weights.pop(f"self_attn.{name}_norm.weight")) for name in "qk")
        ready[HEAD_NORMS] = torch.cat((q_norm.expand(shape.num_heads, -1), k_norm.expand(shape.num_kv_heads, -1)))
    if weights:
        raise UnsupportedModelError(f"The checkpoint has layer weights nothing would compute: {sorted(weights)}.")
    return ready


class _Weights(dict[str, torch.Tensor]):
    """The layer's tensors; each is taken out as it finds its place."""

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self and not default:
            raise UnsupportedModelError(f"The checkpoint's layer has no weight {name}.")
        return super().pop(name, *default)


def _merge(weights: _Weights, *, into: str, parts: Sequence[str]) -> None:
    """Stack the parts' rows under one name, unless the checkpoint has them merged."""
    for kind in ("weight", "bias"):
        if f"{parts[0]}.{kind}" in weights:
            weights[f"{into}.{kind}"] = torch.cat([weights.pop(f"{part}.{kind}") for part in parts])
