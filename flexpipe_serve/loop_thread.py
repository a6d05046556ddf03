"""Coroutines for callers that have no event loop, or one that they must not block."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="flexpipe-handle", daemon=True).start()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Its result. A KeyboardInterrupt cancels it and is raised when it has ended."""
        tasks: list[asyncio.Task[_T]] = []
        ended = threading.Event()

        def start() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(start)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise
        return tasks[0].result()

    def iterate(self, items: AsyncGenerator[_T]) -> Iterator[_T]:
        """The same items; closing the iterator closes the generator."""

        async def advance() -> _T:
            return await anext(items)

        try:
            while True:
                try:
                    item = self.run(advance())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not sys.is_finalizing():  # then the thread is gone
                self.run(items.aclose())

    def stop(self) -> None:
        """End the thread. Nothing can be run afterwards."""
        self._loop.call_soon_threadsafe(self._loop.stop)
