"""The store builds once, commits whole artifacts, and says why it did what it did."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from storage.artifacts import ArtifactStore
from storage.errors import MissingArtifactError, StorageError, UnwritableStoreError
from storage.keys import canonical_json, content_digest
from storage.local import DAMAGED
from storage.manifest import MANIFEST, SEAL, Decision, Outcome, Ref, Request, sealed
from tests.storage.faults import (
    PATIENCE,
    as_ordinary_user,
    forbid_writing,
    output_of,
    snapshot,
    start_python,
    until_it_waits_for_a_lock,
)

UPSTREAM = Ref("pool", "a" * 64, "b" * 64)
REQUEST = Request("statistics", 2, {"pool": {"stage": "pool", "key": "a" * 64}, "skip": 1}, (UPSTREAM,))
FILES = {"nested/table.bin": bytes(range(40)), "values.bin": b"0123456789"}
INFO = {"rows": 2, "name": "é"}


def build(folder: Path) -> dict[str, Any]:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return INFO


def must_not_build(folder: Path) -> None:
    raise AssertionError("the builder was called for an artifact that is in the store")


def write_one(content: str) -> Callable[[Path], None]:
    def build_one(folder: Path) -> None:
        (folder / "file").write_text(content)

    return build_one


def file(name: str) -> str:
    """Return how a reason begins that is about a file of the artifact of `REQUEST`."""
    return f"file statistics/{REQUEST.key[:12]}/{name}"


def copy_of(store: ArtifactStore, root: Path) -> ArtifactStore:
    """Return a store with the same artifacts, of which this process has used none."""
    shutil.copytree(store.root, root)
    return ArtifactStore(root)


def noted(store: ArtifactStore) -> list[str]:
    """Return the keys that are noted as in use, once for every time."""
    return [key for notes in (store.root / "locks" / "in-use").glob("*.keys") for key in notes.read_text().split()]


def outside_locks(store: ArtifactStore) -> dict[str, tuple[int, int, int]]:
    return {name: status for name, status in snapshot(store.root).items() if name.split("/")[0] != "locks"}


def folder_of(store: ArtifactStore) -> Path:
    return store.folder(REQUEST.stage, REQUEST.key)


def edit_manifest(store: ArtifactStore, **changes: Any) -> None:
    """Change fields of a manifest and seal it again, as no disk does by itself."""
    path = folder_of(store) / MANIFEST
    path.write_bytes(sealed({**fields_of(path), **changes}))


def fields_of(path: Path) -> dict[str, Any]:
    """Return what a manifest says, without its seal."""
    return {name: value for name, value in json.loads(path.read_bytes()).items() if name != SEAL}


def staged(store: ArtifactStore) -> list[Path]:
    return list((store.root / "staging").glob("*"))


def reason_for_rebuild(store: ArtifactStore) -> str:
    found = store.look_up(REQUEST.stage, REQUEST.key)
    assert (found.manifest, found.damaged) == (None, True)
    return found.reason


@pytest.fixture
def built(store: ArtifactStore) -> Outcome:
    """The outcome of the first build of `REQUEST`."""
    return store.build_once(REQUEST, build)


# hit and build


def test_what_is_not_there_is_built(built: Outcome) -> None:
    assert built.decision is Decision.BUILT


def test_what_is_there_is_a_hit_and_not_built_again(store: ArtifactStore, built: Outcome) -> None:
    again = store.build_once(REQUEST, must_not_build)
    assert (again.decision, again.reason, again.ref) == (Decision.HIT, "in the store", built.ref)


def test_a_hit_gives_the_info_of_the_build(store: ArtifactStore, built: Outcome) -> None:
    assert store.build_once(REQUEST, must_not_build).info == built.info == INFO


def test_a_builder_may_give_no_info(store: ArtifactStore) -> None:
    assert store.build_once(REQUEST, write_one("x")).info == {}


def test_the_files_are_there_as_they_were_written(store: ArtifactStore, built: Outcome) -> None:
    folder = store.path(built.ref)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_an_artifact_lies_under_its_stage_and_key(store: ArtifactStore, built: Outcome) -> None:
    key = built.ref.key
    assert store.path(built.ref) == store.root / "objects" / "statistics" / key[:2] / key


def test_the_builder_gets_an_empty_folder_outside_of_the_artifacts(store: ArtifactStore) -> None:
    found = []
    store.build_once(REQUEST, lambda folder: found.append((list(folder.iterdir()), folder.parent)))
    assert found == [([], store.root / "staging")]


def test_two_stores_see_one_artifact(store: ArtifactStore, built: Outcome) -> None:
    assert ArtifactStore(store.root).build_once(REQUEST, must_not_build).ref == built.ref


def test_an_artifact_moves_with_its_store(store: ArtifactStore, built: Outcome, tmp_path: Path) -> None:
    shutil.copytree(store.root, tmp_path / "elsewhere")
    assert ArtifactStore(tmp_path / "elsewhere").build_once(REQUEST, must_not_build).ref == built.ref


def test_another_stage_version_is_another_artifact(store: ArtifactStore, built: Outcome) -> None:
    newer = store.build_once(Request(REQUEST.stage, 3, REQUEST.material), build)
    assert (newer.decision, newer.ref.key == built.ref.key) == (Decision.BUILT, False)


def test_inputs_are_not_part_of_the_key(built: Outcome) -> None:
    assert Request(REQUEST.stage, REQUEST.version, REQUEST.material).key == built.ref.key


def test_a_hit_writes_nothing_but_that_the_artifact_is_in_use(
    store: ArtifactStore, built: Outcome, tmp_path: Path
) -> None:
    copy = copy_of(store, tmp_path / "copy")
    before = outside_locks(copy)
    copy.build_once(REQUEST, must_not_build)
    copy.path(built.ref)
    assert outside_locks(copy) == before


def test_the_second_hit_of_a_process_writes_nothing_at_all(store: ArtifactStore, built: Outcome) -> None:
    before = snapshot(store.root)
    store.build_once(REQUEST, must_not_build)
    store.path(built.ref)
    assert snapshot(store.root) == before


def test_a_build_notes_once_that_this_process_uses_its_artifact(store: ArtifactStore, built: Outcome) -> None:
    assert noted(store) == [built.ref.key]


@pytest.mark.parametrize(
    "use",
    [
        lambda store, ref: store.build_once(REQUEST, must_not_build),
        lambda store, ref: store.path(ref),
        lambda store, ref: store.manifest(ref),
        lambda store, ref: store.claim(ref.stage, ref.key),
    ],
    ids=["build_once", "path", "manifest", "claim"],
)
def test_who_reads_an_artifact_notes_that_it_is_in_use(
    store: ArtifactStore, built: Outcome, tmp_path: Path, use: Callable[[ArtifactStore, Ref], object]
) -> None:
    copy = copy_of(store, tmp_path / "copy")
    shutil.rmtree(copy.root / "locks")
    use(copy, built.ref)
    assert noted(copy) == [built.ref.key]


def test_who_only_looks_uses_nothing(store: ArtifactStore, built: Outcome, tmp_path: Path) -> None:
    copy = copy_of(store, tmp_path / "copy")
    before = snapshot(copy.root)
    assert copy.look_up(REQUEST.stage, REQUEST.key).manifest is not None
    assert [each.ref for each in copy.manifests()] == [built.ref]
    assert snapshot(copy.root) == before


def test_a_store_that_may_only_be_read_still_hits(store: ArtifactStore, built: Outcome, public_folder: Path) -> None:
    copy = copy_of(store, public_folder / "cache")
    forbid_writing(copy.root)
    with as_ordinary_user():
        assert copy.prepare().build_once(REQUEST, must_not_build).decision is Decision.HIT


# the reason of a build


def test_the_first_of_a_stage_says_so(built: Outcome) -> None:
    assert built.reason == "first of its stage"


def test_a_changed_parameter_is_the_reason_of_a_build(store: ArtifactStore, built: Outcome) -> None:
    other = store.build_once(Request(REQUEST.stage, REQUEST.version, {**REQUEST.material, "skip": 0}), build)
    assert other.reason == "skip: 1 -> 0"


def test_a_changed_upstream_artifact_is_the_reason_of_a_build(store: ArtifactStore, built: Outcome) -> None:
    material = {**REQUEST.material, "pool": {"stage": "pool", "key": "c" * 64}}
    other = store.build_once(Request(REQUEST.stage, REQUEST.version, material), build)
    assert other.reason == "pool: pool aaaaaaaa -> pool cccccccc"


def test_artifacts_of_other_stages_are_no_reason(store: ArtifactStore, built: Outcome) -> None:
    assert store.build_once(Request("pool", 1, {}), build).reason == "first of its stage"


def test_an_artifact_is_never_compared_with_itself(store: ArtifactStore, built: Outcome) -> None:
    store.build_once(Request(REQUEST.stage, REQUEST.version, {**REQUEST.material, "skip": 0}), build)
    assert store.explain(REQUEST) == "skip: 0 -> 1"


def test_a_reason_can_be_asked_for_without_a_build(store: ArtifactStore, built: Outcome) -> None:
    before = snapshot(store.root)
    assert store.explain(Request(REQUEST.stage, 5, REQUEST.material)) == "statistics stage version 2 -> 5"
    assert snapshot(store.root) == before


def of_pool(pool: Ref, by: str, skip: int = 1) -> Request:
    """Return statistics of a pool, which counts by its `key` or by its `digest`."""
    return Request("statistics", 2, {"pool": {"stage": "pool", by: getattr(pool, by)}, "skip": skip}, (pool,))


def build_pool(store: ArtifactStore, seed: int, version: int = 1) -> Ref:
    return store.build_once(Request("pool", version, {"seed": seed}), write_one(f"{seed} {version}")).ref


@pytest.mark.parametrize("by", ["key", "digest"])
def test_a_changed_parameter_of_an_upstream_artifact_is_the_reason_of_a_build(store: ArtifactStore, by: str) -> None:
    store.build_once(of_pool(build_pool(store, 0), by), build)
    assert store.build_once(of_pool(build_pool(store, 7), by), build).reason == "seed: 0 -> 7"


@pytest.mark.parametrize("by", ["key", "digest"])
def test_a_changed_stage_version_of_an_upstream_artifact_is_the_reason_of_a_build(
    store: ArtifactStore, by: str
) -> None:
    store.build_once(of_pool(build_pool(store, 0), by), build)
    newer = build_pool(store, 0, version=3)
    assert store.build_once(of_pool(newer, by), build).reason == "pool stage version 1 -> 3"


def test_an_upstream_artifact_that_is_gone_is_told_by_its_key(store: ArtifactStore) -> None:
    old, new = build_pool(store, 0), build_pool(store, 7)
    store.build_once(of_pool(old, "key"), build)
    shutil.rmtree(store.folder("pool", old.key))
    found = store.build_once(of_pool(new, "key"), build)
    assert found.reason == f"pool: pool {old.key[:8]} -> pool {new.key[:8]}"


def test_what_is_planned_upstream_is_the_reason_of_a_plan(store: ArtifactStore) -> None:
    store.build_once(of_pool(build_pool(store, 0), "key"), build)
    pool = Request("pool", 1, {"seed": 7})
    wanted = of_pool(Ref("pool", pool.key), "key", skip=0)
    assert store.explain(wanted, {pool.key: pool}) == "seed: 0 -> 7, skip: 1 -> 0"


def test_what_nobody_planned_upstream_is_told_by_its_key(store: ArtifactStore) -> None:
    old = build_pool(store, 0)
    store.build_once(of_pool(old, "key"), build)
    assert store.explain(of_pool(UPSTREAM, "key")) == f"pool: pool {old.key[:8]} -> pool aaaaaaaa"


def test_explaining_leaves_upstream_artifacts_unused(store: ArtifactStore, tmp_path: Path) -> None:
    store.build_once(of_pool(build_pool(store, 0), "key"), build)
    new = build_pool(store, 7)
    copy = copy_of(store, tmp_path / "copy")
    before = snapshot(copy.root)
    copy.explain(of_pool(new, "key"))
    assert snapshot(copy.root) == before


# what a build can go on from


def fail_after_work(store: ArtifactStore) -> None:
    """Begin a build of `REQUEST` that keeps some work and then fails."""

    def fail(folder: Path) -> None:
        store.work_folder(REQUEST.key).mkdir(parents=True)
        (store.work_folder(REQUEST.key) / "half").write_text("of it")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.build_once(REQUEST, fail)


def test_the_work_of_a_build_that_failed_is_kept(store: ArtifactStore) -> None:
    fail_after_work(store)
    assert (store.work_folder(REQUEST.key) / "half").read_text() == "of it"


def test_the_work_of_a_build_is_gone_once_its_artifact_is_there(store: ArtifactStore) -> None:
    fail_after_work(store)
    store.build_once(REQUEST, build)
    assert list((store.root / "work").iterdir()) == []


def test_a_build_leaves_the_work_of_other_builds_alone(store: ArtifactStore) -> None:
    fail_after_work(store)
    store.build_once(Request("pool", 1, {}), build)
    assert (store.work_folder(REQUEST.key) / "half").exists()


def test_the_reason_says_where_a_build_went_on(store: ArtifactStore) -> None:
    found = store.build_once(REQUEST, lambda folder: {**build(folder), "continued": "block 3 of 30"})
    assert found.reason == "first of its stage; continued at block 3 of 30"


def test_more_space_than_is_free_is_refused_before_the_work(store: ArtifactStore) -> None:
    free = shutil.disk_usage(store.prepare().root).free
    with pytest.raises(StorageError, match=rf"^The pool needs [\d,]+ MB under {store.root} and [\d,]+ MB are free"):
        store.require_space(free + 10**12, "The pool")


def test_space_that_is_free_is_enough(store: ArtifactStore) -> None:
    store.prepare().require_space(1, "The pool")


# errors of a builder


def test_an_error_of_the_builder_passes_through(store: ArtifactStore) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise ZeroDivisionError("in the mathematics")

    with pytest.raises(ZeroDivisionError, match="in the mathematics"):
        store.build_once(REQUEST, fail)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "/models/x"), ConnectionError("hub down")])
def test_an_oserror_that_is_not_the_stores_passes_through(store: ArtifactStore, error: OSError) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        store.build_once(REQUEST, fail)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_is_committed_when_the_builder_raises(store: ArtifactStore, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(error):
        store.build_once(REQUEST, fail)
    assert (list(store.folders()), staged(store)) == ([], [])


@pytest.mark.parametrize("name", [MANIFEST, DAMAGED])
def test_a_builder_that_writes_what_the_store_does_is_refused(store: ArtifactStore, name: str) -> None:
    def write_it(folder: Path) -> None:
        (folder / name).write_text("{}")

    with pytest.raises(ValueError, match=f"a build must not write {name}"):
        store.build_once(REQUEST, write_it)
    assert (list(store.folders()), staged(store)) == ([], [])


def test_a_builder_that_makes_a_symbolic_link_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="link is a symbolic link"):
        store.build_once(REQUEST, lambda folder: (folder / "link").symlink_to("/etc/hostname"))
    assert (list(store.folders()), staged(store)) == ([], [])


def test_every_file_has_the_permissions_of_a_new_file(store: ArtifactStore, tmp_path: Path) -> None:
    def build_private(folder: Path) -> None:
        build(folder)
        (folder / "values.bin").chmod(0o600)  # as libraries do that write to a temporary file and rename it

    (tmp_path / "new").touch()
    folder = store.path(store.build_once(REQUEST, build_private).ref)
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_info_that_is_not_json_commits_nothing(store: ArtifactStore) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        return {**build(folder), "folder": folder}

    with pytest.raises(TypeError):
        store.build_once(REQUEST, fail)
    assert (list(store.folders()), staged(store)) == ([], [])


def test_a_build_succeeds_after_one_that_failed(store: ArtifactStore) -> None:
    with pytest.raises(ZeroDivisionError):
        store.build_once(REQUEST, lambda folder: 1 // 0)
    assert store.build_once(REQUEST, build).decision is Decision.BUILT


def test_a_failed_rebuild_does_not_bring_the_damaged_artifact_back(store: ArtifactStore, built: Outcome) -> None:
    (store.path(built.ref) / "values.bin").unlink()
    with pytest.raises(ZeroDivisionError):
        store.build_once(REQUEST, lambda folder: 1 // 0)
    assert reason_for_rebuild(store) == f"{file('values.bin')} is missing"


def test_a_build_leaves_nothing_in_staging(store: ArtifactStore, built: Outcome) -> None:
    assert staged(store) == []


# manifests


def test_the_manifest_names_every_file_with_its_size_and_sha256(store: ArtifactStore, built: Outcome) -> None:
    assert store.manifest(built.ref).files == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }


def test_the_manifest_keeps_what_the_artifact_was_made_from(store: ArtifactStore, built: Outcome) -> None:
    manifest = store.manifest(built.ref)
    assert (manifest.stage, manifest.version, manifest.material) == ("statistics", 2, REQUEST.material)


def test_the_manifest_keeps_the_inputs(store: ArtifactStore, built: Outcome) -> None:
    assert store.manifest(built.ref).inputs == [{"stage": "pool", "key": "a" * 64, "digest": "b" * 64}]


def test_the_manifest_keeps_the_info(store: ArtifactStore, built: Outcome) -> None:
    assert store.manifest(built.ref).info == INFO


def test_the_manifest_keeps_the_versions_of_the_libraries(store: ArtifactStore, built: Outcome) -> None:
    assert store.manifest(built.ref).libraries["numpy"] == version("numpy")


def test_the_manifest_tells_when_it_was_made_with_its_time_zone(store: ArtifactStore, built: Outcome) -> None:
    assert datetime.fromisoformat(store.manifest(built.ref).created).utcoffset() is not None


def test_the_size_of_an_artifact_is_that_of_its_files(store: ArtifactStore, built: Outcome) -> None:
    assert store.manifest(built.ref).size == 40 + 10


def test_the_manifest_is_plain_json_on_the_disk(store: ArtifactStore, built: Outcome) -> None:
    assert json.loads((store.path(built.ref) / MANIFEST).read_bytes())["key"] == REQUEST.key


def test_everything_is_flushed_before_the_artifact_gets_its_name(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    not_flushed: list[set[int]] = []
    fsync, rename = os.fsync, os.rename

    def flush(handle: int) -> None:
        fsync(handle)
        flushed.add(os.fstat(handle).st_ino)

    def move(source: Path, target: Path) -> None:
        if Path(target) == folder_of(store):
            not_flushed.append({each.stat().st_ino for each in (Path(source), *Path(source).rglob("*"))} - flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move)
    store.build_once(REQUEST, build)
    assert not_flushed == [set()]


# digests


def test_the_digest_is_a_hash_of_names_and_contents_alone(built: Outcome) -> None:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert built.ref.digest == hashlib.sha256(b"content\0" + canonical_json(hashes)).hexdigest()


def test_the_digest_does_not_depend_on_what_the_artifact_was_made_from(store: ArtifactStore, built: Outcome) -> None:
    other = store.build_once(Request("selection", 9, {"seed": 1}), build)
    assert other.ref.digest == built.ref.digest


def test_the_digest_does_not_depend_on_the_info(store: ArtifactStore, built: Outcome) -> None:
    def talkative(folder: Path) -> dict[str, Any]:
        return {**build(folder), "seconds": 12.5}

    assert store.build_once(Request("pool", 1, {}), talkative).ref.digest == built.ref.digest


def test_another_content_is_another_digest(store: ArtifactStore) -> None:
    one, two = (store.build_once(Request("pool", 1, {"text": text}), write_one(text)) for text in "ab")
    assert one.ref.digest != two.ref.digest


# damage


def damage_missing_file(folder: Path) -> None:
    (folder / "values.bin").unlink()


def damage_missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "nested")


def damage_cut_file(folder: Path) -> None:
    (folder / "values.bin").write_bytes(FILES["values.bin"][:-1])


def damage_emptied_file(folder: Path) -> None:
    (folder / "values.bin").write_bytes(b"")


def damage_grown_file(folder: Path) -> None:
    (folder / "values.bin").write_bytes(FILES["values.bin"] + b"!")


def damage_deleted_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_emptied_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"")


def damage_cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-30])


def damage_binary_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(bytes(range(256)))


def damage_manifest_of_another_kind(folder: Path) -> None:
    (folder / MANIFEST).write_text("[1, 2, 3]")


def damage_manifest_without_a_field(folder: Path) -> None:
    value = fields_of(folder / MANIFEST)
    del value["digest"]
    (folder / MANIFEST).write_bytes(sealed(value))


def damage_manifest_without_a_seal(folder: Path) -> None:
    value = fields_of(folder / MANIFEST)
    (folder / MANIFEST).write_text(json.dumps(value, indent=1, sort_keys=True))


def damage_manifest_with_another_seal(folder: Path) -> None:
    value = {**fields_of(folder / MANIFEST), SEAL: "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(value, indent=1, sort_keys=True))


def damage_manifest_of_another_artifact(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(sealed({**fields_of(folder / MANIFEST), "key": "c" * 64}))


NOT_READABLE = f"{file(MANIFEST)} is not readable"
DAMAGES = [
    pytest.param(damage_missing_file, f"{file('values.bin')} is missing", id="missing file"),
    pytest.param(damage_missing_folder, f"{file('nested/table.bin')} is missing", id="missing folder"),
    pytest.param(damage_cut_file, f"{file('values.bin')} has 9 bytes, not 10", id="cut file"),
    pytest.param(damage_emptied_file, f"{file('values.bin')} has 0 bytes, not 10", id="emptied file"),
    pytest.param(damage_grown_file, f"{file('values.bin')} has 11 bytes, not 10", id="grown file"),
    pytest.param(damage_deleted_manifest, f"{file(MANIFEST)} is missing", id="deleted manifest"),
    pytest.param(damage_emptied_manifest, NOT_READABLE, id="emptied manifest"),
    pytest.param(damage_cut_manifest, NOT_READABLE, id="cut manifest"),
    pytest.param(damage_binary_manifest, NOT_READABLE, id="binary manifest"),
    pytest.param(damage_manifest_of_another_kind, NOT_READABLE, id="list as manifest"),
    pytest.param(damage_manifest_without_a_field, NOT_READABLE, id="field missing"),
    pytest.param(damage_manifest_without_a_seal, NOT_READABLE, id="seal missing"),
    pytest.param(damage_manifest_with_another_seal, NOT_READABLE, id="seal of something else"),
    pytest.param(
        damage_manifest_of_another_artifact,
        f"{file(MANIFEST)} belongs to statistics/cccccccccccc",
        id="manifest of another artifact",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_artifact_is_rebuilt_with_the_file_named(
    store: ArtifactStore, built: Outcome, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder_of(store))
    again = store.build_once(REQUEST, build)
    assert again.decision is Decision.REBUILT
    assert again.reason.startswith(reason)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_rebuilt_artifact_is_whole(
    store: ArtifactStore, built: Outcome, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder_of(store))
    again = store.build_once(REQUEST, build)
    assert (again.ref, store.verify(REQUEST.stage, REQUEST.key), staged(store)) == (built.ref, [], [])


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_artifact_has_no_path(
    store: ArtifactStore, built: Outcome, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder_of(store))
    with pytest.raises(MissingArtifactError, match=reason):
        store.path(built.ref)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_verify_names_what_a_look_up_finds(
    store: ArtifactStore, built: Outcome, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder_of(store))
    (fault,) = store.verify(REQUEST.stage, REQUEST.key)
    assert fault.startswith(reason)


def test_what_was_left_over_in_a_damaged_artifact_is_gone_after_a_rebuild(store: ArtifactStore, built: Outcome) -> None:
    (folder_of(store) / "stray").write_text("left over")
    (folder_of(store) / MANIFEST).unlink()
    store.build_once(REQUEST, build)
    assert not (folder_of(store) / "stray").exists()


def test_a_manifest_cut_at_any_byte_is_not_read(store: ArtifactStore, built: Outcome) -> None:
    path = folder_of(store) / MANIFEST
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert reason_for_rebuild(store).startswith(NOT_READABLE), length


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(store: ArtifactStore, built: Outcome) -> None:
    path = folder_of(store) / MANIFEST
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as stream:
        for bit in range(8 * len(whole)):
            place, byte = bit // 8, whole[bit // 8]
            os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit % 8]), place)
            found = store.look_up(REQUEST.stage, REQUEST.key)
            assert (found.manifest, found.damaged) == (None, True), bit
            assert found.reason.startswith(NOT_READABLE), bit
            os.pwrite(stream.fileno(), bytes([byte]), place)


@pytest.mark.parametrize(
    "files",
    [[], None, {"values.bin": {"size": 10}}, {"values.bin": {"size": "ten", "sha256": "0" * 64}}, {"a\0": {"size": 1}}],
)
def test_a_manifest_of_the_wrong_shape_is_a_rebuild(store: ArtifactStore, files: object) -> None:
    store.build_once(REQUEST, build)
    edit_manifest(store, files=files)
    again = store.build_once(REQUEST, build)
    assert again.decision is Decision.REBUILT
    assert again.reason.startswith(NOT_READABLE)


@pytest.mark.parametrize("name", ["version", "created", "info", "inputs", "libraries", "seconds"])
def test_a_manifest_that_holds_an_infinity_is_a_rebuild(store: ArtifactStore, built: Outcome, name: str) -> None:
    path = folder_of(store) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), name: float("inf")}, indent=1, sort_keys=True))
    assert store.build_once(REQUEST, build).reason.startswith(NOT_READABLE)


def test_a_garbled_manifest_is_no_hindrance_to_explain_another_build(store: ArtifactStore, built: Outcome) -> None:
    damage_manifest_without_a_seal(folder_of(store))
    other = store.build_once(Request(REQUEST.stage, REQUEST.version, {"skip": 0}), build)
    assert (other.decision, other.reason) == (Decision.BUILT, "first of its stage")


def test_a_folder_replaced_by_a_file_is_a_rebuild(store: ArtifactStore) -> None:
    store.build_once(REQUEST, build)
    folder = folder_of(store)
    (folder / "nested" / "table.bin").unlink()
    (folder / "nested").rmdir()
    (folder / "nested").touch()
    assert store.build_once(REQUEST, build).reason == f"{file('nested/table.bin')} is missing"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "nested/../../outside", "..", "nested\\..\\outside"])
def test_a_file_name_that_leaves_the_folder_is_refused(store: ArtifactStore, built: Outcome, name: str) -> None:
    edit_manifest(store, files={name: {"size": 0, "sha256": hashlib.sha256().hexdigest()}})
    assert "leaves the artifact's folder" in reason_for_rebuild(store)


# verify


def test_verify_finds_nothing_wrong_with_a_whole_artifact(store: ArtifactStore, built: Outcome) -> None:
    assert store.verify(REQUEST.stage, REQUEST.key) == []


def test_verify_says_what_is_not_in_the_store(store: ArtifactStore) -> None:
    assert store.verify(REQUEST.stage, REQUEST.key) == ["not in the store"]


def flip_a_bit(store: ArtifactStore) -> None:
    (folder_of(store) / "values.bin").write_bytes(b"0123456788")


def test_a_flipped_bit_of_the_same_size_is_a_hit_until_verify_found_it(store: ArtifactStore, built: Outcome) -> None:
    flip_a_bit(store)
    assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT


def test_verify_names_the_file_with_a_flipped_bit(store: ArtifactStore, built: Outcome) -> None:
    flip_a_bit(store)
    assert store.verify(REQUEST.stage, REQUEST.key) == [f"{file('values.bin')} does not match its sha256"]


def test_verify_names_every_damaged_file(store: ArtifactStore, built: Outcome) -> None:
    for name, content in FILES.items():
        (folder_of(store) / name).write_bytes(bytes(len(content)))
    assert len(store.verify(REQUEST.stage, REQUEST.key)) == len(FILES)


def test_verify_names_a_file_that_is_not_in_the_manifest(store: ArtifactStore, built: Outcome) -> None:
    (folder_of(store) / "nested" / "stray").touch()
    assert store.verify(REQUEST.stage, REQUEST.key) == [f"{file('nested/stray')} is not in the manifest"]


def test_a_file_that_is_not_in_the_manifest_is_no_reason_to_rebuild(store: ArtifactStore, built: Outcome) -> None:
    (folder_of(store) / "stray").touch()
    store.verify(REQUEST.stage, REQUEST.key)
    assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT


@pytest.mark.parametrize("change", [{"material": {"skip": 0}}, {"version": 1}], ids=["material", "version"])
def test_verify_names_altered_key_material(store: ArtifactStore, built: Outcome, change: dict[str, Any]) -> None:
    edit_manifest(store, **change)
    assert store.verify(REQUEST.stage, REQUEST.key) == [
        f"{file(MANIFEST)} holds key material that does not give its key"
    ]


def test_verify_names_an_altered_digest(store: ArtifactStore, built: Outcome) -> None:
    edit_manifest(store, digest="d" * 64)
    assert store.verify(REQUEST.stage, REQUEST.key) == [f"{file(MANIFEST)} lists files that do not give its digest"]


def test_only_damage_keeps_files_from_being_passed_on(store: ArtifactStore, built: Outcome) -> None:
    (folder_of(store) / "stray").touch()
    store.check_whole(built.ref, "was not used")
    flip_a_bit(store)
    with pytest.raises(MissingArtifactError, match=f"Artifact {built.ref.short} is damaged here and was not used: .*"):
        store.check_whole(built.ref, "was not used")
    assert reason_for_rebuild(store).startswith(f"{file('values.bin')} does not match its sha256")


def test_verify_notices_a_file_and_its_hash_replaced_together(store: ArtifactStore, built: Outcome) -> None:
    (folder_of(store) / "values.bin").write_bytes(b"forged....")
    files = store.manifest(built.ref).files
    forged = {"size": 10, "sha256": hashlib.sha256(b"forged....").hexdigest()}
    edit_manifest(store, files={**files, "values.bin": forged})
    assert store.verify(REQUEST.stage, REQUEST.key) == [f"{file(MANIFEST)} lists files that do not give its digest"]


def test_verify_survives_a_manifest_without_a_sha256(store: ArtifactStore) -> None:
    store.build_once(REQUEST, build)
    path = folder_of(store) / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    (fault,) = store.verify(REQUEST.stage, REQUEST.key)
    assert fault.startswith(NOT_READABLE)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_what_came_after_the_end_of_a_manifest_is_noticed(store: ArtifactStore, built: Outcome, size: int) -> None:
    with (folder_of(store) / MANIFEST).open("ab") as stream:
        stream.write(b"\n" * size)
    assert (store.verify(REQUEST.stage, REQUEST.key) == []) is (size == 0)


def test_verify_changes_nothing_of_a_whole_artifact(store: ArtifactStore, built: Outcome) -> None:
    before = snapshot(store.root)
    store.verify(REQUEST.stage, REQUEST.key)
    assert snapshot(store.root) == before


def test_verify_adds_nothing_but_its_mark_to_a_damaged_artifact(store: ArtifactStore, built: Outcome) -> None:
    flip_a_bit(store)
    before = snapshot(folder_of(store))
    store.verify(REQUEST.stage, REQUEST.key)
    after = snapshot(folder_of(store))
    assert set(after) - set(before) == {DAMAGED}
    assert {name for name in before if after[name] != before[name]} == {"."}


# the mark of verify


@pytest.fixture
def marked(store: ArtifactStore, built: Outcome) -> str:
    """What verify marked an artifact with whose file has a flipped bit."""
    flip_a_bit(store)
    store.verify(REQUEST.stage, REQUEST.key)
    return f"{file('values.bin')} does not match its sha256 (found by verify)"


def test_what_verify_found_is_rebuilt_by_the_next_run_with_the_file_named(store: ArtifactStore, marked: str) -> None:
    again = store.build_once(REQUEST, build)
    assert (again.decision, again.reason) == (Decision.REBUILT, marked)


def test_what_verify_found_can_no_longer_be_read(store: ArtifactStore, built: Outcome, marked: str) -> None:
    assert reason_for_rebuild(store) == marked
    with pytest.raises(MissingArtifactError, match=marked.partition(" (")[0]):
        store.path(built.ref)


def test_what_verify_found_is_well_after_the_rebuild(store: ArtifactStore, built: Outcome, marked: str) -> None:
    assert store.build_once(REQUEST, build).ref == built.ref
    assert store.verify(REQUEST.stage, REQUEST.key) == []
    assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT


def test_a_rebuild_that_fails_leaves_what_verify_found(store: ArtifactStore, marked: str) -> None:
    with pytest.raises(ZeroDivisionError):
        store.build_once(REQUEST, lambda folder: 1 // 0)
    assert reason_for_rebuild(store) == marked


def test_verify_finds_a_marked_artifact_as_damaged_as_before(store: ArtifactStore, marked: str) -> None:
    assert store.verify(REQUEST.stage, REQUEST.key) == [f"{file('values.bin')} does not match its sha256"]
    assert reason_for_rebuild(store) == marked


def test_verify_takes_its_mark_away_when_all_is_well_again(store: ArtifactStore, marked: str) -> None:
    (folder_of(store) / "values.bin").write_bytes(FILES["values.bin"])
    assert store.verify(REQUEST.stage, REQUEST.key) == []
    assert not (folder_of(store) / DAMAGED).exists()
    assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT


def test_a_mark_names_every_damaged_file(store: ArtifactStore, built: Outcome) -> None:
    for name, content in FILES.items():
        (folder_of(store) / name).write_bytes(bytes(len(content)))
    store.verify(REQUEST.stage, REQUEST.key)
    reason = store.build_once(REQUEST, build).reason
    assert all(f"{file(name)} does not match its sha256" in reason for name in FILES)


@pytest.mark.parametrize("change", [{"material": {"skip": 0}}, {"digest": "d" * 64}], ids=["material", "digest"])
def test_an_altered_manifest_that_verify_found_is_rebuilt(
    store: ArtifactStore, built: Outcome, change: dict[str, Any]
) -> None:
    edit_manifest(store, **change)
    store.verify(REQUEST.stage, REQUEST.key)
    again = store.build_once(REQUEST, build)
    assert (again.decision, again.ref) == (Decision.REBUILT, built.ref)
    assert again.reason.startswith(file(MANIFEST))


def test_who_may_only_read_verifies_and_leaves_no_mark(
    store: ArtifactStore, built: Outcome, public_folder: Path
) -> None:
    flip_a_bit(store)
    copy = copy_of(store, public_folder / "cache")
    forbid_writing(copy.root)
    with as_ordinary_user():
        assert copy.verify(REQUEST.stage, REQUEST.key) == [f"{file('values.bin')} does not match its sha256"]
    assert not (folder_of(copy) / DAMAGED).exists()


# names


@pytest.mark.parametrize("stage", ["", "Pool", "po/ol", "..", "pool1", "_pool", "pool\n", "pool.x"])
def test_a_stage_that_is_no_stage_is_refused(store: ArtifactStore, stage: str) -> None:
    with pytest.raises(StorageError, match="names no artifact"):
        store.look_up(stage, "a" * 64)


@pytest.mark.parametrize("key", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_a_key_that_is_no_key_is_refused(store: ArtifactStore, key: str) -> None:
    with pytest.raises(StorageError, match="names no artifact"):
        store.path(Ref("pool", key))


def test_a_request_with_a_bad_stage_writes_nothing(store: ArtifactStore) -> None:
    with pytest.raises(StorageError, match="names no artifact"):
        store.build_once(Request("../pool", 1, {}), build)
    assert not store.root.exists()


def test_a_reference_is_shown_by_stage_and_twelve_digits() -> None:
    assert Ref("pool", "0123456789abcdef" * 4).short == "pool/0123456789ab"


def test_an_artifact_that_was_never_built_has_no_path(store: ArtifactStore) -> None:
    with pytest.raises(MissingArtifactError, match="pool/aaaaaaaaaaaa cannot be read: not in the store"):
        store.path(UPSTREAM)


def test_an_artifact_that_was_never_built_has_no_manifest(store: ArtifactStore) -> None:
    with pytest.raises(MissingArtifactError, match="pool/aaaaaaaaaaaa cannot be read: not in the store"):
        store.manifest(UPSTREAM)


# listings


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store with twenty artifacts of one stage, so that two keys share their first digit, and one of another."""
    library = ArtifactStore(tmp_path_factory.mktemp("library"))
    for seed in range(20):
        library.build_once(Request("pool", 1, {"seed": seed}), write_one(str(seed)))
    library.build_once(Request("selection", 1, {}), write_one(""))
    return library


