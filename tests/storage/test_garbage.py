"""Garbage collection deletes what no pinned or recent run needs, whatever else is going on, and nothing else."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage.garbage
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.garbage import DAY, Collected, StoredObject, collect, folder_size, garbage, recent_roots, stored_objects
from storage.in_use import Claims
from storage.manifest import MANIFEST, Ref, Request
from storage.runs import RunRecord, StageRecord, pin_run, run_bytes, write_run
from storage.testing import write_artifact
from tests.storage.faults import PATIENCE, as_ordinary_user, output_of, snapshot, start_python

NOW = 2_000_000_000.0
FILES = {"values.bin": bytes(range(50)), "nested/table.bin": b"0123456789"}
OLD = 100.0  # days
UNKNOWN = "xyz"


# --- the pure part ---------------------------------------------------------------------------------------------------

Objects = dict[str, StoredObject]


def stored(key: str, *reads: str, arrived: float = 0.0) -> StoredObject:
    return StoredObject("statistics", key, 1, arrived, reads)


@st.composite
def graphs(draw: st.DrawFn, *, circles: bool) -> Objects:
    """Return artifacts that read each other, and some that are not there; without circles, only earlier ones."""
    keys = draw(st.permutations("abcdefgh"))[: draw(st.integers(0, 8))]
    found = {}
    for index, key in enumerate(keys):
        readable = [*(keys if circles else keys[:index]), *UNKNOWN]
        found[key] = stored(key, *draw(st.lists(st.sampled_from(readable), max_size=4)))
    order = draw(st.permutations(list(found)))
    return {key: found[key] for key in order}


roots_of_any_kind = st.sets(st.sampled_from("abcdefgh" + UNKNOWN), max_size=4)


def reached(roots: set[str], objects: Objects) -> set[str]:
    """Return the roots and all that they were made from: grows the set by one step until it stays as it is."""
    found = set(roots)
    while True:
        more = found | {read for key in found if key in objects for read in objects[key].reads}
        if more == found:
            return found
        found = more


@given(graphs(circles=False), roots_of_any_kind)
def test_an_object_goes_exactly_when_no_root_was_made_from_it(objects: Objects, roots: set[str]) -> None:
    kept = reached(roots, objects)
    assert garbage(roots, objects) == tuple(each for key, each in objects.items() if key not in kept)


@given(graphs(circles=True), roots_of_any_kind)
def test_circles_and_unknown_keys_change_nothing_of_that(objects: Objects, roots: set[str]) -> None:
    kept = reached(roots, objects)
    assert garbage(roots, objects) == tuple(each for key, each in objects.items() if key not in kept)


@given(graphs(circles=True), roots_of_any_kind)
def test_what_stays_lacks_nothing_it_was_made_from(objects: Objects, roots: set[str]) -> None:
    staying = set(objects) - {each.key for each in garbage(roots, objects)}
    assert roots & set(objects) <= staying
    assert all(read in staying for key in staying for read in objects[key].reads if read in objects)


@given(graphs(circles=True), roots_of_any_kind)
def test_a_second_collection_finds_nothing(objects: Objects, roots: set[str]) -> None:
    going = {each.key for each in garbage(roots, objects)}
    assert garbage(roots, {key: each for key, each in objects.items() if key not in going}) == ()


@given(graphs(circles=True), roots_of_any_kind, roots_of_any_kind)
def test_one_more_root_never_lets_more_go(objects: Objects, roots: set[str], more: set[str]) -> None:
    assert set(garbage(roots | more, objects)) <= set(garbage(roots, objects))


def test_without_roots_everything_goes() -> None:
    objects = {"a": stored("a"), "b": stored("b", "a")}
    assert garbage((), objects) == tuple(objects.values())


def test_a_long_line_of_artifacts_stays_whole() -> None:
    line = {str(index): stored(str(index), str(index + 1)) for index in range(5000)}
    assert garbage({"0"}, line) == ()


def run_of(
    *stages: Ref, name: str = "20250102T030405-aaaaaa", started: float | str = NOW, state: str = "completed"
) -> RunRecord:
    text = started if isinstance(started, str) else datetime.fromtimestamp(started, UTC).isoformat()
    records = [StageRecord(ref.stage, ref.stage, ref.key, "hit", "in the store", 0.0) for ref in stages]
    return RunRecord(name, "covercal run", text, 1.0, state, {}, records)


A, B = Ref("pool", "a"), Ref("pool", "b")


@pytest.mark.parametrize("state", ["completed", "failed"])
@pytest.mark.parametrize(("began", "stays"), [(NOW - 1, False), (NOW, True), (NOW + 1, True)])
def test_what_a_run_used_stays_from_its_begin_on(state: str, began: float, stays: bool) -> None:
    assert recent_roots([run_of(A, B, started=began, state=state)], (), [], NOW) == ({"a", "b"} if stays else set())


def test_what_a_pinned_run_used_stays_whatever_its_age() -> None:
    runs = [run_of(A, name="old", started=0), run_of(B, name="older", started=0)]
    assert recent_roots(runs, {"old", "gone"}, [], NOW) == {"a"}


@pytest.mark.parametrize(("arrived", "stays"), [(NOW - 1, False), (NOW, True), (NOW + 1, True)])
def test_what_has_just_come_stays_though_no_run_names_it(arrived: float, stays: bool) -> None:
    assert recent_roots([], (), [stored("a", "b", arrived=arrived)], NOW) == ({"a"} if stays else set())


def test_a_stage_that_never_had_a_key_is_no_root() -> None:
    assert recent_roots([run_of(Ref("pool", ""), A)], (), [], NOW) == {"a"}


def test_the_begin_of_a_run_is_understood_in_any_time_zone() -> None:
    began = datetime.fromtimestamp(NOW, UTC)
    for hours in (-11, 0, 13):
        there = began.astimezone(timezone(timedelta(hours=hours)))
        assert recent_roots([run_of(A, started=there.isoformat())], (), [], NOW) == {"a"}
        assert recent_roots([run_of(A, started=there.isoformat())], (), [], NOW + 1) == set()


# --- a store ---------------------------------------------------------------------------------------------------------


def put(store: ArtifactStore, number: int, *reads: Ref, age: float = OLD, stage: str = "statistics") -> Ref:
    """Put an artifact into a store without using it, and let it have come `age` days before `NOW`."""
    staged = store.root / "staging" / uuid.uuid4().hex
    staged.mkdir(parents=True)
    made = write_artifact(staged, FILES, stage=stage, sample=number)
    manifest = dataclasses.replace(made, inputs=[dataclasses.asdict(each) for each in reads])
    store.local.commit(manifest, staged)
    set_age(store.folder(stage, manifest.key), age)
    return manifest.ref


def set_age(path: Path, days: float) -> None:
    """Let a file, or a folder and everything in it, have been written `days` before `NOW`."""
    when = NOW - days * DAY
    for each in (*(path.rglob("*") if path.is_dir() else ()), path):
        os.utime(each, (when, when))


def damage(store: ArtifactStore, ref: Ref, manifest: bytes | None = None, age: float = OLD) -> None:
    """Take the manifest of an artifact away, or write another one."""
    folder = store.folder(ref.stage, ref.key)
    (folder / MANIFEST).unlink() if manifest is None else (folder / MANIFEST).write_bytes(manifest)
    set_age(folder, age)


def rewrite_inputs(store: ArtifactStore, ref: Ref, inputs: list[dict[str, str]]) -> None:
    """Let a manifest list other inputs than it did."""
    found = store.look_up(ref.stage, ref.key).manifest
    damage(store, ref, dataclasses.replace(found, inputs=inputs).to_bytes())


def write_file(path: Path, age: float = OLD, text: str = "half of it") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    set_age(path, age)
    return path


def record(store: ArtifactStore, *refs: Ref, age: float, **changes: Any) -> RunRecord:
    """Write the record of a run that used some artifacts."""
    run = run_of(*refs, started=NOW - age * DAY, **changes)
    write_run(store.root, run)
    return run


def here(store: ArtifactStore) -> set[str]:
    """Return the keys of all artifact folders that lie there."""
    return {key for _, key in store.folders()}


def keys(*refs: Ref) -> set[str]:
    return {ref.key for ref in refs}


def outside_locks(store: ArtifactStore) -> dict[str, tuple[int, int, int]]:
    return {name: status for name, status in snapshot(store.root).items() if name.split("/")[0] not in ("locks", ".")}


def leftovers(store: ArtifactStore) -> list[Path]:
    """Return everything that lies where builds work, and copies beside artifacts."""
    places = [*(store.root / "staging").glob("*"), *(store.root / "work").glob("*")]
    return sorted([*places, *(store.root / "objects").glob("*/*/.partial-*")])


def put_leftovers(store: ArtifactStore, key: str) -> list[Path]:
    """Put there what builds that were cut short leave behind, in all its kinds."""
    unique = uuid.uuid4().hex
    folders = [
        store.root / "staging" / f"{key}-{unique}",
        store.root / "staging" / f"{key}-{unique}-{unique}",
        store.root / "objects" / "pool" / key[:2] / f".partial-{key}-{unique}",
        store.root / "objects" / "pool" / key[:2] / f".partial-.partial-{key}-{unique}-{unique}",
        store.root / "work" / key,
    ]
    for folder in folders:
        write_file(folder / "nested" / "file", text="some bytes")
        set_age(folder, OLD)
    return sorted(folders)


@pytest.fixture(autouse=True)
def _nothing_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about a power cut, and flushing is as slow as the disk of the day."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def mixed(store: ArtifactStore) -> ArtifactStore:
    """A store with pinned, recent, young and unneeded artifacts, damaged ones, and leftovers of every kind."""
    chain = [put(store, 0)]
    for number in range(1, 4):
        chain.append(put(store, number, chain[-1]))
    record(store, chain[1], age=OLD, name="pinned-run")
    pin_run(store.root, "pinned-run")
    record(store, put(store, 10, put(store, 11)), age=10, name="recent-run")
    put(store, 20, put(store, 21), age=10)
    put(store, 30, chain[0])
    damage(store, put(store, 40))
    damage(store, put(store, 41), b"{}")
    put_leftovers(store, "f" * 64)
    return store


def test_a_dry_run_deletes_nothing(mixed: ArtifactStore) -> None:
    before = outside_locks(mixed)
    assert collect(mixed, 30, dry_run=True, now=NOW).size > 0
    assert outside_locks(mixed) == before


def test_a_dry_run_lists_exactly_what_the_real_one_deletes(mixed: ArtifactStore) -> None:
    planned = collect(mixed, 30, dry_run=True, now=NOW)
    assert collect(mixed, 30, now=NOW) == planned
    assert (len(planned.objects), len(planned.leftovers)) == (5, 5)


def test_what_is_listed_is_what_is_gone_from_the_disk(mixed: ArtifactStore) -> None:
    before, size_before = here(mixed), folder_size(mixed.root / "objects") + folder_size(mixed.root / "staging")
    size_before += folder_size(mixed.root / "work")
    found = collect(mixed, 30, now=NOW)
    assert before - here(mixed) == {each.key for each in found.objects}
    assert not any(each.path.exists() for each in found.leftovers)
    assert leftovers(mixed) == []
    size_after = folder_size(mixed.root / "objects")
    assert found.size == size_before - size_after > 0
    assert found.kept == len(here(mixed))


def test_a_second_collection_of_a_store_deletes_nothing(mixed: ArtifactStore) -> None:
    kept = collect(mixed, 30, now=NOW).kept
    before = outside_locks(mixed)
    assert collect(mixed, 30, now=NOW) == Collected((), (), kept, 0)
    assert outside_locks(mixed) == before


def test_an_empty_store_has_no_garbage(store: ArtifactStore) -> None:
    store.prepare()
    assert collect(store, 0) == Collected((), (), 0, 0)


def test_artifacts_that_no_run_names_go_when_they_are_old(store: ArtifactStore) -> None:
    old, young = put(store, 1, age=31), put(store, 2, age=29)
    found = collect(store, 30, now=NOW)
    assert [(each.stage, each.key) for each in found.objects] == [(old.stage, old.key)]
    assert here(store) == keys(young)


def test_by_default_a_month_is_kept_and_now_is_now(store: ArtifactStore) -> None:
    old, young = put(store, 1), put(store, 2)
    for ref, days in ((old, 31), (young, 29)):
        when = time.time() - days * DAY
        os.utime(store.folder(ref.stage, ref.key) / MANIFEST, (when, when))
    collect(store)
    assert here(store) == keys(young)


def test_young_artifacts_stay_with_all_they_were_made_from(store: ArtifactStore) -> None:
    first = put(store, 1)
    second = put(store, 2, first, put(store, 3))
    other = put(store, 4, first)
    young = put(store, 5, second, age=1)
    collect(store, 30, now=NOW)
    assert here(store) >= keys(first, second, young)
    assert other.key not in here(store)
    assert len(here(store)) == 4


@pytest.mark.parametrize("state", ["completed", "failed"])
def test_artifacts_of_runs_of_the_last_days_stay_with_all_they_were_made_from(store: ArtifactStore, state: str) -> None:
    first = put(store, 1)
    second, other = put(store, 2, first), put(store, 3, first)
    record(store, second, age=29, state=state, name="recent")
    record(store, other, age=31, name="old")
    collect(store, 30, now=NOW)
    assert here(store) == keys(first, second)


def test_artifacts_of_pinned_runs_stay_with_all_they_were_made_from_until_they_are_unpinned(
    store: ArtifactStore,
) -> None:
    first = put(store, 1)
    second, other = put(store, 2, first), put(store, 3, first)
    record(store, second, age=OLD, name="pinned")
    pin_run(store.root, "pinned")
    collect(store, 0, now=NOW)
    assert here(store) == keys(first, second)
    assert other.key not in here(store)
    pin_run(store.root, "pinned", pinned=False)
    collect(store, 0, now=NOW)
    assert here(store) == set()


def test_what_a_run_names_and_is_not_there_changes_nothing(store: ArtifactStore) -> None:
    kept = put(store, 1, Ref("pool", "c" * 64))
    record(store, kept, Ref("pool", "d" * 64), Ref("pool", ""), age=1)
    assert collect(store, 30, now=NOW).kept == 1


def test_a_damaged_folder_without_manifest_goes_when_it_is_old(store: ArtifactStore) -> None:
    old, young = put(store, 1), put(store, 2)
    damage(store, old, age=31)
    damage(store, young, age=29)
    found = collect(store, 30, now=NOW)
    assert [each.key for each in found.objects] == [old.key]
    assert here(store) == keys(young)


def test_a_damaged_artifact_of_a_recent_run_stays(store: ArtifactStore) -> None:
    damaged = put(store, 1)
    damage(store, damaged, b"{}")
    record(store, damaged, age=1)
    collect(store, 30, now=NOW)
    assert here(store) == keys(damaged)


def test_artifacts_that_read_each_other_in_a_circle_go_together(store: ArtifactStore) -> None:
    first = put(store, 1)
    second = put(store, 2, first)
    rewrite_inputs(store, first, [dataclasses.asdict(second)])
    assert len(collect(store, 30, now=NOW).objects) == 2


# what builds leave behind


def test_what_dead_builds_left_is_swept(store: ArtifactStore) -> None:
    put_leftovers(store, "f" * 64)
    found = collect(store, 30, now=NOW)
    assert leftovers(store) == []
    assert {each.size for each in found.leftovers} == {len("some bytes")}


def test_staging_and_copies_of_dead_builds_are_swept_however_young(store: ArtifactStore) -> None:
    *swept, work = put_leftovers(store, "f" * 64)
    for each in (*swept, work):
        set_age(each, 0)
    found = collect(store, 30, now=NOW)
    assert sorted(each.path for each in found.leftovers) == swept
    assert leftovers(store) == [work]


@pytest.mark.parametrize(("age", "stays"), [(29, True), (31, False)])
def test_the_work_of_a_build_that_is_not_finished_stays_until_it_is_old(
    store: ArtifactStore, age: float, stays: bool
) -> None:
    part = write_file(store.work_folder("f" * 64) / "block-0" / "part", age)
    set_age(store.work_folder("f" * 64), age)
    collect(store, 30, now=NOW)
    assert part.exists() is stays


def test_the_newest_change_deep_in_a_work_folder_counts(store: ArtifactStore) -> None:
    part = write_file(store.work_folder("f" * 64) / "block-0" / "part", age=29)
    for folder in (part.parent, part.parent.parent):
        os.utime(folder, (NOW - OLD * DAY,) * 2)
    collect(store, 30, now=NOW)
    assert part.exists()


def test_the_work_of_a_rebuild_that_was_cut_short_stays(store: ArtifactStore) -> None:
    damaged = put(store, 1, age=0)
    path = store.folder(damaged.stage, damaged.key) / next(iter(FILES))
    path.chmod(0o644)
    path.write_bytes(b"")
    part = write_file(store.work_folder(damaged.key) / "part", age=0)
    assert collect(store, 30, now=NOW).leftovers == ()
    assert part.exists()


def test_the_work_of_a_build_goes_at_once_when_its_artifact_is_there(store: ArtifactStore) -> None:
    finished = put(store, 1, age=0)
    write_file(store.work_folder(finished.key) / "part", age=0)
    (left,) = collect(store, 30, now=NOW).leftovers
    assert left.what == "work folder of a finished build"
    assert not store.work_folder(finished.key).exists()
    assert here(store) == keys(finished)


def test_only_artifacts_that_a_build_left_work_of_are_looked_at_file_by_file(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(store, number, age=0)
    worked = put(store, 3, age=0)
    write_file(store.work_folder(worked.key) / "part", age=0)
    looked_at: list[str] = []
    look_up = store.look_up
    monkeypatch.setattr(store, "look_up", lambda stage, key: looked_at.append(key) or look_up(stage, key))
    collect(store, 30, now=NOW)
    assert (looked_at, leftovers(store)) == ([worked.key], [])


def test_what_is_no_leftover_stays(store: ArtifactStore) -> None:
    strangers = [
        write_file(store.root / "staging" / "note.txt"),
        write_file(store.root / "work" / "not-a-key" / "file"),
        write_file(store.root / "demo" / "model.gguf"),
        write_file(store.root / "hashes" / f"{'a' * 64}.json"),
        write_file(store.root / "unsent" / f"pool-{'a' * 64}"),
        write_file(store.root / "runs" / "x.json.0123.partial"),
    ]
    collect(store, 0, now=NOW)
    assert all(each.exists() for each in strangers)


# --- what others use -------------------------------------------------------------------------------------------------

BUILDER = """
import json, os, sys
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Ref, Request
store = ArtifactStore(Path(sys.argv[1]))
inputs = tuple(Ref(**each) for each in json.loads(sys.argv[2]))
request = Request("selection", 1, {"of": [each.key for each in inputs]}, inputs)
def build(folder):
    for each in inputs:
        (folder / each.key).write_bytes((store.path(each) / "values.bin").read_bytes())
    work = store.work_folder(request.key)
    work.mkdir(parents=True)
    (work / "part").write_text("a finished part")
    for path in (work / "part", work, *folder.iterdir(), folder):
        os.utime(path, (0, 0))
    print(request.key, flush=True)
    sys.stdin.readline()
