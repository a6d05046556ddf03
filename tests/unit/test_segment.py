"""Segments in real shared memory and on a device."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flexpipe_serve.kv.domain import SHM_ROOT, free_bytes
from flexpipe_serve.kv.segment import BlockShape, DeviceSegment, KVMemoryError, Segment, SharedSegment

PAGE = os.sysconf("SC_PAGESIZE")
SHAPE = BlockShape(block_size=16, num_kv_heads=3, head_dim=64, dtype=torch.float32)
ODD_SHAPE = BlockShape(block_size=3, num_kv_heads=1, head_dim=5, dtype=torch.bfloat16)
"""Its blocks (60 bytes) end inside pages."""


@pytest.fixture
def shm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private folder in real shared memory."""
    folder = SHM_ROOT / f"flexpipe-test-{os.getpid()}-{threading.get_ident()}"
    folder.mkdir()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.fixture(params=["shared", "device"])
def make_segment(request: pytest.FixtureRequest, shm: Path) -> Callable[..., Segment]:
    def make(shape: BlockShape = SHAPE, max_blocks: int = 64) -> Segment:
        if request.param == "shared":
            return SharedSegment(shm / "layer-0.kv", shape=shape, max_blocks=max_blocks)
        return DeviceSegment(shape=shape, max_blocks=max_blocks, device=torch.device("cpu"))

    return make


def fill(segment: Segment) -> None:
    """Make each committed block hold its id plus one."""
    for block in range(segment.num_blocks):
        segment.tensor[block] = block + 1


def assert_filled(segment: Segment, num_blocks: int) -> None:
    for block in range(num_blocks):
        assert (segment.tensor[block] == block + 1).all()


@pytest.mark.parametrize("shape", [SHAPE, ODD_SHAPE], ids=["float32", "bfloat16-odd"])
def test_contents_survive_resizes_and_new_blocks_are_zero(
    make_segment: Callable[..., Segment], shape: BlockShape
) -> None:
    segment = make_segment(shape)
    assert segment.num_blocks == 0
    segment.resize(10)
    assert segment.tensor.shape == (10, *shape.dims)
    assert segment.tensor.dtype == shape.dtype
    assert not segment.tensor.any()
    fill(segment)
    segment.resize(25)
    assert_filled(segment, 10)
    assert not segment.tensor[10:].any()
    fill(segment)
    segment.resize(7)
    assert len(segment.tensor) == 7
    segment.resize(64)
    assert_filled(segment, 7)
    assert not segment.tensor[7:].any()
    assert segment.committed_bytes == 64 * shape.num_bytes
    segment.close()


@pytest.mark.parametrize("num_blocks", [-1, 65])
def test_resize_out_of_range(make_segment: Callable[..., Segment], num_blocks: int) -> None:
    segment = make_segment()
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}; this segment holds 0 to 64"):
        segment.resize(num_blocks)
    assert segment.num_blocks == 0


def test_shared_memory_is_taken_and_given_back(shm: Path) -> None:
    shape = BlockShape(block_size=16, num_kv_heads=8, head_dim=128, dtype=torch.float32)
    segment = SharedSegment(shm / "layer-0.kv", shape=shape, max_blocks=256)
    for num_blocks in (128, 200, 3, 0, 40):
        segment.resize(num_blocks)
        assert segment.allocated_bytes == num_blocks * shape.num_bytes
        fill(segment)
        assert segment.allocated_bytes == num_blocks * shape.num_bytes


def test_large_reserve_is_free(shm: Path) -> None:
    max_blocks = 4 * 2**30 // SHAPE.num_bytes
    segment = SharedSegment(shm / "layer-0.kv", shape=SHAPE, max_blocks=max_blocks)
    assert segment.path.stat().st_size > 3.9 * 2**30
    assert segment.allocated_bytes == 0
    segment.resize(1)
    assert segment.allocated_bytes <= SHAPE.num_bytes + PAGE


def test_views_keep_the_memory_after_the_last_close(shm: Path) -> None:
    segment = SharedSegment(shm / "layer-0.kv", shape=SHAPE, max_blocks=4)
    segment.resize(2)
    fill(segment)
    view = segment.tensor
    segment.close()
    segment.close()
    assert not segment.path.exists()
    assert (view[1] == 2).all()