@pytest.fixture(scope="module")
def refs(library: ArtifactStore) -> list[Ref]:
    """The references to the artifacts of the library, from the folders that they lie in."""
    paths = sorted((library.root / "objects").glob("*/*/*"))
    return [Ref(path.parts[-3], path.name) for path in paths]


def test_a_listing_holds_every_artifact_in_the_order_of_stages_and_keys(
    library: ArtifactStore, refs: list[Ref]
) -> None:
    assert [(each.stage, each.key) for each in library.manifests()] == [(ref.stage, ref.key) for ref in refs]
    assert len(refs) == 21


def test_a_listing_can_be_of_one_stage(library: ArtifactStore, refs: list[Ref]) -> None:
    assert [each.key for each in library.manifests("selection")] == [refs[-1].key]


def test_an_empty_store_lists_nothing(store: ArtifactStore) -> None:
    assert (list(store.manifests()), list(store.folders())) == ([], [])


def test_a_listing_of_manifests_leaves_a_garbled_one_out(store: ArtifactStore, built: Outcome) -> None:
    other = store.build_once(Request("pool", 1, {}), build)
    damage_binary_manifest(folder_of(store))
    assert [each.ref for each in store.manifests()] == [other.ref]


def test_a_listing_of_folders_holds_the_damaged_ones_too(store: ArtifactStore, built: Outcome) -> None:
    other = store.build_once(Request("pool", 1, {}), build)
    damage_deleted_manifest(folder_of(store))
    assert list(store.folders()) == [("pool", other.ref.key), (REQUEST.stage, REQUEST.key)]


