"""Byte work on a local folder: durable writes, commits by rename, build locks."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from storage.errors import StorageError, UnwritableStoreError

SHARED_MODE = 0o666  # a lock file outlives its build, and the next user of a shared cache must be able to take it
FLUSHING_THREADS = 8  # they wait for the disk far more than they compute
PARTIAL = ".partial-"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_and_hash(folder: Path) -> dict[str, tuple[int, str]]:
    """Flush every file below `folder` to the disk, then every folder; return size and sha256 by relative name.

    Files get the permissions that the user's umask gives new files, whatever library wrote them.

    Raises
    ------
    ValueError
        For a symbolic link: what it points to is not part of the folder.
    """
    names = file_names(folder)
    mode = folder.stat().st_mode & 0o666
    with ThreadPoolExecutor(FLUSHING_THREADS) as threads:
        found = dict(zip(names, threads.map(lambda name: _flush_file(folder / name, mode), names), strict=True))
    flush_folders(folder)
    return found


def _flush_file(path: Path, mode: int) -> tuple[int, str]:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if status.st_mode & 0o777 != mode:
            os.fchmod(handle, mode)
        os.fsync(handle)
        return status.st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def file_names(folder: Path) -> list[str]:
    """Return the names of all files below `folder`, relative to it, sorted.

    Raises
    ------
    ValueError
        For a symbolic link.
    """
    names: list[str] = []
    open_folders = [""] if folder.is_dir() else []
    while open_folders:
        inside = open_folders.pop()
        with os.scandir(folder / inside) as entries:
            for each in entries:
                if each.is_symlink():
                    raise ValueError(f"{each.name} is a symbolic link; an artifact holds only files of its own")
                (open_folders if each.is_dir() else names).append(f"{inside}{each.name}" + "/" * each.is_dir())
    return sorted(names)


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, in the order of names; nothing when there is no such folder.

    Raises
    ------
    StorageError
        When it cannot be read, or is a link that leads nowhere: what lies there is not known then.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda each: each.name)
    except OSError as cause:
        if isinstance(cause, FileNotFoundError) and not folder.is_symlink():
            return []
        raise StorageError(f"Cannot list {folder}: {cause.strerror or cause}.") from cause


def subfolders(folder: Path) -> list[Path]:
    """Return the folders that lie in a folder, in the order of their names; raises as `listed`."""
    return [Path(each.path) for each in listed(folder) if each.is_dir()]


def flush_folders(folder: Path) -> None:
    """Flush the entries of `folder` and of every folder below it, the deepest first."""
    for root, _, _ in os.walk(folder, topdown=False):
        fsync_path(Path(root))


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
    """Rename a finished folder to its final name; whatever stood there is moved to `trash` first and deleted.

    When the final name lies on another file system, the folder is copied beside it first, so that readers still see
    all of it or nothing.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        shutil.rmtree(set_aside(final, trash))
    try:
        staged.rename(final)
    except OSError as cause:
        if cause.errno != errno.EXDEV:
            raise
        _copy_into_place(staged, final)
    fsync_path(final.parent)


def _copy_into_place(staged: Path, final: Path) -> None:
    beside = final.parent / f"{PARTIAL}{final.name}-{uuid.uuid4().hex}"
    try:
        shutil.copytree(staged, beside)
        for name in file_names(beside):
            fsync_path(beside / name)
        flush_folders(beside)
        beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(staged)


def set_aside(folder: Path, trash: Path) -> Path:
    """Take a folder out of sight in one step and return where it is now: in `trash`, or beside itself."""
    trash.mkdir(parents=True, exist_ok=True)
    aside = trash / f"{folder.name}-{uuid.uuid4().hex}"
    try:
        folder.rename(aside)
    except OSError as cause:
        if cause.errno != errno.EXDEV:
            raise
        aside = folder.parent / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex}"
        folder.rename(aside)
    return aside


def share_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError as cause:
        if cause.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)


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


def is_locked(path: Path) -> bool:
    """Return whether some process holds a lock file now."""
    if not path.exists():
        return False
    lock = FileLock(path, mode=SHARED_MODE, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
