"""A Llama-like decoder layer in few calls: merged projections, rotation by complex numbers, packed weights.

Covers Llama, Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys) and Phi-3 (merged in the checkpoint already).
Keys stand in the cache with the halves of a head interleaved, so a layer's KV is for this class only; all stages of a
pipeline run the same one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexpipe_serve.kernels.elementwise import rms_norm, rotate_pairs_, swiglu
from flexpipe_serve.kernels.linear import Linear, make_linear
from flexpipe_serve.kernels.native_attention import NativePlan
from flexpipe_serve.kernels.native_layer import NativeLayer, run_layers
from flexpipe_serve.kernels.native_linear import NativeLinear
from flexpipe_serve.model.fused_weights import (
    DOWN,
    GATE_UP,
    HEAD_NORMS,
    INPUT_NORM,
    OUTPUT,
    POST_ATTENTION_NORM,
    QKV,
    FusedShape,
)
from flexpipe_serve.model.layer import StepContext


class FusedLayer:
    """One layer over ready weights.

    Args:
        weights: of :func:`~flexpipe_serve.model.fused_weights.fuse_weights` for the same shape and linear kind.
        linear: kind of the linear maps (``flexpipe_serve.kernels.linear``).
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], shape: FusedShape, *, eps: float, linear: str) -> None:
        self._shape = shape
        self._scale = shape.head_dim**-0.5
        self._eps = eps
        self._maps: dict[str, Linear] = {
            name: make_linear(
                weights[f"{name}.weight"], weights.get(f"{name}.bias"), kind=linear, num_outputs=num_outputs
            )
            for name, (num_outputs, _) in shape.linear_shapes.items()
        }
        self._qkv, self._output = self._maps[QKV], self._maps[OUTPUT]
        self._gate_up, self._down = self._maps[GATE_UP], self._maps[DOWN]
        self._input_norm = weights[INPUT_NORM]
        self._post_attention_norm = weights[POST_ATTENTION_NORM]
        self._head_norms = weights.get(HEAD_NORMS)
        self.native: NativeLayer | None = None
        """The whole layer in one call, where its maps are native."""
        if linear == "native":
            qkv, output, gate_up, down = (made for made in self._maps.values() if isinstance(made, NativeLinear))
            self.native = NativeLayer(
                qkv=qkv,
                output=output,
                gate_up=gate_up,
                down=down,
                input_norm=self._input_norm,
                post_attention_norm=self._post_attention_norm,
                head_norms=self._head_norms,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                rotary_dim=shape.rotary_dim,
                eps=eps,
                scale=self._scale,
            )

    def weights(self) -> dict[str, torch.Tensor]:
        norms = {
            INPUT_NORM: self._input_norm,
            POST_ATTENTION_NORM: self._post_attention_norm,
            HEAD_NORMS: self._head_norms,
        }
        tensors = {f"{name}.weight": made.packed for name, made in self._maps.items()}
        biases = {f"{name}.bias": made.bias for name, made in self._maps.items()}
        return tensors | {name: tensor for name, tensor in (biases | norms).items() if tensor is not None}

    def forward(self, hidden: torch.Tensor, context: StepContext, kv: torch.Tensor) -> torch.Tensor:
        if self.native is not None and isinstance(context.plan, NativePlan):
            return run_layers([self.native], hidden, context.rotary, kvs=[kv], plan=context.plan)
        num_tokens = hidden.shape[0]
        num_rotated = self._shape.num_rotated
        qkv = self._qkv(rms_norm(hidden, self._input_norm, self._eps))
        heads = qkv.view(num_tokens, num_rotated + self._shape.num_kv_heads, self._shape.head_dim)
        rotated = heads[:, :num_rotated]
        if self._head_norms is not None:
            rotated = rms_norm(rotated, self._head_norms, self._eps)
        rotate_pairs_(rotated, context.rotary)
        attended = context.attention.forward(
            rotated[:, : self._shape.num_heads],
            rotated[:, self._shape.num_heads :],
            heads[:, num_rotated:],
            kv=kv,
            plan=context.plan,
            scale=self._scale,
        )
        hidden = self._output.add_to(hidden, attended.reshape(num_tokens, -1))
        gate_up = self._gate_up(rms_norm(hidden, self._post_attention_norm, self._eps))
        return self._down.add_to(hidden, swiglu(gate_up))
