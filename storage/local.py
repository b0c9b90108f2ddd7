"""Byte work on a local folder: durable writes, commits by rename, build locks."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from storage.errors import StorageError, UnwritableStoreError

SHARED_MODE = 0o666  # a lock file outlives its build, and the next user of a shared cache must be able to take it


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then every folder, the deepest first."""
    folders = []
    for root, _, names in os.walk(folder):
        folders.append(Path(root))
        for name in names:
            fsync_path(Path(root) / name)
    for each in reversed(folders):
        fsync_path(each)


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or nothing, also after a power cut."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def move_into_place(staged: Path, final: Path, trash: Path) -> None:
    """Rename a finished folder to its final name; whatever stood there is moved to `trash` first and deleted."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        trash.mkdir(parents=True, exist_ok=True)
        old = trash / uuid.uuid4().hex
        final.rename(old)
        shutil.rmtree(old)
    staged.rename(final)
    fsync_path(final.parent)


def make_writable_folder(folder: Path, purpose: str) -> None:
    """Create `folder` if needed.

    Raises
    ------
    UnwritableStoreError
        When the folder cannot be created or written, with the system's cause.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as cause:
        raise UnwritableStoreError(
            f"{purpose} {folder} is not writable ({cause.strerror or cause}); "
            "set COVERCAL_CACHE to a folder that this user can write."
        ) from cause


@contextmanager
def build_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; yields whether another process held it first.

    The operating system frees the lock when its holder dies, so a killed build blocks nobody.
    """
    make_writable_folder(path.parent, "The folder of locks")
    lock = FileLock(path, mode=SHARED_MODE, thread_local=False)
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        lock.acquire()
    except OSError as cause:
        raise StorageError(f"Lock file {path} cannot be opened: {cause.strerror or cause}.") from cause
    try:
        yield waited
    finally:
        lock.release()
