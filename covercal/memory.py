"""What the C library does with memory that was freed.

By default glibc gives large pieces back to the system at once, and the next tensor of that size has its pages made
anew: a fifth of the time of quantising a small model. Kept pieces pile up over many blocks, however, so that they are
given back now and then.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

KEPT_BYTES = 2**25  # of one piece; larger ones go back to the system as soon as they are freed
KEPT_BESIDE_WIDE = 2**23  # where matrices of a gigabyte leave no room for what lies between pieces
# <malloc.h>, and the variable by which a user says otherwise
MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_")
TRIM_THRESHOLD = (-1, "MALLOC_TRIM_THRESHOLD_")
ARENA_MAX = (-8, "MALLOC_ARENA_MAX")  # other arenas than the first hold only small pieces

_asked = False  # whether `keep_freed` was called: a program that only uses this library keeps its own way


def keep_freed() -> None:
    """Let this process keep freed memory for what it allocates next (glibc); elsewhere do nothing."""
    global _asked
    _asked = True
    for setting, value in ((MMAP_THRESHOLD, KEPT_BYTES), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1)):
        _set(setting, value)


@contextmanager
def keeping_less() -> Iterator[None]:
    """Keep smaller pieces only, for a while; nothing where `keep_freed` was not called."""
    if not _asked:
        yield
        return
    _set(MMAP_THRESHOLD, KEPT_BESIDE_WIDE)
    try:
        yield
    finally:
        _set(MMAP_THRESHOLD, KEPT_BYTES)


def release_freed() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere do nothing."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _set(setting: tuple[int, str], value: int) -> None:
    parameter, variable = setting
    call = _function("mallopt")
    if call is not None and variable not in os.environ:
        call(parameter, value)


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
