"""Work that should not be felt by a pipeline that runs on the same cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")
_LOWER_BY = 5
"""Steps of niceness: about a third of a normal thread's share."""
_LEAST_SHARE = 0.05
"""Of one core, which work gets however busy the cores are."""
_PATIENCE_S = 0.5


class _StarvedError(Exception):
    """The work hardly gets on."""


def in_background(work: Callable[[], _T]) -> _T:
    """Do ``work`` in a thread of lower priority, and wait for it.

    A thread of its own each time: without privileges its priority cannot be raised again. Threads that it starts
    would inherit it, so sockets and the like are not made here.
    """
    return _in_thread(work, lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _niceness()))


def gently(work: Callable[[Callable[[], None]], _T]) -> _T:
    """Do ``work``, which may take seconds, while steps run, and wait for it.

    It runs where nobody else wants the core; such a thread gives way at once. Where that would starve it, it gets a
    small share of a core, in short pieces.

    Args:
        work: calls what it is given after every few milliseconds of work. May be called a second time, to go on where
            it was.
    """
    try:
        return _in_thread(lambda: work(_IdlePace()), lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)))
    except _StarvedError:
        return work(_SharePace())


class _IdlePace:
    """Raises _StarvedError when the calling thread has got less than it should."""

    def __init__(self) -> None:
        self._start = (time.monotonic(), time.thread_time())

    def __call__(self) -> None:
        elapsed = time.monotonic() - self._start[0]
        if elapsed > _PATIENCE_S and time.thread_time() - self._start[1] < _LEAST_SHARE * elapsed:
            raise _StarvedError


class _SharePace:
    """Sleeps so that the calling thread takes no more than its share."""

    def __init__(self) -> None:
        self._last = time.thread_time()

    def __call__(self) -> None:
        time.sleep((time.thread_time() - self._last) * (1 / _LEAST_SHARE - 1))
        self._last = time.thread_time()


def _niceness() -> int:
    return min(19, os.getpriority(os.PRIO_PROCESS, 0) + _LOWER_BY)


def _in_thread(work: Callable[[], _T], lower_priority: Callable[[], None]) -> _T:
    done: Future[_T] = Future()

    def run() -> None:
        try:
            lower_priority()
            done.set_result(work())
        except BaseException as error:  # thread edge: the caller gets it
            done.set_exception(error)

    threading.Thread(target=run, name="flexpipe-background", daemon=True).start()
    return done.result()
