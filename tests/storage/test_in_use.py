"""What living processes use is known to every other process, and to no one once they are dead."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.in_use import Claims, claims_of, last_change
from tests.storage.faults import (
    PATIENCE,
    as_ordinary_user,
    forbid_writing,
    snapshot,
    start_python,
)

KEY, OTHER = "a" * 64, "b" * 64
USER = """
import sys
from pathlib import Path
from storage.in_use import claims_of
claims = claims_of(Path(sys.argv[1]))
for key in sys.argv[2:]:
    claims.claim(key)
print("claimed", flush=True)
sys.stdin.read()
"""
FORKED_USER = """
import os, sys
from pathlib import Path
from storage.in_use import claims_of
root, parents_key, childs_key = Path(sys.argv[1]), *sys.argv[2:]
claims_of(root).claim(parents_key)
if child := os.fork():
    os.waitpid(child, 0)
else:
    claims_of(root).claim(childs_key)
    print("claimed by", os.getpid(), flush=True)
    sys.stdin.readline()
    sys.exit()  # a whole end, with everything that Python tidies up
print("child ended", flush=True)
sys.stdin.read()
"""
CLAIMER = """
import sys
from pathlib import Path
from storage.in_use import claims_of
root, number, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
claims = claims_of(root)
for index in range(count):
    claims.claim(f"{number:032x}{index:032x}")
    claims.claim(f"{index:064x}")
print("claimed", flush=True)
sys.stdin.read()
"""
Start = Callable[..., subprocess.Popen[str]]
StartForked = Callable[[str, str], tuple[subprocess.Popen[str], int]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty cache folder."""
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Return a function that starts a process which claims keys and lives until its input ends."""
    started = []

    def begin(*keys: str, script: str = USER) -> subprocess.Popen[str]:
        process = start_python(script, root, *keys)
        started.append(process)
        process.first_line = process.stdout.readline()
        assert process.first_line.startswith("claimed"), process.stderr.read()
        return process

    yield begin
    for process in started:
        end(process)


@pytest.fixture
def start_forked(start: Start) -> StartForked:
    """Return a function that starts a process with a forked child, each with a key of its own: process, child's id."""

    def begin(parents_key: str, childs_key: str) -> tuple[subprocess.Popen[str], int]:
        process = start(parents_key, childs_key, script=FORKED_USER)
        return process, int(process.first_line.split()[-1])

    return begin


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)


def end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes, so that what it forked ends too
        process.kill()


def used(root: Path) -> set[str]:
    """Return what somebody who wants to delete must spare."""
    with Claims(root).removing() as keys:
        return set(keys)


def notes(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "locks" / "in-use").iterdir())


def test_nothing_is_in_use_in_an_empty_store(root: Path) -> None:
    assert used(root) == set()


def test_what_this_process_claims_is_in_use(root: Path) -> None:
    claims_of(root).claim(KEY)
    assert used(root) == {KEY}


def test_claims_are_seen_by_other_processes(root: Path, start: Start) -> None:
    start(KEY, OTHER)
    start(OTHER, "c" * 64)
    assert used(root) == {KEY, OTHER, "c" * 64}


def test_claims_vanish_with_the_process_that_is_killed(root: Path, start: Start) -> None:
    killed = start(KEY)
    start(OTHER)
    kill(killed)
    assert used(root) == {OTHER}


def test_claims_vanish_with_the_process_that_ends(root: Path, start: Start) -> None:
    process = start(KEY)
    process.stdin.close()
    assert process.wait(PATIENCE) == 0
    assert used(root) == set()


def test_notes_of_the_dead_are_deleted_and_those_of_the_living_stay(root: Path, start: Start) -> None:
    kill(start(KEY))
    start(OTHER)
    assert len(notes(root)) == 4
    used(root)
    assert len(notes(root)) == 2
    assert used(root) == {OTHER}


