"""One copy, message by message: what is sent, what is refused."""

from __future__ import annotations

import mmap
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from kv_transfer_sim import copy_header, decode_patch, step_batch

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv.transfer import KVGiver, KVTaker
from flexpipe_serve.pipeline.messages import PatchAckHeader, PatchHeader, decode_header

LAYERS = (3, 4, 7)
BLOCK_SIZE = 4


def make_kv(dtype: torch.dtype = torch.float32, *, num_blocks: int = 8) -> dict[int, torch.Tensor]:
    return {layer: torch.rand(num_blocks, 2, BLOCK_SIZE, 2, 8).to(dtype) for layer in LAYERS}


def make_giver(kv: dict[int, torch.Tensor], blocks: list[int], *, last_step: int = 4, rate: float = 1e9) -> KVGiver:
    header = copy_header(LAYERS, max_bytes_per_s=rate)
    return KVGiver(header, np.array(blocks, np.int32), source="old", last_step=last_step, kv=kv.__getitem__)


def make_taker(kv: dict[int, torch.Tensor]) -> KVTaker:
    return KVTaker(epoch=2, source="old", target="new", layers=LAYERS, kv=kv.__getitem__)


def acknowledge(taker: KVTaker) -> PatchAckHeader:
    header = decode_header(taker.ack()[0])
    assert isinstance(header, PatchAckHeader)
    return header