print(store.build_once(request, build).decision, flush=True)
sys.stdin.read()
"""
READER = """
import json, sys
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Ref, Request
store = ArtifactStore(Path(sys.argv[1]))
ref = Ref(**json.loads(sys.argv[2])[0])
manifest = store.look_up(ref.stage, ref.key).manifest
def build(folder):
    raise AssertionError("the artifact is there")
print(store.build_once(Request(ref.stage, manifest.version, manifest.material), build).decision, flush=True)
sys.stdin.read()
"""
Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(store: ArtifactStore) -> Iterator[Start]:
    """Return a function that starts a process which uses artifacts; it gives the process and its first line."""
    started = []

    def begin(script: str, *refs: Ref) -> tuple[subprocess.Popen[str], str]:
        process = start_python(script, store.root, json.dumps([dataclasses.asdict(ref) for ref in refs]))
        started.append(process)
        line = process.stdout.readline().strip()
        assert line, process.stderr.read()
        return process, line

    yield begin
    for process in started:
        with process:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)


def test_what_a_running_build_works_on_stays(store: ArtifactStore, start: Start) -> None:
    first = put(store, 1)
    read = [put(store, 2, first), put(store, 3)]
    unneeded = put(store, 4, first)
    process, key = start(BUILDER, *read)
    found = collect(store, 0, now=NOW)
    assert here(store) == keys(first, *read)
    assert [each.key for each in found.objects] == [unneeded.key]
    assert (found.kept, found.in_use, found.leftovers) == (3, 3, ())
    assert [path.name.partition("-")[0] for path in leftovers(store)] == [key, key]  # its staging, its work
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "built\n"
    assert store.verify("selection", key) == []


def test_what_a_build_worked_on_goes_once_it_is_killed(store: ArtifactStore, start: Start) -> None:
    read = [put(store, 1, put(store, 2)), put(store, 3)]
    process, key = start(BUILDER, *read)
    collect(store, 0, now=NOW)
    kill(process)
    found = collect(store, 0, now=NOW)
    assert {each.key for each in found.objects} >= keys(*read)
    assert sorted(each.path.name.partition("-")[0] for each in found.leftovers) == [key, key]
    assert (here(store), leftovers(store), found.in_use) == (set(), [], 0)


def test_what_a_living_process_has_found_stays_with_all_it_was_made_from(store: ArtifactStore, start: Start) -> None:
    first = put(store, 1)
    second, other = put(store, 2, first), put(store, 3, first)
    process, decision = start(READER, second)
    assert decision == "hit"
    found = collect(store, 0, now=NOW)
    assert (here(store), found.kept, found.in_use) == (keys(first, second), 2, 2)
    assert [each.key for each in found.objects] == [other.key]
    kill(process)
    collect(store, 0, now=NOW)
    assert here(store) == set()


def test_what_this_process_itself_has_found_stays(store: ArtifactStore) -> None:
    used, other = put(store, 1), put(store, 2)
    store.path(used)
    collect(store, 0, now=NOW)
    assert here(store) == keys(used)
    assert other.key not in here(store)


def test_what_is_kept_anyway_does_not_count_as_in_use(store: ArtifactStore, start: Start) -> None:
    young = put(store, 1, age=0)
    start(READER, young)
    assert collect(store, 30, now=NOW).in_use == 0


def test_a_dry_run_tells_what_is_in_use_as_the_real_one_does(store: ArtifactStore, start: Start) -> None:
    put(store, 1)
    start(BUILDER, put(store, 2))
    planned = collect(store, 0, dry_run=True, now=NOW)
    assert (len(planned.objects), planned.in_use) == (1, 1)
    assert collect(store, 0, now=NOW) == planned


# --- collections that go wrong ---------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import storage.garbage
from storage.artifacts import ArtifactStore
owner, name = {"set_aside": (storage.garbage, "set_aside"), "rmtree": (shutil, "rmtree")}[sys.argv[2]]
calls, last, real = 0, int(sys.argv[3]), getattr(owner, name)
def call(folder, *arguments, **keywords):
    global calls
    calls += 1
    if calls == last:
        if name == "rmtree":
            next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(folder, *arguments, **keywords)
setattr(owner, name, call)
storage.garbage.collect(ArtifactStore(Path(sys.argv[1])), 30, now=float(sys.argv[4]))
"""


