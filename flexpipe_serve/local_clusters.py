"""Which clusters ``flexpipe serve`` runs on this machine: each notes its address in its folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import psutil

FOLDER_PREFIX = f"flexpipe-{os.getuid()}-"
_FILE = "address"


def note_address(folder: str, address: str) -> None:
    """Let scripts of this user find the cluster that this process runs."""
    (Path(folder) / _FILE).write_text(f"{address} {os.getpid()}")


def running_addresses() -> list[str]:
    """Addresses of this user's clusters that run."""
    addresses = []
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{_FILE}"):
        with contextlib.suppress(OSError):  # it ended just now
            if path.stat().st_uid == os.getuid():  # the folder is open to all, as Ray wants it
                address, pid = path.read_text().split()
                if psutil.pid_exists(int(pid)):
                    addresses.append(address)
    return sorted(addresses)
