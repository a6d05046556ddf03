"""Weights that fit into few bits: held in them, and computed with to the same bits as in floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.kernels.linear import nothing
from flexpipe_serve.kernels.native import native_library, set_native_threads
from flexpipe_serve.kernels.native_linear import Form, NativeLinear, pack, pack_floats

LIBRARY = native_library()
if LIBRARY is None:
    pytest.skip("the kernels do not compile", allow_module_level=True)

BLOCK = 32
FORMS = (Form.BFLOAT16, Form.INT8, Form.INT4)


def weight_of(form: Form, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A weight that ``form`` can hold, and no smaller one."""
    random = np.random.default_rng(seed)
    num_outputs, num_inputs = shape
    blocks = (num_outputs, num_inputs // BLOCK, 1)
    scale = random.uniform(1e-3, 1e-1, blocks).astype(np.float16).astype(np.float32)
    if form is Form.INT4:
        codes = random.integers(0, 16, (*blocks[:2], BLOCK))
        codes[..., 0], codes[..., 1] = 0, 15  # as quantisers leave them: both ends of the range are reached
        low = random.uniform(-1, 0, blocks).astype(np.float16).astype(np.float32)
        values = codes.astype(np.float32) * scale + low
    elif form is Form.INT8:
        codes = random.integers(-127, 128, (*blocks[:2], BLOCK))
        codes[..., 0] = 127
        values = codes.astype(np.float32) * scale
    else:
        values = random.standard_normal((*blocks[:2], BLOCK)).astype(np.float32)
    weight = torch.from_numpy(values.reshape(shape))
    return weight.bfloat16().float() if form is Form.BFLOAT16 else weight


def maps(weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[NativeLinear, NativeLinear]:
    """In the smallest form, and in floats."""
    assert LIBRARY is not None
    packings = (pack(LIBRARY, weight, nothing), pack_floats(LIBRARY, weight, nothing))
    small, floats = (NativeLinear(LIBRARY, packed, bias, num_outputs=len(weight)) for packed in packings)
    return small, floats


@pytest.mark.parametrize("form", FORMS)
@given(
    num_rows=st.integers(1, 200),
    num_outputs=st.integers(1, 150),
    num_blocks=st.integers(1, 7),
    with_bias=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_results_have_the_bits_of_floats(
    form: Form, num_rows: int, num_outputs: int, num_blocks: int, with_bias: bool, num_threads: int, seed: int
) -> None:
    weight = weight_of(form, (num_outputs, num_blocks * BLOCK), seed)
    bias = torch.randn(num_outputs) if with_bias else None
    small, floats = maps(weight, bias)
    assert (small.form, floats.form) == (form, Form.FLOAT32)
    assert small.packed.nbytes < floats.packed.nbytes
    x, residual = torch.randn(num_rows, num_blocks * BLOCK), torch.randn(num_rows, num_outputs)
    set_native_threads(num_threads)
    try:
        assert torch.equal(small(x), floats(x))
        assert torch.equal(small.add_to(residual, x), floats.add_to(residual, x))
    finally:
        set_native_threads(0)


@pytest.mark.parametrize("form", [*FORMS, Form.FLOAT32])
@given(num_outputs=st.integers(1, 130), seed=st.integers(0, 99))
def test_rows_are_the_weights_own(form: Form, num_outputs: int, seed: int) -> None:
    shape = (num_outputs, 3 * BLOCK)
    weight = torch.randn(shape) if form is Form.FLOAT32 else weight_of(form, shape, seed)
    ids = torch.randint(num_outputs, (20,))
    for made in maps(weight):
        assert torch.equal(made.rows(ids), weight[ids])


@pytest.mark.parametrize("form", FORMS)
@given(at=st.tuples(st.integers(0, 99), st.integers(0, 95)), seed=st.integers(0, 99))
def test_one_float_that_does_not_fit_is_kept(form: Form, at: tuple[int, int], seed: int) -> None:
    weight = weight_of(form, (100, 96), seed)
    weight[at] = torch.nextafter(weight[at], torch.tensor(9.0))
    small, _ = maps(weight)
    assert small.form is not form
    assert torch.equal(small.rows(torch.arange(100)).view(torch.int32), weight.view(torch.int32)), "every bit"


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1e-42, 3e38, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_strange_floats_are_kept(form: Form, value: float) -> None:
    weight = weight_of(form, (50, 64), 0)
    weight[3, 40] = value
    constant = torch.full((50, 64), value)
    for given_weight in (weight, constant):
        small, _ = maps(given_weight)
        rows = small.rows(torch.arange(50))
        assert torch.equal(rows.view(torch.int32), given_weight.view(torch.int32))


def test_inputs_that_make_no_whole_blocks_stay_floats() -> None:
    weight = weight_of(Form.BFLOAT16, (50, 64), 0)[:, :40]
    small, _ = maps(weight)
    assert small.form is Form.FLOAT32


def test_packing_can_be_given_up() -> None:
    assert LIBRARY is not None

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pack(LIBRARY, weight_of(Form.INT4, (100, 64), 0), give_up)