@pytest.mark.parametrize(("step", "count"), [("set_aside", 1), ("set_aside", 4), ("set_aside", 8), ("rmtree", 3)])
def test_a_collection_that_is_killed_leaves_whole_artifacts_and_the_next_one_sweeps(
    mixed: ArtifactStore, step: str, count: int
) -> None:
    planned = collect(mixed, 30, dry_run=True, now=NOW)
    going = {each.key for each in planned.objects}
    staying = here(mixed) - going
    process = start_python(KILLED, mixed.root, step, count, NOW)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert here(mixed) >= staying
    readable = [manifest for manifest in mixed.manifests() if manifest.key not in going]
    assert len(readable) == len(staying)
    for manifest in mixed.manifests():
        assert mixed.look_up(manifest.stage, manifest.key).manifest == manifest
        assert mixed.verify(manifest.stage, manifest.key) == []
    collect(mixed, 30, now=NOW)
    assert (here(mixed), leftovers(mixed)) == (staying, [])


UNREADABLE: dict[str, bytes] = {
    "empty": b"",
    "cut": run_bytes(run_of())[:40],
    "no text": b"\xff\xfe",
    "null": b"null",
    "a list": b"[]",
    "without stages": json.dumps({"run": "a-run"}).encode(),
    "a field too many": json.dumps({**json.loads(run_bytes(run_of())), "more": 1}).encode(),
    "a stage that is a number": json.dumps({**json.loads(run_bytes(run_of())), "stages": [5]}).encode(),
    "a name that is none": json.dumps({**json.loads(run_bytes(run_of())), "run": "../x"}).encode(),
}


