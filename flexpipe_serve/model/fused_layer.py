"""A Llama-like decoder layer in few calls: merged projections, rotation by complex numbers, packed weights.

Covers Llama, Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys) and Phi-3 (merged in the checkpoint already).
Keys stand in the cache with the halves of a head interleaved, so a layer's KV is for this class only; all stages of a
pipeline run the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flexpipe_serve.errors import UnsupportedModelError
from flexpipe_serve.kernels.elementwise import interleave_halves, rms_norm, rotate_pairs_, swiglu
from flexpipe_serve.kernels.linear import Linear, nothing, pack_linear
from flexpipe_serve.kernels.native_attention import NativePlan
from flexpipe_serve.kernels.native_layer import NativeLayer
from flexpipe_serve.kernels.native_linear import NativeLinear
from flexpipe_serve.model.layer import StepContext


class FusedLayer:
    """One layer from its checkpoint tensors.

    Args:
        tensors: by their names within the layer; owned by the layer from now on.
        rotary_dim: how many dimensions of a head are rotated.
        linear: kind of the linear maps (``flexpipe_serve.kernels.linear``).
        between: called after every few milliseconds of packing; may wait, or raise to give up.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        eps: float,
        linear: str,
        between: Callable[[], None] = nothing,
    ) -> None:
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._eps = eps
        weights = _Weights(tensors)
        _merge(weights, into="self_attn.qkv_proj", parts=[f"self_attn.{name}_proj" for name in "qkv"])
        _merge(weights, into="mlp.gate_up_proj", parts=["mlp.gate_proj", "mlp.up_proj"])

        def interleave(weight: torch.Tensor) -> torch.Tensor:
            return interleave_halves(weight, head_dim=head_dim, rotary_dim=rotary_dim)

        def linear_map(name: str) -> Linear:
            between()
            weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None)
            return pack_linear(weight, bias, kind=linear, between=between)

        num_rotated_rows = (num_heads + num_kv_heads) * head_dim
        for name in ("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"):
            if name in weights:
                rotated, values = torch.tensor_split(weights[name], [num_rotated_rows])
                weights[name] = torch.cat((interleave(rotated), values))
        self._qkv = linear_map("self_attn.qkv_proj")
        self._output = linear_map("self_attn.o_proj")
        self._gate_up = linear_map("mlp.gate_up_proj")
        self._down = linear_map("mlp.down_proj")
        self._input_norm = weights.pop("input_layernorm.weight")
        self._post_attention_norm = weights.pop("post_attention_layernorm.weight")
        self._head_norms: torch.Tensor | None = None
        """[num_heads + num_kv_heads, head_dim]: norm weights of each query and key head."""
        if "self_attn.q_norm.weight" in weights:
            q_norm, k_norm = (interleave(weights.pop(f"self_attn.{name}_norm.weight")) for name in "qk")
            self._head_norms = torch.cat((q_norm.expand(num_heads, -1), k_norm.expand(num_kv_heads, -1)))
        if weights:
            raise UnsupportedModelError(f"The checkpoint has layer weights nothing would compute: {sorted(weights)}.")

        self._native: NativeLayer | None = None
        """The whole layer in one call, where its maps are native."""
        maps = (self._qkv, self._output, self._gate_up, self._down)
        if linear == "native":
            qkv, output, gate_up, down = (linear_map for linear_map in maps if isinstance(linear_map, NativeLinear))
            self._native = NativeLayer(
                qkv=qkv,
                output=output,
                gate_up=gate_up,
                down=down,
                input_norm=self._input_norm,
                post_attention_norm=self._post_attention_norm,
                head_norms=self._head_norms,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rotary_dim=rotary_dim,
                eps=eps,
                scale=self._scale,
            )

    def forward(self, hidden: torch.Tensor, context: StepContext, kv: torch.Tensor) -> torch.Tensor:
        if self._native is not None and isinstance(context.plan, NativePlan):
            return self._native.forward(hidden, context.rotary, kv=kv, plan=context.plan)
        num_tokens = hidden.shape[0]
        num_rotated = self._num_heads + self._num_kv_heads
        qkv = self._qkv(rms_norm(hidden, self._input_norm, self._eps))
        heads = qkv.view(num_tokens, num_rotated + self._num_kv_heads, self._head_dim)
        rotated = heads[:, :num_rotated]
        if self._head_norms is not None:
            rotated = rms_norm(rotated, self._head_norms, self._eps)
        rotate_pairs_(rotated, context.rotary)
        attended = context.attention.forward(
            rotated[:, : self._num_heads],
            rotated[:, self._num_heads :],
            heads[:, num_rotated:],
            kv=kv,
            plan=context.plan,
            scale=self._scale,
        )
        hidden = self._output.add_to(hidden, attended.reshape(num_tokens, -1))
        gate_up = self._gate_up(rms_norm(hidden, self._post_attention_norm, self._eps))
        return self._down.add_to(hidden, swiglu(gate_up))


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
