"""Calls into the engine thread from others, which it makes between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class ThreadCalls:
    """Functions to be called, and conditions that somebody waits for.

    Args:
        wake: interrupts whatever the thread waits for; any thread may call it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._end: Exception | None = None
        # The thread's own.
        self._conditions: list[tuple[Callable[[], bool], Future[None]]] = []

    # ------------------------------------------------------------------ for other threads

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Have ``function`` called, unless the future is cancelled before; it fails with what ``function`` raises, or
        with the error of :meth:`close`."""
        future: Future[_T] = Future()
        with self._lock:
            if self._end is not None:
                future.set_exception(self._end)
                return future
            self._calls.append((future, function))
        self._wake()
        return future

    def when(self, condition: Callable[[], bool]) -> Future[None]:
        """Ends when ``condition``, asked in the thread between two steps, is true."""
        future: Future[None] = Future()
        added = self.call(lambda: self._conditions.append((condition, future)))
        added.add_done_callback(lambda added: future.set_exception(error) if (error := added.exception()) else None)
        return future

    # ------------------------------------------------------------------ for the thread itself

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to call."""
        return not self._calls

    @property
    def num_waiting(self) -> int:
        """Conditions that are not true yet."""
        return len(self._conditions)

    def run(self) -> None:
        """Call what is to be called."""
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue  # who asked has left meanwhile
            try:
                future.set_result(function())
            except Exception as error:  # thread edge: the caller gets it
                future.set_exception(error)

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

    def close(self, error: Exception) -> None:
        """The thread ends: nothing is called any more, and nobody waits for it."""
        with self._lock:
            self._end = error
            calls, self._calls = self._calls, deque()
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self.fail_waits(error)

    def fail_waits(self, error: Exception) -> None:
        """Make an end of every wait."""
        conditions, self._conditions = self._conditions, []
        for _, future in conditions:
            future.set_exception(error)