def test_a_key_that_begins_as_no_other_is_found_by_its_beginning(library: ArtifactStore, refs: list[Ref]) -> None:
    assert [library.find(ref.key[:12]).key for ref in refs] == [ref.key for ref in refs]


def test_an_artifact_is_found_by_stage_and_key(library: ArtifactStore, refs: list[Ref]) -> None:
    assert [library.find(ref.short).key for ref in refs] == [ref.key for ref in refs]


def test_a_stage_narrows_what_is_found(library: ArtifactStore, refs: list[Ref]) -> None:
    assert library.find("selection/").key == refs[-1].key


def test_a_beginning_that_several_keys_have_is_ambiguous(library: ArtifactStore, refs: list[Ref]) -> None:
    digits = [ref.key[0] for ref in refs if ref.stage == "pool"]
    digit = next(each for each in digits if digits.count(each) > 1)
    said = rf"^{digits.count(digit)} artifacts .*pool/{digit}.*give more digits"
    with pytest.raises(MissingArtifactError, match=said):
        library.find(f"pool/{digit}")


def test_a_beginning_that_no_key_has_is_not_found(library: ArtifactStore) -> None:
    with pytest.raises(MissingArtifactError, match=r"^0 artifacts have a key that begins with 'xyz'"):
        library.find("xyz")


