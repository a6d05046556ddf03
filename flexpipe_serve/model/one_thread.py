"""Keeps a piece of torch work on the calling thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, and around a function that it decorates, torch starts no helper threads for the calling thread.

    Loading weights is many short pieces of work, after each of which OpenMP's threads spin to meet. Stages start
    together, and load while others compute: on cores that are taken the spinning took three times the work's own time.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
