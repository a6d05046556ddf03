"""Work that must not be felt by a pipeline that runs on the same cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def in_background(work: Callable[[], _T]) -> _T:
    """Do ``work`` in a thread that runs only where nobody else wants the core, and wait for it.

    A thread of its own each time: without privileges its priority cannot be raised again. Threads that it starts
    would inherit it, so sockets and the like are not made here.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            done.set_result(work())
        except BaseException as error:  # thread edge: the caller gets it
            done.set_exception(error)

    threading.Thread(target=run, name="flexpipe-background", daemon=True).start()
    return done.result()