# a disk that is full, a folder that cannot be written


def disk_full(folder: Path) -> None:
    build(folder)
    (folder / "large").write_bytes(bytes(2_500_000))
    raise OSError(errno.ENOSPC, "No space left on device", str(folder / "values.bin"))


def test_a_full_disk_is_an_error_with_its_cause_and_the_space_that_is_free_and_needed(store: ArtifactStore) -> None:
    said = r"artifact statistics/\w{12} .*No space left on device \([\d,.]+ MB free; .* more than the 2\.5 MB"
    with pytest.raises(StorageError, match=said) as found:
        store.build_once(REQUEST, disk_full)
    assert isinstance(found.value.__cause__, OSError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("IO Error: Could not write to file: No space left on device"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("[Errno 122] Error writing bytes to file. Detail: [errno 122] Disk quota exceeded"),
    ],
    ids=["duckdb", "safetensors", "pyarrow"],
)
def test_a_full_disk_that_a_library_tells_in_its_own_way_is_a_storage_error(
    store: ArtifactStore, error: Exception
) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(StorageError, match="run again when there is room") as found:
        store.build_once(REQUEST, fail)
    assert found.value.__cause__ is error


def test_a_full_disk_leaves_nothing_behind(store: ArtifactStore) -> None:
    with pytest.raises(StorageError):
        store.build_once(REQUEST, disk_full)
    assert (list(store.folders()), staged(store)) == ([], [])


