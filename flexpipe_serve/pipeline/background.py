"""Work that should not be felt by a pipeline that runs on the same cores."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import psutil

_T = TypeVar("_T")
_LOWER_BY = 5
"""Steps of niceness: about a third of a normal thread's share."""
_LEAST_URGENT = 19
_SHARE = 0.02
"""Of one core, for all that is done on a node while its cores are wanted: what those who wait for tokens may lose."""
_SPARE_CORES = 0.75
"""So much of the machine unused: nobody is kept waiting."""
_LOOK_EVERY_S = 0.1
_STARVING_SHARE = 0.01
"""Of a core, while it does not rest. A busy pipeline leaves more than that between its hops, and work that is done
there delays nobody; a thread that may preempt delays all that wait for the one it takes the core from."""
_PATIENCE_S = 0.25


class _StarvedError(Exception):
    """The work hardly gets on."""


def in_background(work: Callable[[], _T]) -> _T:
    """Do ``work`` in a thread of lower priority, and wait for it.

    A thread of its own each time: without privileges its priority cannot be raised again. Threads that it starts
    would inherit it, so sockets and the like are not made here.
    """
    return _in_thread(work, lambda: lower_priority(_LOWER_BY))


def lower_priority(steps: int) -> None:
    """Of the calling thread, by so many steps of niceness, as far as there are any: Ray starts its workers at 15 of 19,
    and only the superuser may raise a priority."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(_LEAST_URGENT, niceness + steps))


def gently(work: Callable[[Callable[[], None]], _T], *, folder: Path) -> _T:
    """Do ``work``, which may take seconds, while steps run, and wait for it.

    It runs where nobody else wants the core; such a thread gives way at once. Yet what it takes is felt, in caches and
    in memory, so on a busy machine it rests most of the time. Where it would starve, it rests only.

    Args:
        work: calls what it is given after every few milliseconds of work. May be called a second time, to go on where
            it was.
        folder: of the application on this node: work of all its processes together has one share.
    """
    pace = _Pace(folder)
    try:
        return _in_thread(
            lambda: work(pace.rest_or_starve), lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        )
    except _StarvedError:
        return in_background(lambda: work(pace.rest))


class _Pace:
    """Keeps the thread that calls it, and all others that rest by the same folder, to one share of a core."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare = _SpareCores()
        self._worked = 0.0
        self._working = 0.0
        self._last: tuple[float, float] | None = None

    def rest(self) -> None:
        """Sleep as long as the work since the last call asks for."""
        now, used = time.monotonic(), time.thread_time()
        if self._last is not None:
            worked = used - self._last[1]
            self._worked += worked
            self._working += now - self._last[0]
            if self._spare.count(now, used) < _SPARE_CORES:
                with _alone(self._folder):  # rests one after the other: no two processes work that much
                    time.sleep(worked * (1 / _SHARE - 1))
        self._last = (time.monotonic(), used)

    def rest_or_starve(self) -> None:
        """The same, or raise _StarvedError when the thread hardly gets on while it works."""
        self.rest()
        if self._working > _PATIENCE_S and self._worked < _STARVING_SHARE * self._working:
            self._last, self._spare = None, _SpareCores()  # it goes on in another thread, with a clock of its own
            raise _StarvedError


class _SpareCores:
    """How much of the machine is unused, but for the calling thread."""

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None
        self._count = 0.0

    def count(self, now: float, used: float) -> float:
        """In cores, over the last moments; 0 before there is anything to go by.

        Args:
            now: the time.
            used: CPU seconds of the calling thread.
        """
        if self._last is None:
            self._last = (now, used, psutil.cpu_times().idle)
        elapsed = now - self._last[0]
        if elapsed >= _LOOK_EVERY_S:
            idle = psutil.cpu_times().idle
            self._count = (idle - self._last[2] + used - self._last[1]) / elapsed
            self._last = (now, used, idle)
        return self._count


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else is in here for the same folder, in any process. Where that is gone, nobody waits."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _in_thread(work: Callable[[], _T], set_priority: Callable[[], None]) -> _T:
    done: Future[_T] = Future()

    def run() -> None:
        try:
            set_priority()
            done.set_result(work())
        except BaseException as error:  # thread edge: the caller gets it
            done.set_exception(error)

    threading.Thread(target=run, name="flexpipe-background", daemon=True).start()
    return done.result()