def shared_kv(dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """As a segment in shared memory is: zeros in a mapping."""
    shape = torch.Size((8, 2, BLOCK_SIZE, 2, 8))
    return {
        layer: torch.frombuffer(mmap.mmap(-1, shape.numel() * dtype.itemsize), dtype=dtype).view(shape)
        for layer in LAYERS
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_between_shared_segments(dtype: torch.dtype) -> None:
    source, target = shared_kv(dtype), shared_kv(dtype)
    for kv in source.values():
        kv.copy_(torch.rand(kv.shape))
    giver, taker = make_giver(source, [5, 2]), make_taker(target)
    chunk = giver.next_chunk(0.0)
    assert chunk is not None
    header, buffers = decode_patch(chunk)
    assert (header.number, header.through_step, header.is_snapshot, header.snapshot_complete) == (1, 4, True, True)
    assert giver.is_complete
    assert giver.ready_at(9.0) is None
    assert giver.next_chunk(9.0) is None
    assert taker.apply(header, buffers)
    for kv in source.values():
        kv[6, :, 0] = 0.5
        kv[6, :, 1:] = 0
    patch = giver.on_step(5, step_batch(5, num_computed=[8], num_new=[1], tables=[[5, 2, 6]]))
    assert taker.apply(*decode_patch(patch))
    for layer in LAYERS:
        assert torch.equal(target[layer][[2, 5, 6]], source[layer][[2, 5, 6]])
        assert not target[layer][[0, 1, 3, 4, 7]].any()
    assert taker.reached(5)
    block_bytes = 2 * BLOCK_SIZE * 2 * 8 * dtype.itemsize
    assert taker.snapshot_bytes == 2 * len(LAYERS) * block_bytes
    assert taker.patch_bytes == len(LAYERS) * block_bytes // BLOCK_SIZE


def test_new_tokens_in_pending_blocks_wait_for_the_snapshot() -> None:
    giver = make_giver(make_kv(), [1, 2])
    header, buffers = decode_patch(giver.on_step(5, step_batch(5, num_computed=[3, 0], num_new=[2, 1],
                                                               tables=[[1, 6], [2, 0]])))  # fmt: skip
    assert np.frombuffer(buffers[0], np.int32).tolist() == [6 * BLOCK_SIZE]
    assert (header.through_step, header.snapshot_complete, header.is_snapshot) == (5, False, False)
    chunk = giver.next_chunk(0.0)
    assert chunk is not None
    assert decode_patch(chunk)[0].through_step == 5
    _, buffers = decode_patch(giver.on_step(6, step_batch(6, num_computed=[1], num_new=[1], tables=[[2]])))
    assert np.frombuffer(buffers[0], np.int32).tolist() == [2 * BLOCK_SIZE + 1]


def test_every_step_makes_a_patch() -> None:
    giver, taker = make_giver(make_kv(), [1]), make_taker(make_kv())
    empty = step_batch(6, num_computed=[], num_new=[], tables=[])
    pending = step_batch(7, num_computed=[0], num_new=[1], tables=[[1]])
    for step, batch in ((5, None), (6, empty), (7, pending)):
        header, buffers = decode_patch(giver.on_step(step, batch))
        assert (header.number, header.through_step) == (step - 4, step)
        assert [len(buffer) for buffer in buffers] == [0, 0]
        assert taker.apply(header, buffers)
        assert not taker.reached(0)
    assert taker.through_step == 7


def test_without_blocks_the_first_message_completes_the_snapshot() -> None:
    giver, taker = make_giver(make_kv(), []), make_taker(make_kv())
    assert giver.ready_at(1.0) == 1.0
    frames = giver.next_chunk(1.0)
    assert frames is not None
    assert taker.apply(*decode_patch(frames))
    assert taker.reached(4)
    assert giver.next_chunk(2.0) is None

    giver, taker = make_giver(make_kv(), []), make_taker(make_kv())
    assert taker.apply(*decode_patch(giver.on_step(5, None)))
    assert taker.reached(5)
    assert giver.next_chunk(2.0) is None


def test_chunks_wait_for_the_limit_and_for_acknowledgements() -> None:
    kv = {layer: torch.zeros(6, 2, 16, 8, 128) for layer in LAYERS}  # 384 KiB for three layers of a block
    giver = make_giver(kv, list(range(6)), rate=1e6)
    first = giver.next_chunk(10.0)
    assert first is not None
    ready_at = giver.ready_at(10.0)
    assert ready_at == 10.0 + sum(len(frame) for frame in first) / 1e6
    assert giver.next_chunk(ready_at - 1e-6) is None
    assert giver.next_chunk(ready_at) is not None
    assert giver.ready_at(99.0) is None
    assert giver.next_chunk(99.0) is None
    giver.on_ack(PatchAckHeader(epoch=2, target="new", number=1))
    assert giver.ready_at(99.0) == 99.0


def test_a_step_that_is_missing_breaks_the_copy() -> None:
    """What it wrote would be missing at the target."""
    giver = make_giver(make_kv(), [], last_step=4)
    giver.on_step(5, None)
    with pytest.raises(AssertionError, match="one is missing"):
        giver.on_step(7, None)


def test_repeated_messages_are_acknowledged_again_and_not_applied() -> None:
    source, target = make_kv(), make_kv()
    giver, taker = make_giver(source, []), make_taker(target)
    first = giver.on_step(5, step_batch(5, num_computed=[0], num_new=[1], tables=[[3]]))
    for kv in source.values():
        kv[3, :, 0] = 9.0
    second = giver.on_step(6, step_batch(6, num_computed=[0], num_new=[1], tables=[[3]]))
    assert taker.apply(*decode_patch(first))
    assert taker.apply(*decode_patch(second))
    assert not taker.apply(*decode_patch(first))
    assert acknowledge(taker) == PatchAckHeader(epoch=2, target="new", number=2)
    assert (target[3][3, :, 0] == 9.0).all()
    assert taker.through_step == 6


def test_a_lost_message_breaks_the_copy() -> None:
    giver, taker = make_giver(make_kv(), []), make_taker(make_kv())
    giver.on_step(5, None)
    late = decode_patch(giver.on_step(6, None))
    for _ in range(2):
        with pytest.raises(CopyError, match=r"stage 'old' for epoch 2: message 2 came after message 0"):
            taker.apply(*late)
    assert not taker.reached(0)
    assert acknowledge(taker).number == 0


GOOD = PatchHeader(
    epoch=2, source="old", number=1, through_step=5, layers=(3, 7), is_snapshot=False, snapshot_complete=True
)
KV_BYTES = 2 * 2 * 2 * 2 * 8 * 4  # two layers, two places, K and V, two heads of 8 floats
PLACES = np.array([4, 9], np.int32).tobytes()


@pytest.mark.parametrize(
    ("changes", "buffers", "message"),
    [
        ({}, [PLACES], "buffers of"),
        ({}, [PLACES, bytes(KV_BYTES), b""], "buffers of"),
        ({}, [PLACES[:7], bytes(KV_BYTES)], "buffers of"),
        ({}, [PLACES, bytes(KV_BYTES - 4)], "bytes of KV for 2 places in 2 layers"),
        ({"layers": (3,)}, [PLACES, bytes(KV_BYTES)], "bytes of KV for 2 places in 1 layers"),
        ({"is_snapshot": True}, [np.array([4, 7], np.int32).tobytes(), bytes(KV_BYTES)], "bytes of KV"),
        ({"is_snapshot": True}, [PLACES, bytes(4 * KV_BYTES)], "not within 0 to 7"),
        ({}, [np.array([4, 32], np.int32).tobytes(), bytes(KV_BYTES)], "not within 0 to 31"),
        ({}, [np.array([-1, 4], np.int32).tobytes(), bytes(KV_BYTES)], "not within 0 to 31"),
        ({"layers": (3, 5)}, [PLACES, bytes(KV_BYTES)], r"has layers \(3, 5\), but \[3, 4, 7\] are to come"),
        ({"layers": ()}, [b"", b""], r"has layers \(\)"),
        ({"through_step": -1}, [PLACES, bytes(KV_BYTES)], "through step -1, after step 0"),
    ],
)
def test_malformed_messages_break_the_copy_and_write_nothing(
    changes: dict[str, Any], buffers: list[bytes], message: str
) -> None:
    target = make_kv()
    before = {layer: kv.clone() for layer, kv in target.items()}
    taker = make_taker(target)
    with pytest.raises(CopyError, match=message):
        taker.apply(msgspec.structs.replace(GOOD, **changes), buffers)
    assert all(torch.equal(target[layer], before[layer]) for layer in LAYERS)
    assert not taker.reached(0)
    assert taker.apply(GOOD, [PLACES, bytes(KV_BYTES)])  # and the good one is well-formed


def test_blocks_outside_the_segments_are_refused() -> None:
    with pytest.raises(CopyError, match="blocks 1 to 8, but its segments have 8 blocks"):
        make_giver(make_kv(), [1, 8])


def test_no_block_moves_during_a_copy() -> None:
    giver = make_giver(make_kv(), [])
    with pytest.raises(AssertionError, match="never during one"):
        giver.on_step(5, step_batch(5, num_computed=[], num_new=[], tables=[], copies=((6, 1),)))
