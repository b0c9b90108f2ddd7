"""What is freed is kept, told by the pages that have to be made anew for a piece of memory of the same size."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")

COUNT = """
import ctypes, resource
from covercal.memory import KEPT_BESIDE_WIDE, KEPT_BYTES, keep_freed, keeping_less
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def again(size):  # the share of pages made anew for three pieces that were freed just before
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [c.malloc(size) for _ in range(3)]
        for piece in pieces:
            ctypes.memset(piece, 1, size)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        for piece in pieces:
            c.free(piece)
    return faults / (3 * size / resource.getpagesize())
"""


def share(program: str, **environment: str) -> float:
    """Return the number that a program prints; each has a process of its own, for what lies free is used first."""
    asked = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", f"{COUNT}\n{program}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=asked).stdout)


def test_pieces_up_to_a_limit_are_kept_and_larger_ones_are_not() -> None:
    assert share("keep_freed(); print(again(KEPT_BYTES - 2**16))") < 0.1
    assert share("keep_freed(); print(again(KEPT_BYTES + 2**16))") > 0.9


def test_less_is_kept_for_a_while_only() -> None:
    while_less = "keep_freed()\nwith keeping_less(): print(again(KEPT_BESIDE_WIDE {}))"
    assert share(while_less.format("- 2**16")) < 0.1
    assert share(while_less.format("+ 2**16")) > 0.9
    assert share("keep_freed()\nwith keeping_less(): pass\nprint(again(KEPT_BYTES - 2**16))") < 0.1


def test_what_the_user_set_stands() -> None:
    assert share("keep_freed(); print(again(2**24))", MALLOC_MMAP_THRESHOLD_=str(2**20)) > 0.9


def test_a_program_that_did_not_ask_keeps_its_own_way() -> None:
    own = "c.mallopt(-3, 2**26), c.mallopt(-1, 2**30)\n"
    assert share(f"{own}with keeping_less(): print(again(2**24))") < 0.1
