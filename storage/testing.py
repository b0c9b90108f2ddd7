"""What every place for artifacts must do, as tests: subclass `StoreTests` and give it the place.

A test of a place writes and reads behind its back, with other means than the place itself, so that it fails for a
place that only agrees with itself. Only tests import this module; it needs pytest.
"""
# ruff: noqa: D102 -- the name of a test is its sentence

import dataclasses
import json
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from storage.backend import Backend
from storage.durable import file_names
from storage.errors import StorageError
from storage.keys import artifact_key, content_digest
from storage.manifest import MANIFEST, SEAL, Manifest, file_name, sealed

STAGE = "statistics"
FILES = {"values.bin": bytes(range(200)), "nested/deep/table.bin": b"0123456789", "empty": b""}
OTHERS = {"values.bin": bytes(range(100, 250)), "nested/more.bin": b"another"}
PART = 64  # bytes; stands in for `storage.remote.PART_BYTES`, which is too much for a quick test
THREADS = 6
ROUNDS = 2
NAMES = [
    "plain",
    "with space",
    " leading space",
    "trailing space ",
    "nested/deep/er/file",
    "zürich/日本.bin",
    "e\u0301 decomposed",
    "sharp#",
    "#sharp",
    "sharp#1.bin",
    "per%cent",
    "a%20b",
    "100%25",
    "plus+plus",
    "question?mark=1",
    "st*r",
    "~tilde",
    "tilde~/~",
    ".hidden",
    ".folder/.file",
    "..two",
    "three...",
    "co:lon",
    "a=b&c",
    "quote'\"",
    "{[<^|`>]}",
    "MANIFEST.json.bak",
]
ALTERATIONS: dict[str, Callable[[bytes], bytes | None]] = {
    "one bit": lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
    "cut": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "grown": lambda data: data + b"x",
    "deleted": lambda data: None,
}
OUTSIDE = ["../x", "/etc/x", "a/../../x", "a/../x", "a\\..\\x", "", ".", "..", "./x", "a//b", "a/", "a/./b", "a\0b"]
BAD_NAMES = [
    ("Statistics", "a" * 64),
    ("../statistics", "a" * 64),
    ("statistics/..", "a" * 64),
    ("", "a" * 64),
    ("statistics\n", "a" * 64),
    ("statistics", "a" * 63),
    ("statistics", "A" * 64),
    ("statistics", "../" + "a" * 61),
    ("statistics", ""),
    ("statistics", "a" * 64 + "\n"),
]


def write_artifact(folder: Path, files: Mapping[str, bytes], *, stage: str = STAGE, sample: int = 0) -> Manifest:
    """Write files into an empty folder and return the manifest of the artifact that they are.

    Parameters
    ----------
    sample
        What tells its key from that of other artifacts of the stage.
    """
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = {name: {"size": len(files[name]), "sha256": sha256(files[name]).hexdigest()} for name in sorted(files)}
    material = {"sample": sample, "text": "größe"}
    return Manifest(
        stage=stage,
        version=2,
        key=artifact_key(stage, 2, material),
        digest=content_digest({name: str(each["sha256"]) for name, each in found.items()}),
        material=material,
        inputs=[{"stage": "pool", "key": "a" * 64, "digest": "b" * 64}],
        files=found,
        info={"rows": 2, "name": "é"},
        libraries={"numpy": "2.0"},
        created="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder by relative name."""
    return {name: (folder / name).read_bytes() for name in file_names(folder)}


def resealed(text: bytes, **changes: Any) -> bytes:
    """Return a manifest with other fields and the seal that belongs to them."""
    value = json.loads(text)
    value.pop(SEAL)
    return sealed({**value, **changes})


def _unsealed(text: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(text), **changes}).encode()


