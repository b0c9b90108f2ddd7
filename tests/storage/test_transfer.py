"""The artifacts of a run go to the remote and come back as they were, and nothing of a remote is believed unchecked."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest

from benchmarks.s3 import bucket_address, s3_client, s3_server
from covercal.recipe import Recipe, load_recipe
from flows.chain import Chain, run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.report import conclude
from storage.artifacts import ArtifactStore
from storage.durable import file_names
from storage.errors import MissingArtifactError, RemoteSettingsError, StorageError
from storage.keys import content_digest
from storage.manifest import MANIFEST, Ref, sealed
from storage.remote import MARKER, open_remote
from storage.runs import RunRecord, StageRecord, find_run, parse_run, read_runs, run_bytes, write_run
from storage.transfer import Moved, artifacts_of, pull_run, push_run, remote_runs
from tests import tiny

RUN = "20260101T000000000000-abcdef"
DIGEST_DIGITS = 32


# --- a real run, made once -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealRun:
    """A cache folder with the artifacts and the record of one tiny real run, which nobody may change."""

    root: Path
    recipe: Path
    chain: Chain
    record: RunRecord

    def store(self, root: Path) -> ArtifactStore:
        """Return a copy of it, of which this process has used nothing."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("locks"))
        return ArtifactStore(root)

    @property
    def refs(self) -> list[Ref]:
        return artifacts_of(self.record)


def run_to_report(recipe: Recipe, store: ArtifactStore, recorder: Recorder) -> Chain:
    """Run a recipe to its end in this process."""
    execution = Direct(store, recorder)
    chain = run_chain(recipe, identify(recipe, store), execution, until="report")
    conclude(recipe, chain, execution, recorder.events, until="report")
    return chain


def make_real_run(folder: Path, **changes: Any) -> RealRun:
    """Run a tiny recipe for real, without Prefect, and keep its record."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.recipe_value(folder, **changes)), encoding="utf-8")
    store = ArtifactStore(folder / "cache").prepare()
    recorder = Recorder()
    typed = load_recipe(recipe)
    chain = run_to_report(typed, store, recorder)
    stages = [StageRecord(e.label, e.stage, e.key, str(e.decision), e.reason, e.seconds) for e in recorder.events]
    command = f"covercal run {recipe}"
    started = "2026-01-01T00:00:00+00:00"
    record = RunRecord(RUN, command, started, 1.5, "completed", typed.model_dump(mode="json"), stages, {"é": 1})
    write_run(store.root, record)
    return RealRun(store.root, recipe, chain, record)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """One real run for all tests here."""
    return make_real_run(tmp_path_factory.mktemp("ran"))


@pytest.fixture(autouse=True)
def _nothing_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about a power cut, and flushing is as slow as the disk of the day."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 endpoint in a process of its own."""
    with s3_server() as endpoint:
        yield endpoint


def shared_folder(tmp_path: Path) -> str:
    folder = tmp_path / "mnt" / "team"
    folder.mkdir(parents=True)
    return str(folder)


EVERYWHERE = pytest.mark.parametrize("address", ["folder", "s3"], indirect=True)


@pytest.fixture
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty remote cache: in a folder, or of the kind that a test asks for."""
    is_s3 = getattr(request, "param", "folder") == "s3"
    found = bucket_address(request.getfixturevalue("s3")) if is_s3 else shared_folder(tmp_path)
    open_remote(found, writable=True).create()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty remote cache in a folder that others can write to as well."""
    found = Path(shared_folder(tmp_path))
    open_remote(str(found), writable=True).create()
    return found


def connected(store: ArtifactStore, address: str | Path, *, writable: bool = True) -> ArtifactStore:
    """Return a store with a remote."""
    return ArtifactStore(store.root, open_remote(str(address), writable=writable))


def empty_store(tmp_path: Path, address: str | Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "another" / "cache", open_remote(str(address))).prepare()


