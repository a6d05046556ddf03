"""The shared-memory folder of one application on one node, and its clean-up after crashes.

Every process that uses the folder holds a shared lock on its ``lock`` file; the kernel drops the lock when the
process dies, however it dies. So a folder on which an exclusive lock succeeds has no living user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from pathlib import Path
from types import TracebackType

from flexpipe_serve.kv.file_lock import is_current, remove_unused, try_lock_exclusive

SHM_ROOT = Path("/dev/shm")
_LOCK_NAME = "lock"
_SEGMENT_SUFFIX = ".kv"


class DomainFolder:
    """A folder of segments that all processes of one application on one node share.

    The last user to close it removes it with everything inside. A user that is killed leaves it to the others, or,
    if it was the last, to :func:`sweep_stale`; until then the KV in it can be mapped again.
    """

    def __init__(self, key: str, *, root: Path = SHM_ROOT) -> None:
        """Make the folder of ``key``, or join it.

        Args:
            key: names one application of one Ray cluster, and nothing else on this machine.
            root: where shared memory is mounted.

        Raises:
            PermissionError: somebody else owns a folder of that name.
        """
        self.path = root / (_prefix() + hashlib.sha256(key.encode()).hexdigest()[:16])
        self._lock_fd = self._join()

    def segment_path(self, layer: int, *, stage: str | None = None) -> Path:
        """Where the KV of ``layer`` (its global index) lies: for all stages, or for one that shares it with nobody."""
        return self.path / (
            f"layer-{layer}{_SEGMENT_SUFFIX}" if stage is None else f"{stage}.layer-{layer}{_SEGMENT_SUFFIX}"
        )

    def sweep_segments(self) -> list[Path]:
        """Remove segments that only dead processes mapped: a killed one leaves its KV behind. Returns them."""
        return [path for path in sorted(self.path.glob(f"*{_SEGMENT_SUFFIX}")) if remove_unused(path)]

    def close(self) -> None:
        """Stop using the folder; remove it if nobody else does. Closing twice is harmless."""
        if self._lock_fd < 0:
            return
        fd, self._lock_fd = self._lock_fd, -1
        try:
            # Converting a lock drops the old one first: of several that close at once, one finds itself alone.
            if try_lock_exclusive(fd):
                _remove(self.path)
        finally:
            os.close(fd)

    def __enter__(self) -> DomainFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _join(self) -> int:
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            try:
                fd = _open_lock(self.path)
            except FileNotFoundError:
                continue  # removed between the two calls
            fcntl.flock(fd, fcntl.LOCK_SH)
            if is_current(fd, self.path / _LOCK_NAME):
                return fd
            os.close(fd)  # the last user removed the folder while we waited


def sweep_stale(*, root: Path = SHM_ROOT) -> list[Path]:
    """Remove this user's folders whose users are all dead. Returns the removed ones."""
    removed = []
    for path in sorted(root.glob(_prefix() + "*")):
        try:
            fd = _open_lock(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # just removed, or not one of ours
        try:
            if try_lock_exclusive(fd) and is_current(fd, path / _LOCK_NAME):
                _remove(path)
                removed.append(path)
        finally:
            os.close(fd)
    return removed


def free_bytes(path: Path | int = SHM_ROOT) -> int:
    """Bytes that this user can still allocate in the file system of ``path`` (or of an open file)."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _prefix() -> str:
    return f"flexpipe-{os.getuid()}-"


def _open_lock(folder: Path) -> int:
    """The folder's lock file, made if need be. KV is prompts: only a folder of our own will do."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder.")
    if status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {status.st_uid}, not to {os.getuid()}.")
    return os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _remove(folder: Path) -> None:
    """Remove the folder under its exclusive lock, which goes last: who joins meanwhile waits for it and starts anew."""
    for entry in os.scandir(folder):
        if entry.name != _LOCK_NAME:
            os.unlink(entry.path)
    os.unlink(folder / _LOCK_NAME)
    with contextlib.suppress(OSError):  # somebody already made a new lock in it: it lives on
        folder.rmdir()
