"""The part of a model that one stage holds and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch

from flexpipe_serve.errors import UnsupportedModelError
from flexpipe_serve.kernels.attention import AttentionBackend
from flexpipe_serve.kernels.elementwise import rms_norm
from flexpipe_serve.kernels.linear import (
    Embedding,
    Linear,
    embedding_kind,
    make_embedding,
    make_linear,
    nothing,
    pack_weight,
)
from flexpipe_serve.kernels.native_attention import NativeAttention, NativePlan
from flexpipe_serve.kernels.native_layer import LayerRun, NativeLayer, run_layers
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.model.freed_memory import return_freed_memory
from flexpipe_serve.model.fused_layer import FusedLayer
from flexpipe_serve.model.layer import DecoderLayer, StepContext
from flexpipe_serve.model.layer_maker import make_layer_maker
from flexpipe_serve.model.one_thread import one_thread
from flexpipe_serve.model.source import EMBEDDING_NAME, HEAD_NAME, NORM_NAME, ModelSpec
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.placement.host_cache import HostCache

_READY_FORM = 2
"""Counts changes of what is packed how: weights in another form are no use in a cache."""
_EMBEDDING, _HEAD = "embedding", "head"
Weights = Mapping[str, torch.Tensor]


class StageModel:
    """Some layers of a model, with the embedding on a first stage and final norm and LM head on a last one.

    Layers and ends come and go while steps run: :meth:`load` and :meth:`keep` belong to one thread, :meth:`forward` and
    :meth:`logits` to another, which asks only for what is held then, and :meth:`fill_cache` to a third. Empty at first.

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
        self._embedding: Embedding | None = None
        self._norm: torch.Tensor | None = None
        self._head: Linear | None = None
        self._cache: HostCache | None = None
        self._has_read = False
        """Whether the checkpoint was read since :meth:`load` began, which leaves much freed memory."""

    @property
    def is_native(self) -> bool:
        """Whether the kernels in C++ do all the work that is worth several threads."""
        return self._spec.fused and self._linear == "native" and isinstance(self._attention, NativeAttention)

    @property
    def layers(self) -> tuple[int, ...]:
        """Global indices of the layers held, in order."""
        return tuple(sorted(self._layers))

    @property
    def sizes(self) -> WeightSizes:
        """Memory of what is held."""
        layers = {
            index: sum(tensor.nbytes for tensor in layer.weights().values()) for index, layer in self._layers.items()
        }
        embedding, head = self._embedding, self._head
        shared = embedding is not None and head is not None and embedding.packed is head.packed
        return WeightSizes(
            layers=layers,
            embedding=0 if embedding is None else embedding.packed.nbytes,
            head=0 if head is None or self._norm is None else head.packed.nbytes + self._norm.nbytes,
            shared_ends=head.packed.nbytes if head is not None and shared else 0,
        )

    @property
    def weights_key(self) -> str:
        """Names the checkpoint and the form in which this holds its weights."""
        form = (self._checkpoint.fingerprint, self._dtype, self._linear, self._spec.fused, _READY_FORM)
        return hashlib.sha256(repr(form).encode()).hexdigest()[:16]

    def use_cache(self, cache: HostCache) -> None:
        """Take from ``cache`` what it has; the rest comes from the checkpoint."""
        self._cache = cache

    @one_thread()
    def load(
        self,
        layers: Iterable[int],
        *,
        embedding: bool = False,
        head: bool = False,
        between: Callable[[], None] = nothing,
    ) -> None:
        """Have these layers and ends, of the same bits wherever they come from; what is there already stays as it is.

        Args:
            between: called after every few milliseconds of work; may wait, or raise to give up.

        Raises:
            UnsupportedModelError: the checkpoint's weights do not match the architecture.
            ConfigError: a file is missing or damaged.
        """
        self._has_read = False
        if embedding and self._embedding is None:
            self._load_embedding(between)
        if head and self._head is None:
            self._load_head(between)
        for layer in layers:
            if layer not in self._layers:
                weights = self._from_cache(_part_of(layer), between) or self._prepare_layer(layer, between)
                self._layers = {**self._layers, layer: self._maker.make(layer, weights)}
                del weights
                between()
        if self._has_read:
            return_freed_memory()

    def fill_cache(self, *, between: Callable[[], None]) -> None:
        """Write what is held into the cache, as far as it has room. Goes on where it was when ``between`` raised.

        Args:
            between: called after every few MB; may wait, or raise to give up.
        """
        cache = self._cache
        if cache is None:
            return
        for index in self.layers:
            layer = self._layers.get(index)  # may have been given up meanwhile
            if layer is not None and _part_of(index) not in cache:
                cache.write(_part_of(index), layer.weights(), between=between)
            del layer
        embedding, norm, head = self._embedding, self._norm, self._head
        matrix = embedding or (head if self._shares_matrix else None)
        if matrix is not None and _EMBEDDING not in cache:
            cache.write(_EMBEDDING, {"weight": matrix.packed}, between=between)
        if norm is not None and head is not None and _HEAD not in cache:
            weights = {"norm": norm} if self._shares_matrix else {"norm": norm, "weight": head.packed}
            cache.write(_HEAD, weights, between=between)

    def keep(self, layers: Container[int], *, embedding: bool = False, head: bool = False) -> None:
        """Give the memory of everything else back."""
        gives_up = any(index not in layers for index in self._layers)
        self._layers = {index: layer for index, layer in self._layers.items() if index in layers}
        if not embedding and self._embedding is not None:
            gives_up, self._embedding = True, None
        if not head and self._head is not None:
            gives_up, self._norm, self._head = True, None, None
        if gives_up:
            return_freed_memory()

    @torch.inference_mode()
    def rotary(self, positions: torch.Tensor) -> Any:
        """What a step's tokens are rotated by: ``positions`` int64 [num_tokens], place of each in its sequence."""
        return self._maker.rotary(torch.empty(0, dtype=self._dtype, device=self._device), positions)

    @torch.inference_mode()
    def forward(
        self,
        inputs: torch.Tensor,
        *,
        layers: range,
        is_first: bool,
        rotary: Any,
        plan: Any,
        kv: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Run some of the layers held.

        Args:
            inputs: token ids int64 [num_tokens] where ``is_first``, else hidden states [num_tokens, hidden_size].
            layers: global indices.
            is_first: begin with the embedding.
            rotary: of :meth:`rotary` for the same tokens.
            plan: of the attention backend, for the same tokens.
            kv: segment of each layer.

        Returns:
            Hidden states [num_tokens, hidden_size], before the final norm.
        """
        hidden = self.embed(inputs) if is_first else inputs
        if isinstance(plan, NativePlan) and (natives := self._natives(layers)):
            return run_layers(natives, hidden, rotary, kvs=[kv[index] for index in layers], plan=plan)
        context = StepContext(rotary=rotary, attention=self._attention, plan=plan)
        for index in layers:
            # Looked up one by one: holding them all would leave it to this thread to free what is dropped meanwhile.
            hidden = self._layers[index].forward(hidden, context, kv[index])
        return hidden

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, hidden_size] of token ids int64 [n]; where the embedding is loaded."""
        assert self._embedding is not None, "the embedding is not loaded"
        return self._embedding.rows(ids)

    def layer_run(self, layers: range, kv: Mapping[int, torch.Tensor]) -> LayerRun | None:
        """Some of the layers held as the kernels in C++ compute them, with their segments; None where they do not."""
        natives = self._natives(layers) if self.is_native else []
        return LayerRun(natives, [kv[index] for index in layers]) if natives else None

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
    def _shares_matrix(self) -> bool:
        """Whether one matrix can serve both ends: tied, and laid out alike."""
        return self._spec.tied_embeddings and self._linear == embedding_kind(self._linear)

    def _load_embedding(self, between: Callable[[], None]) -> None:
        packed = self._head.packed if self._shares_matrix and self._head else self._load_matrix(between)
        self._embedding = make_embedding(packed, kind=self._linear, num_rows=self._spec.vocab_size)

    def _load_head(self, between: Callable[[], None]) -> None:
        weights = self._from_cache(_HEAD, between) or self._prepare_head(between)
        if not self._shares_matrix:
            packed = weights["weight"]
        elif self._embedding is not None:
            packed = self._embedding.packed
        else:
            packed = self._load_matrix(between)
        self._norm = weights["norm"]
        self._head = make_linear(packed, kind=self._linear, num_outputs=self._spec.vocab_size)

    def _prepare_layer(self, layer: int, between: Callable[[], None]) -> Weights:
        self._has_read = True
        tensors = self._checkpoint.read_layer(layer, device=self._device, dtype=self._dtype, between=between)
        return self._maker.prepare(layer, tensors, between=between)

    def _prepare_head(self, between: Callable[[], None]) -> Weights:
        norm = self._read(NORM_NAME, between)
        if self._shares_matrix:
            return {"norm": norm}
        weight = self._read(EMBEDDING_NAME if self._spec.tied_embeddings else HEAD_NAME, between)
        if weight.shape != (self._spec.vocab_size, self._spec.hidden_size):
            raise UnsupportedModelError(
                f"{HEAD_NAME} has shape {tuple(weight.shape)}, but the configuration says "
                f"{(self._spec.vocab_size, self._spec.hidden_size)}."
            )
        return {"norm": norm, "weight": pack_weight(weight, kind=self._linear, between=between)}

    def _load_matrix(self, between: Callable[[], None]) -> torch.Tensor:
        """The embedding's matrix, packed."""
        # Of an embedding alone a step reads some rows: large pages are for maps.
        weights = self._from_cache(_EMBEDDING, between, huge_pages=self._shares_matrix)
        if weights is not None:
            return weights["weight"]
        return pack_weight(self._read(EMBEDDING_NAME, between), kind=embedding_kind(self._linear), between=between)

    def _from_cache(self, part: str, between: Callable[[], None], *, huge_pages: bool = True) -> Weights | None:
        if self._cache is None:
            return None
        return self._cache.read(part, device=self._device, huge_pages=huge_pages, between=between)

    def _read(self, name: str, between: Callable[[], None]) -> torch.Tensor:
        self._has_read = True
        return self._checkpoint.read([name], device=self._device, dtype=self._dtype, between=between)[name]


def _part_of(layer: int) -> str:
    return f"layer-{layer}"