DAMAGES_OF_MANIFEST: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "cut": lambda text: text[: len(text) // 2],
    "a line too many": lambda text: text + b"\n",
    "no text": lambda text: b"\xff\xfe\x00\x80",
    "zeros": lambda text: bytes(len(text)),
    "null": lambda text: b"null",
    "a list": lambda text: b"[]",
    "an empty object": lambda text: b"{}",
    "nested without end": lambda text: b"[" * 100_000,
    "other seconds": lambda text: text.replace(b'"seconds": 1.5', b'"seconds": 1.6'),
    "without a seal": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != SEAL}).encode(),
    "a seal that is none": lambda text: _unsealed(text, seal=None),
    "without files": lambda text: sealed({k: v for k, v in json.loads(text).items() if k not in ("files", SEAL)}),
    "a field too many": lambda text: resealed(text, more=1),
    "files are a list": lambda text: resealed(text, files=[]),
    "a file is a number": lambda text: resealed(text, files={"file": 1}),
    "a file without sha256": lambda text: resealed(text, files={"file": {"size": 1}}),
    "a sha256 that is none": lambda text: resealed(text, files={"file": {"size": 1, "sha256": "../x"}}),
    "a size below zero": lambda text: resealed(text, files={"file": {"size": -1, "sha256": "a" * 64}}),
    "a size without end": lambda text: _unsealed(text, files={"file": {"size": float("inf"), "sha256": "a" * 64}}),
    "a number that is none": lambda text: _unsealed(text, material={"sample": float("nan")}),
    "text that is none": lambda text: _unsealed(text, material={"sample": "\ud800"}),
    "of another key": lambda text: resealed(text, key="c" * 64),
    "of another stage": lambda text: resealed(text, stage="scores"),
    "a key that is none": lambda text: resealed(text, key="../" + "c" * 61),
}
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "another digest": {"digest": "d" * 64},
    "other key material": {"material": {"sample": 99}},
    "another stage version": {"version": 3},
}


