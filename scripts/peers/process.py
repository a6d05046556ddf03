"""A server process with its whole tree: started, paused without losing its memory, and ended for certain."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from peers.environment import PeerError


class ServerProcess:
    """One running server.

    Args:
        command: its command line.
        env: variables added to this process's own.
        log: file for its output.
        stop_s: how long it may take to end when asked to.
    """

    def __init__(self, command: list[str], *, env: dict[str, str], log: Path, stop_s: float = 30.0) -> None:
        self.log = log
        self._stop_s = stop_s
        self.started_s = time.perf_counter()
        with log.open("w") as output:
            # A session of its own: Ctrl-C at the terminal must reach it through stop() only.
            self._popen = subprocess.Popen(
                command,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Started in the background, a shell has us ignore interrupts, and a child would inherit that.
                preexec_fn=_heed_interrupts,
            )
        self._root = psutil.Process(self._popen.pid)
        self._seen: dict[int, psutil.Process] = {self._root.pid: self._root}

    def check_alive(self) -> None:
        """Raises PeerError, with the last lines of its log, if the server has ended."""
        if self._popen.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise PeerError(f"ended with status {self._popen.returncode}; see {self.log}: " + " | ".join(lines[-3:]))

    def pause(self) -> None:
        """Stops the whole tree: it keeps its memory and uses no CPU."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused tree go on."""
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU time of the tree's living processes."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def resident_bytes(self) -> int:
        """Resident memory summed over the tree; shared pages count once for each process."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def stop(self) -> None:
        """Ends the tree: an interrupt to the server as from a terminal, then, to what is left, a kill."""
        tree = self._tree()
        self.resume()
        self._popen.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(self._stop_s)
        _, alive = psutil.wait_procs(tree, timeout=0.5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self._popen.wait(5)

    def _tree(self) -> list[psutil.Process]:
        """All living processes ever seen under the root, the root first: a worker may outlive its parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self._root.children(recursive=True):
                self._seen.setdefault(process.pid, process)
        self._seen = {pid: process for pid, process in self._seen.items() if process.is_running()}
        return list(self._seen.values())

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
