"""Which artifacts living processes use, so that nothing is deleted under a running build."""

import errno
import os
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from storage.durable import SHARED_MODE, listed
from storage.errors import StorageError

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
NOTES_MODE = 0o644  # who deletes must be able to read them, whatever the umask of who notes
POLL_SECONDS = 0.001  # the gate is held for microseconds
_of_process: dict[tuple[int, Path], "Claims"] = {}
_opening = threading.Lock()


class Claims:
    """The artifacts that this process uses of one store.

    A process notes a key before it looks the artifact up, and holds a lock on its notes as long as it lives; the
    kernel frees the lock when it dies. Who deletes holds the gate, in which no key can be noted, reads the notes of
    the living and spares what they name.

    Parameters
    ----------
    root
        The cache folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "locks" / "in-use"
        self._gate = root / "locks" / "in-use.lock"
        self._mine = self._folder / f"{os.getpid()}-{uuid.uuid4().hex}.keys"
        self._held: tuple[FileLock, int] | None = None  # and the inode of its file
        self._users: dict[str, set[int]] = {}  # threads by key
        self._lost: set[str] = set()  # keys whose notes were deleted
        self._lock = threading.Lock()

    def claim(self, key: str) -> None:
        """Note that this process uses an artifact; does nothing in a store that is not there or not to be written.

        Who may only read a store cannot keep its owner from deleting.
        """
        with self._lock:
            self._look_after_notes()
            wanted = self._lost | ({key} - self._users.keys())
            if wanted and not self._root.is_dir():
                return
            try:
                self._note(wanted)
            except OSError as cause:
                if cause.errno in READ_ONLY:
                    return
                raise StorageError(
                    f"Cannot note in {self._folder} what is in use: {cause.strerror or cause}."
                ) from cause
            self._lost.clear()
            self._users.setdefault(key, set()).add(threading.get_ident())

    def _note(self, keys: Collection[str]) -> None:
        if not keys:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._passing():
            if self._held is None:
                held = _lock_of(self._mine)
                held.acquire()
                self._held = held, Path(held.lock_file).stat().st_ino
                self._mine.touch()
                self._mine.chmod(NOTES_MODE)
            with self._mine.open("a", encoding="ascii") as notes:
                notes.writelines(f"\n{key}\n" for key in sorted(keys))  # a note before these may be torn

    def _look_after_notes(self) -> None:
        """See whether somebody deleted the cache folder, or its locks, and with them what this process noted."""
        if self._held is None:
            return
        held, inode = self._held
        try:
            there = Path(held.lock_file).stat().st_ino == inode
        except OSError:
            there = False
        if not there:
            held.release()
            self._held = None
            self._lost |= self._users.keys()

    def leave(self, key: str) -> None:
        """Note that this thread found nothing to use under a key; what the process noted stays."""
        with self._lock:
            self._users.get(key, set()).discard(threading.get_ident())

    @contextmanager
    def removing(self) -> Iterator[frozenset[str]]:
        """Hold the gate and yield every key that some living process uses; notes of the dead are deleted."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._passing():
            yield frozenset(key for notes in self._notes() for key in self._living(notes))

    @contextmanager
    def removing_as_only_user(self, key: str) -> Iterator[bool]:
        """Hold the gate and yield whether no other living process, and no other thread of this one, uses `key`."""
        with self._lock:
            alone = self._users.get(key, set()) <= {threading.get_ident()}
            with self._passing():
                yield alone and all(key not in self._living(notes) for notes in self._notes() if notes != self._mine)

    def _notes(self) -> list[Path]:
        return [Path(each.path) for each in listed(self._folder) if each.name.endswith(".keys")]

    def _living(self, notes: Path) -> set[str]:
        lock = _lock_of(notes)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return set(notes.read_text(encoding="ascii").split())
            lock.release()
            notes.unlink(missing_ok=True)
            notes.with_suffix(".lock").unlink(missing_ok=True)
        except OSError as cause:
            raise StorageError(
                f"Cannot tell from {notes} what another process uses: {cause.strerror or cause}; nothing was deleted."
            ) from cause
        return set()

    @contextmanager
    def _passing(self) -> Iterator[None]:
        with FileLock(self._gate, mode=SHARED_MODE, thread_local=False, poll_interval=POLL_SECONDS):
            yield


def _lock_of(notes: Path) -> FileLock:
    return FileLock(notes.with_suffix(".lock"), mode=SHARED_MODE, thread_local=False)


def claims_of(root: Path) -> Claims:
    """Return the claims of this process on one store; a forked child has its own."""
    with _opening:
        name = (os.getpid(), root)
        if name not in _of_process:
            _of_process[name] = Claims(root)
        return _of_process[name]


def last_change(path: Path) -> float:
    """Return when anything in a folder changed last, in seconds since the epoch; now, if it is just vanishing."""
    try:
        return max((each.stat().st_mtime for each in (path, *path.rglob("*"))), default=time.time())
    except FileNotFoundError:
        return time.time()
