"""Signals that end a program, as an exception: what it has begun can be ended in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The signals that end a program raise KeyboardInterrupt meanwhile."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = [(number, signal.signal(number, interrupt)) for number in _INTERRUPTS]
    try:
        yield
    finally:
        for number, handler in former:
            signal.signal(number, handler)