class StoreTests:
    """The contract of `Backend`.

    A subclass overrides the fixtures `backend` and `second`, the four methods that go behind the backend's back, and
    `name_behind`. Names behind the back are relative to the place: `objects/STAGE/KK/KEY/MANIFEST.json`.
    """

    scratch: Path

    # --- what a subclass gives ---------------------------------------------------------------------------------------

    @pytest.fixture
    def backend(self) -> Backend:
        """Return a backend on a fresh place with nothing in it."""
        raise NotImplementedError

    @pytest.fixture
    def second(self, backend: Backend) -> Backend:
        """Return another backend on the same place, as another user has it."""
        raise NotImplementedError

    def names_behind(self) -> set[str]:
        """Return the names of everything that lies in the place."""
        raise NotImplementedError

    def read_behind(self, name: str) -> bytes:
        """Return the bytes of what lies there."""
        raise NotImplementedError

    def write_behind(self, name: str, data: bytes) -> None:
        """Write what lies there, or overwrite it."""
        raise NotImplementedError

    def delete_behind(self, name: str) -> None:
        """Delete what lies there."""
        raise NotImplementedError

    def name_behind(self, manifest: Manifest, file: str) -> str:
        """Return where a file of an artifact lies."""
        raise NotImplementedError

    def committing(self, key: str) -> AbstractContextManager[Any]:
        """Hold what the caller of `commit` must hold."""
        return nullcontext()

    # --- steps -------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _scratch(self, tmp_path: Path) -> None:
        self.scratch = tmp_path / "scratch"

    def fresh_folder(self) -> Path:
        """Return an empty folder."""
        folder = self.scratch / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def made(self, files: Mapping[str, bytes] = FILES, *, stage: str = STAGE, sample: int = 0) -> tuple[Manifest, Path]:
        """Return an artifact that is not committed yet: its manifest and the folder with its files."""
        folder = self.fresh_folder()
        return write_artifact(folder, files, stage=stage, sample=sample), folder

    def put(
        self,
        backend: Backend,
        files: Mapping[str, bytes] = FILES,
        *,
        stage: str = STAGE,
        sample: int = 0,
        replace: bool = False,
    ) -> Manifest:
        """Commit an artifact and return the manifest that holds afterwards."""
        manifest, folder = self.made(files, stage=stage, sample=sample)
        with self.committing(manifest.key):
            return backend.commit(manifest, folder, replace=replace)

    def fetched(self, backend: Backend, manifest: Manifest) -> tuple[dict[str, bytes], list[str]]:
        """Fetch an artifact; return its files, and what was said of them."""
        folder = self.fresh_folder()
        faults = backend.fetch(manifest, folder)
        return read_files(folder), faults

    def manifest_behind(self, manifest: Manifest) -> str:
        """Return where the manifest of an artifact lies."""
        return f"objects/{manifest.stage}/{manifest.key[:2]}/{manifest.key}/{MANIFEST}"

    def edit_manifest(self, manifest: Manifest, **changes: Any) -> None:
        """Change fields of the manifest that lies there, and seal it again."""
        name = self.manifest_behind(manifest)
        self.write_behind(name, resealed(self.read_behind(name), **changes))

    def alter(self, manifest: Manifest, file: str, kind: str) -> None:
        """Do to a file of an artifact what disks, networks and people do."""
        name = self.name_behind(manifest, file)
        data = ALTERATIONS[kind](self.read_behind(name))
        if data is None:
            self.delete_behind(name)
        else:
            self.write_behind(name, data)

    def all_behind(self) -> dict[str, bytes]:
        """Return everything that lies in the place, by name."""
        return {name: self.read_behind(name) for name in self.names_behind()}

    # --- what is not there -------------------------------------------------------------------------------------------

    def test_what_is_not_there_is_a_miss_with_a_reason(self, backend: Backend) -> None:
        found = backend.look_up(STAGE, "0" * 64)
        assert (found.manifest, found.damaged) == (None, False)
        assert "not in" in found.reason

    def test_an_artifact_of_another_stage_or_key_is_not_there(self, backend: Backend) -> None:
        manifest = self.put(backend)
        assert backend.look_up("pool", manifest.key).manifest is None
        assert backend.look_up(STAGE, manifest.key[:-1] + ("0" if manifest.key[-1] != "0" else "1")).manifest is None

    def test_an_empty_place_lists_nothing(self, backend: Backend) -> None:
        assert (list(backend.manifests()), list(backend.manifests(STAGE)), list(backend.folders())) == ([], [], [])

    def test_who_verifies_what_is_not_there_is_told(self, backend: Backend) -> None:
        (fault,) = backend.verify(STAGE, "0" * 64)
        assert "not in" in fault

    def test_asking_writes_nothing(self, backend: Backend) -> None:
        before = self.all_behind()
        backend.look_up(STAGE, "0" * 64)
        backend.verify(STAGE, "0" * 64)
        list(backend.manifests())
        list(backend.folders())
        assert self.all_behind() == before

    # --- commit ------------------------------------------------------------------------------------------------------

    def test_what_is_committed_is_looked_up_equal(self, backend: Backend, second: Backend) -> None:
        manifest, folder = self.made()
        with self.committing(manifest.key):
            told = backend.commit(manifest, folder)
        assert told == manifest
        for each in (backend, second):
            found = each.look_up(STAGE, manifest.key)
            assert (found.manifest, found.damaged) == (manifest, False)

    def test_a_committed_artifact_lies_where_others_look_for_it(self, backend: Backend) -> None:
        manifest = self.put(backend)
        behind = self.all_behind()
        assert behind[self.manifest_behind(manifest)] == manifest.to_bytes()
        assert {name: behind[self.name_behind(manifest, name)] for name in FILES} == FILES

    def test_an_artifact_may_have_no_files(self, backend: Backend, second: Backend) -> None:
        manifest = self.put(backend, {})
        assert second.look_up(STAGE, manifest.key).manifest == manifest
        assert (self.fetched(second, manifest), second.verify(STAGE, manifest.key)) == (({}, []), [])

    @pytest.mark.parametrize(
        "info",
        [
            {"pair": (1, 2)},
            {"numbers": [1e22, -0.0, 1e-7, 2**70]},
            {"text": "\u2028 ' \" \x00"},
            {"layers": {2: 1, 10: 0}},
        ],
        ids=["tuple", "numbers", "text", "numbers as names"],
    )
    def test_what_a_build_notes_comes_back(self, backend: Backend, second: Backend, info: dict[str, Any]) -> None:
        manifest, folder = self.made()
        with self.committing(manifest.key):
            backend.commit(dataclasses.replace(manifest, info=info), folder)
        found = second.look_up(STAGE, manifest.key).manifest
        assert found is not None
        assert found.info == json.loads(json.dumps(info))

    def test_without_its_manifest_nothing_is_there_though_all_files_are(
        self, backend: Backend, second: Backend
    ) -> None:
        manifest = self.put(backend)
        self.delete_behind(self.manifest_behind(manifest))
        assert {self.name_behind(manifest, name) for name in FILES} <= self.names_behind()
        for each in (backend, second):
            assert each.look_up(STAGE, manifest.key).manifest is None
            assert list(each.manifests()) == []
            assert each.verify(STAGE, manifest.key) != []

    def test_what_lost_its_manifest_can_be_committed_again(self, backend: Backend, second: Backend) -> None:
        manifest = self.put(backend)
        self.delete_behind(self.manifest_behind(manifest))
        other = self.put(second, OTHERS)
        assert backend.look_up(STAGE, manifest.key).manifest == other
        assert self.fetched(backend, other) == (OTHERS, [])

    def test_the_first_that_commits_a_key_wins(self, backend: Backend, second: Backend) -> None:
        first = self.put(backend)
        for each in (backend, second):
            assert self.put(each, OTHERS) == first
            assert each.look_up(STAGE, first.key).manifest == first
            assert self.fetched(each, first) == (FILES, [])

    def test_who_replaces_replaces_the_whole_artifact(self, backend: Backend, second: Backend) -> None:
        first = self.put(backend)
        other = self.put(second, OTHERS, replace=True)
        assert other.digest != first.digest
        for each in (backend, second):
            assert each.look_up(STAGE, first.key).manifest == other
            assert self.fetched(each, other) == (OTHERS, [])
            assert each.verify(STAGE, first.key) == []

    def test_what_is_not_there_can_be_replaced(self, backend: Backend) -> None:
        manifest = self.put(backend, replace=True)
        assert backend.look_up(STAGE, manifest.key).manifest == manifest

    def test_the_same_artifact_can_replace_itself(self, backend: Backend) -> None:
        first = self.put(backend)
        assert self.put(backend, replace=True) == first
        assert self.fetched(backend, first) == (FILES, [])

    @pytest.mark.parametrize("kind", ["cut", "grown", "deleted"])
    def test_who_commits_over_what_lost_a_file_wins(self, backend: Backend, second: Backend, kind: str) -> None:
        first = self.put(backend)
        self.alter(first, "values.bin", kind)
        other = self.put(second, OTHERS)
        assert backend.look_up(STAGE, first.key).manifest == other
        assert self.fetched(backend, other) == (OTHERS, [])

    def test_who_commits_over_a_manifest_that_cannot_be_read_wins(self, backend: Backend, second: Backend) -> None:
        first = self.put(backend)
        self.write_behind(self.manifest_behind(first), b"{")
        other = self.put(second, OTHERS)
        assert backend.look_up(STAGE, first.key).manifest == other
        assert self.fetched(backend, other) == (OTHERS, [])

    def test_who_replaces_what_is_altered_heals_it(self, backend: Backend, second: Backend) -> None:
        first = self.put(backend)
        self.alter(first, "values.bin", "one bit")
        assert backend.verify(STAGE, first.key) != []
        assert self.put(second, replace=True) == first
        assert self.fetched(backend, first) == (FILES, [])
        assert backend.verify(STAGE, first.key) == []
        assert backend.look_up(STAGE, first.key).manifest == first

    # --- many at once ------------------------------------------------------------------------------------------------

    def at_once(self, work: Callable[[int], Manifest]) -> list[Manifest]:
        """Return what `work` gives for 0, 1, …, each in a thread of its own, all begun together."""
        start = threading.Barrier(THREADS)

        def begin(number: int) -> Manifest:
            start.wait()
            return work(number)

        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(begin, range(THREADS)))

    def contents(self, number: int) -> dict[str, bytes]:
        """Return the files of one of many rivals; sizes, names and bytes differ from those of every other."""
        return {"values.bin": bytes([number]) * (100 + number), "same size": bytes([number]) * 9, f"{number}": b"mine"}

    @pytest.mark.parametrize("replace", [False, True])
    def test_of_many_that_commit_one_key_one_wins_whole(self, backend: Backend, second: Backend, replace: bool) -> None:
        for sample in range(ROUNDS):
            rivals = [self.made(self.contents(n), sample=sample) for n in range(THREADS)]
            key = rivals[0][0].key

            def commit(number: int, rivals: list[tuple[Manifest, Path]] = rivals, key: str = key) -> Manifest:
                with self.committing(key):
                    return (backend, second)[number % 2].commit(*rivals[number], replace=replace)

            told = self.at_once(commit)
            for each in (backend, second):
                found = each.look_up(STAGE, key).manifest
                assert found is not None
                winner = [manifest.digest for manifest, _ in rivals].index(found.digest)
                assert self.fetched(each, found) == (self.contents(winner), [])
                assert each.verify(STAGE, key) == []
                if not replace:
                    assert {manifest.digest for manifest in told} == {found.digest}

    def test_who_looks_while_another_commits_sees_nothing_or_all_of_it(self, backend: Backend, second: Backend) -> None:
        for sample in range(ROUNDS):
            manifest, folder = self.made(FILES, sample=sample)
            done = threading.Event()

            def commit(manifest: Manifest = manifest, folder: Path = folder, done: threading.Event = done) -> None:
                try:
                    with self.committing(manifest.key):
                        backend.commit(manifest, folder)
                finally:
                    done.set()

            with ThreadPoolExecutor(1) as threads:
                committing = threads.submit(commit)
                while not done.is_set():
                    found = second.look_up(STAGE, manifest.key)
                    assert not found.damaged
                    if found.manifest is not None:
                        assert self.fetched(second, found.manifest) == (FILES, [])
                committing.result()
            assert second.look_up(STAGE, manifest.key).manifest == manifest

    # --- fetch -------------------------------------------------------------------------------------------------------

    def test_fetch_copies_every_byte(self, backend: Backend, second: Backend) -> None:
        manifest = self.put(backend)
        assert self.fetched(second, manifest) == (FILES, [])

    def test_files_may_have_any_name(self, backend: Backend, second: Backend) -> None:
        files = {name: name.encode() for name in NAMES}
        manifest = self.put(backend, files)
        assert second.look_up(STAGE, manifest.key).manifest == manifest
        assert self.fetched(second, manifest) == (files, [])
        assert second.verify(STAGE, manifest.key) == []
        assert self.put(second, OTHERS) == manifest
        for name in NAMES:
            self.delete_behind(self.name_behind(manifest, name))
        assert self.named(manifest, self.fetched(second, manifest)[1]) == set(NAMES)

    def test_names_that_differ_only_by_case_are_two(self, backend: Backend) -> None:
        files = {"name": b"lower", "NAME": b"upper", "é": b"composed", "e\u0301": b"decomposed"}
        assert self.fetched(backend, self.put(backend, files)) == (files, [])

    @pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 3 * PART + 7])
    def test_a_file_may_have_any_size(
        self, backend: Backend, second: Backend, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("storage.remote.PART_BYTES", PART)
        files = {"file": bytes((7 * at + at // 251) % 256 for at in range(size))}
        manifest = self.put(backend, files)
        assert self.fetched(second, manifest) == (files, [])
        assert second.verify(STAGE, manifest.key) == []

    def test_an_artifact_may_have_many_files(self, backend: Backend) -> None:
        files = {f"c/{n // 10}/{n % 10}": str(n).encode() for n in range(60)}
        assert self.fetched(backend, self.put(backend, files)) == (files, [])

    @pytest.mark.parametrize("kind", ALTERATIONS)
    def test_fetch_names_the_one_file_that_is_not_as_it_was(self, backend: Backend, kind: str) -> None:
        at = "nested/deep/table.bin"
        manifest = self.put(backend)
        self.alter(manifest, at, kind)
        files, faults = self.fetched(backend, manifest)
        (fault,) = faults
        assert file_name(STAGE, manifest.key, at) in fault
        assert {name: files[name] for name in FILES if name != at} == {n: d for n, d in FILES.items() if n != at}

    @pytest.mark.parametrize("kind", ["one bit", "cut", "grown", "deleted"])
    def test_fetch_names_a_fault_in_the_last_part(
        self, backend: Backend, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("storage.remote.PART_BYTES", 4)
        manifest = self.put(backend, {"file": b"01234567", "other": b"other"})  # its sixth byte is in the second part
        self.alter(manifest, "file", kind)
        files, (fault,) = self.fetched(backend, manifest)
        assert file_name(STAGE, manifest.key, "file") in fault
        assert files["other"] == b"other"

    def test_fetch_names_an_empty_file_that_grew(self, backend: Backend) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "empty", "grown")
        _, (fault,) = self.fetched(backend, manifest)
        assert file_name(STAGE, manifest.key, "empty") in fault

    def test_fetch_names_files_whose_bytes_changed_places(self, backend: Backend) -> None:
        manifest = self.put(backend, {"a": b"first!", "b": b"second", "c": b"third"})
        self.write_behind(self.name_behind(manifest, "a"), b"second")
        self.write_behind(self.name_behind(manifest, "b"), b"first!")
        _, faults = self.fetched(backend, manifest)
        assert self.named(manifest, faults) == {"a", "b"}

    def test_fetch_names_every_file_of_what_is_gone(self, backend: Backend, second: Backend) -> None:
        manifest = self.put(backend)
        for name in self.names_behind():
            if manifest.key in name:
                self.delete_behind(name)
        _, faults = self.fetched(second, manifest)
        assert self.named(manifest, faults) == set(FILES)

    def test_fetch_changes_nothing(self, backend: Backend) -> None:
        manifest = self.put(backend)
        before = self.all_behind()
        self.fetched(backend, manifest)
        assert self.all_behind() == before

    def named(self, manifest: Manifest, faults: list[str]) -> set[str]:
        """Return the files that are named in faults, one a line."""
        found = [
            name for fault in faults for name in manifest.files if file_name(STAGE, manifest.key, name) + " " in fault
        ]
        assert len(found) == len(faults)
        return set(found)

    # --- verify ------------------------------------------------------------------------------------------------------

    def test_a_whole_artifact_verifies(self, backend: Backend, second: Backend) -> None:
        manifest = self.put(backend)
        assert second.verify(STAGE, manifest.key) == []
        assert backend.look_up(STAGE, manifest.key).manifest == manifest

    @pytest.mark.parametrize("kind", ALTERATIONS)
    def test_verify_names_the_file_that_is_not_as_it_was(self, backend: Backend, kind: str) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", kind)
        assert self.named(manifest, backend.verify(STAGE, manifest.key)) == {"values.bin"}

    @pytest.mark.parametrize("kind", ALTERATIONS)
    def test_verify_names_every_file_that_is_not_as_it_was(self, backend: Backend, kind: str) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", kind)
        self.alter(manifest, "nested/deep/table.bin", "one bit")
        faults = backend.verify(STAGE, manifest.key)
        assert self.named(manifest, faults) == {"values.bin", "nested/deep/table.bin"}

    def test_what_was_mended_verifies_again(self, backend: Backend) -> None:
        manifest = self.put(backend)
        self.alter(manifest, "values.bin", "one bit")
        assert backend.verify(STAGE, manifest.key) != []
        self.alter(manifest, "values.bin", "one bit")
        assert backend.verify(STAGE, manifest.key) == []
        assert backend.look_up(STAGE, manifest.key).manifest == manifest

    @pytest.mark.parametrize("kind", CONTRADICTIONS)
    def test_verify_names_a_manifest_that_contradicts_itself(self, backend: Backend, kind: str) -> None:
        manifest = self.put(backend)
        self.edit_manifest(manifest, **CONTRADICTIONS[kind])
        faults = backend.verify(STAGE, manifest.key)
        assert any(file_name(STAGE, manifest.key, MANIFEST) in fault for fault in faults)

    def test_verify_names_a_manifest_that_lists_fewer_files(self, backend: Backend) -> None:
        manifest = self.put(backend)
        self.edit_manifest(manifest, files={n: each for n, each in manifest.files.items() if n != "empty"})
        faults = backend.verify(STAGE, manifest.key)
        assert any(file_name(STAGE, manifest.key, MANIFEST) in fault for fault in faults)

    # --- damaged manifests -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "kinds",
        [[kind for kind in DAMAGES_OF_MANIFEST if kind != "nested without end"], ["nested without end"]],
        ids=["any way", "nested without end"],
    )
    def test_a_manifest_that_is_damaged_is_named(self, backend: Backend, second: Backend, kinds: list[str]) -> None:
        manifest = self.put(backend)
        for kind in kinds:
            self.write_behind(self.manifest_behind(manifest), DAMAGES_OF_MANIFEST[kind](manifest.to_bytes()))
            found = backend.look_up(STAGE, manifest.key)
            assert (found.manifest, found.damaged) == (None, True), kind
            assert file_name(STAGE, manifest.key, MANIFEST) in found.reason, kind
            (fault,) = second.verify(STAGE, manifest.key)
            assert file_name(STAGE, manifest.key, MANIFEST) in fault, kind

    def test_no_bit_of_a_manifest_changes_unnoticed(self, backend: Backend) -> None:
        manifest = self.put(backend)
        text = manifest.to_bytes()
        for at in range(0, len(text), 41):
            changed = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
            self.write_behind(self.manifest_behind(manifest), changed)
            found = backend.look_up(STAGE, manifest.key)
            assert (found.manifest, found.damaged) == (None, True), at

    def test_a_manifest_that_names_a_file_outside_is_refused(self, backend: Backend) -> None:
        manifest = self.put(backend)
        for name in OUTSIDE:
            files = {name: manifest.files["values.bin"]}
            self.edit_manifest(manifest, files=files, digest=content_digest({name: str(files[name]["sha256"])}))
            found = backend.look_up(STAGE, manifest.key)
            assert (found.manifest, found.damaged) == (None, True), name
            assert repr(name) in found.reason
            assert backend.verify(STAGE, manifest.key) == [found.reason]
            assert list(backend.manifests()) == [], name

    @pytest.mark.parametrize("size", ["1", 1.5, None])
    def test_a_manifest_whose_sizes_are_no_whole_numbers_is_refused(self, backend: Backend, size: object) -> None:
        manifest = self.put(backend, {"file": b"x"})
        self.edit_manifest(manifest, files={"file": {**manifest.files["file"], "size": size}})
        found = backend.look_up(STAGE, manifest.key)
        assert (found.manifest, found.damaged) == (None, True)

    # --- listing -----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def several(self, backend: Backend) -> list[Manifest]:
        """Return artifacts of two stages, in the order of stages and keys."""
        stages = ["pool", "pool_scores"]
        found = [self.put(backend, {"file": b"x"}, stage=stage, sample=n) for n in range(2) for stage in stages]
        return sorted(found, key=lambda manifest: (manifest.stage, manifest.key))

    def test_manifests_are_listed_in_the_order_of_their_keys(self, second: Backend, several: list[Manifest]) -> None:
        assert list(second.manifests()) == several

    def test_the_manifests_of_one_stage_are_listed_alone(self, second: Backend, several: list[Manifest]) -> None:
        for stage in ("pool", "pool_scores", "scores", "poo"):
            assert list(second.manifests(stage)) == [each for each in several if each.stage == stage]

    def test_folders_are_listed_in_order(self, second: Backend, several: list[Manifest]) -> None:
        assert list(second.folders()) == [(each.stage, each.key) for each in several]

    @pytest.mark.parametrize(
        "kind", ["cut", "no text", "nested without end", "other seconds", "of another key", "of another stage"]
    )
    def test_a_listing_skips_what_cannot_be_read(self, backend: Backend, several: list[Manifest], kind: str) -> None:
        self.write_behind(self.manifest_behind(several[2]), DAMAGES_OF_MANIFEST[kind](several[2].to_bytes()))
        assert list(backend.manifests()) == several[:2] + several[3:]
        assert list(backend.folders()) == [(each.stage, each.key) for each in several]

    @pytest.mark.parametrize(
        "name",
        [
            "objects/README.txt",
            "objects/pool/aa/README.txt",
            f"objects/pool/aa/{MANIFEST}",
            f"objects/pool/aa/backup/{MANIFEST}",
            f"objects/pool/aa/{'A' * 64}/{MANIFEST}",
            f"objects/pool/aa/{'a' * 64}.bak/{MANIFEST}",
            f"objects/pool/zz/{'a' * 64}/{MANIFEST}",
            f"objects/No-Stage/aa/{'a' * 64}/{MANIFEST}",
            f"objects2/pool/aa/{'a' * 64}/{MANIFEST}",
        ],
    )
    def test_a_listing_ignores_what_others_put_there(self, backend: Backend, name: str) -> None:
        manifest = self.put(backend, {"file": b"x"}, stage="pool")
        self.write_behind(name, manifest.to_bytes())
        assert list(backend.manifests()) == list(backend.manifests("pool")) == [manifest]
        assert list(backend.folders()) == [("pool", manifest.key)]
        assert name in self.names_behind()

    # --- names that are none -----------------------------------------------------------------------------------------

    def test_a_stage_or_key_that_is_none_is_refused(self, backend: Backend) -> None:
        before = self.names_behind()
        manifest, folder = self.made()
        asked: list[Callable[[Manifest], object]] = [
            lambda wrong: backend.look_up(wrong.stage, wrong.key),
            lambda wrong: backend.verify(wrong.stage, wrong.key),
            lambda wrong: backend.fetch(wrong, self.fresh_folder()),
            lambda wrong: backend.commit(wrong, folder),
            lambda wrong: backend.commit(wrong, folder, replace=True),
        ]
        for stage, key in BAD_NAMES:
            for ask in asked:
                with pytest.raises(StorageError, match="names no artifact"):
                    ask(dataclasses.replace(manifest, stage=stage, key=key))
        assert self.names_behind() == before