def test_a_full_disk_is_not_taken_for_a_missing_artifact(store: ArtifactStore) -> None:
    with pytest.raises(StorageError) as found:
        store.build_once(REQUEST, disk_full)
    assert not isinstance(found.value, MissingArtifactError)


def test_the_build_succeeds_when_there_is_room_again(store: ArtifactStore) -> None:
    with pytest.raises(StorageError):
        store.build_once(REQUEST, disk_full)
    assert store.build_once(REQUEST, build).decision is Decision.BUILT


def test_a_full_disk_during_a_rebuild_leaves_the_damage_named(store: ArtifactStore, built: Outcome) -> None:
    damage_cut_file(folder_of(store))
    with pytest.raises(StorageError):
        store.build_once(REQUEST, disk_full)
    assert reason_for_rebuild(store) == f"{file('values.bin')} has 9 bytes, not 10"


LIMITED_FILE_SIZE = """
import json, resource, sys
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Request
from storage.errors import StorageError

store, request = ArtifactStore(Path(sys.argv[1])), Request("pool", 1, {})

def build(folder):
    (folder / "file").write_bytes(bytes(100_000))

unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
try:
    store.build_once(request, build)
except StorageError as error:
    said = str(error)
left = [str(p) for p in store.root.rglob("*") if p.is_file() and "locks" not in p.parts]
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
print(json.dumps({"said": said, "left": left, "then": store.build_once(request, build).decision}))
"""


