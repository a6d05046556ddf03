"""The native attention backend: against the reference, and bit for bit against itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import TOLERANCE, Case, cases, run
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.kernels.native import native_library
from flexpipe_serve.kernels.native_attention import NativeAttention

LIBRARY = native_library()
if LIBRARY is None:
    pytest.skip("the CPU kernels cannot be compiled here (see the warning)", allow_module_level=True)
BACKEND = NativeAttention(LIBRARY)


@given(case=cases)
@settings(max_examples=80, deadline=None)
def test_agrees_with_reference(case: Case) -> None:
    for difference in run(BACKEND, case).differences:
        assert difference.abs().max() < TOLERANCE


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 299), max_size=4),
    num_threads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([12, 64, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_bits_depend_on_the_sequence_alone(
    lengths: list[int], cuts: list[int], num_threads: int, head_dim: int, seed: int
) -> None:
    """Whatever it is batched with, however it is cut into chunks, on any number of threads."""
    whole = Case(
        chunks=[[length] for length in lengths],
        block_size=16,
        num_kv_heads=2,
        num_groups=3,
        seed=seed,
        head_dim=head_dim,
    )
    cut = replace(whole, chunks=[cut_at(length, cuts) for length in lengths])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(BACKEND, whole)
        torch.set_num_threads(num_threads)
        outputs = run(BACKEND, cut).outputs
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected.outputs, strict=True))
    assert max(difference.abs().max() for difference in expected.differences) < TOLERANCE


def cut_at(length: int, cuts: list[int]) -> list[int]:
    """Lengths of the chunks of a sequence cut at some positions; its last three tokens are decodes."""
    places = sorted({0, length, *(cut for cut in (*cuts, length - 1, length - 2, length - 3) if 0 < cut < length)})
    return [stop - start for start, stop in itertools.pairwise(places)]


def test_sequence_of_nan_spoils_no_other() -> None:
    case = Case(chunks=[[3, 1, 1], [5, 1, 2], [1, 1, 1]], block_size=4, num_kv_heads=2, num_groups=2, seed=1)
    differences = run(BACKEND, case, poison=1).differences
    assert differences[1].isnan().all()
    assert max(differences[0].abs().max(), differences[2].abs().max()) < TOLERANCE


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 300.0])
def test_scores_of_any_size(size: float) -> None:
    """Among scores of thousands only the largest counts; the exponential must neither overflow nor lose the sum."""
    from flexpipe_serve.kernels.torch_attention import TorchAttention

    case = Case(chunks=[[200], [50, 1]], block_size=16, num_kv_heads=1, num_groups=2, seed=3, head_dim=64)
    outputs = run(BACKEND, case, query_size=size).outputs
    expected = run(TorchAttention(dtype=torch.float32), case, query_size=size).outputs
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, size), rtol=0)
