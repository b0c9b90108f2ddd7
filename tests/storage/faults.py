"""Real faults for the tests of the store: another process, a user without rights, a limit on file sizes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.durable import build_lock

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
PATIENCE = 60.0  # seconds after which a child that should have ended is a failure


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start `script` in a fresh interpreter that can import the packages of this repository."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process that must succeed and return what it printed."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Give up root's right to write everywhere; does nothing for who has no such right."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)  # the real user too: access(2), which asks for rights beforehand, asks for that one
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def forbid_writing(folder: Path) -> None:
    """Take the right to write from a folder and everything in it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def allow_writing(folder: Path) -> None:
    """Undo `forbid_writing`, so that the folder can be deleted."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, inode and time of change of everything in a folder; any write changes it."""
    return {
        path.relative_to(folder).as_posix(): (status.st_size, status.st_ino, status.st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
        for status in [path.stat()]
    }


def until_it_waits_for_a_lock(thread: threading.Thread) -> None:
    """Return as soon as `thread` has found a build lock taken."""
    end = time.monotonic() + PATIENCE
    while not _found_a_lock_taken(thread):
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.001)


def _found_a_lock_taken(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code is build_lock.__wrapped__.__code__ and frame.f_locals.get("waited"):
            return True
        frame = frame.f_back
    return False
