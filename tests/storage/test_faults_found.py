"""Tests that fail today, one a bug; to be moved to tests/storage once the source is right."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from storage.arrays import read_array, write_array
from storage.artifacts import MANIFEST, ArtifactStore, Decision
from storage.errors import StorageError, UnwritableStoreError
from storage.explain import changed_fields, explain_miss
from storage.keys import FileHashes
from storage.tables import query, write_table
from tests.storage.test_artifacts import REQUEST, build, edit_manifest, folder_of, must_not_build

LONG_AGO = (1e9, 1e9)


# 1 tables.query: glob characters in a path
@pytest.mark.parametrize("name", ["[ab]", "x*", "?", "{a,b}"])
def test_a_path_is_a_name_and_never_a_pattern(tmp_path: Path, name: str) -> None:
    for each, value in ((name, "mine"), ("a", "other"), ("xy", "other")):
        (tmp_path / each).mkdir()
        write_table(tmp_path / each / "t.parquet", {"whose": [value]})
    found = query("SELECT whose FROM t", {"t": [tmp_path / name / "t.parquet"]})
    assert found.to_pydict() == {"whose": ["mine"]}


# 2 arrays: integers
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_deleted_chunk_file_of_integers_is_an_error_and_not_zeros(tmp_path: Path, dtype: str) -> None:
    write_array(tmp_path / "array", np.ones((3, 5), dtype))
    (tmp_path / "array" / "c" / "0" / "0").unlink()
    with pytest.raises(StorageError, match="lacks a chunk"):
        read_array(tmp_path / "array")


def test_zeros_of_an_integer_type_are_one_shard_file_too(tmp_path: Path) -> None:
    write_array(tmp_path / "array", np.zeros((3, 5), np.uint8))
    assert (tmp_path / "array" / "c" / "0" / "0").is_file()


@pytest.mark.parametrize("dtype", [">f8", ">f2", "complex64", "complex128", "U3", "bool"])
def test_every_type_but_float32_and_integers_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="float32 or integer"):
        write_array(tmp_path / "array", np.zeros((2, 2), dtype))


# 3 artifacts: an OSError of the builder that is no fault of the store
@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "/models/x"), ConnectionError("hub down")])
def test_an_oserror_that_is_not_the_stores_passes_through(store: ArtifactStore, error: OSError) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        store.build_once(REQUEST, fail)


# 4 artifacts: manifests that are JSON of the wrong shape
@pytest.mark.parametrize("files", [[], None, {"values.bin": {"size": float("inf")}}, {"a\0": {"size": 1}}])
def test_a_manifest_of_the_wrong_shape_is_a_rebuild(store: ArtifactStore, files: object) -> None:
    store.build_once(REQUEST, build)
    edit_manifest(store, files=files)
    again = store.build_once(REQUEST, build)
    assert again.decision is Decision.REBUILT
    assert again.reason.startswith("file MANIFEST.json is not readable")


def test_verify_survives_a_manifest_without_a_sha256(store: ArtifactStore) -> None:
    store.build_once(REQUEST, build)
    path = folder_of(store) / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    (fault,) = store.verify(REQUEST.stage, REQUEST.key)
    assert fault.startswith("file MANIFEST.json is not readable")


def test_a_folder_replaced_by_a_file_is_a_rebuild(store: ArtifactStore) -> None:
    store.build_once(REQUEST, build)
    folder = folder_of(store)
    (folder / "nested" / "table.bin").unlink()
    (folder / "nested").rmdir()
    (folder / "nested").touch()
    assert store.build_once(REQUEST, build).reason == "file nested/table.bin is missing"


def test_no_flipped_bit_of_a_manifest_crashes_verify(store: ArtifactStore) -> None:
    store.build_once(REQUEST, build)
    path = folder_of(store) / MANIFEST
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as stream:
        for bit in range(8 * len(whole)):
            os.pwrite(stream.fileno(), bytes([whole[bit // 8] ^ 1 << bit % 8]), bit // 8)
            store.verify(REQUEST.stage, REQUEST.key)
            os.pwrite(stream.fileno(), whole[bit // 8 : bit // 8 + 1], bit // 8)


def test_a_builder_that_writes_a_manifest_of_its_own_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match=MANIFEST):
        store.build_once(REQUEST, lambda folder: (folder / MANIFEST).write_text("{}") and None)


# 5 faults of the locks folder and of the root
def test_a_locks_folder_that_cannot_be_made_is_a_storage_error(store: ArtifactStore) -> None:
    store.root.mkdir()
    (store.root / "locks").touch()
    with pytest.raises(StorageError, match="locks"):
        store.build_once(REQUEST, must_not_build)


def test_a_build_in_a_store_below_a_file_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableStoreError, match="COVERCAL_CACHE"):
        ArtifactStore(tmp_path / "file" / "cache").build_once(REQUEST, must_not_build)


# 6 keys.FileHashes
def test_a_folder_of_hashes_below_a_file_still_gives_the_hash(tmp_path: Path) -> None:
    for name in ("data", "file"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, LONG_AGO)
    assert len(FileHashes(tmp_path / "file" / "notes").sha256(tmp_path / "data")) == 64


@pytest.mark.parametrize("torn", [b"\xff\xfe\x80", b'{"stamp": STAMP}'], ids=["binary", "no sha256"])
def test_a_garbled_note_is_only_a_hash_to_compute_again(tmp_path: Path, torn: bytes) -> None:
    hashes, old = FileHashes(tmp_path / "notes"), Path(os.__file__)
    expected = hashes.sha256(old)
    (note,) = hashes.folder.iterdir()
    stamp = json.dumps(json.loads(note.read_bytes())["stamp"]).encode()
    note.write_bytes(torn.replace(b"STAMP", stamp))
    assert hashes.sha256(old) == expected


def test_threads_that_hash_one_file_at_once_all_get_the_hash(tmp_path: Path) -> None:
    files = [tmp_path / str(index) for index in range(20)]
    for each in files:
        each.write_bytes(b"x" * 100)
        os.utime(each, LONG_AGO)
    failures: list[BaseException] = []

    def hash_all(round_: int) -> None:
        try:
            for each in files:
                FileHashes(tmp_path / f"notes{round_}").sha256(each)
        except OSError as error:
            failures.append(error)

    for round_ in range(20):
        threads = [threading.Thread(target=hash_all, args=(round_,)) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert failures == []


# 7 explain
@pytest.mark.parametrize(("old", "new"), [({"x": 1}, {"x": 1.0}), ({"x": 1}, {"x": True}), ({}, {"x": None})])
def test_whatever_changes_a_key_is_named(old: dict, new: dict) -> None:
    assert explain_miss(1, new, [(1, old, "2025-01-01")]) != ""


def test_two_long_values_are_told_apart() -> None:
    (line,) = changed_fields({"m": "HuggingFaceTB/SmolLM2-135M-Instruct"}, {"m": "HuggingFaceTB/SmolLM2-360M-Instruct"})
    old, new = line.removeprefix("m: ").split(" -> ")
    assert old != new


def test_empty_material_has_no_field() -> None:
    assert changed_fields({}, {"seed": 0}) == ["seed: none -> 0"]


def test_the_same_stage_version_is_nearer() -> None:
    assert explain_miss(2, {"a": 1}, [(2, {"a": 2}, "2025-01-01"), (1, {"a": 3}, "2025-02-02")]) == "a: 2 -> 1"
