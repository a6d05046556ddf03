"""The part of a model that one stage holds and runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional

from flexpipe_serve.kernels.attention import AttentionBackend
from flexpipe_serve.kernels.elementwise import rms_norm
from flexpipe_serve.kernels.linear import Linear, PlainLinear, nothing, pack_linear
from flexpipe_serve.kernels.native_attention import NativeAttention, NativePlan
from flexpipe_serve.kernels.native_layer import NativeLayer, run_layers
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.model.freed_memory import return_freed_memory
from flexpipe_serve.model.fused_layer import FusedLayer
from flexpipe_serve.model.layer import DecoderLayer, StepContext
from flexpipe_serve.model.layer_maker import make_layer_maker
from flexpipe_serve.model.one_thread import one_thread
from flexpipe_serve.model.source import EMBEDDING_NAME, HEAD_NAME, NORM_NAME, ModelSpec


class StageModel:
    """Some layers of a model, with the embedding on a first stage and final norm and LM head on a last one.

    Layers and ends come and go while steps run: :meth:`load` and :meth:`keep` belong to one thread, :meth:`forward` and
    :meth:`logits` to another, which asks only for what is held then. Empty at first.

    Args:
        spec: the whole model.
        attention: backend that plans and computes attention.
        linear: kind of the linear maps; the same on all stages of a pipeline.
    """

    def __init__(
        self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, attention: AttentionBackend, linear: str
    ) -> None:
        self._spec = spec
        self._device = device
        self._dtype = dtype
        self._attention = attention
        self._linear = linear
        self._checkpoint = Checkpoint(spec.path)
        self._maker = make_layer_maker(spec, device=device, linear=linear)
        self._layers: dict[int, DecoderLayer] = {}
        self._embedding: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._head: Linear | None = None
        self._head_bytes = 0

    @property
    def is_native(self) -> bool:
        """Whether the kernels in C++ do all the work that is worth several threads."""
        return self._spec.fused and self._linear == "native" and isinstance(self._attention, NativeAttention)

    @property
    def layers(self) -> tuple[int, ...]:
        """Global indices of the layers held, in order."""
        return tuple(sorted(self._layers))

    @property
    def weights_bytes(self) -> int:
        """Memory that all weights held take."""
        layers = sum(self._spec.layer_bytes(layer, _name(self._dtype)) for layer in self._layers)
        embedding = 0 if self._embedding is None or self._has_one_matrix else self._embedding.nbytes
        return layers + embedding + self._head_bytes

    @one_thread()
    def load(
        self,
        layers: Iterable[int],
        *,
        embedding: bool = False,
        head: bool = False,
        between: Callable[[], None] = nothing,
    ) -> None:
        """Have these layers and ends; what is there already stays as it is.

        Args:
            between: called after every few milliseconds of work; may wait, or raise to give up.

        Raises:
            UnsupportedModelError: the checkpoint's weights do not match the architecture.
            ConfigError: a file is missing or damaged.
        """
        if embedding and self._embedding is None:
            self._load_embedding(between)
        if head and self._head is None:
            self._load_head(between)
        for layer in layers:
            if layer not in self._layers:
                tensors = self._checkpoint.read_layer(layer, device=self._device, dtype=self._dtype, between=between)
                weights = self._maker.prepare(layer, tensors, between=between)
                del tensors
                self._layers = {**self._layers, layer: self._maker.make(layer, weights)}
                del weights
                between()
        return_freed_memory()

    def keep(self, layers: Container[int], *, embedding: bool = False, head: bool = False) -> None:
        """Give the memory of everything else back."""
        self._layers = {index: layer for index, layer in self._layers.items() if index in layers}
        if not embedding:
            self._embedding = None
        if not head:
            self._norm = self._head = None
            self._head_bytes = 0
        return_freed_memory()

    @torch.inference_mode()
    def forward(
        self,
        inputs: torch.Tensor,
        *,
        layers: range,
        is_first: bool,
        positions: torch.Tensor,
        plan: Any,
        kv: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Run some of the layers held.

        Args:
            inputs: token ids int64 [num_tokens] where ``is_first``, else hidden states [num_tokens, hidden_size].
            layers: global indices.
            is_first: begin with the embedding.
            positions: int64 [num_tokens], place of each token in its sequence.
            plan: of the attention backend, for the same tokens.
            kv: segment of each layer.

        Returns:
            Hidden states [num_tokens, hidden_size], before the final norm.
        """
        hidden = inputs
        if is_first:
            assert self._embedding is not None, "the embedding is not loaded"
            hidden = functional.embedding(inputs, self._embedding)
        rotary = self._maker.rotary(hidden, positions)
        if isinstance(plan, NativePlan) and (natives := self._natives(layers)):
            return run_layers(natives, hidden, rotary, kvs=[kv[index] for index in layers], plan=plan)
        context = StepContext(rotary=rotary, attention=self._attention, plan=plan)
        for index in layers:
            # Looked up one by one: holding them all would leave it to this thread to free what is dropped meanwhile.
            hidden = self._layers[index].forward(hidden, context, kv[index])
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab_size] of hidden states [n, hidden_size]; where the head is loaded."""
        assert self._norm is not None
        assert self._head is not None, "the head is not loaded"
        return self._head(rms_norm(hidden, self._norm, self._spec.norm_eps)).float()

    def _natives(self, layers: range) -> list[NativeLayer]:
        """These layers as the kernels in C++ compute them; empty where one is not like that."""
        held = [self._layers[index] for index in layers]
        natives = [layer.native for layer in held if isinstance(layer, FusedLayer) and layer.native is not None]
        return natives if len(natives) == len(held) else []

    @property
    def _has_one_matrix(self) -> bool:
        """Whether one matrix serves both ends: tied, plain weights. Packed, the head is a copy."""
        return isinstance(self._head, PlainLinear) and self._head.packed is self._embedding

    def _load_embedding(self, between: Callable[[], None]) -> None:
        if self._spec.tied_embeddings and isinstance(self._head, PlainLinear):
            self._embedding = self._head.packed
        else:
            self._embedding = self._read(EMBEDDING_NAME, between)

    def _load_head(self, between: Callable[[], None]) -> None:
        self._norm = self._read(NORM_NAME, between)
        if self._spec.tied_embeddings and self._linear == "plain" and self._embedding is not None:
            weight = self._embedding
        else:
            weight = self._read(EMBEDDING_NAME if self._spec.tied_embeddings else HEAD_NAME, between)
        self._head_bytes = weight.nbytes + self._norm.nbytes
        self._head = pack_linear(weight, kind=self._linear, between=between)

    def _read(self, name: str, between: Callable[[], None]) -> torch.Tensor:
        return self._checkpoint.read([name], device=self._device, dtype=self._dtype, between=between)[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