def contents(store: ArtifactStore, refs: list[Ref]) -> dict[str, bytes]:
    """Return every byte of some artifacts, manifests too."""
    return {
        f"{ref.short}/{name}": (store.folder(ref.stage, ref.key) / name).read_bytes()
        for ref in refs
        for name in file_names(store.folder(ref.stage, ref.key))
    }


def names_there(address: str | Path) -> set[str]:
    """Return the names of all that lies in a remote, by other means than the remote's own."""
    if not str(address).startswith("s3://"):
        return set(file_names(Path(address)))
    bucket, _, prefix = str(address).removeprefix("s3://").partition("/")
    pages = s3_client(os.environ["AWS_ENDPOINT_URL"]).get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {each["Key"].removeprefix(f"{prefix}/") for page in pages for each in page.get("Contents", [])}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all that is put into any remote, as it happens."""
    names: list[str] = []
    real = obstore.put

    def put(store: Any, path: str, *arguments: Any, **keywords: Any) -> Any:
        names.append(path)
        return real(store, path, *arguments, **keywords)

    monkeypatch.setattr(obstore, "put", put)
    return names


# --- there and back --------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_a_run_goes_to_another_store_byte_for_byte(ran: RealRun, address: str, tmp_path: Path) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    assert push_run(here, RUN) == Moved(RUN, len(ran.refs), 0)
    there = empty_store(tmp_path, address)
    assert pull_run(there, RUN) == Moved(RUN, len(ran.refs), 0)
    assert contents(there, ran.refs) == contents(here, ran.refs)
    assert [there.verify(ref.stage, ref.key) for ref in ran.refs] == [[]] * len(ran.refs)


@EVERYWHERE
def test_the_record_of_a_run_comes_along(ran: RealRun, address: str, tmp_path: Path) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), address), RUN)
    there = empty_store(tmp_path, address)
    assert remote_runs(there) == [ran.record]
    pull_run(there, RUN)
    assert list(read_runs(there.root)) == [ran.record]


def test_a_run_that_was_pulled_is_answered_from_the_store(ran: RealRun, address: str, tmp_path: Path) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), address), RUN)
    pull_run(empty_store(tmp_path, address), RUN)
    alone = ArtifactStore(tmp_path / "another" / "cache")
    recorder, recipe = Recorder(), load_recipe(ran.recipe)
    chain = run_to_report(recipe, alone, recorder)
    assert {str(event.decision) for event in recorder.events} == {"hit"}
    assert chain == ran.chain


@EVERYWHERE
def test_a_run_that_is_pushed_again_sends_nothing_but_its_record(
    ran: RealRun, address: str, tmp_path: Path, sent: list[str]
) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    push_run(here, RUN)
    files = sum(len(here.manifest(ref).files) for ref in ran.refs)
    assert len(sent) == len(set(sent)) == files + len(ran.refs) + 1
    sent.clear()
    assert push_run(here, RUN) == Moved(RUN, 0, len(ran.refs))
    assert sent == [f"runs/{RUN}.json"]


def test_what_is_in_the_remote_is_what_the_run_used_and_nothing_else(
    ran: RealRun, address: str, tmp_path: Path
) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    push_run(here, RUN)
    expected = {MARKER, f"runs/{RUN}.json"}
    for ref in ran.refs:
        manifest = here.manifest(ref)
        place = f"objects/{ref.stage}/{ref.key[:2]}/{ref.key}"
        expected |= {f"{place}/{MANIFEST}", *(f"{place}/{manifest.digest[:32]}/{name}" for name in manifest.files)}
    assert names_there(address) == expected


def test_a_run_that_is_pulled_again_copies_nothing(
    ran: RealRun, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), address), RUN)
    there = empty_store(tmp_path, address)
    pull_run(there, RUN)
    monkeypatch.setattr(obstore, "get_range", None)  # calling it would fail
    assert pull_run(there, RUN) == Moved(RUN, 0, len(ran.refs))


def test_only_what_is_not_there_is_sent(ran: RealRun, address: str, tmp_path: Path) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    here.push(ran.refs[0])
    here.push(ran.refs[-1])
    assert push_run(here, RUN) == Moved(RUN, len(ran.refs) - 2, 2)


def test_only_what_is_not_here_is_pulled(ran: RealRun, address: str, tmp_path: Path) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), address), RUN)
    there = empty_store(tmp_path, address)
    there.pull(ran.refs[0].stage, ran.refs[0].key)
    assert pull_run(there, RUN) == Moved(RUN, len(ran.refs) - 1, 1)


@EVERYWHERE
def test_what_is_damaged_here_is_not_sent(ran: RealRun, address: str, tmp_path: Path) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    ref = ran.refs[-1]
    damage(here, ref)
    with pytest.raises(MissingArtifactError, match=f"Artifact {ref.short} is damaged here and was not sent: .*sha256"):
        push_run(here, RUN)
    assert open_remote(address).look_up(ref.stage, ref.key).manifest is None


@EVERYWHERE
def test_what_is_damaged_there_is_found_and_replaced_when_asked(ran: RealRun, address: str, tmp_path: Path) -> None:
    ref = ran.refs[-1]
    damaged = connected(ran.store(tmp_path / "damaged"), address)
    damage(damaged, ref)
    assert damaged.remote is not None
    damaged.remote.commit(damaged.manifest(ref), damaged.folder(ref.stage, ref.key))
    here = connected(ran.store(tmp_path / "cache"), address)
    assert push_run(here, RUN) == Moved(RUN, len(ran.refs) - 1, 1)
    assert push_run(here, RUN, verify=True) == Moved(RUN, 1, len(ran.refs) - 1)
    assert push_run(here, RUN, verify=True) == Moved(RUN, 0, len(ran.refs))
    assert pull_run(empty_store(tmp_path, address), RUN) == Moved(RUN, len(ran.refs), 0)


def damage(store: ArtifactStore, ref: Ref) -> None:
    """Change the last byte of a file of an artifact; its size stays."""
    path = store.folder(ref.stage, ref.key) / next(iter(store.manifest(ref).files))
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_progress_is_told_for_every_artifact(ran: RealRun, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    here = connected(ran.store(tmp_path / "cache"), folder)
    push_run(here, RUN, lambda done, total: told.append((done, total)))
    expected = [(done, len(ran.refs)) for done in range(1, len(ran.refs) + 1)]
    assert told == expected
    told.clear()
    pull_run(empty_store(tmp_path, folder), RUN, lambda done, total: told.append((done, total)))
    assert told == expected


def test_an_artifact_that_a_run_used_twice_is_moved_once(ran: RealRun) -> None:
    doubled = dataclasses.replace(ran.record, stages=[*ran.record.stages, *ran.record.stages])
    assert artifacts_of(doubled) == ran.refs
    assert len(set(ran.refs)) == len(ran.refs)


def test_a_stage_that_never_had_a_key_is_no_artifact() -> None:
    stages = [StageRecord("pool", "pool", "", "waits", "", 0.0), StageRecord("pool", "pool", "a" * 64, "hit", "", 0.0)]
    assert artifacts_of(RunRecord("a-run", "", "", 0.0, "failed", {}, stages)) == [Ref("pool", "a" * 64)]


# --- which run -------------------------------------------------------------------------------------------------------


def add_run(store: ArtifactStore, name: str, *, state: str = "completed") -> RunRecord:
    """Write the record of a run that used nothing."""
    record = RunRecord(name, "covercal run", "2026-01-01T00:00:00+00:00", 1.0, state, {}, [])
    write_run(store.root, record)
    return record


def test_latest_is_the_last_run_that_was_completed(folder: Path, tmp_path: Path) -> None:
    here = connected(ArtifactStore(tmp_path / "cache"), folder)
    for name, state in (("2025-a", "completed"), ("2026-a", "completed"), ("2027-a", "failed")):
        add_run(here, name, state=state)
    assert push_run(here, "latest").run == "2026-a"
    push_run(here, "2025-a")
    assert pull_run(empty_store(tmp_path, folder), "latest").run == "2026-a"


def test_latest_of_the_remote_is_the_last_run_that_was_completed_too(folder: Path, tmp_path: Path) -> None:
    here = connected(ArtifactStore(tmp_path / "cache"), folder)
    for name, state in (("2026-a", "completed"), ("2027-a", "failed")):
        add_run(here, name, state=state)
        push_run(here, name)
    assert pull_run(empty_store(tmp_path, folder), "latest").run == "2026-a"


@pytest.mark.parametrize(("name", "count"), [("2024", 0), ("2026", 2), ("", 3)])
@pytest.mark.parametrize("move", [push_run, pull_run])
def test_a_name_that_is_not_that_of_one_run_is_counted(
    folder: Path, tmp_path: Path, move: Callable[..., Moved], name: str, count: int
) -> None:
    here = connected(ArtifactStore(tmp_path / "cache"), folder)
    for each in ("2025-a", "2026-a", "2026-b"):
        add_run(here, each)
        push_run(here, each)
    with pytest.raises(MissingArtifactError, match=f"^{count} runs .*have a name that begins with '{name}'; `covercal"):
        move(here, name)


@pytest.mark.parametrize("move", [push_run, pull_run])
def test_where_no_run_is_there_is_no_latest(folder: Path, tmp_path: Path, move: Callable[..., Moved]) -> None:
    with pytest.raises(MissingArtifactError, match=r"^0 runs"):
        move(connected(ArtifactStore(tmp_path / "cache").prepare(), folder), "latest")


def test_a_record_that_is_here_stays_as_it_is(ran: RealRun, folder: Path, tmp_path: Path) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), folder), RUN)
    there = empty_store(tmp_path, folder)
    mine = add_run(there, RUN, state="failed")
    pull_run(there, RUN)
    assert find_run(there.root, RUN) == mine


# --- what is not to be moved -----------------------------------------------------------------------------------------


def delete(store: ArtifactStore, ref: Ref) -> None:
    shutil.rmtree(store.folder(ref.stage, ref.key))


def cut(store: ArtifactStore, ref: Ref) -> None:
    folder = store.folder(ref.stage, ref.key)
    name = next(iter(store.look_up(ref.stage, ref.key).manifest.files))
    (folder / name).write_bytes(b"")


@EVERYWHERE
@pytest.mark.parametrize("fault", [delete, cut])
def test_missing_artifacts_are_named_and_nothing_is_sent(
    ran: RealRun, address: str, tmp_path: Path, sent: list[str], fault: Callable[[ArtifactStore, Ref], None]
) -> None:
    here = connected(ran.store(tmp_path / "cache"), address)
    lost = [ran.refs[1], ran.refs[-1]]
    for ref in lost:
        fault(here, ref)
    with pytest.raises(MissingArtifactError, match=f"{lost[0].short}, {lost[1].short} are not here") as found:
        push_run(here, RUN)
    assert RUN in str(found.value)
    assert sent == []
    assert names_there(address) == {MARKER}


@EVERYWHERE
def test_a_remote_that_may_only_be_read_is_refused(ran: RealRun, address: str, tmp_path: Path, sent: list[str]) -> None:
    here = connected(ran.store(tmp_path / "cache"), address, writable=False)
    with pytest.raises(RemoteSettingsError, match="is read-only here; COVERCAL_REMOTE_WRITE=1"):
        push_run(here, RUN)
    assert sent == []
    assert names_there(address) == {MARKER}


@pytest.mark.parametrize("move", [push_run, pull_run, lambda store, name: remote_runs(store)])
def test_without_a_remote_nothing_is_moved(ran: RealRun, tmp_path: Path, move: Callable[..., Any]) -> None:
    with pytest.raises(RemoteSettingsError, match="No remote is set: COVERCAL_REMOTE is not set"):
        move(ran.store(tmp_path / "cache"), RUN)


@pytest.mark.parametrize("move", [push_run, pull_run, lambda store, name: remote_runs(store)])
def test_a_remote_that_was_never_set_up_is_no_remote(ran: RealRun, tmp_path: Path, move: Callable[..., Any]) -> None:
    address = shared_folder(tmp_path)
    with pytest.raises(RemoteSettingsError, match="holds no covercal cache"):
        move(connected(ran.store(tmp_path / "cache"), address), RUN)
    assert names_there(address) == set()


def test_what_the_remote_lost_is_named_and_what_came_stays(ran: RealRun, folder: Path, tmp_path: Path) -> None:
    push_run(connected(ran.store(tmp_path / "cache"), folder), RUN)
    lost = ran.refs[-1]
    shutil.rmtree(folder / "objects" / lost.stage / lost.key[:2] / lost.key)
    there = empty_store(tmp_path, folder)
    with pytest.raises(MissingArtifactError, match=f"Artifact {lost.short} cannot be pulled: not in {folder}"):
        pull_run(there, RUN)
    assert {key for _, key in there.folders()} == {ref.key for ref in ran.refs[:-1]}
    assert list(read_runs(there.root)) == []


def test_a_pull_that_failed_goes_on_where_it_stopped(ran: RealRun, folder: Path, tmp_path: Path) -> None:
    here = connected(ran.store(tmp_path / "cache"), folder)
    push_run(here, RUN)
    lost = ran.refs[-1]
    shutil.rmtree(folder / "objects" / lost.stage / lost.key[:2] / lost.key)
    there = empty_store(tmp_path, folder)
    with pytest.raises(MissingArtifactError):
        pull_run(there, RUN)
    push_run(here, RUN)
    assert pull_run(there, RUN) == Moved(RUN, 1, len(ran.refs) - 1)


# --- a hostile remote ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed_once(ran: RealRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remote cache with the run, which nobody may change."""
    folder = Path(shared_folder(tmp_path_factory.mktemp("pushed")))
    open_remote(str(folder), writable=True).create()
    push_run(connected(ArtifactStore(ran.root), folder), RUN)
    return folder


