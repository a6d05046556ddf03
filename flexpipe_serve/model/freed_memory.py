"""Gives memory that was freed back to the operating system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Ask the C library to release free pages.

    glibc keeps freed blocks of up to 32 MB for itself: after weights were read, converted and packed, a stage would
    stay up to twice as large as what it holds. Only for then: the buffers of the next steps come from fresh pages.
    Does nothing where the C library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
