"""Weights of a model kept in a node's memory, merged and packed, so that a stage gets a layer by copying it.

The cache lies in the application's folder in shared memory: it outlives stages and Routers, and goes with the last of
them. A file holds one part of the model (a layer, or what belongs to one end). It appears under its name when it is
whole, never changes, and whoever has it open may read on when it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import torch

from flexpipe_serve.kv.domain import free_bytes
from flexpipe_serve.kv.file_lock import close_shared, is_current, open_shared, remove_unused
from flexpipe_serve.placement.host_cache_use import HostCacheUse
from flexpipe_serve.placement.weights_file import DamagedFileError, WeightsFileWriter, read_weights

logger = logging.getLogger(__name__)
FREE_SHARE = 0.25
"""Of the memory that would be free without the cache. Budgets for KV and weights take 60 % where none is given."""
_SUFFIX = ".weights"
_UNFINISHED = ".new"
_LOCK_NAME = "host-cache.lock"
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)
_YOUNG_NS = 60 * 10**9
"""What was used so lately stays: a model larger than the cache would push itself out, part by part."""


class HostCache:
    """The cache of one application on one node, for parts of one model in one form.

    Any number of processes and threads may read and write it at once.

    Args:
        folder: of the application in shared memory.
        key: names the model and the form of its weights; files of other keys are removed.
        max_bytes: limit beside the share of the node's free memory; None: no other.
        available_bytes: tells how much memory the node has left.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str,
        max_bytes: int | None = None,
        available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
    ) -> None:
        self._folder = folder
        self._key = key
        self._max_bytes = max_bytes
        self._available_bytes = available_bytes
        self._num_hits = 0
        self._num_misses = 0
        with self._lock():
            for path in self._files():
                if f".{key}{_SUFFIX}" not in path.name and not path.name.endswith(_UNFINISHED):
                    path.unlink(missing_ok=True)

    def read(
        self, part: str, *, device: torch.device, huge_pages: bool = True, between: Callable[[], None]
    ) -> dict[str, torch.Tensor] | None:
        """The weights of ``part`` on ``device``, as they were written; None where the cache has none.

        Args:
            huge_pages: have them in large pages on a CPU. Worth it for what is read as a whole in each step.
            between: called after every few MB; may wait, or raise to give up.
        """
        path = self._path(part)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._num_misses += 1
            return None
        try:
            _touch(fd)
            weights = read_weights(fd, device=device, huge_pages=huge_pages, between=between)
        except DamagedFileError as error:
            logger.warning("%s is damaged and is made anew: %s", path, error)
            if is_current(fd, path):
                path.unlink(missing_ok=True)
            self._num_misses += 1
            return None
        finally:
            os.close(fd)
        self._num_hits += 1
        return weights

    def __contains__(self, part: str) -> bool:
        return self._path(part).exists()

    def write(self, part: str, weights: Mapping[str, torch.Tensor], *, between: Callable[[], None]) -> bool:
        """Keep ``part``; parts not used for longest make room.

        Args:
            weights: by name, float32, bfloat16, float16, or uint8 where they are packed.
            between: called after every few MB; may wait, or raise to give up.

        Returns:
            Whether it is there now; else there is no room for it, or somebody else is writing it.
        """
        writer = WeightsFileWriter(weights)
        unfinished = self._path(part).with_suffix(_SUFFIX + _UNFINISHED)
        with self._lock():
            if part in self:
                return True
            if unfinished.exists() and not remove_unused(unfinished):
                return False
            if not self._make_room(writer.num_bytes):
                return False
            fd = open_shared(unfinished)
            os.ftruncate(fd, writer.num_bytes)  # takes no memory yet, but is counted from now on
        try:
            writer.write(fd, between=between)
            _touch(fd)
            with self._lock():
                unfinished.rename(self._path(part))
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            logger.info("no room in shared memory to keep %s: %s", part, error)
            return False
        finally:
            close_shared(fd, unfinished)
        return True

    def use(self) -> HostCacheUse:
        """What the cache holds now."""
        sizes = _sizes(self._files())
        return HostCacheUse(
            used_bytes=sum(size for size, _ in sizes.values()),
            limit_bytes=self._limit_bytes(sum(size for size, _ in sizes.values())),
            num_parts=sum(path.suffix == _SUFFIX for path in sizes),
            num_hits=self._num_hits,
            num_misses=self._num_misses,
        )

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what is in the way of ``num_bytes`` more, if that helps. Under the lock."""
        for path in self._files():
            if path.name.endswith(_UNFINISHED):
                remove_unused(path)  # of a process that died
        sizes = _sizes(self._files())
        used = sum(size for size, _ in sizes.values())
        excess = used + num_bytes - self._limit_bytes(used)
        newest = time.time_ns() - _YOUNG_NS
        removable = sorted((used_ns, path) for path, (_, used_ns) in sizes.items() if used_ns < newest)
        chosen = []
        for _, path in removable:
            if excess <= 0:
                break
            if path.suffix == _SUFFIX:
                chosen.append(path)
                excess -= sizes[path][0]
        if excess > 0:
            return False
        for path in chosen:
            path.unlink(missing_ok=True)
        return True

    def _limit_bytes(self, used: int) -> int:
        share = int(FREE_SHARE * (min(self._available_bytes(), free_bytes(self._folder)) + used))
        return share if self._max_bytes is None else min(share, self._max_bytes)

    def _files(self) -> list[Path]:
        return [*self._folder.glob(f"*{_SUFFIX}"), *self._folder.glob(f"*{_SUFFIX}{_UNFINISHED}")]

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.{self._key}{_SUFFIX}"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One at a time counts, makes room and takes it: a moment. Weights are read and written without."""
        fd = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _touch(fd: int) -> None:
    """Say that the file was used now. Not left to the file system, whose clock is coarse."""
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def _sizes(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """Bytes, and when each was used last, of those that are still there."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found