def stops_and_deletes_nothing(store: ArtifactStore, path: Path) -> None:
    """Assert that a collection ends with an error that names a record and leaves the store as it is."""
    before = outside_locks(store)
    with pytest.raises(StorageError, match=str(path)) as found:
        collect(store, 0, now=NOW)
    assert "Delete the file if the run no longer matters" in str(found.value)
    assert outside_locks(store) == before


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_a_run_record_that_cannot_be_read_stops_the_collection_and_is_named(store: ArtifactStore, text: bytes) -> None:
    put(store, 1)
    put_leftovers(store, "f" * 64)
    path = write_file(store.root / "runs" / "20250102T030405-aaaaaa.json")
    path.write_bytes(text)
    stops_and_deletes_nothing(store, path)


@pytest.mark.parametrize("started", ["yesterday", "", None, 5])
def test_a_run_record_without_a_time_stops_the_collection_and_is_named(store: ArtifactStore, started: Any) -> None:
    put(store, 1)
    path = write_file(store.root / "runs" / "20250102T030405-aaaaaa.json")
    path.write_bytes(json.dumps({**json.loads(run_bytes(run_of())), "started": started}).encode())
    stops_and_deletes_nothing(store, path)


def test_a_run_record_nested_without_end_stops_the_collection_and_is_named(store: ArtifactStore) -> None:
    put(store, 1)
    path = write_file(store.root / "runs" / "20250102T030405-aaaaaa.json", text="[" * 100_000)
    stops_and_deletes_nothing(store, path)


