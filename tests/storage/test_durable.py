"""Writes are whole or absent, commits are renames, and a lock lasts exactly as long as its holder."""

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.durable import (
    PARTIAL,
    build_lock,
    file_names,
    flush_and_hash,
    flush_folders,
    fsync_path,
    listed,
    make_writable_folder,
    move_into_place,
    set_aside,
    share_file,
    subfolders,
    write_durably,
)
from storage.errors import StorageError, UnwritableStoreError
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
from storage.durable import write_durably
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_durably(Path(sys.argv[1]), b"x" * 5000)
except OSError as cause:
    print(cause.strerror)
"""

HOLD_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from storage.durable import build_lock
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


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    memory = Path("/dev/shm")
    if not memory.exists():
        pytest.skip("this system has no /dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory, prefix="covercal-tests-"))
    assert folder.stat().st_dev != tmp_path.stat().st_dev
    yield folder
    shutil.rmtree(folder)


def make_folder(folder: Path, *names: str) -> Path:
    """Make a folder with some files, each of which holds its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


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


def test_a_path_that_is_not_there_cannot_be_flushed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "nothing")


# whole folders

TREE = ("one", "a/two", "a/b/three", "a/b/four")


def test_a_folder_is_flushed_with_every_file_and_every_folder_after_what_is_in_it(
    tmp_path: Path, flushed: list[int]
) -> None:
    flush_and_hash(make_folder(tmp_path, *TREE))
    inodes = {path: path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
    assert sorted(flushed) == sorted(inodes.values())
    place = {path: flushed.index(inode) for path, inode in inodes.items()}
    assert all(place[path] < place[path.parent] for path in inodes if path != tmp_path)


def test_only_the_entries_of_folders_are_flushed_when_only_they_are_asked_for(
    tmp_path: Path, flushed: list[int]
) -> None:
    flush_folders(make_folder(tmp_path, *TREE))
    assert flushed == [each.stat().st_ino for each in (tmp_path / "a" / "b", tmp_path / "a", tmp_path)]


def test_every_file_comes_back_with_its_size_and_sha256(tmp_path: Path) -> None:
    contents = {f"{n % 3}/file{n}": bytes(range(n)) * 1000 for n in range(40)}  # more than one thread takes at a time
    make_folder(tmp_path, *contents)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    assert flush_and_hash(tmp_path) == expected


def test_an_empty_folder_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert flush_and_hash(tmp_path) == {}


def test_the_names_of_files_are_sorted_and_relative(tmp_path: Path) -> None:
    assert file_names(make_folder(tmp_path, *TREE)) == ["a/b/four", "a/b/three", "a/two", "one"]


@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o755, 0o644), (0o775, 0o664), (0o2777, 0o666)])
@pytest.mark.parametrize("before", [0o600, 0o640, 0o644, 0o666, 0o755, 0o400])
def test_files_get_the_permissions_that_their_folder_has(tmp_path: Path, folder: int, file: int, before: int) -> None:
    made = make_folder(tmp_path / "folder", *TREE)
    (made / "a" / "two").chmod(before)
    made.chmod(folder)
    flush_and_hash(made)
    assert {(made / name).stat().st_mode & 0o7777 for name in TREE} == {file}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_files_get_the_permissions_that_the_users_umask_gives_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        made = make_folder(tmp_path / "folder", "file")
    finally:
        os.umask(before)
    (made / "file").chmod(0o601)
    flush_and_hash(made)
    assert (made / "file").stat().st_mode & 0o7777 == 0o666 & ~mask


def test_a_file_with_the_right_permissions_keeps_its_time_of_change(tmp_path: Path) -> None:
    (make_folder(tmp_path, "file") / "file").chmod(tmp_path.stat().st_mode & 0o666)
    before = (tmp_path / "file").stat().st_ctime_ns
    flush_and_hash(tmp_path)
    assert (tmp_path / "file").stat().st_ctime_ns == before


@pytest.mark.parametrize(
    "target", ["one", "a", "nowhere", "/etc/hostname"], ids=["file", "folder", "broken", "outside"]
)
@pytest.mark.parametrize("link", ["link", "a/b/link"])
@pytest.mark.parametrize("look", [flush_and_hash, file_names])
def test_a_symbolic_link_is_refused(tmp_path: Path, target: str, link: str, look: Callable[[Path], object]) -> None:
    (make_folder(tmp_path, *TREE) / link).symlink_to(target if target.startswith("/") else tmp_path / target)
    with pytest.raises(ValueError, match="link is a symbolic link; an artifact holds only files of its own"):
        look(tmp_path)


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


def test_a_folder_moves_across_file_systems(tmp_path: Path, other_disk: Path) -> None:
    staged = make_folder(tmp_path / "staged", *TREE)
    final = other_disk / "far" / "final"
    move_into_place(staged, final, tmp_path / "trash")
    assert {name: (final / name).read_text() for name in file_names(final)} == {name: name for name in TREE}
    assert names_in(tmp_path) == []
    assert names_in(final.parent) == ["final"]