def test_a_forked_child_has_claims_of_its_own(root: Path, start_forked: StartForked) -> None:
    parent, child = start_forked(KEY, OTHER)
    assert used(root) == {KEY, OTHER}
    assert len(notes(root)) == 4
    os.kill(child, signal.SIGKILL)
    assert parent.stdout.readline() == "child ended\n"
    assert used(root) == {KEY}


def test_claims_of_a_forked_child_outlive_its_parent(root: Path, start_forked: StartForked) -> None:
    parent, _ = start_forked(KEY, OTHER)
    kill(parent)
    assert OTHER in used(root)


def test_a_forked_child_that_ends_takes_no_claim_of_its_parent_along(root: Path, start_forked: StartForked) -> None:
    parent, _ = start_forked(KEY, OTHER)
    parent.stdin.write("end\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "child ended\n"
    assert used(root) == {KEY}


def test_a_key_is_noted_once_however_often_it_is_claimed(root: Path) -> None:
    claims = Claims(root)
    for _ in range(3):
        claims.claim(KEY)
    (text,) = (path.read_text() for path in (root / "locks" / "in-use").glob("*.keys"))
    assert text.split() == [KEY]


def test_one_process_has_one_set_of_claims_for_each_store(root: Path, tmp_path: Path) -> None:
    assert claims_of(root) is claims_of(root)
    claims_of(root).claim(KEY)
    (tmp_path / "other").mkdir()
    assert used(tmp_path / "other") == set()


def test_a_store_that_may_only_be_read_is_read_without_claims(public_folder: Path) -> None:
    forbid_writing(public_folder)
    before = snapshot(public_folder)
    with as_ordinary_user():
        Claims(public_folder).claim(KEY)
    assert snapshot(public_folder) == before


def test_a_claim_that_cannot_be_noted_names_the_folder(root: Path) -> None:
    (root / "locks").write_text("in the way")
    with pytest.raises(StorageError, match=f"Cannot note in {root}/locks/in-use what is in use"):
        Claims(root).claim(KEY)


def test_a_claim_that_could_not_be_noted_is_noted_the_next_time(root: Path) -> None:
    claims = Claims(root)
    (root / "locks").write_text("in the way")
    with pytest.raises(StorageError):
        claims.claim(KEY)
    (root / "locks").unlink()
    claims.claim(KEY)
    assert used(root) == {KEY}


def test_a_note_that_a_full_disk_tore_hides_no_later_one(root: Path) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    (mine,) = (root / "locks" / "in-use").glob("*.keys")
    with mine.open("a") as torn:
        torn.write(OTHER[:20])
    claims.claim(OTHER)
    assert used(root) >= {KEY, OTHER}


@pytest.mark.parametrize("made_again", [True, False], ids=["made again by others", "not there"])
def test_claims_begin_anew_when_the_cache_folder_was_wiped(root: Path, made_again: bool) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    shutil.rmtree(root)
    claims.claim(KEY)
    assert not root.exists()
    root.mkdir()
    if made_again:
        Claims(root).claim(OTHER)
    claims.claim(KEY)
    assert used(root) >= {KEY}


def test_all_claims_are_noted_again_when_the_notes_alone_were_deleted(root: Path) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    shutil.rmtree(root / "locks")
    claims.claim(OTHER)
    assert used(root) == {KEY, OTHER}


@pytest.fixture
def shared(public_folder: Path) -> Path:
    """A cache folder that every user can write to."""
    (public_folder / "locks" / "in-use").mkdir(parents=True)
    for each in (public_folder, *public_folder.rglob("*")):
        each.chmod(0o777)
    return public_folder


def test_what_is_noted_can_be_read_by_other_users_whatever_the_umask(shared: Path) -> None:
    claims, before = Claims(shared), os.umask(0o077)
    try:
        claims.claim(KEY)
    finally:
        os.umask(before)
    with as_ordinary_user():
        assert used(shared) == {KEY}


def test_notes_that_may_not_be_read_are_named_and_not_left_out(shared: Path) -> None:
    claims = Claims(shared)
    claims.claim(KEY)
    (mine,) = (shared / "locks" / "in-use").glob("*.keys")
    mine.chmod(0)
    with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot tell from {mine} what another process uses"):
        used(shared)


def test_a_folder_of_notes_that_may_not_be_listed_is_named(shared: Path) -> None:
    Claims(shared).claim(KEY)
    (shared / "locks" / "in-use").chmod(0o333)
    with as_ordinary_user(), pytest.raises(StorageError, match=r"Cannot list .*in-use: Permission denied"):
        used(shared)


def test_many_processes_that_claim_at_once_lose_no_key(root: Path) -> None:
    processes = [start_python(CLAIMER, root, number, 200) for number in range(1, 5)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        seen: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while len(seen) < 1000:
            now = used(root)
            assert seen <= now  # what was noted once stays noted, whoever notes more meanwhile
            seen = now
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        own = {f"{number:032x}{index:032x}" for number in range(1, 5) for index in range(200)}
        assert seen == own | {f"{index:064x}" for index in range(200)}
        for process in processes[:2]:
            kill(process)
        assert used(root) == {key for key in seen if int(key[:32], 16) not in (1, 2)}
    finally:
        for process in processes:
            end(process)


def test_no_key_is_noted_while_somebody_deletes(root: Path) -> None:
    process = start_python(CLAIMER, root, 1, 1)
    try:
        assert process.stdout.readline() == "ready\n"
        noted = threading.Event()
        threading.Thread(target=lambda: process.stdout.readline() and noted.set(), daemon=True).start()
        with Claims(root).removing() as keys:
            process.stdin.write("go\n")
            process.stdin.flush()
            assert not noted.wait(0.5)
            assert (keys, notes(root)) == (frozenset(), [])
        assert noted.wait(PATIENCE)
        assert len(used(root)) == 2
    finally:
        end(process)


@pytest.mark.parametrize(("claimed", "alone"), [((), True), ((KEY,), False), ((OTHER,), True), ((OTHER, KEY), False)])
def test_who_replaces_an_artifact_asks_whether_others_use_it(
    root: Path, start: Start, claimed: tuple[str, ...], alone: bool
) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    if claimed:
        start(*claimed)
    with claims.removing_as_only_user(KEY) as found:
        assert found is alone


def in_another_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)


def test_who_replaces_an_artifact_asks_whether_other_threads_use_it(root: Path) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    in_another_thread(lambda: claims.claim(KEY))
    with claims.removing_as_only_user(KEY) as alone:
        assert not alone


def test_a_thread_that_found_nothing_uses_nothing(root: Path) -> None:
    claims = Claims(root)

    def look() -> None:
        claims.claim(KEY)
        claims.leave(KEY)

    in_another_thread(look)
    claims.claim(KEY)
    with claims.removing_as_only_user(KEY) as alone:
        assert alone
    assert used(root) == {KEY}


def test_who_is_the_last_user_is_the_only_one(root: Path, start: Start) -> None:
    claims = Claims(root)
    claims.claim(KEY)
    kill(start(KEY))
    with claims.removing_as_only_user(KEY) as alone:
        assert alone
    assert used(root) == {KEY}


def test_claims_of_before_a_deletion_still_count_after_it(root: Path, start: Start) -> None:
    start(KEY)
    assert [used(root) for _ in range(3)] == [{KEY}] * 3


def test_the_last_change_of_a_folder_is_that_of_its_newest_file(tmp_path: Path) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "file").write_text("x")
    for path, seconds in ((("deep", "file"), 300), (("deep",), 200), ((), 100)):
        os.utime(tmp_path.joinpath("work", *path), (seconds, seconds))
    assert last_change(tmp_path / "work") == 300
    os.utime(tmp_path / "work", (400, 400))
    assert last_change(tmp_path / "work") == 400


def test_a_folder_that_is_gone_changed_just_now(tmp_path: Path) -> None:
    before = time.time()
    assert last_change(tmp_path / "gone") >= before