def test_a_run_record_that_may_not_be_read_stops_the_collection_and_is_named(public_folder: Path) -> None:
    store = ArtifactStore(public_folder / "cache")
    put(store, 1)
    path = write_file(store.root / "runs" / "20250102T030405-aaaaaa.json")
    for each in (store.root, *store.root.rglob("*")):
        each.chmod(0o777)
    path.chmod(0)
    before = here(store)
    with as_ordinary_user(), pytest.raises(StorageError, match=str(path)):
        collect(store, 0, now=NOW)
    assert here(store) == before


def test_a_folder_of_records_that_may_not_be_listed_stops_the_collection(public_folder: Path) -> None:
    store = ArtifactStore(public_folder / "cache")
    run = record(store, put(store, 1), age=OLD)
    pin_run(store.root, run.run)
    for each in (store.root, *store.root.rglob("*")):
        each.chmod(0o777)
    (store.root / "runs").chmod(0o333)
    before = here(store)
    with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot list {store.root / 'runs'}"):
        collect(store, 0, now=NOW)
    assert here(store) == before


def test_what_another_user_keeps_is_named_and_the_rest_goes(public_folder: Path) -> None:
    store = ArtifactStore(public_folder / "cache")
    theirs, *_ = sorted((put(store, number) for number in range(3)), key=lambda ref: ref.key)
    for each in (store.root, *store.root.rglob("*")):
        each.chmod(0o777)
    folder = store.folder(theirs.stage, theirs.key)
    folder.chmod(0o755)
    with as_ordinary_user(), pytest.raises(StorageError, match=f"1 of 3 folders .* first {folder}: Permission denied"):
        collect(store, 0, now=NOW)
    assert (here(store), leftovers(store)) == (keys(theirs), [])


