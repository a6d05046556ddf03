"""The file that keeps some named tensors in shared memory, ready to be copied into a stage's own.

Read and written with calls and never mapped: a reader is charged for its own copy alone, a full file system or a
shortened file is an error and no signal, and a file that is removed stays readable for whoever has it open.

Layout: a preamble (``_PREAMBLE``), a header in JSON, the tensors' bytes one after the other. The preamble is written
last and holds a checksum of each of the other two parts.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import prod

import msgspec
import numpy as np
import torch

from flexpipe_serve.kernels.huge_pages import empty_in_huge_pages

_MAGIC = b"flexpw01"
_PREAMBLE = struct.Struct("<8sIIQ")
"""Magic, bytes of the header, its CRC-32, sum of the data's 64-bit words."""
_ALIGNMENT = 256
_PIECE_BYTES = 2 << 20
_SUMMED_BYTES = 256 << 10
"""Small enough to be in the core's cache still when it is summed."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
}

Array = np.ndarray[tuple[int], np.dtype[np.uint8]]


class DamagedFileError(ValueError):
    """The file does not hold what its header says, or has none."""


class _Entry(msgspec.Struct, frozen=True):
    """One tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In the file, of its first byte."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


class _Header(msgspec.Struct, frozen=True):
    """What the file holds."""

    size: int
    """Of the whole file."""
    entries: tuple[_Entry, ...]


_decoder = msgspec.json.Decoder(_Header)


class WeightsFileWriter:
    """Writes tensors into a file.

    Args:
        tensors: by name, float32, bfloat16 or float16, on any device.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        entries: list[_Entry] = []
        offset = 0
        for name, tensor in tensors.items():
            entries.append(_Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        # The header's own length moves the offsets in it: room for their digits to grow.
        room = len(msgspec.json.encode(_Header(offset, tuple(entries)))) + 20 * (len(entries) + 1)
        start = -(-(_PREAMBLE.size + room) // _ALIGNMENT) * _ALIGNMENT
        moved = tuple(msgspec.structs.replace(entry, offset=entry.offset + start) for entry in entries)
        self._header = _Header(start + offset, moved)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._header.size

    def write(self, fd: int, *, between: Callable[[], None]) -> None:
        """Write the file.

        Args:
            fd: open for writing, of ``num_bytes`` bytes.
            between: called after every few MB; may wait, or raise to give up.

        Raises:
            OSError: the memory cannot be had.
        """
        data_sum = 0
        for entry in self._header.entries:
            for start, piece in _pieces_of(self._tensors[entry.name]):
                _write(fd, piece, entry.offset + start)
                data_sum += _sum(piece)
                between()
        header = msgspec.json.encode(self._header)
        _write(fd, np.frombuffer(header, np.uint8), _PREAMBLE.size)
        preamble = _PREAMBLE.pack(_MAGIC, len(header), zlib.crc32(header), data_sum % 2**64)
        _write(fd, np.frombuffer(preamble, np.uint8), 0)


def read_weights(
    fd: int, *, device: torch.device, huge_pages: bool, between: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """The tensors of the file that is open as ``fd``, copied to ``device``; they share one piece of memory.

    Args:
        huge_pages: have them in large pages on a CPU.
        between: called after every few MB; may wait, or raise to give up.

    Raises:
        DamagedFileError: it is not a whole file of this kind.
    """
    header, data_sum = _read_header(fd)
    first = min((entry.offset for entry in header.entries), default=header.size)
    size = header.size - first
    # All in one piece of memory, so that large pages cover it.
    if device.type == "cpu":
        memory = empty_in_huge_pages((size,), torch.uint8) if huge_pages else torch.empty(size, dtype=torch.uint8)
        buffer = None
    else:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)  # the device can read it by itself
    for start in range(0, size, _PIECE_BYTES):
        target = memory[start : start + _PIECE_BYTES]
        piece = target if buffer is None else buffer[: len(target)]
        data_sum -= _read(fd, piece.numpy(), first + start)
        if buffer is not None:
            target.copy_(piece)
        between()
    if data_sum % 2**64:
        raise DamagedFileError("the sum of its words is wrong")
    tensors = {}
    for entry in header.entries:
        start = entry.offset - first
        tensors[entry.name] = memory[start : start + entry.num_bytes].view(_DTYPES[entry.dtype]).view(entry.shape)
    return tensors


def _read_header(fd: int) -> tuple[_Header, int]:
    preamble = os.pread(fd, _PREAMBLE.size, 0)
    if len(preamble) < _PREAMBLE.size:
        raise DamagedFileError("it has no preamble")
    magic, length, crc, data_sum = _PREAMBLE.unpack(preamble)
    encoded = os.pread(fd, length, _PREAMBLE.size) if magic == _MAGIC else b""
    if magic != _MAGIC or len(encoded) < length or zlib.crc32(encoded) != crc:
        raise DamagedFileError("it has no header")
    header = _decoder.decode(encoded)
    if os.fstat(fd).st_size != header.size:
        raise DamagedFileError(f"it has {os.fstat(fd).st_size} bytes of {header.size}")
    return header, data_sum


def _pieces_of(tensor: torch.Tensor) -> Iterator[tuple[int, Array]]:
    """Offset and bytes of each few MB of a tensor, in order."""
    flat = tensor.detach().contiguous().view(-1)
    step = _PIECE_BYTES // flat.itemsize
    for start in range(0, len(flat), step):
        yield start * flat.itemsize, flat[start : start + step].cpu().view(torch.uint8).numpy()


def _write(fd: int, piece: Array, offset: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(fd, piece[done:].data, offset + done)


def _read(fd: int, piece: Array, offset: int) -> int:
    """Fill ``piece`` and return the sum of its words."""
    total = 0
    for start in range(0, len(piece), _SUMMED_BYTES):
        part = piece[start : start + _SUMMED_BYTES]
        if os.preadv(fd, [part.data], offset + start) < len(part):
            raise DamagedFileError("it ends early")
        total += _sum(part)
    return total


def _sum(piece: Array) -> int:
    """Of the 64-bit words, the last one filled up with zeros: a fraction of the time that copying takes."""
    whole = len(piece) // 8 * 8
    return int(piece[:whole].view(np.uint64).sum(dtype=np.uint64)) + int.from_bytes(piece[whole:].tobytes(), "little")