@pytest.fixture
def pushed(pushed_once: Path, tmp_path: Path) -> Path:
    """A remote cache with the run, into which a stranger can write anything."""
    return Path(shutil.copytree(pushed_once, tmp_path / "team"))


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / "runs" / f"{RUN}.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def edit_stage(folder: Path, index: int, **changes: Any) -> None:
    stages = json.loads((folder / "runs" / f"{RUN}.json").read_bytes())["stages"]
    stages[index] |= changes
    edit_record(folder, stages=stages)


def place_of(folder: Path, ref: Ref) -> Path:
    return folder / "objects" / ref.stage / ref.key[:2] / ref.key


def all_files(tmp_path: Path) -> set[str]:
    """Return everything below the folder of a test but what lies in the cache that pulls, except its records."""
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith(("another/cache/locks/", "another/cache/objects/"))}


def refused(tmp_path: Path, folder: Path, match: str | None = None) -> None:
    """Assert that a pull ends with an error of the store, writes nothing outside of it, and keeps no record."""
    there = empty_store(tmp_path, folder)
    before = all_files(tmp_path)
    with pytest.raises(StorageError, match=match):
        pull_run(there, RUN)
    assert all_files(tmp_path) == before
    for stage, key in there.folders():
        assert there.verify(stage, key) == []


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/evil", "a/b", "evil.json", "", "..", "a\0b", "é", "x" * 81, 5, None],
)
def test_a_record_whose_name_is_none_of_a_run_is_refused(pushed: Path, tmp_path: Path, name: Any) -> None:
    edit_record(pushed, run=name)
    refused(tmp_path, pushed, "A run record is not readable")


