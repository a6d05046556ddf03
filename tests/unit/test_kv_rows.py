"""Moving rows of KV as bytes: every dtype, every address, both ways of doing it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from flexpipe_serve.kv.rows import DeviceRows, KVRows, kv_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
])]  # fmt: skip
BLOCK_SIZE = 4


LAYERS = (4, 0, 9)


def make_segments(dtype: torch.dtype, device: str = "cpu") -> dict[int, torch.Tensor]:
    """Three layers of 7 blocks: any bits, NaNs among them."""
    shape = (7, 2, BLOCK_SIZE, 3, 5)
    generator = torch.Generator().manual_seed(dtype.itemsize)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return {
        layer: torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(shape)
        .to(device)
        for layer in LAYERS
    }


def zeros(segments: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {layer: torch.zeros_like(kv) for layer, kv in segments.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("halves", "rows"), [(False, [6, 0, 3]), (True, [55, 3, 0, 7, 40, 22])])
@pytest.mark.parametrize("make", [kv_rows, DeviceRows])
def test_rows_arrive_bit_for_bit(
    make: Callable[[dict[int, torch.Tensor]], KVRows], dtype: torch.dtype, halves: bool, rows: list[int], device: str
) -> None:
    source = make_segments(dtype, device)
    target = zeros(source)
    data = make(source).gather((9, 4), np.array(rows), halves=halves)
    odd = memoryview(b"!" + bytes(data))[1:]
    make(target).scatter((9, 4), np.array(rows), odd, halves=halves)
    num_rows = 7 * 2 * BLOCK_SIZE if halves else 7
    assert len(data) == 2 * len(rows) * source[0].nbytes // num_rows
    for layer in (9, 4):
        expected = torch.zeros_like(source[layer]).view(num_rows, -1)
        expected[rows] = source[layer].view(num_rows, -1)[rows]
        assert torch.equal(bits(target[layer]), bits(expected.view(source[layer].shape)))
    assert not bits(target[0]).any()


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_send_the_same_bytes(dtype: torch.dtype, halves: bool) -> None:
    segments, rows = make_segments(dtype), np.array([5, 1, 6])
    assert bytes(DeviceRows(segments).gather(LAYERS, rows, halves=halves)) == bytes(
        kv_rows(segments).gather(LAYERS, rows, halves=halves)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [kv_rows, DeviceRows])
def test_zeroed_blocks_are_zero_and_others_are_not_touched(
    make: Callable[[dict[int, torch.Tensor]], KVRows], device: str
) -> None:
    segments = make_segments(torch.bfloat16, device)
    before = {layer: kv.clone() for layer, kv in segments.items()}
    make(segments).zero_blocks((0, 9), np.array([2, 5]))
    for layer in (0, 9):
        before[layer][[2, 5]] = 0
    for layer in LAYERS:
        assert torch.equal(bits(segments[layer]), bits(before[layer]))


def test_sizes() -> None:
    rows = kv_rows(make_segments(torch.float16))
    assert (rows.num_blocks, rows.block_size, rows.half_bytes) == (7, BLOCK_SIZE, 3 * 5 * 2)
    assert rows.block_bytes == 2 * BLOCK_SIZE * rows.half_bytes


def test_gathered_bytes_are_a_copy() -> None:
    rows = kv_rows(make_segments(torch.float32))
    data = rows.gather(LAYERS, np.array([1]), halves=False)
    before = bytes(data)
    rows.zero_blocks(LAYERS, np.array([1]))
    assert bytes(data) == before