def test_a_file_that_the_system_does_not_let_grow_is_a_storage_error(store: ArtifactStore) -> None:
    found = json.loads(output_of(start_python(LIMITED_FILE_SIZE, store.root)))
    assert "File too large" in found["said"]
    assert (found["left"], found["then"]) == ([], "built")


def test_a_store_below_a_file_names_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableStoreError, match=r"Not a directory.*COVERCAL_CACHE"):
        ArtifactStore(tmp_path / "file" / "cache").prepare()


def test_a_build_in_a_store_below_a_file_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableStoreError, match="COVERCAL_CACHE"):
        ArtifactStore(tmp_path / "file" / "cache").build_once(REQUEST, must_not_build)


def test_a_store_that_cannot_be_made_names_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UnwritableStoreError, match=r"cache is not writable .*COVERCAL_CACHE"):
        ArtifactStore(tmp_path / "cache").build_once(REQUEST, must_not_build)


def test_a_build_in_a_store_without_the_right_to_write_names_the_setting_to_change(public_folder: Path) -> None:
    forbid_writing(public_folder)
    with as_ordinary_user(), pytest.raises(UnwritableStoreError, match=r"Permission denied.*COVERCAL_CACHE"):
        ArtifactStore(public_folder).build_once(REQUEST, must_not_build)


