"""The linear maps of a layer, with their weights laid out for the machine.

Three layouts of torch's own and one of the kernels in ``csrc``. Which is fastest differs by machine, so it is measured
(``flexpipe_serve.kernels.linear_choice``). All stages of a pipeline use the same one: then a layer computes the same
bits on whichever stage it runs. ``native`` and ``onednn`` have one more virtue: the bits of a row do not depend on the
number of threads, nor on which other rows are computed with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.functional import embedding, linear

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels.native import native_library
from flexpipe_serve.kernels.native_linear import NativeLinear, pack


class Linear(Protocol):
    """``y = x W^T + b`` for x of [num_tokens, in_features]."""

    bias: torch.Tensor | None

    @property
    def packed(self) -> torch.Tensor:
        """The weight as :func:`pack_weight` lays it out for this kind; on a CPU perhaps a copy."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``residual + y``; ``residual`` is not changed."""
        ...


class Embedding(Protocol):
    """A matrix of which rows are taken."""

    @property
    def packed(self) -> torch.Tensor:
        """The matrix as :func:`pack_weight` lays it out for the embedding's kind."""
        ...

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` int64 [n] of the matrix: [n, in_features]."""
        ...


class PlainLinear:
    """The weight as it is in the checkpoint, [out_features, in_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = weight
        self.bias = bias
        self._transposed = weight.t()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.addmm(residual, x, self._transposed)
        return out if self.bias is None else out.add_(self.bias)


class TransposedLinear:
    """The weight as [in_features, out_features]."""

    def __init__(self, transposed: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = transposed
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.mm(x, self.packed)
        return torch.addmm(self.bias, x, self.packed)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.addmm(residual, x, self.packed)
        return out if self.bias is None else out.add_(self.bias)


class OneDnnLinear:
    """The weight in the blocked layout of oneDNN (CPU only)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self.bias = bias
        self._pad_single_row = False
        self._pad_single_row = not self._row_alone_has_same_bits()

    @property
    def packed(self) -> torch.Tensor:
        # As it was given: the blocked layout is oneDNN's secret and cannot be copied byte by byte.
        weight: torch.Tensor = self._weight.to_dense()
        return weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._pad_single_row and x.shape[0] == 1:
            return self(x.expand(2, -1))[:1]
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # Not oneDNN's own fused addition: calling that takes longer than it saves.
        return self(x).add_(residual)

    def _row_alone_has_same_bits(self) -> bool:
        """Whether oneDNN computes a single row as it computes the same row among others.

        Where in_features is large (above 1,024 in oneDNN 3) it takes another kernel for one row, which sums in
        another order. Tried on the weight itself: another one of its shape would take memory and time.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, self._weight.shape[1], dtype=self._weight.dtype, generator=generator)
        return torch.equal(self(x[:1]), self(x)[:1])


_KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Linear]] = {
    "plain": PlainLinear,
    "transposed": TransposedLinear,
    "onednn": OneDnnLinear,
}


def nothing() -> None:
    """Nothing to do in between."""


def available_kinds(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Kinds of linear that work on the device, the one to prefer between equals first."""
    if device.type != "cpu":
        return ("plain",)
    if dtype != torch.float32:
        return ("plain", "transposed")
    native = ("native",) if native_library() is not None else ()
    onednn = ("onednn",) if torch.backends.mkldnn.is_available() else ()  # type: ignore[no-untyped-call]
    return (*native, *onednn, "transposed", "plain")


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, kind: str, between: Callable[[], None] = nothing
) -> Linear:
    """A linear map of the given kind from a checkpoint's weight: :func:`pack_weight` and :func:`make_linear`."""
    return make_linear(pack_weight(weight, kind=kind, between=between), bias, kind=kind, num_outputs=weight.shape[0])


def pack_weight(weight: torch.Tensor, *, kind: str, between: Callable[[], None] = nothing) -> torch.Tensor:
    """The weight laid out for a kind of linear map: what can be stored and copied.

    Args:
        weight: [out_features, in_features], on its device; owned by the result from now on.
        kind: one of ``available_kinds`` of the weight's device.
        between: called after every few MB of packing, where that takes long; may wait, or raise to give up.

    Raises:
        ConfigError: the kind does not work there.
    """
    kinds = available_kinds(weight.device, weight.dtype)
    if kind not in kinds:
        raise ConfigError(
            f"linear kind {kind!r} does not work on {weight.device} in {weight.dtype}; use one of {', '.join(kinds)}."
        )
    if kind == "native":
        return pack(_native(), weight, between)
    return weight.t().contiguous() if kind == "transposed" else weight


def make_linear(packed: torch.Tensor, bias: torch.Tensor | None = None, *, kind: str, num_outputs: int) -> Linear:
    """A linear map over a weight of :func:`pack_weight`.

    Args:
        bias: [out_features].
        num_outputs: out_features.
    """
    if kind == "native":
        return NativeLinear(_native(), packed, bias, num_outputs=num_outputs)
    return _KINDS[kind](packed, bias)


def embedding_kind(kind: str) -> str:
    """The kind in which an embedding lies beside linear maps of ``kind``: one that knows its rows."""
    return kind if kind in ("native", "plain") else "plain"


def make_embedding(packed: torch.Tensor, *, kind: str, num_rows: int) -> Embedding:
    """An embedding over a matrix of :func:`pack_weight`, packed for ``embedding_kind(kind)``."""
    if kind == "native":
        return NativeLinear(_native(), packed, None, num_outputs=num_rows)
    return PlainLinear(packed, None)


def _native() -> ctypes.CDLL:
    library = native_library()
    assert library is not None, "only chosen where it can be had"
    return library
