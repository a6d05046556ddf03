"""One layer's KV memory: a reserved range of blocks of which the first ``num_blocks`` are committed.

A block id means the same place on every stage, so a layer that moves keeps its block tables. Growing and shrinking
change only how much of the range is committed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexpipe_serve.kv.domain import free_bytes
from flexpipe_serve.kv.file_lock import close_shared, open_shared

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_PIECE_BYTES = 1 << 20  # whole pages, and below half a millisecond
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class KVMemoryError(MemoryError):
    """The device or the shared memory cannot hold the blocks asked for; nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What one block of one layer looks like in memory."""

    block_size: int
    """Tokens in a block."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """[2, block_size, num_kv_heads, head_dim]; K first."""
        return (2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def num_elements(self) -> int:
        return 2 * self.block_size * self.num_kv_heads * self.head_dim

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class Segment(Protocol):
    """One layer's KV memory."""

    shape: BlockShape
    max_blocks: int

    @property
    def num_blocks(self) -> int:
        """Committed blocks: the valid block ids are 0 .. num_blocks-1."""
        ...

    @property
    def tensor(self) -> torch.Tensor:
        """The committed blocks, [num_blocks, 2, block_size, num_kv_heads, head_dim].

        Take it anew after :meth:`resize`; an older tensor may show released memory.
        """
        ...

    @property
    def committed_bytes(self) -> int: ...

    def resize(self, num_blocks: int, *, between: Callable[[], None]) -> None:
        """Commit or release memory so that exactly the first ``num_blocks`` blocks are usable.

        Blocks below both the old and the new number keep their contents; new ones are zero, or what another
        process keeps there.

        Args:
            between: called after every few MB; may wait, or raise to give up, and then the same call is to follow.

        Raises:
            ValueError: ``num_blocks`` is negative or above ``max_blocks``.
            KVMemoryError: there is too little memory; the segment is as before.
        """
        ...

    def close(self) -> None:
        """Give up this process's view. The memory goes when the last view and its last tensor do."""
        ...


