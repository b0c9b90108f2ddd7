"""What the C library does with memory that was freed.

By default glibc gives large pieces back to the system at once, and the next tensor of that size has its pages made
anew: a fifth of the time of quantising a small model. Kept pieces pile up over many blocks, however, so that they are
given back now and then.
"""

import ctypes
import os
import sys
from typing import Any

KEPT_BYTES = 2**25  # of one piece; larger ones go back to the system as soon as they are freed
KEPT_BESIDE_WIDE = 2**23  # where matrices of a gigabyte leave no room for what lies between pieces
# <malloc.h>, and the variable by which a user says otherwise
MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_")
TRIM_THRESHOLD = (-1, "MALLOC_TRIM_THRESHOLD_")
ARENA_MAX = (-8, "MALLOC_ARENA_MAX")  # other arenas than the first hold only small pieces


def keep_freed(piece: int = KEPT_BYTES) -> None:
    """Let this process keep freed pieces of so many bytes for what it allocates next (glibc); elsewhere do nothing."""
    setting = _function("mallopt")
    if setting is None:
        return
    for (parameter, variable), value in ((MMAP_THRESHOLD, piece), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1)):
        if variable not in os.environ:
            setting(parameter, value)


def release_freed() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere do nothing."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
