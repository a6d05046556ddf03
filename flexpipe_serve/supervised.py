"""A command that is run in a process of its own, and of which nothing is left, however and whenever it ends.

Ray ends the process that it is used in when it loses its cluster, and a signal may come at any moment of a start. So
who cleans up uses no Ray, and takes signals only where it waits for them. See :func:`supervised`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import psutil

from flexpipe_serve.kv.domain import sweep_stale

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_S = 30.0
_REMOVE_S = 5.0
_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervised(run: Callable[[str], int], *, prefix: str) -> int | None:
    """Call ``run`` in a child process with a folder of its own, and wait for its end, or for a signal to end.

    Then every process that came of it is killed, its folder is removed, and so is shared memory that nobody uses any
    more. The child has a session of its own: signals of a terminal reach this process only. If this process is killed,
    the child is told to end, and cleans up itself.

    To be called by the main thread of a process that ends afterwards: it leaves these signals ignored, so that none can
    disturb the end.

    Args:
        run: given the folder's path, returns the exit status.
        prefix: what the folder's name begins with.

    Returns:
        The exit status (128 + n for a child that a signal n ended); None if this process was interrupted.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*_INTERRUPTS, signal.SIGCHLD):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup asks for
            signal.signal(number, _do_nothing)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    folder = tempfile.mkdtemp(prefix=prefix)
    try:
        supervisor = os.getpid()
        child = os.fork()
        if child == 0:
            _be_child(run, folder, supervisor)
        return _wait(child, reader)
    finally:
        _ignore_interrupts()
        _clean_up(folder)


def end_with_parent() -> None:
    """Have this process get a SIGTERM when the thread that started it has ended, however that comes."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _ignore_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(number: int, _: object) -> None:
    """The signal stands in the pipe. Blocked instead, it would go to some other thread, which a library started."""


def _wait(child: int, signals: int) -> int | None:
    """Its exit status; None as soon as a signal asks for the end."""
    while True:
        if set(os.read(signals, 4096)) - {signal.SIGCHLD}:
            return None
        for pid, status in _reap():
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _reap() -> list[tuple[int, int]]:
    """Children that have ended, orphans of the command too, with their wait statuses."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(found)
    return ended


def _be_child(run: Callable[[str], int], folder: str, supervisor: int) -> None:
    """Never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _INTERRUPTS:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        os.setsid()
        end_with_parent()
        if os.getppid() == supervisor:  # else it died before it could be waited for
            status = run(folder)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # process edge
        traceback.print_exc()
    finally:
        try:
            if os.getppid() != supervisor:
                _ignore_interrupts()
                _clean_up(folder)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _clean_up(folder: str) -> None:
    deadline = time.monotonic() + _END_S
    while processes := _descendants():  # again and again: they may start others until they are dead
        if time.monotonic() > deadline:
            break  # in a system call that does not end
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _REMOVE_S
    shutil.rmtree(folder, ignore_errors=True)
    while os.path.exists(folder) and time.monotonic() < deadline:
        time.sleep(_POLL_S)  # a script that had joined the cluster still writes its logs
        shutil.rmtree(folder, ignore_errors=True)
    sweep_stale()


def _descendants() -> list[psutil.Process]:
    """All processes that came of this one and are there. Zombies too: one that is not reaped may have threads that
    still hold its files, and their locks."""
    _reap()
    return psutil.Process().children(recursive=True)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
