"""Memory that was freed, given back: the C library keeps pieces of it, and over many blocks they pile up."""

import ctypes
import sys


def release_freed() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere do nothing."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
