"""Every place for artifacts keeps the same contract, and stores that share one build each artifact once."""

import dataclasses
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

import storage.local
from storage.artifacts import ArtifactStore
from storage.backend import Backend
from storage.durable import build_lock, file_names
from storage.errors import MissingArtifactError, RemoteError, RemoteSettingsError, StorageError
from storage.keys import content_digest
from storage.local import DAMAGED, LocalObjects
from storage.manifest import MANIFEST, Decision, Lookup, Manifest, Outcome, Request, file_name
from storage.remote import MARKER, RemoteObjects, open_remote
from storage.testing import CONTRADICTIONS, FILES, OTHERS, STAGE, StoreTests, read_files
from tests.storage.faults import PATIENCE, as_ordinary_user, snapshot
from tests.storage.s3 import BUCKET, S3Server, s3_server, use_s3


# (class, test) or parts of them: why it does not hold yet. Who makes it hold deletes the line.
@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only a power cut needs: hundreds of flushes take as long as the disk of the day likes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class LocalPlace:
    """A cache folder."""

    root: Path

    @pytest.fixture
    def backend(self, tmp_path: Path) -> LocalObjects:
        self.root = tmp_path / "cache"
        return LocalObjects(self.root)

    @pytest.fixture
    def second(self, backend: Backend) -> LocalObjects:
        return LocalObjects(self.root)

    def names_behind(self) -> set[str]:
        return {name for name in file_names(self.root) if not name.startswith("locks/")}

    def read_behind(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write_behind(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def delete_behind(self, name: str) -> None:
        (self.root / name).unlink()

    def name_behind(self, manifest: Manifest, file: str) -> str:
        return f"objects/{manifest.stage}/{manifest.key[:2]}/{manifest.key}/{file}"

    def committing(self, key: str) -> AbstractContextManager[Any]:
        return build_lock(self.root / "locks" / f"{key}.lock")


class RemotePlace:
    """A place that a team shares: it is set up once, and users connect to it."""

    def connect(self, *, writable: bool = True) -> RemoteObjects:
        """Return the place as one more user has it."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, place: None) -> RemoteObjects:
        remote = self.connect()
        assert remote.create()
        return remote

    @pytest.fixture
    def second(self, backend: Backend) -> RemoteObjects:
        return self.connect()

    def name_behind(self, manifest: Manifest, file: str) -> str:
        return f"objects/{manifest.stage}/{manifest.key[:2]}/{manifest.key}/{manifest.digest[:32]}/{file}"


class MemoryPlace(RemotePlace):
    """An object store in memory."""

    @pytest.fixture
    def place(self) -> None:
        self.objects = MemoryStore()

    def connect(self, *, writable: bool = True) -> RemoteObjects:
        return RemoteObjects(self.objects, "the memory", writable=writable)

    def names_behind(self) -> set[str]:
        return {each["path"] for chunk in obstore.list(self.objects) for each in chunk}

    def read_behind(self, name: str) -> bytes:
        return bytes(obstore.get(self.objects, name).bytes())

    def write_behind(self, name: str, data: bytes) -> None:
        obstore.put(self.objects, name, data)

    def delete_behind(self, name: str) -> None:
        obstore.delete(self.objects, name)


class FolderPlace(RemotePlace):
    """A folder that several machines mount."""

    root: Path

    @pytest.fixture
    def place(self, tmp_path: Path) -> None:
        self.root = tmp_path / "mnt" / "team #1 ~ 100%"
        self.root.mkdir(parents=True)

    def connect(self, *, writable: bool = True) -> RemoteObjects:
        return open_remote(str(self.root), writable=writable)

    def names_behind(self) -> set[str]:
        return set(file_names(self.root))

    def read_behind(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write_behind(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def delete_behind(self, name: str) -> None:
        (self.root / name).unlink()


class S3Place(RemotePlace):
    """S3 over HTTP, with a prefix of its own for every test."""

    server: S3Server

    @pytest.fixture
    def place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = s3_server()
        self.prefix = f"{uuid.uuid4().hex}/team"
        use_s3(monkeypatch, self.server.url)

    def connect(self, *, writable: bool = True) -> RemoteObjects:
        return open_remote(f"s3://{BUCKET}/{self.prefix}", writable=writable, timeout=PATIENCE)

    def names_behind(self) -> set[str]:
        return self.server.names(f"{self.prefix}/")

    def read_behind(self, name: str) -> bytes:
        return self.server.read(f"{self.prefix}/{name}")

    def write_behind(self, name: str, data: bytes) -> None:
        self.server.write(f"{self.prefix}/{name}", data)

    def delete_behind(self, name: str) -> None:
        self.server.delete(f"{self.prefix}/{name}")


# --- the contract, and what is particular to one kind of place --------------------------------------------------------


class TestLocal(LocalPlace, StoreTests):
    @pytest.mark.parametrize("kind", ["cut", "grown", "deleted", "emptied"])
    def test_a_file_that_is_not_there_at_its_size_is_damage_at_once(self, backend: LocalObjects, kind: str) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", kind)
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, True)
        assert file_name(STAGE, manifest.key, "values.bin") in found.reason

    def test_what_verify_found_is_damage_from_then_on(self, backend: LocalObjects, second: LocalObjects) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", "one bit")
        assert second.look_up(STAGE, manifest.key).manifest == manifest
        (fault,) = backend.verify(STAGE, manifest.key)
        found = second.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged, found.reason) == (None, True, f"{fault} (found by verify)")

    def test_verify_names_files_that_are_not_in_the_manifest(self, backend: LocalObjects) -> None:
        manifest = self.put(backend)
        self.write_behind(self.name_behind(manifest, "stranger"), b"x")
        (fault,) = backend.verify(STAGE, manifest.key)
        assert f"{file_name(STAGE, manifest.key, 'stranger')} is not in the manifest" in fault
        assert backend.look_up(STAGE, manifest.key).manifest == manifest

    def test_strangers_are_no_damage(self, backend: LocalObjects) -> None:
        manifest = self.put(backend)
        self.write_behind(self.name_behind(manifest, "stranger"), b"x")
        assert backend.damage(STAGE, manifest.key) == []
        self.alter(manifest, "values.bin", "one bit")
        (fault,) = backend.damage(STAGE, manifest.key)
        assert "sha256" in fault
        assert backend.verify(STAGE, manifest.key) == [fault, *backend.strangers(STAGE, manifest.key)]

    @pytest.mark.parametrize("left", ["made again", "nothing"])
    def test_what_is_replaced_while_it_is_verified_is_looked_at_again(
        self, backend: LocalObjects, second: LocalObjects, monkeypatch: pytest.MonkeyPatch, left: str
    ) -> None:
        manifest = self.put(backend)
        again, folder = self.made(OTHERS)
        self.alter(manifest, "values.bin", "deleted")
        real = storage.local._content_faults

        def while_another_works(place: Path, found: Manifest) -> list[str]:
            monkeypatch.setattr(storage.local, "_content_faults", real)
            faults = real(place, found)
            shutil.rmtree(place)
            if left == "made again":
                second.commit(again, folder)
            return faults

        monkeypatch.setattr(storage.local, "_content_faults", while_another_works)
        assert backend.verify(STAGE, manifest.key) == ([] if left == "made again" else ["not in the store"])
        assert second.look_up(STAGE, manifest.key).manifest == (again if left == "made again" else None)

    def test_a_manifest_is_parsed_once_until_it_is_replaced(
        self, backend: LocalObjects, second: LocalObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [self.put(backend, sample=sample).key for sample in range(2)]
        parsed: list[str] = []
        real = storage.local.understood
        monkeypatch.setattr(storage.local, "understood", lambda *asked: parsed.append(asked[2]) or real(*asked))
        for each in (backend, second):
            assert sorted(found.key for found in each.manifests()) == sorted(keys)
        assert sorted(parsed) == sorted(keys)
        other = self.put(backend, OTHERS, replace=True)
        assert other in list(second.manifests())
        assert sorted(parsed) == sorted([*keys, other.key])

    def test_a_folder_without_a_manifest_is_listed_as_a_folder(self, backend: LocalObjects) -> None:
        manifest = self.put(backend)
        self.delete_behind(self.manifest_behind(manifest))
        assert list(backend.folders()) == [(STAGE, manifest.key)]

    def test_a_folder_that_appears_while_it_is_looked_up_is_no_damage(
        self, backend: LocalObjects, second: LocalObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, folder = self.made()
        is_dir = Path.is_dir

        def is_dir_after_a_commit(path: Path) -> bool:
            monkeypatch.setattr(Path, "is_dir", is_dir)
            second.commit(manifest, folder)
            return path.is_dir()

        monkeypatch.setattr(Path, "is_dir", is_dir_after_a_commit)
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) in [(manifest, False), (None, False)]

    def test_a_manifest_that_may_not_be_read_is_no_miss(self, backend: LocalObjects, public_folder: Path) -> None:
        shared = LocalObjects(public_folder)
        manifest, folder = self.made()
        shared.commit(manifest, folder)
        (shared.folder(STAGE, manifest.key) / MANIFEST).chmod(0)
        with as_ordinary_user(), pytest.raises(StorageError, match="Permission denied"):
            shared.look_up(STAGE, manifest.key)

    def test_a_listing_of_what_may_not_be_read_fails_by_name(self, backend: LocalObjects, public_folder: Path) -> None:
        shared = LocalObjects(public_folder)
        manifest, folder = self.made()
        shared.commit(manifest, folder)
        (shared.folder(STAGE, manifest.key) / MANIFEST).chmod(0)
        with as_ordinary_user(), pytest.raises(StorageError, match="Permission denied"):
            list(shared.manifests())

    @pytest.mark.parametrize("ask", ["verify", "fetch"])
    def test_a_file_that_may_not_be_read_is_no_damage(
        self, backend: LocalObjects, public_folder: Path, ask: str
    ) -> None:
        shared = LocalObjects(public_folder / "cache")
        manifest, folder = self.made()
        shared.commit(manifest, folder)
        (shared.folder(STAGE, manifest.key) / "values.bin").chmod(0)
        target = public_folder / "target"
        target.mkdir(mode=0o777)
        target.chmod(0o777)
        with as_ordinary_user(), pytest.raises(StorageError, match="Permission denied"):
            shared.verify(STAGE, manifest.key) if ask == "verify" else shared.fetch(manifest, target)

    def test_a_place_that_is_no_folder_is_no_miss(self, backend: LocalObjects) -> None:
        self.write_behind("objects", b"no folder")
        with pytest.raises(StorageError):
            backend.look_up(STAGE, "0" * 64)

    def test_objects_that_are_a_link_which_leads_nowhere_are_no_miss(self, backend: LocalObjects) -> None:
        self.root.mkdir()
        backend.objects.symlink_to(self.root / "unmounted")
        with pytest.raises(StorageError, match=f"{backend.objects} is no folder; is its disk mounted"):
            backend.look_up(STAGE, "0" * 64)
        with pytest.raises(StorageError, match=f"Cannot list {backend.objects}"):
            list(backend.folders())

    def test_objects_that_may_not_be_listed_are_not_nothing(self, backend: LocalObjects, public_folder: Path) -> None:
        shared = LocalObjects(public_folder)
        manifest, folder = self.made()
        shared.commit(manifest, folder)
        (shared.objects / "lost+found").mkdir(mode=0)
        with as_ordinary_user():
            assert list(shared.folders()) == [(STAGE, manifest.key)]
        (shared.objects / STAGE).chmod(0o333)
        with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot list {shared.objects / STAGE}"):
            list(shared.folders())

    def test_a_commit_that_cannot_write_says_so(self, backend: LocalObjects) -> None:
        self.write_behind("objects", b"no folder")
        manifest, folder = self.made()
        with pytest.raises(StorageError):
            backend.commit(manifest, folder, replace=True)


class RemoteTests(RemotePlace, StoreTests):
    """What holds for every remote."""

    @pytest.mark.parametrize("kind", CONTRADICTIONS)
    def test_a_manifest_that_contradicts_itself_is_damaged(self, backend: RemoteObjects, kind: str) -> None:
        manifest = self.put(backend)
        self.edit_manifest(manifest, **CONTRADICTIONS[kind])
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, True)
        assert file_name(STAGE, manifest.key, MANIFEST) in found.reason
        assert list(backend.manifests()) == []

    def test_a_manifest_that_lists_fewer_files_is_damaged(self, backend: RemoteObjects) -> None:
        manifest = self.put(backend)
        self.edit_manifest(manifest, files={n: each for n, each in manifest.files.items() if n != "empty"})
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, True)
        assert "lists files that do not give its digest" in found.reason

    @pytest.mark.parametrize("name", [MANIFEST, DAMAGED, "line\nbreak", "tab\t", "\x7f"])
    def test_a_name_that_no_artifact_can_have_is_damage(self, backend: RemoteObjects, name: str) -> None:
        manifest = self.put(backend, {"file": b"x"})
        files = {name: manifest.files["file"]}
        self.edit_manifest(manifest, files=files, digest=content_digest({name: str(files[name]["sha256"])}))
        assert backend.look_up(STAGE, manifest.key).damaged

    def test_a_name_that_is_a_file_and_a_folder_is_damage(self, backend: RemoteObjects) -> None:
        manifest = self.put(backend, {"file": b"x"})
        files = dict.fromkeys(("file", "file/file"), manifest.files["file"])
        self.edit_manifest(manifest, files=files, digest=content_digest({n: str(files[n]["sha256"]) for n in files}))
        assert backend.look_up(STAGE, manifest.key).damaged

    @pytest.mark.parametrize("field", ["inputs", "info", "libraries", "created", "seconds"])
    def test_a_manifest_with_a_field_of_another_kind_is_damaged(self, backend: RemoteObjects, field: str) -> None:
        manifest = self.put(backend)
        self.edit_manifest(manifest, **{field: [7]})
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, True)

    def test_reasons_name_the_place(self, backend: RemoteObjects) -> None:
        assert backend.place in backend.look_up(STAGE, "0" * 64).reason
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", "one bit")
        self.alter(manifest, "empty", "deleted")
        assert all(backend.place in fault for fault in self.fetched(backend, manifest)[1])
        assert all(backend.place in fault for fault in backend.verify(STAGE, manifest.key))
        self.write_behind(self.manifest_behind(manifest), b"{")
        assert backend.place in backend.look_up(STAGE, manifest.key).reason

    def test_a_commit_leaves_what_it_sends_as_it_was(self, backend: RemoteObjects) -> None:
        manifest, folder = self.made()
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        (folder / "stranger").write_bytes(b"not of the artifact")
        before = snapshot(folder)
        backend.commit(manifest, folder)
        assert snapshot(folder) == before
        assert {name for name in self.names_behind() if manifest.key in name} == {
            self.manifest_behind(manifest),
            *(self.name_behind(manifest, name) for name in FILES),
        }

    def test_files_are_sent_before_the_manifest(
        self, backend: RemoteObjects, second: RemoteObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, folder = self.made()
        put, sent = obstore.put, []

        def watched(objects: Any, name: str, *arguments: Any, **options: Any) -> Any:
            assert second.look_up(STAGE, manifest.key).manifest is None
            result = put(objects, name, *arguments, **options)
            sent.append(name)
            return result

        monkeypatch.setattr(obstore, "put", watched)
        backend.commit(manifest, folder)
        assert sent[-1] == self.manifest_behind(manifest)
        assert sorted(sent[:-1]) == sorted(self.name_behind(manifest, name) for name in FILES)

    @pytest.mark.parametrize("after", range(4))
    def test_a_push_that_is_cut_short_leaves_nothing_there(
        self, backend: RemoteObjects, second: RemoteObjects, after: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, folder = self.made()
        with cut_short(after, monkeypatch), pytest.raises(RemoteError, match="the line went dead"):
            backend.commit(manifest, folder)
        assert self.manifest_behind(manifest) not in self.names_behind()
        found = second.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, False)
        assert list(second.manifests()) == []
        other = self.put(second, OTHERS)
        assert backend.look_up(STAGE, manifest.key).manifest == other
        assert self.fetched(backend, other) == (OTHERS, [])

    @pytest.mark.parametrize("after", range(4))
    def test_a_replacement_that_is_cut_short_leaves_the_old_one(
        self, backend: RemoteObjects, second: RemoteObjects, after: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.put(backend, OTHERS)
        manifest, folder = self.made()
        with cut_short(after, monkeypatch), pytest.raises(RemoteError):
            backend.commit(manifest, folder, replace=True)
        assert second.look_up(STAGE, manifest.key).manifest == first
        assert self.fetched(second, first) == (OTHERS, [])

    def test_a_file_that_vanishes_on_the_way_is_an_error(self, backend: RemoteObjects) -> None:
        manifest, folder = self.made()
        (folder / "values.bin").unlink()
        with pytest.raises(RemoteError, match=r"values\.bin"):
            backend.commit(manifest, folder)
        assert backend.look_up(STAGE, manifest.key).manifest is None

    def test_who_fetches_while_another_replaces_gets_the_old_one_whole(
        self, backend: RemoteObjects, second: RemoteObjects
    ) -> None:
        first = self.put(backend)
        self.put(second, OTHERS, replace=True)
        assert self.fetched(backend, first) == (FILES, [])

    @pytest.mark.parametrize("before", ["nothing", "a manifest that cannot be read", "an artifact without its files"])
    def test_who_loses_by_a_moment_is_told_the_winner(
        self, backend: RemoteObjects, second: RemoteObjects, before: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, folder = self.made({"values.bin": b"of who loses"})
        if before == "a manifest that cannot be read":
            self.write_behind(self.manifest_behind(manifest), b"{")
        elif before == "an artifact without its files":
            self.alter(self.put(backend), "values.bin", "deleted")
        winner: list[Manifest] = []
        send = RemoteObjects._send_files

        def send_while_another_commits(*arguments: Any) -> None:
            send(*arguments)
            monkeypatch.setattr(RemoteObjects, "_send_files", send)
            winner.append(self.put(second, OTHERS))

        monkeypatch.setattr(RemoteObjects, "_send_files", send_while_another_commits)
        assert [backend.commit(manifest, folder)] == winner
        assert backend.look_up(STAGE, manifest.key).manifest == winner[0]
        assert self.fetched(backend, winner[0]) == (OTHERS, [])

    def test_who_may_not_write_reads(self, backend: RemoteObjects) -> None:
        manifest = self.put(backend)
        reader = self.connect(writable=False)
        assert reader.look_up(STAGE, manifest.key).manifest == manifest
        assert self.fetched(reader, manifest) == (FILES, [])
        assert reader.verify(STAGE, manifest.key) == []
        assert list(reader.manifests()) == [manifest]

    def test_who_may_not_write_writes_nothing(self, backend: RemoteObjects) -> None:
        manifest, folder = self.made()
        reader, before = self.connect(writable=False), self.all_behind()
        for ask in (
            lambda: reader.commit(manifest, folder),
            lambda: reader.commit(manifest, folder, replace=True),
            lambda: reader.create(),
            lambda: reader.send_record("a-run", b"{}"),
        ):
            with pytest.raises(RemoteSettingsError, match="read-only here; COVERCAL_REMOTE_WRITE=1"):
                ask()
        assert self.all_behind() == before

    def test_a_cache_is_set_up_once(self, backend: RemoteObjects, second: RemoteObjects) -> None:
        manifest = self.put(backend)
        before = self.all_behind()
        assert not second.create()
        assert self.all_behind() == before
        assert second.look_up(STAGE, manifest.key).manifest == manifest

    def test_of_many_that_set_a_cache_up_one_does(self, place: None) -> None:
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(lambda each: each.create(), [self.connect() for _ in range(4)]))
        assert sorted(made) == [False, False, False, True]
        assert self.names_behind() == {MARKER}

    @pytest.mark.parametrize(
        "ask",
        [
            lambda remote: remote.look_up(STAGE, "0" * 64),
            lambda remote: list(remote.manifests()),
            lambda remote: list(remote.folders()),
            lambda remote: remote.verify(STAGE, "0" * 64),
            lambda remote: remote.records(),
            lambda remote: remote.send_record("a-run", b"{}"),
        ],
        ids=["look_up", "manifests", "folders", "verify", "records", "send_record"],
    )
    def test_what_was_never_set_up_is_no_empty_cache(self, place: None, ask: Callable[[RemoteObjects], object]) -> None:
        remote = self.connect()
        with pytest.raises(RemoteSettingsError, match=f"{MARKER} is not there"):
            ask(remote)
        assert self.names_behind() == set()

    def test_nothing_is_sent_to_what_was_never_set_up(self, place: None) -> None:
        manifest, folder = self.made()
        with pytest.raises(RemoteSettingsError, match=f"{MARKER} is not there"):
            self.connect().commit(manifest, folder)
        assert self.names_behind() == set()

    def test_a_cache_that_goes_away_is_no_miss(self, backend: RemoteObjects) -> None:
        manifest = self.put(backend)
        assert backend.look_up(STAGE, manifest.key).manifest == manifest
        for name in self.names_behind():
            self.delete_behind(name)
        with pytest.raises(RemoteError):
            backend.look_up(STAGE, manifest.key)

    def test_records_come_back_the_oldest_first(self, backend: RemoteObjects, second: RemoteObjects) -> None:
        for name in ("20260102T000000-b", "20260101T000000-a", "20260103T000000-c"):
            backend.send_record(name, name.encode())
        self.write_behind("runs/README.txt", b"of another")
        found = second.records()
        assert list(found) == ["20260101T000000-a", "20260102T000000-b", "20260103T000000-c"]
        assert all(text == name.encode() for name, text in found.items())
        assert list(second.folders()) == []


def cut_short(after: int, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[Any]:
    """Let the line to every remote go dead after so many puts."""
    return _CutShort(after, monkeypatch)


class _CutShort:
    def __init__(self, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.patch, self.put, self.lock = after, monkeypatch, obstore.put, threading.Lock()

    def __enter__(self) -> None:
        self.patch.setattr(obstore, "put", self)

    def __exit__(self, *_: object) -> None:
        self.patch.setattr(obstore, "put", self.put)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                raise OSError("the line went dead")
        return self.put(*arguments, **options)


class TestMemory(MemoryPlace, RemoteTests):
    pass


class TestSharedFolder(FolderPlace, RemoteTests):
    def test_the_address_may_be_a_url(self, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        remote = open_remote(f"file://{tmp_path}/plain", writable=True)
        assert remote.create()
        assert [path.name for path in (tmp_path / "plain").iterdir()] == [MARKER]


class TestS3(S3Place, RemoteTests):
    def test_two_prefixes_are_two_caches(self, backend: RemoteObjects) -> None:
        manifest = self.put(backend)
        other = open_remote(f"s3://{BUCKET}/{self.prefix}2", writable=True)
        assert other.create()
        assert other.look_up(STAGE, manifest.key).manifest is None
        assert list(other.manifests()) == []
        assert list(backend.manifests()) == [manifest]


# --- stores that share a remote ---------------------------------------------------------------------------------------

REQUEST = Request(STAGE, 2, {"sample": 1})


def builds(files: dict[str, bytes]) -> Callable[[Path], dict[str, Any]]:
    """Return a build that writes `files`."""

    def build(folder: Path) -> dict[str, Any]:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return {"rows": 3}

    return build


def must_not_build(folder: Path) -> None:
    raise AssertionError("built what the remote has")


class SharingTests(RemotePlace):
    """Stores of several users over one remote."""

    tmp_path: Path
    read_behind: Callable[[str], bytes]
    write_behind: Callable[[str, bytes], None]
    names_behind: Callable[[], set[str]]

    @pytest.fixture(autouse=True)
    def _set_up(self, tmp_path: Path, backend: RemoteObjects) -> None:
        self.tmp_path, self.remote = tmp_path, backend

    def store(self, name: str, *, writable: bool = True) -> ArtifactStore:
        """Return the store of one user."""
        return ArtifactStore(self.tmp_path / name, self.connect(writable=writable))

    def all_behind(self) -> dict[str, bytes]:
        """Return everything that lies in the remote."""
        return {name: self.read_behind(name) for name in self.names_behind()}

    def files_of(self, store: ArtifactStore, outcome: Outcome) -> dict[str, bytes]:
        """Return an artifact's files as a store gives them."""
        files = read_files(store.path(outcome.ref))
        return {name: data for name, data in files.items() if name != MANIFEST}

    def manifest_there(self) -> Manifest:
        """Return the manifest of `REQUEST` in the remote."""
        found = self.connect(writable=False).look_up(STAGE, REQUEST.key).manifest
        assert found is not None
        return found

    def flip(self, file: str) -> None:
        """Flip one bit of a file of `REQUEST` in the remote."""
        name = self.name_behind(self.manifest_there(), file)
        data = self.read_behind(name)
        self.write_behind(name, bytes([data[0] ^ 1]) + data[1:])

    def assert_whole(self, files: dict[str, bytes]) -> None:
        """Assert that `REQUEST` lies whole in the remote, and is `files`."""
        target = self.tmp_path / uuid.uuid4().hex
        target.mkdir()
        assert self.remote.verify(STAGE, REQUEST.key) == []
        assert self.remote.fetch(self.manifest_there(), target) == []
        assert read_files(target) == files

    def test_what_one_builds_is_there_for_all(self) -> None:
        outcome = self.store("first").build_once(REQUEST, builds(FILES))
        assert outcome.decision is Decision.BUILT
        assert self.manifest_there().ref == outcome.ref
        self.assert_whole(FILES)

    def test_what_another_built_is_pulled_and_never_built(self) -> None:
        first, second = self.store("first"), self.store("second", writable=False)
        built = first.build_once(REQUEST, builds(FILES))
        pulled = second.build_once(REQUEST, must_not_build)
        assert (pulled.decision, pulled.ref, pulled.info) == (Decision.PULLED, built.ref, built.info)
        assert self.remote.place in pulled.reason
        assert self.files_of(second, pulled) == FILES
        assert read_files(second.path(pulled.ref)) == read_files(first.path(built.ref))
        assert second.verify(STAGE, REQUEST.key) == []

    def test_what_was_pulled_is_a_hit_from_then_on_without_the_remote(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.store("second").build_once(REQUEST, must_not_build)
        offline = ArtifactStore(self.tmp_path / "second").build_once(REQUEST, must_not_build)
        assert offline.decision is Decision.HIT

    def test_a_path_that_is_asked_for_is_pulled(self) -> None:
        built = self.store("first").build_once(REQUEST, builds(FILES))
        second = self.store("second", writable=False)
        assert self.files_of(second, built) == FILES
        assert second.look_up(STAGE, REQUEST.key).manifest == self.manifest_there()

    def test_what_nobody_has_cannot_be_pulled(self) -> None:
        store = self.store("first")
        with pytest.raises(MissingArtifactError, match="not in"):
            store.pull(STAGE, REQUEST.key)
        assert store.look_up(STAGE, REQUEST.key).manifest is None

    def test_a_damaged_local_one_is_pulled_and_both_reasons_are_told(self) -> None:
        store = self.store("first")
        built = store.build_once(REQUEST, builds(FILES))
        (store.path(built.ref) / "values.bin").unlink()
        pulled = store.build_once(REQUEST, must_not_build)
        assert pulled.decision is Decision.PULLED
        assert "values.bin is missing" in pulled.reason
        assert self.remote.place in pulled.reason
        assert self.files_of(store, pulled) == FILES

    def test_what_is_altered_there_is_refused_rebuilt_and_healed(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.flip("values.bin")
        second = self.store("second")
        outcome = second.build_once(REQUEST, builds(FILES))
        assert outcome.decision is Decision.REBUILT
        assert file_name(STAGE, REQUEST.key, "values.bin") in outcome.reason
        assert self.remote.place in outcome.reason
        assert self.files_of(second, outcome) == FILES
        self.assert_whole(FILES)
        assert self.store("third").build_once(REQUEST, must_not_build).decision is Decision.PULLED

    def test_what_is_altered_there_may_be_rebuilt_with_other_bytes(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.flip("values.bin")
        second = self.store("second")
        outcome = second.build_once(REQUEST, builds(OTHERS))
        assert (outcome.decision, outcome.ref) == (Decision.REBUILT, self.manifest_there().ref)
        self.assert_whole(OTHERS)

    def test_of_two_that_repair_one_artifact_both_end_with_what_the_first_sent(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.flip("values.bin")
        repaired: list[Outcome] = []

        def build_while_another_repairs(folder: Path) -> None:
            repaired.append(self.store("third").build_once(REQUEST, builds(FILES)))
            builds(OTHERS)(folder)

        second = self.store("second")
        outcome = second.build_once(REQUEST, build_while_another_repairs)
        assert (outcome.decision, repaired[0].decision) == (Decision.REBUILT, Decision.REBUILT)
        assert outcome.ref == repaired[0].ref == self.manifest_there().ref
        assert "another machine had sent its own" in outcome.reason
        assert self.files_of(second, outcome) == FILES
        self.assert_whole(FILES)

    @pytest.mark.parametrize("text", [b"", b"{", b"null"])
    def test_a_manifest_that_cannot_be_read_there_is_named_and_healed(self, text: bytes) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.write_behind(f"objects/{STAGE}/{REQUEST.key[:2]}/{REQUEST.key}/{MANIFEST}", text)
        outcome = self.store("second").build_once(REQUEST, builds(FILES))
        assert outcome.decision is Decision.REBUILT
        assert file_name(STAGE, REQUEST.key, MANIFEST) in outcome.reason
        self.assert_whole(FILES)

    @pytest.mark.parametrize("name", ["../stolen", "a/../../../stolen", "{absolute}/stolen"])
    def test_a_manifest_of_somebody_evil_writes_nothing_outside(self, name: str) -> None:
        name = name.format(absolute=self.tmp_path)
        self.store("first").build_once(REQUEST, builds(FILES))
        manifest = self.manifest_there()
        files = {name: manifest.files["values.bin"]}
        evil = dataclasses.replace(manifest, files=files, digest=content_digest({name: str(files[name]["sha256"])}))
        where = f"objects/{STAGE}/{REQUEST.key[:2]}/{REQUEST.key}"
        self.write_behind(f"{where}/{MANIFEST}", evil.to_bytes())
        self.write_behind(f"{where}/stolen", FILES["values.bin"])
        outcome = self.store("second", writable=False).build_once(REQUEST, builds(FILES))
        assert outcome.decision is Decision.REBUILT
        assert "leaves the artifact's folder" in outcome.reason
        assert [path for path in self.tmp_path.rglob("stolen") if path.parent.name != REQUEST.key] == []

    def test_with_a_remote_that_may_only_be_read_nothing_is_written_to_it(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.flip("values.bin")
        before = self.all_behind()
        reader = self.store("second", writable=False)
        assert reader.build_once(REQUEST, builds(FILES)).decision is Decision.REBUILT
        assert reader.build_once(Request(STAGE, 2, {"sample": 2}), builds(OTHERS)).decision is Decision.BUILT
        assert reader.build_once(REQUEST, must_not_build).decision is Decision.HIT
        assert reader.send_unsent() == 0
        assert self.all_behind() == before

    def test_of_two_that_build_one_key_at_once_both_end_with_one_artifact(self) -> None:
        stores = [self.store("first"), self.store("second")]
        contents = [FILES, OTHERS]
        both = threading.Barrier(2)

        def run(number: int) -> Outcome:
            def build(folder: Path) -> None:
                builds(contents[number])(folder)
                both.wait(PATIENCE)

            return stores[number].build_once(REQUEST, build)

        with ThreadPoolExecutor(2) as threads:
            outcomes = list(threads.map(run, range(2)))
        there = self.manifest_there()
        assert [each.ref for each in outcomes] == [there.ref, there.ref]
        assert [each.decision for each in outcomes] == [Decision.BUILT, Decision.BUILT]
        assert sum("another machine had sent its own" in each.reason for each in outcomes) == 1
        winner = contents["another machine had sent its own" in outcomes[0].reason]
        for store, outcome in zip(stores, outcomes, strict=True):
            assert store.manifest(outcome.ref).digest == there.digest
            assert self.files_of(store, outcome) == winner
            assert store.verify(STAGE, REQUEST.key) == []
        self.assert_whole(winner)

    def test_of_two_that_build_the_same_at_once_both_are_right(self) -> None:
        stores = [self.store("first"), self.store("second")]
        both = threading.Barrier(2)

        def run(store: ArtifactStore) -> Outcome:
            def build(folder: Path) -> None:
                builds(FILES)(folder)
                both.wait(PATIENCE)

            return store.build_once(REQUEST, build)

        with ThreadPoolExecutor(2) as threads:
            outcomes = list(threads.map(run, stores))
        assert outcomes[0].ref == outcomes[1].ref == self.manifest_there().ref
        assert not any("another machine" in each.reason for each in outcomes)
        self.assert_whole(FILES)

    @pytest.mark.parametrize("after", range(4))
    def test_a_push_that_is_cut_short_is_made_up_for(self, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store("first")
        with cut_short(after, monkeypatch), pytest.raises(RemoteError, match="the line went dead"):
            store.build_once(REQUEST, builds(FILES))
        assert store.look_up(STAGE, REQUEST.key).manifest is not None
        assert self.remote.look_up(STAGE, REQUEST.key).manifest is None
        assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT
        assert store.send_unsent() == 1
        self.assert_whole(FILES)
        assert store.send_unsent() == 0

    def test_a_push_that_fails_again_is_not_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store("first")
        with cut_short(1, monkeypatch):
            with pytest.raises(RemoteError):
                store.build_once(REQUEST, builds(FILES))
            with pytest.raises(RemoteError):
                store.send_unsent()
        assert store.send_unsent() == 1
        self.assert_whole(FILES)

    def test_what_another_sent_meanwhile_replaces_what_could_not_be_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.store("first")
        with cut_short(1, monkeypatch), pytest.raises(RemoteError):
            first.build_once(REQUEST, builds(FILES))
        second = self.store("second").build_once(REQUEST, builds(OTHERS))
        assert first.send_unsent() == 1
        assert first.build_once(REQUEST, must_not_build).ref == second.ref
        assert self.files_of(first, second) == OTHERS
        self.assert_whole(OTHERS)

    def test_a_repair_that_is_cut_short_is_made_up_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        self.flip("values.bin")
        second = self.store("second")
        with cut_short(0, monkeypatch), pytest.raises(RemoteError):
            second.build_once(REQUEST, builds(FILES))
        assert second.send_unsent() == 1
        self.assert_whole(FILES)

    def test_what_could_not_be_sent_and_was_damaged_since_reaches_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store("first")
        with cut_short(1, monkeypatch), pytest.raises(RemoteError):
            store.build_once(REQUEST, builds(FILES))
        path = store.folder(STAGE, REQUEST.key) / "values.bin"
        content = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert (store.send_unsent(), store.send_unsent()) == (0, 0)
        assert self.remote.look_up(STAGE, REQUEST.key).manifest is None
        assert store.build_once(REQUEST, builds(FILES)).decision is Decision.REBUILT
        self.assert_whole(FILES)

    def test_what_could_not_be_sent_is_sent_though_a_stranger_lies_beside_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.store("first")
        with cut_short(1, monkeypatch), pytest.raises(RemoteError):
            store.build_once(REQUEST, builds(FILES))
        (store.folder(STAGE, REQUEST.key) / ".DS_Store").touch()
        assert (store.send_unsent(), store.send_unsent()) == (1, 0)
        self.assert_whole(FILES)

    def test_what_another_process_sends_at_the_same_moment_is_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store("first")
        with cut_short(1, monkeypatch), pytest.raises(RemoteError):
            store.build_once(REQUEST, builds(FILES))
        other = ArtifactStore(store.root, store.remote)
        claim = store.claim

        def while_the_other_sends(stage: str, key: str) -> Any:
            assert other.send_unsent() == 1
            return claim(stage, key)

        monkeypatch.setattr(store, "claim", while_the_other_sends)
        assert store.send_unsent() == 0
        self.assert_whole(FILES)

    def test_what_another_thread_uses_already_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store("second").build_once(REQUEST, builds(OTHERS))
        store = self.store("first")
        commit = type(self.remote).commit
        used: list[Outcome] = []

        def while_another_reads(remote: Any, *arguments: Any, **options: Any) -> Manifest:
            with ThreadPoolExecutor(1) as threads:
                used.append(threads.submit(store.build_once, REQUEST, must_not_build).result(PATIENCE))
            return commit(remote, *arguments, **options)

        monkeypatch.setattr(type(self.remote), "commit", while_another_reads)
        monkeypatch.setattr(store, "_pull", lambda stage, key: Lookup(None, "not there yet"))
        made = store.build_once(REQUEST, builds(FILES))
        assert made.ref == used[0].ref
        assert self.files_of(store, used[0]) == FILES

    def test_what_could_not_be_sent_and_is_gone_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store("first")
        with cut_short(0, monkeypatch), pytest.raises(RemoteError):
            store.build_once(REQUEST, builds(FILES))
        shutil.rmtree(store.folder(STAGE, REQUEST.key))
        assert (store.send_unsent(), store.send_unsent()) == (0, 0)
        assert self.remote.look_up(STAGE, REQUEST.key).manifest is None

    def test_a_fetch_that_is_cut_short_leaves_nothing_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        second, get_range = self.store("second"), obstore.get_range

        def dies(objects: Any, name: str, **options: Any) -> Any:
            if name.endswith("table.bin"):
                raise OSError("the line went dead")
            return get_range(objects, name, **options)

        with monkeypatch.context() as line:
            line.setattr(obstore, "get_range", dies)
            with pytest.raises(RemoteError, match="the line went dead"):
                second.build_once(REQUEST, must_not_build)
        assert second.look_up(STAGE, REQUEST.key).manifest is None
        assert list((second.root / "staging").iterdir()) == []
        self.assert_whole(FILES)

    def test_shards_of_two_are_all_pulled_by_a_third(self) -> None:
        requests = [Request("pool_scores", 1, {"shard": number}) for number in range(6)]
        stores = [self.store("first"), self.store("second")]
        for number, request in enumerate(requests):
            stores[number % 2].build_once(request, builds({"shard": bytes([number]) * 10, "same": b"x"}))
        third = self.store("third", writable=False)
        outcomes = [third.build_once(request, must_not_build) for request in requests]
        assert {each.decision for each in outcomes} == {Decision.PULLED}
        for number, outcome in enumerate(outcomes):
            assert self.files_of(third, outcome) == {"shard": bytes([number]) * 10, "same": b"x"}

    def test_push_says_whether_it_was_new(self) -> None:
        alone = ArtifactStore(self.tmp_path / "first")
        built = alone.build_once(REQUEST, builds(FILES))
        store = self.store("first")
        (store.folder(STAGE, REQUEST.key) / ".DS_Store").touch()  # no damage
        assert (store.push(built.ref), store.push(built.ref)) == (True, False)
        self.assert_whole(FILES)

    def test_a_store_that_cannot_note_what_is_to_be_sent_builds_nothing_and_says_so(self) -> None:
        store = self.store("first").prepare()
        (store.root / "unsent").touch()
        with pytest.raises(StorageError, match=f"Cannot write artifact {STAGE}/{REQUEST.key[:12]} .*File exists"):
            store.build_once(REQUEST, must_not_build)

    def test_pull_says_whether_it_was_copied(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        second = self.store("second", writable=False)
        assert (second.pull(STAGE, REQUEST.key), second.pull(STAGE, REQUEST.key)) == (True, False)
        assert second.build_once(REQUEST, must_not_build).decision is Decision.HIT

    def test_without_the_remote_a_store_hits_and_builds(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        before = self.all_behind()
        offline = ArtifactStore(self.tmp_path / "first")
        assert offline.build_once(REQUEST, must_not_build).decision is Decision.HIT
        assert offline.build_once(Request(STAGE, 2, {"sample": 3}), builds(OTHERS)).decision is Decision.BUILT
        assert self.all_behind() == before

    def test_nothing_of_the_environment_is_sent(self) -> None:
        self.store("first").build_once(REQUEST, builds(FILES))
        sent = b"".join(self.all_behind().values())
        assert b"some-very-secret" not in sent
        assert str(self.tmp_path).encode() not in sent
        assert json.loads(self.read_behind(MARKER)) == {"format": 1}


class TestSharingInMemory(MemoryPlace, SharingTests):
    pass


class TestSharingInAFolder(FolderPlace, SharingTests):
    pass


class TestSharingOnS3(S3Place, SharingTests):
    pass