@pytest.mark.parametrize("stage", ["../../evil", "pool/..", "/etc", "a/b", "", "Pool", "pool\n", "pool\0"])
def test_a_record_with_a_stage_that_is_none_is_refused(pushed: Path, tmp_path: Path, stage: str) -> None:
    edit_stage(pushed, 0, stage=stage)
    refused(tmp_path, pushed, "names no artifact: a stage is lower-case letters")


@pytest.mark.parametrize("key", ["../" + "c" * 61, "c" * 63, "C" * 64, "../../evil", "c" * 64 + "\n", "/"])
def test_a_record_with_a_key_that_is_none_is_refused(pushed: Path, tmp_path: Path, key: str) -> None:
    edit_stage(pushed, 0, key=key)
    refused(tmp_path, pushed, "a key 64 hex digits")


@pytest.mark.parametrize("changes", [{"stage": 5}, {"stage": None}, {"key": 5}, {"key": ["a" * 64]}, {"key": {"a": 1}}])
def test_a_record_with_a_stage_or_key_of_another_kind_is_refused(
    pushed: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit_stage(pushed, 0, **changes)
    refused(tmp_path, pushed)


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"\xff", b'{"stages": 5}', b'{"stages": [5]}'])
def test_a_record_that_is_none_is_refused(pushed: Path, tmp_path: Path, text: bytes) -> None:
    (pushed / "runs" / f"{RUN}.json").write_bytes(text)
    refused(tmp_path, pushed, "A run record is not readable")