def test_what_stood_at_the_final_name_on_another_file_system_is_replaced_whole(
    tmp_path: Path, other_disk: Path
) -> None:
    make_folder(other_disk / "final", "old")
    move_into_place(make_folder(tmp_path / "staged", "new"), other_disk / "final", tmp_path / "trash")
    assert names_in(other_disk / "final") == ["new"]
    assert names_in(other_disk) == ["final"]
    assert names_in(tmp_path / "trash") == []


def test_a_folder_on_another_file_system_is_whole_and_flushed_when_it_gets_its_name(
    tmp_path: Path, other_disk: Path, flushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, final = make_folder(tmp_path / "staged", *TREE), other_disk / "final"
    found: list[tuple[list[str], set[Path]]] = []
    rename = os.rename

    def move(source: Path, target: Path) -> None:
        rename(source, target)  # raises for two file systems
        inside = list(Path(target).rglob("*"))
        found.append((file_names(Path(target)), {path for path in inside if path.stat().st_ino not in flushed}))

    monkeypatch.setattr(os, "rename", move)
    move_into_place(staged, final, tmp_path / "trash")
    assert found == [(sorted(TREE), set())]
    assert flushed[-1] == other_disk.stat().st_ino


def test_what_lies_in_a_folder_is_listed_in_the_order_of_names(tmp_path: Path) -> None:
    make_folder(tmp_path, "b/x", "a", ".c/z")
    assert [each.name for each in listed(tmp_path)] == [".c", "a", "b"]
    assert subfolders(tmp_path) == [tmp_path / ".c", tmp_path / "b"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert (listed(tmp_path / "gone"), subfolders(tmp_path / "gone" / "too")) == ([], [])


@pytest.mark.parametrize("kind", ["not to be read", "a link that leads nowhere", "a file"])
def test_what_cannot_be_listed_is_named_and_not_taken_for_nothing(public_folder: Path, kind: str) -> None:
    folder = public_folder / "folder"
    if kind == "not to be read":
        folder.mkdir(mode=0o333)
    elif kind == "a file":
        folder.touch()
    else:
        folder.symlink_to(public_folder / "unmounted")
    try:
        with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot list {folder}"):
            listed(folder)
    finally:
        if not folder.is_dir():
            folder.unlink()


def test_a_copy_to_another_file_system_that_fails_leaves_nothing_there(tmp_path: Path, other_disk: Path) -> None:
    staged = make_folder(tmp_path / "staged", *TREE)
    os.mkfifo(staged / "a" / "pipe")  # cannot be copied
    with pytest.raises(shutil.Error):
        move_into_place(staged, other_disk / "final", tmp_path / "trash")
    assert names_in(other_disk) == []
    assert (staged / "one").exists()


def test_a_fault_that_is_not_about_file_systems_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "nothing", tmp_path / "final", tmp_path / "trash")
    assert names_in(tmp_path) == []


# out of sight


def test_a_folder_is_set_aside_into_the_trash(tmp_path: Path) -> None:
    aside = set_aside(make_folder(tmp_path / "folder", "file"), tmp_path / "trash")
    assert aside.parent == tmp_path / "trash"
    assert aside.name.startswith("folder-")
    assert (names_in(aside), names_in(tmp_path)) == (["file"], ["trash"])


def test_a_folder_is_set_aside_as_often_as_it_is_there(tmp_path: Path) -> None:
    found = {set_aside(make_folder(tmp_path / "folder", "file"), tmp_path / "trash") for _ in range(3)}
    assert len(found) == len(names_in(tmp_path / "trash")) == 3


def test_a_folder_is_set_aside_beside_itself_when_the_trash_is_on_another_file_system(
    tmp_path: Path, other_disk: Path
) -> None:
    aside = set_aside(make_folder(other_disk / "folder", "file"), tmp_path / "trash")
    assert aside.parent == other_disk
    assert aside.name.startswith(PARTIAL)
    assert (names_in(aside), names_in(other_disk)) == (["file"], [aside.name])


def test_what_is_not_there_cannot_be_set_aside(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        set_aside(tmp_path / "nothing", tmp_path / "trash")


# second names


def test_a_shared_file_takes_its_room_once(tmp_path: Path) -> None:
    make_folder(tmp_path, "file")
    share_file(tmp_path / "file", tmp_path / "second")
    assert (tmp_path / "second").samefile(tmp_path / "file")


def test_a_file_is_copied_to_another_file_system(tmp_path: Path, other_disk: Path) -> None:
    make_folder(tmp_path, "file")
    share_file(tmp_path / "file", other_disk / "file")
    assert (other_disk / "file").read_text() == "file"


def test_a_shared_file_never_replaces_another(tmp_path: Path) -> None:
    make_folder(tmp_path, "file", "second")
    with pytest.raises(FileExistsError):
        share_file(tmp_path / "file", tmp_path / "second")
    assert (tmp_path / "second").read_text() == "second"


def test_a_file_that_is_not_there_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        share_file(tmp_path / "nothing", tmp_path / "second")
    assert names_in(tmp_path) == []


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