def test_a_manifest_that_may_not_be_read_is_an_error_and_not_a_miss(public_folder: Path) -> None:
    store = ArtifactStore(public_folder / "cache")
    store.build_once(REQUEST, build)
    (folder_of(store) / MANIFEST).chmod(0)
    with as_ordinary_user(), pytest.raises(StorageError, match=r"Cannot read .*MANIFEST.json: Permission denied"):
        store.look_up(REQUEST.stage, REQUEST.key)


def test_a_locks_folder_that_cannot_be_made_is_a_storage_error(store: ArtifactStore) -> None:
    store.root.mkdir()
    (store.root / "locks").touch()
    with pytest.raises(StorageError, match="locks"):
        store.build_once(REQUEST, must_not_build)


def test_preparing_a_store_makes_its_folder(tmp_path: Path) -> None:
    assert ArtifactStore(tmp_path / "a" / "cache").prepare().root.is_dir()


# processes


BUILD_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Request

def build(folder):
    (folder / "file").write_text("half of wha")
    print("building", flush=True)
    time.sleep(600)

ArtifactStore(Path(sys.argv[1])).build_once(Request("pool", 1, {"seed": 0}), build)
"""


@pytest.fixture
def killed(store: ArtifactStore) -> Request:
    """The request whose build was killed halfway."""
    process = start_python(BUILD_UNTIL_KILLED, store.root)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate()
    return Request("pool", 1, {"seed": 0})


def test_a_killed_build_leaves_nothing_that_is_read(store: ArtifactStore, killed: Request) -> None:
    assert store.look_up(killed.stage, killed.key).reason == "not in the store"
    assert (list(store.manifests()), list(store.folders())) == ([], [])


def test_a_killed_build_does_not_block_the_next(store: ArtifactStore, killed: Request) -> None:
    again = store.build_once(killed, write_one("whole"))
    assert again.decision is Decision.BUILT
    assert (store.path(again.ref) / "file").read_text() == "whole"


FAULT_AT_EVERY_STEP = """
import errno, json, os, signal, sys
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Request, library_versions
from storage.errors import StorageError

library_versions()  # imports what a build imports, so that the steps are those of the store alone
ROOT, FAULT, DAMAGED = sys.argv[1], sys.argv[2], sys.argv[3] == "damaged"
CREATES = {"os.mkdir", "os.rename"}
REMOVES = {"os.remove", "os.rmdir", "shutil.rmtree"}
request, steps_left = Request("pool", 1, {}), None


def is_step(event, args):
    if event in REMOVES:
        return FAULT == "kill"  # removing needs no room
    path = os.fspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
    creates = event in CREATES or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
    return creates and path.startswith(ROOT) and (FAULT == "kill" or "/staging/" in path or "/objects" in path)


def hook(event, args):
    global steps_left
    if steps_left is None or not is_step(event, args):
        return
    steps_left -= 1
    if steps_left == 0:
        steps_left = None
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def build(folder):
    (folder / "nested").mkdir()
    (folder / "nested" / "file").write_text("content")


def build_with_fault(store, step):
    global steps_left
    steps_left = step
    try:
        store.build_once(request, build)
    except StorageError as error:
        return "stopped" if "No space left on device" in str(error) else str(error)
    finally:
        steps_left = None
    return "done"


def build_and_be_killed(store, step):
    child = os.fork()
    if child == 0:
        os._exit(0 if build_with_fault(store, step) == "done" else 1)
    status = os.waitpid(child, 0)[1]
    return "stopped" if os.WIFSIGNALED(status) else "done"