def test_a_record_nested_without_end_is_refused(pushed: Path, tmp_path: Path) -> None:
    (pushed / "runs" / f"{RUN}.json").write_bytes(b"[" * 100_000)
    refused(tmp_path, pushed, "A run record is not readable")


@pytest.mark.parametrize("ask", [remote_runs, lambda store: pull_run(store, RUN)], ids=["list", "pull"])
def test_a_record_of_the_remote_that_is_refused_is_named(
    pushed: Path, tmp_path: Path, ask: Callable[[ArtifactStore], Any]
) -> None:
    (pushed / "runs" / f"{RUN}.json").write_bytes(b"{")
    with pytest.raises(StorageError, match=RUN) as found:
        ask(empty_store(tmp_path, pushed))
    assert str(pushed) in str(found.value)


@pytest.mark.parametrize("field", ["seconds", "command", "state", "recipe", "stages"])
def test_a_record_with_a_field_of_another_kind_is_refused(pushed: Path, tmp_path: Path, field: str) -> None:
    edit_record(pushed, **{field: {"a": ["list"]} if field != "recipe" else 5})
    refused(tmp_path, pushed)


def read_manifest(folder: Path, ref: Ref) -> dict[str, Any]:
    value = json.loads((place_of(folder, ref) / MANIFEST).read_bytes())
    del value["seal"]
    return value


