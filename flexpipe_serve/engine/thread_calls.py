"""Calls into the engine thread from others, which it makes between two steps."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class ThreadCalls:
    """Functions to be called, and conditions that somebody waits for.

    Args:
        wake: interrupts whatever the thread waits for; any thread may call it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The thread's own.
        self._conditions: list[tuple[Callable[[], bool], Future[None]]] = []

    # ------------------------------------------------------------------ for other threads

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Have ``function`` called."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # thread edge: the caller gets it
                future.set_exception(error)

        self._calls.put(run)
        self._wake()
        return future

    def when(self, condition: Callable[[], bool]) -> Future[None]:
        """Ends when ``condition``, asked in the thread between two steps, is true."""
        future: Future[None] = Future()
        self.call(lambda: self._conditions.append((condition, future)))
        return future

    # ------------------------------------------------------------------ for the thread itself

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to call."""
        return self._calls.empty()

    @property
    def num_waiting(self) -> int:
        """Conditions that are not true yet."""
        return len(self._conditions)

    def run(self) -> None:
        """Call what is to be called."""
        while not self._calls.empty():
            self._calls.get()()

    def check(self) -> None:
        """End the waits whose conditions are true."""
        if not self._conditions:
            return
        waiting, self._conditions = self._conditions, []
        for condition, future in waiting:
            if condition():
                future.set_result(None)
            else:
                self._conditions.append((condition, future))

    def fail_waits(self, error: Exception) -> None:
        """Make an end of every wait."""
        conditions, self._conditions = self._conditions, []
        for _, future in conditions:
            future.set_exception(error)
