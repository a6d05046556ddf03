"""Memory of a local server's processes, cheap enough to be sampled while it is measured.

Counted are the anonymous pages of the stages and of their siblings (the Router and other workers of their Ray node),
and once the KV files in shared memory. PSS would be more exact about libraries, which no refactoring changes, but walks
every page table of the process that is being measured.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path

from flexpipe_serve.bench.windows import Window
from flexpipe_serve.engine.status import ServerStatus

_INTERVAL_S = 0.2
_SEGMENT = re.compile(r"(/dev/shm/flexpipe-\d+-[0-9a-f]+)/")

Sample = tuple[float, int]
"""Clock in seconds (``time.perf_counter``) and bytes."""


class LocalMemory:
    """Looks at the processes of a server on this machine.

    Args:
        status: of the server, ``GET /flexpipe/status``.

    Raises:
        ProcessLookupError: its stages are not processes of this machine.
    """

    def __init__(self, status: ServerStatus) -> None:
        pid = status.stages[0].pid
        try:
            if not _is_stage(pid):
                raise ProcessLookupError(f"process {pid} is not the server's stage")
            self._parent = _field(pid, "PPid:")
            mapped = set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
        except OSError as error:
            raise ProcessLookupError(f"the server's stages are not on this machine ({error})") from None
        self._folders = [Path(folder) for folder in sorted(mapped)]
        self.samples: list[Sample] = []

    def pids(self) -> list[int]:
        """The stages, the Router and the other workers beside them."""
        children = Path(f"/proc/{self._parent}/task").glob("*/children")
        return sorted(int(pid) for path in children for pid in path.read_text().split())

    def num_stage_processes(self) -> int:
        """Processes that run a stage, warm ones included."""
        return sum(_is_stage(pid) for pid in self.pids())

    def segments(self) -> list[Path]:
        """KV files in shared memory."""
        return [path for folder in self._folders for path in sorted(folder.glob("*.kv"))]

    def total_bytes(self) -> int:
        """Memory now."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total += _field(pid, "RssAnon:") * 1024
        for path in self.segments():
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512
        return total

    async def sample(self) -> None:
        """Fill ``samples`` until cancelled."""
        while True:
            self.samples.append((time.perf_counter(), self.total_bytes()))
            await asyncio.sleep(_INTERVAL_S)


def peak_extra_bytes(samples: Iterable[Sample], *, before: Window, during: Window) -> int | None:
    """The most memory during a window above the most before it; None without samples in both."""
    samples = list(samples)
    low = [size for at_s, size in samples if before.start_s <= at_s <= before.end_s]
    high = [size for at_s, size in samples if during.start_s <= at_s <= during.end_s]
    return max(high) - max(low) if low and high else None


def _is_stage(pid: int) -> bool:
    # Ray writes the actor's class, and the method that runs, over the command line.
    try:
        return b"StageActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def _field(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(name):
                return int(line.split()[1])
    raise ProcessLookupError(f"process {pid} has no {name}")
