"""Linear maps in float32 on the CPU, through the kernels in ``csrc``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum

import torch

from flexpipe_serve.kernels.huge_pages import empty_in_huge_pages
from flexpipe_serve.kernels.native import native_threads

_PIECE_BYTES = 2 << 20
_BLOCK = 32  # flexpipe::kBlock


class Form(IntEnum):
    """``flexpipe::Form``: how a packed weight is held; each gives back every float's very bits.

    A checkpoint served in float32 rarely has that many bits to tell: mostly it was trained in bfloat16, or its weights
    were once quantised to few bits. Then the weight takes a half to a sixth of the memory, and so of the time in which
    a step reads it.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class Linear(ctypes.Structure):
    """``flexpipe::Linear``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("form", ctypes.c_int64),
    )


def pack(library: ctypes.CDLL, weight: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
    """The weight [num_outputs, num_inputs] in panels of as many outputs as three vector registers hold, in the smallest
    form that gives its bits back: float32 [panels, num_inputs, outputs of a panel], missing outputs zero, or uint8
    [panels, num_inputs / 32, bytes of a block].

    Args:
        between: called after every few MB that were packed; may wait, or raise to give up.
    """
    if weight.shape[1] % _BLOCK == 0:
        weight = weight.contiguous()
        for form in (Form.INT4, Form.INT8, Form.BFLOAT16):
            encoded = _encode(library, weight, form, between)
            if encoded is not None:
                return encoded
    return pack_floats(library, weight, between)


def _encode(library: ctypes.CDLL, weight: torch.Tensor, form: Form, between: Callable[[], None]) -> torch.Tensor | None:
    """The weight in ``form``; None where that does not give its bits back."""
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // library.flexpipe_panel())
    encoded = empty_in_huge_pages((num_panels, num_inputs // _BLOCK, library.flexpipe_block_bytes(form)), torch.uint8)
    piece = max(1, _PIECE_BYTES // (library.flexpipe_panel() * num_inputs * weight.itemsize))
    for start in range(0, num_panels, piece):
        stop = min(start + piece, num_panels)
        if not library.flexpipe_encode(
            form, weight.data_ptr(), num_outputs, num_inputs, start, stop, encoded[start:].data_ptr()
        ):
            return None
        between()
    return encoded


def pack_floats(library: ctypes.CDLL, weight: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
    """:func:`pack` for a weight that needs all its bits."""
    num_outputs, num_inputs = weight.shape
    panel = library.flexpipe_panel()
    packed = empty_in_huge_pages((-(-num_outputs // panel), num_inputs, panel), weight.dtype)
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

    Attributes:
        form: how it is held.
    """

    def __init__(
        self, library: ctypes.CDLL, packed: torch.Tensor, bias: torch.Tensor | None, *, num_outputs: int
    ) -> None:
        self.form = _form(library, packed)
        num_inputs = packed.shape[1] * (1 if self.form == Form.FLOAT32 else _BLOCK)
        assert packed.shape[0] == -(-num_outputs // library.flexpipe_panel()), (packed.shape, num_outputs)
        self.library = library
        self.packed = packed
        self.bias = None if bias is None else bias.contiguous()
        self._num_outputs = num_outputs
        bias_pointer = None if self.bias is None else self.bias.data_ptr()
        self.struct = Linear(packed.data_ptr(), bias_pointer, num_outputs, num_inputs, self.form)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` int64 [n] of the weight, as they were before they were packed: [n, num_inputs]."""
        ids = ids.contiguous()
        out = torch.empty(len(ids), self.struct.num_inputs)
        self.library.flexpipe_rows(ctypes.byref(self.struct), ids.data_ptr(), len(ids), out.data_ptr())
        return out

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


def _form(library: ctypes.CDLL, packed: torch.Tensor) -> Form:
    if packed.dtype == torch.float32:
        return Form.FLOAT32
    forms = (Form.BFLOAT16, Form.INT8, Form.INT4)
    return next(form for form in forms if library.flexpipe_block_bytes(form) == packed.shape[2])
