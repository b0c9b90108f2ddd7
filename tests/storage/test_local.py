"""Writes are whole or absent, commits are renames, and a lock lasts exactly as long as its holder."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import StorageError, UnwritableStoreError
from storage.local import build_lock, fsync_path, fsync_tree, make_writable_folder, move_into_place, write_durably
from tests.storage.faults import (
    PATIENCE,
    as_ordinary_user,
    forbid_writing,
    output_of,
    start_python,
    until_it_waits_for_a_lock,
)

WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from storage.local import write_durably
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_durably(Path(sys.argv[1]), b"x" * 5000)
except OSError as cause:
    print(cause.strerror)
"""

HOLD_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from storage.local import build_lock
with build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes that were flushed to the disk, in their order."""
    inodes: list[int] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        inodes.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    return inodes


def start(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


# durable writes


def test_a_durable_write_holds_the_bytes(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"\x00bytes")
    assert (tmp_path / "file").read_bytes() == b"\x00bytes"


def test_a_durable_write_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a longer text than the new one")
    write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_durable_write_leaves_only_its_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_durable_write_flushes_the_file_and_then_its_folder(tmp_path: Path, flushed: list[int]) -> None:
    write_durably(tmp_path / "file", b"new")
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_write_that_the_system_cuts_short_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    assert output_of(start_python(WRITE_TOO_MUCH, tmp_path / "file")) == "File too large\n"
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_write_that_the_system_cuts_short_leaves_no_partial_file(tmp_path: Path) -> None:
    output_of(start_python(WRITE_TOO_MUCH, tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_a_tree_is_flushed_with_every_file_and_its_own_folder_last(tmp_path: Path, flushed: list[int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "a/two", "a/b/three"):
        (tmp_path / name).write_text(name)
    fsync_tree(tmp_path)
    assert set(flushed) == {each.stat().st_ino for each in (tmp_path, *tmp_path.rglob("*"))}
    assert flushed[-1] == tmp_path.stat().st_ino


def test_a_path_that_is_not_there_cannot_be_flushed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "nothing")


# commits


def test_a_staged_folder_moves_to_its_final_name(tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "file").write_text("new")
    move_into_place(tmp_path / "staged", tmp_path / "far" / "final", tmp_path / "trash")
    assert (tmp_path / "far" / "final" / "file").read_text() == "new"
    assert not (tmp_path / "staged").exists()


def test_what_stood_at_the_final_name_is_replaced_whole(tmp_path: Path) -> None:
    for name, file in (("final", "old"), ("staged", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    move_into_place(tmp_path / "staged", tmp_path / "final", tmp_path / "trash")
    assert [each.name for each in (tmp_path / "final").iterdir()] == ["new"]


def test_what_was_replaced_does_not_stay_in_the_trash(tmp_path: Path) -> None:
    for name in ("final", "staged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    move_into_place(tmp_path / "staged", tmp_path / "final", tmp_path / "trash")
    assert list((tmp_path / "trash").iterdir()) == []


def test_the_folder_of_a_commit_is_flushed_after_it(tmp_path: Path, flushed: list[int]) -> None:
    (tmp_path / "staged").mkdir()
    move_into_place(tmp_path / "staged", tmp_path / "far" / "final", tmp_path / "trash")
    assert flushed[-1] == (tmp_path / "far").stat().st_ino


# writable folders


def test_a_writable_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    make_writable_folder(tmp_path / "a" / "b", "The cache folder")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_writable_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    make_writable_folder(tmp_path, "The cache folder")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableStoreError, match=r"The cache folder .*below is not writable \(Not a directory\)"):
        make_writable_folder(tmp_path / "file" / "below", "The cache folder")


def test_a_folder_without_the_right_to_write_is_not_writable(public_folder: Path) -> None:
    forbid_writing(public_folder)
    with as_ordinary_user(), pytest.raises(StorageError, match=r"Permission denied.*COVERCAL_CACHE"):
        make_writable_folder(public_folder, "The cache folder")


# locks


def test_a_free_lock_is_taken_without_waiting(tmp_path: Path) -> None:
    with build_lock(tmp_path / "locks" / "key.lock") as waited:
        assert waited is False


def test_a_lock_can_be_taken_again_after_its_release(tmp_path: Path) -> None:
    with build_lock(tmp_path / "key.lock"):
        pass
    with build_lock(tmp_path / "key.lock") as waited:
        assert waited is False


def test_a_lock_is_free_after_an_error_of_its_holder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), build_lock(tmp_path / "key.lock"):
        raise RuntimeError
    with build_lock(tmp_path / "key.lock") as waited:
        assert waited is False


def test_locks_of_two_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with build_lock(tmp_path / "one.lock"), build_lock(tmp_path / "two.lock") as waited:
        assert waited is False


def test_who_finds_a_lock_taken_waits_and_knows_it(tmp_path: Path) -> None:
    found: list[bool] = []

    def second() -> None:
        with build_lock(tmp_path / "key.lock") as waited:
            found.append(waited)

    with build_lock(tmp_path / "key.lock"):
        thread = start(second)
        until_it_waits_for_a_lock(thread)
        assert found == []
    thread.join(PATIENCE)
    assert found == [True]


def test_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add_twenty() -> None:
        for _ in range(20):
            with build_lock(tmp_path / "key.lock"):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [start(add_twenty) for _ in range(4)]
    for each in threads:
        each.join(PATIENCE)
    assert counter.read_text() == "80"


def test_a_killed_process_frees_its_lock(tmp_path: Path) -> None:
    process = start_python(HOLD_UNTIL_KILLED, tmp_path / "key.lock")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    found: list[bool] = []

    def second() -> None:
        with build_lock(tmp_path / "key.lock") as waited:
            found.append(waited)

    thread = start(second)
    until_it_waits_for_a_lock(thread)
    process.kill()
    process.communicate()
    thread.join(PATIENCE)
    assert found == [True]
