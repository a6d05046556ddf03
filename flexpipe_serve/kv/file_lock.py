"""Files that live as long as somebody uses them: every user holds a shared lock, which the kernel drops when a process
dies, however it dies. So a file on which an exclusive lock succeeds has no living user."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def open_shared(path: Path) -> int:
    """Open ``path`` under a shared lock, made if need be. Belongs to this user alone: KV is prompts."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if is_current(fd, path):
            return fd
        os.close(fd)  # its last user removed it between the two calls


def close_shared(fd: int, path: Path) -> None:
    """Close what :func:`open_shared` gave; the last user removes the file."""
    try:
        # Converting a lock drops the old one first: of several that close at once, one finds itself alone.
        if try_lock_exclusive(fd) and is_current(fd, path):
            path.unlink()
    finally:
        os.close(fd)


def remove_unused(path: Path) -> bool:
    """Remove ``path`` if its users are all dead. Returns whether it did."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not (try_lock_exclusive(fd) and is_current(fd, path)):
            return False
        path.unlink()
        return True
    finally:
        os.close(fd)


def try_lock_exclusive(fd: int) -> bool:
    """Whether nobody else holds a lock on the open file; if so, this one is exclusive now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_current(fd: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: it may have been removed before its lock was got."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