@pytest.mark.parametrize("inputs", [[{"stage": "pool"}], [5], None, [{"stage": "pool", "key": ["x"], "digest": ""}]])
def test_a_manifest_without_proper_inputs_stops_no_collection(store: ArtifactStore, inputs: Any) -> None:
    strange, other = put(store, 1), put(store, 2)
    rewrite_inputs(store, strange, inputs)
    record(store, strange, age=1)
    collect(store, 30, now=NOW)
    assert here(store) == keys(strange)
    assert other.key not in here(store)


def test_a_store_that_may_only_be_read_is_no_place_to_collect_and_is_named(public_folder: Path) -> None:
    store = ArtifactStore(public_folder / "cache")
    put(store, 1)
    for each in (store.root, *store.root.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    before = here(store)
    with as_ordinary_user(), pytest.raises(StorageError, match=str(store.root)):
        collect(store, 0, now=NOW)
    assert here(store) == before


def let_happen_before_the_gate(monkeypatch: pytest.MonkeyPatch, event: Callable[[], object]) -> None:
    """Let something happen once, just before a collection keeps others from using the store."""
    real = Claims.removing
    waiting = [event]

    @contextmanager
    def removing(claims: Claims) -> Iterator[frozenset[str]]:
        if waiting:
            waiting.pop()()
        with real(claims) as used:
            yield used

    monkeypatch.setattr(Claims, "removing", removing)


def test_what_another_collection_has_deleted_is_no_error(mixed: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = collect(mixed, 30, dry_run=True, now=NOW)
    staying = here(mixed) - {each.key for each in planned.objects}
    let_happen_before_the_gate(monkeypatch, lambda: collect(mixed, 30, now=NOW))
    collect(mixed, 30, now=NOW)
    assert (here(mixed), leftovers(mixed)) == (staying, [])


def test_what_another_collection_is_deleting_is_no_error(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, 1)
    put_leftovers(store, "f" * 64)
    real = storage.garbage.folder_size

    def overtaken(folder: Path) -> int:
        size = real(folder)
        if folder.parent == store.root / "staging":  # what was set aside is deleted after others were let in again
            shutil.rmtree(folder)
        return size

    monkeypatch.setattr(storage.garbage, "folder_size", overtaken)
    collect(store, 0, now=NOW)
    assert (here(store), leftovers(store)) == (set(), [])


def test_a_run_that_begins_and_ends_while_the_store_is_listed_keeps_its_artifacts(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = put(store, 1)
    let_happen_before_the_gate(monkeypatch, lambda: record(store, used, age=0))
    collect(store, 30, now=NOW)
    assert here(store) == keys(used)


def test_a_run_that_is_pinned_while_the_store_is_listed_keeps_its_artifacts(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = put(store, 1)
    run = record(store, used, age=OLD)
    let_happen_before_the_gate(monkeypatch, lambda: pin_run(store.root, run.run))
    collect(store, 30, now=NOW)
    assert here(store) == keys(used)


def test_an_artifact_that_is_made_again_while_the_store_is_listed_stays(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = put(store, 1)
    damage(store, damaged)
    let_happen_before_the_gate(monkeypatch, lambda: put(store, 1, age=0))
    collect(store, 30, now=NOW)
    assert store.look_up(damaged.stage, damaged.key).manifest is not None


COLLECTOR = """
import sys
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.garbage import collect
print("ready", flush=True)
sys.stdin.readline()
found = collect(ArtifactStore(Path(sys.argv[1])), 30, now=float(sys.argv[2]))
print(len(found.objects), flush=True)
"""


def test_two_collections_at_once_delete_everything_once(mixed: ArtifactStore) -> None:
    planned = collect(mixed, 30, dry_run=True, now=NOW)
    staying = here(mixed) - {each.key for each in planned.objects}
    processes = [start_python(COLLECTOR, mixed.root, NOW) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(output_of(process)) for process in processes]
    assert sum(counts) >= len(planned.objects)
    assert (here(mixed), leftovers(mixed)) == (staying, [])


def test_a_build_after_a_collection_makes_again_what_went(store: ArtifactStore) -> None:
    ref = put(store, 1)
    manifest = store.look_up(ref.stage, ref.key).manifest
    collect(store, 0, now=NOW)
    request = Request(ref.stage, manifest.version, manifest.material)
    outcome = store.build_once(request, lambda folder: (folder / "values.bin").write_bytes(b"x") and None)
    assert (outcome.decision, outcome.ref.key) == ("built", ref.key)


def test_the_size_of_a_folder_counts_every_file_in_it(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b/c", "b/d/e", ".hidden"), 1):
        write_file(tmp_path / name, text="x" * number)
    assert folder_size(tmp_path) == sum(itertools.accumulate([1] * 4))
    assert folder_size(tmp_path / "gone") == 0


@pytest.mark.parametrize(("vanishing", "left"), [("b", 1), ("", 0)])
def test_the_size_of_a_folder_that_is_being_deleted_is_that_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanishing: str, left: int
) -> None:
    write_file(tmp_path / "folder" / "a", text="x")
    write_file(tmp_path / "folder" / "b" / "c", text="xx")
    real = os.scandir

    def overtaken(path: Path | str) -> Any:
        if Path(path) == tmp_path / "folder" / vanishing:
            monkeypatch.setattr(os, "scandir", real)
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", overtaken)
    assert folder_size(tmp_path / "folder") == left


def test_what_is_stored_is_told_with_what_it_reads_and_when_it_came(store: ArtifactStore) -> None:
    first = put(store, 1, age=3)
    second = put(store, 2, first, age=2)
    found = stored_objects(store)
    assert set(found) == keys(first, second)
    assert (found[second.key].reads, found[first.key].arrived) == ((first.key,), NOW - 3 * DAY)
    assert found[first.key].size == folder_size(store.folder(first.stage, first.key))
