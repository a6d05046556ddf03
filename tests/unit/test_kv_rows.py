"""Moving rows of KV as bytes: every dtype, every address, both ways of doing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexpipe_serve.kv import rows as kv_rows
from flexpipe_serve.kv.rows import gather, row_bytes, scatter, zero_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
])]  # fmt: skip
BLOCK_SIZE = 4


def make_layers(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Three layers of 7 blocks: any bits, NaNs among them."""
    shape = (7, 2, BLOCK_SIZE, 3, 5)
    generator = torch.Generator().manual_seed(int(dtype.itemsize))
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return [
        torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape).to(device)
        for _ in range(3)
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows_per_block", "rows"), [(1, [6, 0, 3]), (2 * BLOCK_SIZE, [55, 3, 0, 7, 40, 22])])
def test_rows_arrive_bit_for_bit(dtype: torch.dtype, rows_per_block: int, rows: list[int], device: str) -> None:
    source = make_layers(dtype, device)
    target = [torch.zeros_like(kv) for kv in source]
    indices = np.array(rows)
    data = gather(source, indices, rows_per_block=rows_per_block)
    assert len(data) == 3 * len(rows) * row_bytes(source[0], rows_per_block=rows_per_block)
    odd = memoryview(b"!" + bytes(data))[1:]
    scatter(target, indices, odd, rows_per_block=rows_per_block)
    for kv, copied in zip(source, target, strict=True):
        expected = torch.zeros_like(kv).view(7 * rows_per_block, -1)
        expected[rows] = kv.view(7 * rows_per_block, -1)[rows]
        assert torch.equal(bits(copied), bits(expected.view(kv.shape)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_devices_way_gives_the_same_bytes(dtype: torch.dtype) -> None:
    layers, indices = make_layers(dtype), np.array([9, 1, 50])
    data = kv_rows._gather_on_device(layers, indices, 2 * BLOCK_SIZE)
    assert bytes(data) == bytes(gather(layers, indices, rows_per_block=2 * BLOCK_SIZE))
    targets = [torch.zeros_like(kv) for kv in layers], [torch.zeros_like(kv) for kv in layers]
    kv_rows._scatter_on_device(targets[0], indices, data, 2 * BLOCK_SIZE)
    scatter(targets[1], indices, data, rows_per_block=2 * BLOCK_SIZE)
    for one, other in zip(*targets, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("device", DEVICES)
def test_zeroed_blocks_are_zero_and_others_are_not_touched(device: str) -> None:
    layers = make_layers(torch.bfloat16, device)
    before = [kv.clone() for kv in layers]
    zero_blocks(layers, np.array([2, 5]))
    for kv, old in zip(layers, before, strict=True):
        old[[2, 5]] = 0
        assert torch.equal(bits(kv), bits(old))


def test_gathered_bytes_are_a_copy() -> None:
    layers = make_layers(torch.float32)
    data = gather(layers, np.array([1]), rows_per_block=1)
    before = bytes(data)
    zero_blocks(layers, np.array([1]))
    assert bytes(data) == before
