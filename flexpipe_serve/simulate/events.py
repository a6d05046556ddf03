"""Virtual time: what happens when, and devices that do one thing after the other. Pure code."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Actions by time; those of one time run in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self._heap: list[tuple[float, int, Action]] = []
        self._num_added = 0

    def after(self, delay_s: float, action: Action) -> None:
        """Run ``action`` ``delay_s`` seconds from now."""
        heapq.heappush(self._heap, (self.now + delay_s, self._num_added, action))
        self._num_added += 1

    def run(self, *, until: Callable[[], bool]) -> None:
        """Until ``until`` is true, asked before each action, or nothing is left."""
        while self._heap and not until():
            self.now, _, action = heapq.heappop(self._heap)
            action()


class Server:
    """Something that serves one piece of work at a time, in the order in which it comes: the compute of a device, or
    the Router's thread."""

    def __init__(self, events: EventQueue) -> None:
        self._events = events
        self._waiting: deque[tuple[float, Action]] = deque()
        self._is_busy = False

    def serve(self, seconds: float, done: Action) -> None:
        """Work ``seconds`` on it when those before are through, then call ``done``."""
        self._waiting.append((seconds, done))
        if not self._is_busy:
            self._begin_next()

    def _begin_next(self) -> None:
        if not self._waiting:
            return
        seconds, done = self._waiting.popleft()
        self._is_busy = True

        def end() -> None:
            self._is_busy = False
            self._begin_next()
            done()

        self._events.after(seconds, end)
