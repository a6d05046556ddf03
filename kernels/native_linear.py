"""Linear maps in float32 on the CPU, through the kernels in ``csrc``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from flexpipe_serve.kernels.huge_pages import empty_in_huge_pages
from flexpipe_serve.kernels.native import native_threads

_PIECE_BYTES = 2 << 20


class Linear(ctypes.Structure):
    """``flexpipe::Linear``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
    )


def pack(library: ctypes.CDLL, weight: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
    """The weight [num_outputs, num_inputs] in panels of as many outputs as three vector registers hold,
    [panels, num_inputs, outputs of a panel]; missing outputs are zero.

    Args:
        between: called after every few MB that were packed; may wait, or raise to give up.
    """
    num_outputs, num_inputs = weight.shape
    panel = library.flexpipe_panel()
    packed = empty_in_huge_pages(_packed_shape(library, num_outputs, num_inputs), weight.dtype)
    num_whole = num_outputs // panel
    whole, rest = weight.tensor_split([num_whole * panel])
    panels = whole.view(num_whole, panel, num_inputs).transpose(1, 2)
    piece = max(1, _PIECE_BYTES // packed[:1].nbytes)
    for start in range(0, num_whole, piece):
        stop = min(start + piece, num_whole)
        packed[start:stop].copy_(panels[start:stop])
        between()
    if len(rest):
        packed[num_whole].zero_()
        packed[num_whole, :, : len(rest)] = rest.t()
    return packed


class NativeLinear:
    """A linear map over packed weights.

    The bits of a row depend neither on the other rows nor on the number of threads.

    Args:
        packed: of :func:`pack`.
        num_outputs: rows of the weight before it was packed.
    """

    def __init__(
        self, library: ctypes.CDLL, packed: torch.Tensor, bias: torch.Tensor | None, *, num_outputs: int
    ) -> None:
        num_inputs = packed.shape[1]
        assert packed.shape == _packed_shape(library, num_outputs, num_inputs), (packed.shape, num_outputs)
        self.library = library
        self.packed = packed
        self.bias = None if bias is None else bias.contiguous()
        self._num_outputs = num_outputs
        bias_pointer = None if self.bias is None else self.bias.data_ptr()
        self.struct = Linear(packed.data_ptr(), bias_pointer, num_outputs, num_inputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x, None)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        residual = residual.contiguous()
        return self._compute(x, residual.data_ptr())

    def _compute(self, x: torch.Tensor, residual: int | None) -> torch.Tensor:
        x = x.contiguous()
        num_rows = x.shape[0]
        out = torch.empty(num_rows, self._num_outputs)
        self.library.flexpipe_linear(
            ctypes.byref(self.struct), x.data_ptr(), num_rows, residual, out.data_ptr(), native_threads()
        )
        return out


def _packed_shape(library: ctypes.CDLL, num_outputs: int, num_inputs: int) -> tuple[int, int, int]:
    panel: int = library.flexpipe_panel()
    return (-(-num_outputs // panel), num_inputs, panel)