def write_manifest(folder: Path, ref: Ref, value: dict[str, Any]) -> None:
    """Write a manifest of the remote, under a proper seal."""
    (place_of(folder, ref) / MANIFEST).write_bytes(sealed(value))


OUTSIDE = [
    "../evil",
    "../../../../../../../evil",
    "nested/../../evil",
    "/etc/evil",
    "nested/./evil",
    "a//b",
    "a\\..\\b",
]


def list_one_more(folder: Path, ref: Ref, name: str, data: bytes = b"evil") -> None:
    """Let a manifest of the remote list one more file, and put that file where it would be."""
    value = read_manifest(folder, ref)
    value["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, ref, value)
    target = Path(os.path.normpath(place_of(folder, ref) / value["digest"][:DIGEST_DIGITS] / name))
    if target.is_relative_to(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_is_refused(ran: RealRun, pushed: Path, tmp_path: Path, name: str) -> None:
    list_one_more(pushed, ran.refs[0], name)
    refused(tmp_path, pushed, f"Artifact {ran.refs[0].short} cannot be pulled: .*leaves the artifact's folder")
    assert not Path("/etc/evil").exists()


def test_a_manifest_that_lists_what_its_digest_does_not_cover_is_refused(
    ran: RealRun, pushed: Path, tmp_path: Path
) -> None:
    list_one_more(pushed, ran.refs[0], "more.bin")
    refused(tmp_path, pushed, "lists files that do not give its digest")


def test_a_manifest_without_its_seal_is_refused(ran: RealRun, pushed: Path, tmp_path: Path) -> None:
    path = place_of(pushed, ran.refs[0]) / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"seconds"', b'"Seconds"'))
    refused(tmp_path, pushed, "does not match its seal")


def test_an_artifact_under_the_name_of_another_is_refused(ran: RealRun, pushed: Path, tmp_path: Path) -> None:
    first, second = (ref for ref in ran.refs if ref.stage == "statistics")
    shutil.rmtree(place_of(pushed, first))
    shutil.copytree(place_of(pushed, second), place_of(pushed, first))
    refused(tmp_path, pushed, f"belongs to {second.short}")


def test_files_that_are_not_what_the_manifest_says_are_refused(ran: RealRun, pushed: Path, tmp_path: Path) -> None:
    place = place_of(pushed, ran.refs[0])
    (file,) = [path for path in place.rglob("*") if path.is_file() and path.name != MANIFEST][:1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(tmp_path, pushed, "does not match its sha256")


def test_a_link_in_the_remote_gives_no_file_of_this_machine_away(ran: RealRun, pushed: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    place = place_of(pushed, ran.refs[0])
    (file,) = [path for path in place.rglob("*") if path.is_file() and path.name != MANIFEST][:1]
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    refused(tmp_path, pushed)
    pulled = [path for path in (tmp_path / "another").rglob("*") if path.is_file()]
    assert not any(path.read_bytes() == b"mine" for path in pulled)


@pytest.mark.parametrize(
    "inputs", [[{"stage": "pool"}], [5], None, "abc", [{"stage": "../x", "key": "a", "digest": ""}]]
)
def test_a_manifest_without_proper_inputs_is_refused(ran: RealRun, pushed: Path, tmp_path: Path, inputs: Any) -> None:
    write_manifest(pushed, ran.refs[0], {**read_manifest(pushed, ran.refs[0]), "inputs": inputs})
    refused(tmp_path, pushed)


@pytest.mark.parametrize("changes", [{"created": 5}, {"seconds": "x"}, {"info": []}, {"libraries": 5}])
def test_a_manifest_with_a_field_of_another_kind_is_refused(
    ran: RealRun, pushed: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_manifest(pushed, ran.refs[0], {**read_manifest(pushed, ran.refs[0]), **changes})
    refused(tmp_path, pushed)


@pytest.mark.parametrize("name", [MANIFEST, "DAMAGED"])
def test_a_manifest_that_names_a_file_of_the_store_itself_is_refused(
    ran: RealRun, pushed: Path, tmp_path: Path, name: str
) -> None:
    ref = ran.refs[0]
    value = read_manifest(pushed, ref)
    old = place_of(pushed, ref) / value["digest"][:DIGEST_DIGITS]
    value["files"][name] = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    value["digest"] = content_digest({file: each["sha256"] for file, each in value["files"].items()})
    new = old.rename(old.with_name(value["digest"][:DIGEST_DIGITS]))
    (new / name).write_bytes(b"evil")
    write_manifest(pushed, ref, value)
    refused(tmp_path, pushed)


def test_a_record_of_the_remote_is_read_as_it_was_sent(ran: RealRun, pushed: Path) -> None:
    text = (pushed / "runs" / f"{RUN}.json").read_bytes()
    assert text == run_bytes(ran.record)
    assert parse_run(text) == ran.record
