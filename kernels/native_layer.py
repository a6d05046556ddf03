"""Llama-like decoder layers in one call of the kernels in ``csrc``.

From Python a layer takes some twenty calls of torch, which cost more than its arithmetic at batch 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from flexpipe_serve.kernels import native_attention, native_linear
from flexpipe_serve.kernels.native import native_threads
from flexpipe_serve.kernels.native_attention import NativePlan
from flexpipe_serve.kernels.native_linear import NativeLinear


class _Layer(ctypes.Structure):
    """``flexpipe::Layer``."""

    _fields_ = (
        ("qkv", native_linear.Linear),
        ("output", native_linear.Linear),
        ("gate_up", native_linear.Linear),
        ("down", native_linear.Linear),
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("head_norms", ctypes.c_void_p),
        ("heads", native_attention.Heads),
        ("rotary_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class NativeLayer:
    """Pre-norm attention and SwiGLU with residuals, float32 on the CPU.

    The bits of a token's result depend on its own sequence alone.

    Args:
        qkv: the merged projection; its query and key heads have the halves of the rotary dimensions interleaved.
        gate_up: the merged projection, gate first.
        input_norm, post_attention_norm: weights [hidden_size].
        head_norms: weights [num_heads + num_kv_heads, head_dim] of the norms of queries and keys, or None.
        scale: factor on the scores.
    """

    def __init__(
        self,
        *,
        qkv: NativeLinear,
        output: NativeLinear,
        gate_up: NativeLinear,
        down: NativeLinear,
        input_norm: torch.Tensor,
        post_attention_norm: torch.Tensor,
        head_norms: torch.Tensor | None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        self.library = qkv.library
        self._maps = (qkv, output, gate_up, down)
        self._norms = [
            None if weight is None else weight.contiguous() for weight in (input_norm, post_attention_norm, head_norms)
        ]
        self._struct = _Layer(
            *(linear_map.struct for linear_map in self._maps),
            *(None if weight is None else weight.data_ptr() for weight in self._norms),
            native_attention.Heads(num_heads, num_kv_heads, head_dim, scale),
            rotary_dim,
            eps,
        )
        self.address = ctypes.addressof(self._struct)


class LayerRun:
    """Layers and their KV as the kernels take them. Keeps both.

    Args:
        layers: at least one.
        kvs: each layer's segment, as the attention backends take it.
    """

    def __init__(self, layers: Sequence[NativeLayer], kvs: Sequence[torch.Tensor]) -> None:
        pointers = ctypes.c_void_p * len(layers)
        self.library = layers[0].library
        self.num_layers = len(layers)
        self.layers = pointers(*(layer.address for layer in layers))
        self.kvs = pointers(*(kv.data_ptr() for kv in kvs))
        self._kept = (layers, kvs)


def run_layers(
    layers: Sequence[NativeLayer],
    hidden: torch.Tensor,
    rotary: torch.Tensor,
    *,
    kvs: Sequence[torch.Tensor],
    plan: NativePlan,
) -> torch.Tensor:
    """Hidden states [num_tokens, hidden_size] after all ``layers``, in one call: what lies between two calls from
    Python is long enough for the helper threads to fall asleep.

    Args:
        layers: at least one.
        rotary: of :func:`~flexpipe_serve.kernels.elementwise.rotary_factors`.
        kvs: each layer's segment, as the attention backends take it.
        plan: of :class:`~flexpipe_serve.kernels.native_attention.NativeAttention`.
    """
    out, rotary = hidden.clone(memory_format=torch.contiguous_format), rotary.contiguous()
    run = LayerRun(layers, kvs)
    run.library.flexpipe_layers(
        *(run.layers, run.kvs, run.num_layers),
        *(ctypes.byref(plan.batch), out.data_ptr(), rotary.data_ptr(), len(out), native_threads()),
    )
    return out