sys.addaudithook(hook)
report = []
for step in range(1, 100):
    store = ArtifactStore(Path(ROOT, str(step)))
    if DAMAGED:
        store.build_once(request, build)
        (store.folder("pool", request.key) / "nested" / "file").write_text("cut")
    how = (build_and_be_killed if FAULT == "kill" else build_with_fault)(store, step)
    found = store.look_up("pool", request.key)
    report.append({
        "how": how,
        "read": found.manifest is not None,
        "faults_of_what_is_read": store.verify("pool", request.key) if found.manifest else [],
        "staged": len(list((store.root / "staging").glob("*"))),
        "then": store.build_once(request, build).decision,
        "faults": store.verify("pool", request.key),
    })
    if how == "done":
        break
print(json.dumps(report))
"""


@pytest.fixture(scope="module", params=["absent", "damaged"])
def kills(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was found after a SIGKILL at the first, second, ... change of the store that a build makes."""
    root = tmp_path_factory.mktemp("kills")
    return json.loads(output_of(start_python(FAULT_AT_EVERY_STEP, root, "kill", request.param)))


@pytest.fixture(scope="module", params=["absent", "damaged"])
def full_disks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was found after the disk was full at the first, second, ... thing that a build creates."""
    root = tmp_path_factory.mktemp("full")
    return json.loads(output_of(start_python(FAULT_AT_EVERY_STEP, root, "full", request.param)))


def test_a_build_is_killed_at_every_step_until_one_gets_through(kills: list[dict[str, Any]]) -> None:
    assert [each["how"] for each in kills] == ["stopped"] * (len(kills) - 1) + ["done"]
    assert len(kills) > 10


def test_what_is_read_after_a_kill_at_any_step_is_whole(kills: list[dict[str, Any]]) -> None:
    assert [each["faults_of_what_is_read"] for each in kills] == [[]] * len(kills)


def test_a_kill_before_the_commit_leaves_nothing_that_is_read(kills: list[dict[str, Any]]) -> None:
    read = [each["read"] for each in kills]
    assert read == sorted(read)
    assert read[0] is False


def test_the_next_build_is_whole_after_a_kill_at_any_step(kills: list[dict[str, Any]]) -> None:
    assert [each["faults"] for each in kills] == [[]] * len(kills)


def test_a_disk_full_at_any_step_is_a_storage_error(full_disks: list[dict[str, Any]]) -> None:
    assert [each["how"] for each in full_disks] == ["stopped"] * (len(full_disks) - 1) + ["done"]
    assert len(full_disks) > 5


def test_a_disk_full_at_any_step_leaves_nothing_that_is_read(full_disks: list[dict[str, Any]]) -> None:
    assert [each["read"] for each in full_disks] == [False] * (len(full_disks) - 1) + [True]


def test_a_disk_full_at_any_step_leaves_nothing_in_staging(full_disks: list[dict[str, Any]]) -> None:
    assert [each["staged"] for each in full_disks] == [0] * len(full_disks)


def test_the_next_build_is_whole_after_a_disk_full_at_any_step(full_disks: list[dict[str, Any]]) -> None:
    assert [each["faults"] for each in full_disks] == [[]] * len(full_disks)


ASK_TOGETHER = """
import json, os, sys, time
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.manifest import Request

root, meeting, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def all_ask():
    return len(list(meeting.glob("asks-*"))) == count

def build(folder):
    (meeting / f"builds-{os.getpid()}").touch()
    while not all_ask():
        time.sleep(0.01)
    (folder / "file").write_text("content")

(meeting / f"asks-{os.getpid()}").touch()
found = ArtifactStore(root).build_once(Request("pool", 1, {"seed": 0}), build)
print(json.dumps({"decision": found.decision, "digest": found.ref.digest}))
"""


@pytest.fixture(scope="module")
def four_at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], list[str]]:
    """What four processes got that asked for one artifact while it was built, and the names of who built."""
    root, meeting = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("meeting")
    processes = [start_python(ASK_TOGETHER, root, meeting, 4) for _ in range(4)]
    return [json.loads(output_of(each)) for each in processes], [each.name for each in meeting.glob("builds-*")]


def test_of_four_processes_that_ask_at_once_one_builds(
    four_at_once: tuple[list[dict[str, str]], list[str]],
) -> None:
    decisions = sorted(each["decision"] for each in four_at_once[0])
    assert len(four_at_once[1]) == 1
    assert decisions.count("built") == 1
    assert set(decisions) <= {"built", "waited", "hit"}


def test_four_processes_that_ask_at_once_get_one_artifact(
    four_at_once: tuple[list[dict[str, str]], list[str]],
) -> None:
    expected = content_digest({"file": hashlib.sha256(b"content").hexdigest()})
    assert [each["digest"] for each in four_at_once[0]] == [expected] * 4


def ask_while_building(store: ArtifactStore, first: Callable[[Path], Any]) -> list[Outcome]:
    """Ask for `REQUEST` a second time while `first` builds it; return what came of the second."""
    outcomes: list[Outcome] = []
    second = threading.Thread(target=lambda: outcomes.append(store.build_once(REQUEST, build)), daemon=True)

    def build_first(folder: Path) -> Any:
        second.start()
        until_it_waits_for_a_lock(second)
        return first(folder)

    try:
        store.build_once(REQUEST, build_first)
    finally:
        second.join(PATIENCE)
    return outcomes


def test_who_waited_for_a_build_says_so(store: ArtifactStore) -> None:
    (outcome,) = ask_while_building(store, build)
    assert (outcome.decision, outcome.reason) == (Decision.WAITED, "built by another process")


def test_who_waited_for_a_build_gets_its_artifact(store: ArtifactStore) -> None:
    (outcome,) = ask_while_building(store, build)
    assert outcome.ref == store.build_once(REQUEST, must_not_build).ref


def test_who_waited_for_a_build_that_failed_builds_itself(store: ArtifactStore) -> None:
    with pytest.raises(ZeroDivisionError):
        ask_while_building(store, lambda folder: 1 // 0)
    assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT


def test_builds_of_two_keys_do_not_wait_for_each_other(store: ArtifactStore) -> None:
    def build_another_inside(folder: Path) -> None:
        store.build_once(Request("pool", 1, {}), build)

    assert store.build_once(REQUEST, build_another_inside).decision is Decision.BUILT


def test_an_artifact_that_was_replaced_by_another_is_not_read_as_the_one_asked_for(store: ArtifactStore) -> None:
    made = store.build_once(REQUEST, build).ref
    assert store.path(made) == store.folder(made.stage, made.key)
    with pytest.raises(MissingArtifactError, match="was replaced while it was in use"):
        store.path(Ref(made.stage, made.key, "0" * 64))