def test_a_file_of_another_shape_is_refused_and_stays(shm: Path) -> None:
    path = shm / "layer-0.kv"
    segment = SharedSegment(path, shape=SHAPE, max_blocks=4)
    with pytest.raises(ValueError, match="belongs to another model"):
        SharedSegment(path, shape=SHAPE, max_blocks=5)
    assert path.exists()
    segment.close()
    SharedSegment(path, shape=SHAPE, max_blocks=5).close()
    assert not path.exists()


def test_the_last_to_close_removes_the_file(shm: Path) -> None:
    path = shm / "layer-0.kv"
    first = SharedSegment(path, shape=SHAPE, max_blocks=4)
    first.resize(4)
    fill(first)
    second = SharedSegment(path, shape=SHAPE, max_blocks=4)
    second.resize(4)
    first.close()
    assert path.exists()
    assert_filled(second, 4)
    third = SharedSegment(path, shape=SHAPE, max_blocks=4)
    second.close()
    third.resize(4)
    assert_filled(third, 4)
    third.close()
    assert list(shm.iterdir()) == []


def test_a_shrunk_segment_releases_what_only_another_view_had_committed(shm: Path) -> None:
    path = shm / "layer-0.kv"
    old = SharedSegment(path, shape=SHAPE, max_blocks=16)
    old.resize(16)
    new = SharedSegment(path, shape=SHAPE, max_blocks=16)
    new.resize(4)
    old.close()
    assert new.allocated_bytes <= 4 * SHAPE.num_bytes + PAGE


def test_grown_blocks_cost_no_page_faults(shm: Path) -> None:
    segment = SharedSegment(shm / "layer-0.kv", shape=SHAPE, max_blocks=4096)
    segment.resize(4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    segment.tensor.fill_(1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < segment.committed_bytes / PAGE / 100


def test_segments_opened_and_closed_by_many_at_once_are_never_a_dead_file(shm: Path) -> None:
    path = shm / "layer-0.kv"
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(200):
                segment = SharedSegment(path, shape=SHAPE, max_blocks=2)
                try:
                    assert os.path.samestat(path.stat(), os.fstat(segment._fd)), "mapped, but nobody else will find it"
                finally:
                    segment.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(shm.iterdir()) == []


def test_second_view_may_resize_too(shm: Path) -> None:
    path = shm / "layer-0.kv"
    first = SharedSegment(path, shape=SHAPE, max_blocks=16)
    first.resize(8)
    fill(first)
    second = SharedSegment(path, shape=SHAPE, max_blocks=16)
    second.resize(8)
    assert_filled(second, 8)
    second.tensor[3] = 99
    assert (first.tensor[3] == 99).all()
    second.resize(4)
    first.resize(4)
    assert first.allocated_bytes <= 4 * SHAPE.num_bytes + PAGE


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of shared memory."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_full_shared_memory_is_an_error_with_numbers(tiny_tmpfs: Path) -> None:
    segment = SharedSegment(tiny_tmpfs / "layer-0.kv", shape=SHAPE, max_blocks=1000)
    segment.resize(20)
    fill(segment)
    before = segment.allocated_bytes
    with pytest.raises(KVMemoryError, match=r"from 20 to 100 blocks: that takes 1\.9 MiB .* 0\.5 MiB are free"):
        segment.resize(100)
    assert segment.num_blocks == 20
    assert segment.allocated_bytes == before, "the failed call must give back what it got"
    assert_filled(segment, 20)
    segment.resize(30)
    assert free_bytes(tiny_tmpfs) == 2**20 - 30 * SHAPE.num_bytes


def test_what_cannot_fit_is_refused_before_the_first_piece(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = SharedSegment(shm / "layer-0.kv", shape=SHAPE, max_blocks=10**9)
    pieces: list[int] = []
    with pytest.raises(KVMemoryError, match="Lower the KV memory budget"):
        segment.resize(10**9, between=lambda: pieces.append(1))
    assert pieces == []
    assert segment.allocated_bytes == 0


def test_no_space_without_a_full_file_system(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = SharedSegment(shm / "layer-0.kv", shape=SHAPE, max_blocks=8)

    def refuse(fd: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(KVMemoryError, match="Lower the KV memory budget"):
        segment.resize(8)
    assert segment.num_blocks == 0


def test_device_segment_without_room_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = DeviceSegment(shape=SHAPE, max_blocks=64, device=torch.device("cpu"))
    segment.resize(4)
    fill(segment)

    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(KVMemoryError, match="cannot go from 4 to 40 blocks"):
        segment.resize(40)
    assert_filled(segment, 4)