class SharedSegment:
    """A segment in a sparse file in shared memory, mapped by every stage of the domain that needs it.

    The file reserves the whole range (which costs nothing); blocks are committed with ``posix_fallocate``, so that a
    full file system is an error here and not a SIGBUS at the first touch, and released with a punched hole. Only the
    file system's limit is an error: a container's memory limit counts these blocks too, and beyond it the kernel kills.

    Whoever maps a file that another process maps finds its KV. The last one to close it removes it; a killed process
    leaves it behind. All who map it resize it to the same number of blocks: each remembers its own ``num_blocks``,
    committing blocks twice is harmless, and what lies above is released.
    """

    def __init__(self, path: Path, *, shape: BlockShape, max_blocks: int) -> None:
        """Map the file ``path``, made if need be, with no block committed by this process. To take over a layer's KV,
        :meth:`resize` to the number of blocks that others have committed: contents stay.

        Raises:
            ValueError: the existing file was made for another shape or another ``max_blocks``.
        """
        self.path = path
        self.shape = shape
        self.max_blocks = max_blocks
        self._num_blocks = 0
        reserved = max_blocks * shape.num_bytes
        self._fd = open_shared(path)
        try:
            if os.fstat(self._fd).st_size == 0:
                os.ftruncate(self._fd, reserved)  # by two at once: to the same size
            if (size := os.fstat(self._fd).st_size) != reserved:
                raise ValueError(
                    f"{path} reserves {size} bytes, but {max_blocks} blocks of {shape.num_bytes} bytes are {reserved}: "
                    "it belongs to another model or configuration."
                )
            # frombuffer keeps the mapping alive as long as any tensor shows it; it is never closed by hand.
            memory = mmap.mmap(self._fd, reserved)
            self._reserved = torch.frombuffer(memory, dtype=shape.dtype).view(max_blocks, *shape.dims)
        except BaseException:
            close_shared(self._fd, path)
            raise
        self._tensor = self._reserved[:0]

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    @property
    def committed_bytes(self) -> int:
        return self._num_blocks * self.shape.num_bytes

    @property
    def allocated_bytes(self) -> int:
        """Memory the file really takes, whoever committed it (whole pages)."""
        return os.fstat(self._fd).st_blocks * 512

    def resize(self, num_blocks: int, *, between: Callable[[], None] = lambda: None) -> None:
        _check_num_blocks(num_blocks, self.max_blocks)
        if num_blocks > self._num_blocks:
            self._commit(num_blocks, between)
        self._tensor = self._reserved[:num_blocks]
        self._punch(num_blocks)
        self._num_blocks = num_blocks

    def _commit(self, num_blocks: int, between: Callable[[], None]) -> None:
        stop = num_blocks * self.shape.num_bytes
        if stop - self.allocated_bytes > free_bytes(self._fd):  # else it would be found out after long work
            raise self._full(num_blocks)
        first = self.committed_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        # Pages that another process has filled are mapped for writing too by a read, many at once.
        advice = _MADV_POPULATE_READ if self.allocated_bytes >= stop else _MADV_POPULATE_WRITE
        for start in range(first, stop, _PIECE_BYTES):
            length = min(_PIECE_BYTES, stop - start)
            try:
                os.posix_fallocate(self._fd, start, length)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                    raise
                self._punch(self._num_blocks)
                raise self._full(num_blocks) from error
            # Map the pages now: else each takes a fault in the middle of a step. Advice only: before Linux 5.14 the
            # call is not known, and the faults come later.
            _libc.madvise(self._reserved.data_ptr() + start, length, advice)
            between()

    def _full(self, num_blocks: int) -> KVMemoryError:
        return KVMemoryError(
            f"{self.path} cannot grow from {self._num_blocks} to {num_blocks} blocks: that takes "
            f"{_mib(num_blocks * self.shape.num_bytes - self.committed_bytes)} of shared memory, and "
            f"{_mib(free_bytes(self._fd))} are free in {self.path.parent}. Lower the KV memory budget or enlarge the "
            "file system (Docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm)."
        )

    def _punch(self, num_blocks: int) -> None:
        # To the end of the range, and also when growing: another process may have committed more.
        start = num_blocks * self.shape.num_bytes
        length = self.max_blocks * self.shape.num_bytes - start
        if length and _libc.fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot release KV blocks: {os.strerror(code)}", str(self.path))

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            close_shared(fd, self.path)
            self._num_blocks = 0
            del self._reserved, self._tensor


class DeviceSegment:
    """A segment in ordinary memory of one device.

    A resize allocates the new tensor and copies the blocks that stay, so it needs room for both at that moment, and
    ``max_blocks`` reserves nothing.
    """

    def __init__(self, *, shape: BlockShape, max_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.max_blocks = max_blocks
        self._tensor = torch.zeros((0, *shape.dims), dtype=shape.dtype, device=device)

    @property
    def num_blocks(self) -> int:
        return len(self._tensor)

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    @property
    def committed_bytes(self) -> int:
        return self._tensor.numel() * self.shape.dtype.itemsize

    def resize(self, num_blocks: int, *, between: Callable[[], None] = lambda: None) -> None:
        _check_num_blocks(num_blocks, self.max_blocks)
        if num_blocks == self.num_blocks:
            return
        try:
            resized = torch.zeros((num_blocks, *self.shape.dims), dtype=self.shape.dtype, device=self._tensor.device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise KVMemoryError(
                f"a segment on {self._tensor.device} cannot go from {self.num_blocks} to {num_blocks} blocks: no room "
                f"for {_mib(num_blocks * self.shape.num_bytes)} beside the {_mib(self.committed_bytes)} it has. "
                "Lower the KV memory budget."
            ) from error
        num_kept = min(num_blocks, self.num_blocks)
        resized[:num_kept].copy_(self._tensor[:num_kept])
        self._tensor = resized

    def close(self) -> None:
        self._tensor = self._tensor.new_empty((0, *self.shape.dims))


def _check_num_blocks(num_blocks: int, max_blocks: int) -> None:
    if not 0 <= num_blocks <= max_blocks:
        raise ValueError(f"num_blocks is {num_blocks}; this segment holds 0 to {max_blocks}.")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
