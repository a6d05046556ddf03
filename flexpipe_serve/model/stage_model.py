"""The part of a model that one stage holds and runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import embedding

from flexpipe_serve.kernels.attention import AttentionBackend
from flexpipe_serve.kernels.elementwise import rms_norm
from flexpipe_serve.kernels.linear import Linear, pack_linear
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.model.freed_memory import return_freed_memory
from flexpipe_serve.model.layer import DecoderLayer, StepContext
from flexpipe_serve.model.layer_maker import make_layer_maker
from flexpipe_serve.model.one_thread import one_thread
from flexpipe_serve.model.source import EMBEDDING_NAME, HEAD_NAME, NORM_NAME, ModelSpec


class StageModel:
    """Some consecutive layers of a model, with the embedding on the first stage and norm and LM head on the last.

    Args:
        spec: the whole model.
        layers: global indices of the layers to load.
        is_first: holds the embedding and takes token ids.
        is_last: holds final norm and LM head and gives logits.
        attention: backend that plans and computes attention.
        linear: kind of the linear maps; the same on all stages of a pipeline.

    Raises:
        UnsupportedModelError: the checkpoint's weights do not match the architecture.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        layers: range,
        is_first: bool,
        is_last: bool,
        device: torch.device,
        dtype: torch.dtype,
        attention: AttentionBackend,
        linear: str,
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
        self._ends_bytes = 0
        self.hold(layers, is_first=is_first, is_last=is_last)

    @property
    def layers(self) -> tuple[int, ...]:
        """Global indices of the layers held, in order."""
        return tuple(sorted(self._layers))

    @property
    def weights_bytes(self) -> int:
        """Memory that all weights held take."""
        return self._ends_bytes + sum(layer.num_bytes for layer in self._layers.values())

    def hold(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Hold exactly these layers and ends: drop what is too much first, then load what is missing."""
        for layer in set(self._layers) - set(layers):
            self.drop_layer(layer)
        if (is_first, is_last) != (self._embedding is not None, self._head is not None):
            self._load_ends(is_first=is_first, is_last=is_last)
        for layer in layers:
            if layer not in self._layers:
                self.load_layer(layer)
        return_freed_memory()

    @one_thread()
    def load_layer(self, layer: int) -> None:
        """Read one layer's weights; it takes part from the next forward on."""
        tensors = self._checkpoint.read_layer(layer, device=self._device, dtype=self._dtype)
        self._layers = {**self._layers, layer: self._maker.make(layer, tensors)}

    def drop_layer(self, layer: int) -> None:
        """Give one layer's memory back. Raises KeyError if it is not held."""
        rest = dict(self._layers)
        del rest[layer]
        self._layers = rest

    @torch.inference_mode()
    def forward(
        self, inputs: torch.Tensor, *, positions: torch.Tensor, plan: Any, kv: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Run all layers held.

        Args:
            inputs: token ids int64 [num_tokens] on the first stage, hidden states [num_tokens, hidden_size] elsewhere.
            positions: int64 [num_tokens], place of each token in its sequence.
            plan: of the attention backend, for the same tokens.
            kv: segment of each layer held.

        Returns:
            Hidden states [num_tokens, hidden_size], before the final norm.
        """
        hidden = inputs if self._embedding is None else embedding(inputs, self._embedding)
        rotary = self._maker.rotary(hidden, positions)
        context = StepContext(rotary=rotary, attention=self._attention, plan=plan)
        layers = self._layers
        for index in sorted(layers):
            hidden = layers[index].forward(hidden, context, kv[index])
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab_size] of hidden states [n, hidden_size]; on the last stage only."""
        assert self._norm is not None
        assert self._head is not None, "only the last stage has logits"
        return self._head(rms_norm(hidden, self._norm, self._spec.norm_eps)).float()

    @one_thread()
    def _load_ends(self, *, is_first: bool, is_last: bool) -> None:
        self._embedding = self._norm = self._head = None
        head_name = EMBEDDING_NAME if self._spec.tied_embeddings else HEAD_NAME
        names = ({EMBEDDING_NAME} if is_first else set()) | ({head_name, NORM_NAME} if is_last else set())
        tensors = self._checkpoint.read(names, device=self._device, dtype=self._dtype)
        self._ends_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if is_first:
            self._embedding = tensors[EMBEDDING_NAME]
        if is_last:
            self._norm = tensors[NORM_NAME]
            self._head = pack_linear(tensors[head_name], kind=self._linear)
            if is_first and self._spec.tied_embeddings and self._linear != "plain":
                # Packed, the head is a copy; with plain weights one matrix serves both ends of a single stage.
                self._ends_bytes += tensors[head_name].nbytes
