"""A growing int32 array: token ids and block tables without a copy of the whole at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MIN_CAPACITY = 16


class Int32Vector:
    """Append in amortised constant time, read slices as NumPy views.

    A view shares memory with the vector: copy what must outlive the next change.
    """

    __slots__ = ("_data", "_size")

    def __init__(self, values: Sequence[int] = ()) -> None:
        self._size = len(values)
        self._data = np.empty(max(_MIN_CAPACITY, self._size), np.int32)
        self._data[: self._size] = values

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return int(self._data[self._checked(index)])

    def __setitem__(self, index: int, value: int) -> None:
        self._data[self._checked(index)] = value

    def append(self, value: int) -> None:
        if self._size == len(self._data):
            self._grow(self._size + 1)
        self._data[self._size] = value
        self._size += 1

    def extend(self, values: Sequence[int]) -> None:
        size = self._size + len(values)
        if size > len(self._data):
            self._grow(size)
        self._data[self._size : size] = values
        self._size = size

    def clear(self) -> None:
        self._size = 0

    def view(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int32]:
        """Elements ``start`` to ``stop`` (default: all of them), sharing memory."""
        stop = self._size if stop is None else stop
        assert 0 <= start <= stop <= self._size
        return self._data[start:stop]

    def _checked(self, index: int) -> int:
        if not -self._size <= index < self._size:
            raise IndexError(f"index {index} of {self._size} elements")
        return index % self._size

    def _grow(self, size: int) -> None:
        data = np.empty(max(size, 2 * len(self._data)), np.int32)
        data[: self._size] = self._data[: self._size]
        self._data = data
