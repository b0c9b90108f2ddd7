"""Keys are functions of what an artifact is made from; a file is hashed once and never trusted too long."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import keys
from storage.keys import FileHashes, artifact_key, canonical_json, content_digest, file_sha256, hash_tagged
from tests.storage.faults import as_ordinary_user, forbid_writing

LONG_AGO = (1e9, 1e9)

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
plain_json = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def reversed_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_order(value[key]) for key in reversed(value)}
    return [reversed_order(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def hashes(tmp_path: Path) -> FileHashes:
    return FileHashes(tmp_path / "hashes")


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that `FileHashes` reads to the end from here on."""
    read = []

    def spy(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(keys, "file_sha256", spy)
    return read


def wait_for_a_later_timestamp(path: Path) -> None:
    """Wait until the file system's clock has moved on since `path` changed (it ticks every few milliseconds)."""
    probe = path.with_name("probe")
    probe.touch()
    while probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        probe.touch()


# canonical JSON


@given(value=plain_json)
def test_canonical_json_does_not_depend_on_the_order_of_fields(value: Any) -> None:
    assert canonical_json(reversed_order(value)) == canonical_json(value)


@given(value=plain_json)
def test_canonical_json_loses_nothing(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_is_sorted_compact_utf8() -> None:
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'.encode()


def test_a_tuple_and_a_list_have_one_canonical_json() -> None:
    assert canonical_json({"sites": ("q", "k")}) == canonical_json({"sites": ["q", "k"]})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_canonical_json_refuses_a_number_that_json_does_not_have(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"deep": [{"down": number}]})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), Path("x")], ids=["set", "bytes", "object", "path"])
def test_canonical_json_refuses_what_is_not_json(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json({"field": value})


# keys


def test_the_golden_key_holds() -> None:
    # printf 'artifact\0{"material":{"bits":4,"name":"é"},"stage":"pool","version":1}' | sha256sum
    assert (
        artifact_key("pool", 1, {"name": "é", "bits": 4})
        == "5ceed304d2f23f11bb0b3095d263fc7dfa16f5f4be69fb402164a3b43ec1d49b"
    )


@pytest.mark.parametrize(
    "other",
    [("selection", 1, {"seed": 0}), ("pool", 2, {"seed": 0}), ("pool", 1, {"seed": 1}), ("pool", 1, {"seeds": 0})],
    ids=["stage", "version", "value", "field"],
)
def test_another_stage_version_or_material_is_another_key(other: tuple[str, int, dict[str, int]]) -> None:
    assert artifact_key(*other) != artifact_key("pool", 1, {"seed": 0})


@given(a=plain_json, b=plain_json)
def test_keys_agree_exactly_when_the_material_does(a: Any, b: Any) -> None:
    same = canonical_json(a) == canonical_json(b)
    assert (artifact_key("pool", 1, {"field": a}) == artifact_key("pool", 1, {"field": b})) is same


@given(value=plain_json)
def test_a_key_outlives_a_journey_through_a_manifest(value: Any) -> None:
    material = {"field": value}
    assert artifact_key("pool", 1, json.loads(json.dumps(material, indent=1))) == artifact_key("pool", 1, material)


def test_a_key_is_64_hex_digits() -> None:
    assert len(bytes.fromhex(artifact_key("pool", 1, {}))) == 32


@given(data=st.binary())
def test_two_kinds_of_thing_never_share_a_hash(data: bytes) -> None:
    assert hash_tagged("path", data) != hash_tagged("content", data)


def test_a_digest_does_not_depend_on_the_order_of_files() -> None:
    assert content_digest({"a": "0", "b": "1"}) == content_digest({"b": "1", "a": "0"})


def test_a_digest_depends_on_which_file_holds_which_content() -> None:
    assert content_digest({"a": "0", "b": "1"}) != content_digest({"a": "1", "b": "0"})


# hashes of files


@given(data=st.binary(max_size=300))
def test_the_sha256_of_a_file_is_that_of_its_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(data)
    assert file_sha256(path) == hashlib.sha256(data).hexdigest()


def test_a_file_that_did_not_change_is_read_once(hashes: FileHashes, files_read: list[Path]) -> None:
    old = Path(os.__file__)  # changed long ago, which a file made by a test cannot be
    first, second = hashes.sha256(old), hashes.sha256(old)
    assert (first, files_read) == (second, [old.resolve()])


def test_a_hash_is_remembered_by_the_next_process(hashes: FileHashes, files_read: list[Path]) -> None:
    old = Path(os.__file__)
    first = hashes.sha256(old)
    assert FileHashes(hashes.folder).sha256(old) == first
    assert len(files_read) == 1


def test_a_remembered_hash_is_the_hash_of_the_bytes(hashes: FileHashes) -> None:
    old = Path(os.__file__)
    hashes.sha256(old)
    assert hashes.sha256(old) == hashlib.sha256(old.read_bytes()).hexdigest()


def test_a_file_that_grew_is_read_again(hashes: FileHashes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"one")
    os.utime(path, LONG_AGO)
    hashes.sha256(path)
    path.write_bytes(b"one and two")
    os.utime(path, LONG_AGO)
    assert hashes.sha256(path) == hashlib.sha256(b"one and two").hexdigest()


def test_other_content_of_the_same_size_and_date_is_read_again(
    hashes: FileHashes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "RACY_SECONDS", 0.0)  # so that the first hash is remembered for certain
    path = tmp_path / "data"
    path.write_bytes(b"one")
    os.utime(path, LONG_AGO)
    hashes.sha256(path)
    wait_for_a_later_timestamp(path)
    path.write_bytes(b"two")
    os.utime(path, LONG_AGO)
    assert hashes.sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_another_file_moved_onto_the_path_is_read_again(hashes: FileHashes, tmp_path: Path) -> None:
    path, other = tmp_path / "data", tmp_path / "other"
    for each, content in ((path, b"one"), (other, b"two")):
        each.write_bytes(content)
        os.utime(each, LONG_AGO)
    hashes.sha256(path)
    other.replace(path)
    assert hashes.sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_a_file_changed_a_moment_ago_is_not_remembered(hashes: FileHashes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"fresh")
    hashes.sha256(path)
    assert not hashes.folder.exists()


def test_a_file_whose_date_lies_ahead_is_read_once(
    hashes: FileHashes, files_read: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "RACY_SECONDS", 0.0)  # of the change itself, which a test makes a moment ago
    path = tmp_path / "data"
    path.write_bytes(b"one")
    ahead = time.time() + 3600
    os.utime(path, (ahead, ahead))
    time.sleep(0.01)
    assert {hashes.sha256(path) for _ in range(3)} == {hashlib.sha256(b"one").hexdigest()}
    assert files_read == [path]


def test_a_file_changed_a_moment_ago_is_not_remembered_whatever_its_date(hashes: FileHashes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"fresh")
    for date in (LONG_AGO, (time.time() + 3600,) * 2):
        os.utime(path, date)
        hashes.sha256(path)
        assert not hashes.folder.exists()


def test_a_torn_note_is_only_a_hash_to_compute_again(hashes: FileHashes) -> None:
    old = Path(os.__file__)
    expected = hashes.sha256(old)
    (note,) = hashes.folder.iterdir()
    note.write_bytes(note.read_bytes()[:-20])
    assert hashes.sha256(old) == expected


@pytest.mark.parametrize("torn", [b"\xff\xfe\x80", b'{"stamp": STAMP}'], ids=["binary", "no sha256"])
def test_a_garbled_note_is_only_a_hash_to_compute_again(tmp_path: Path, torn: bytes) -> None:
    hashes, old = FileHashes(tmp_path / "notes"), Path(os.__file__)
    expected = hashes.sha256(old)
    (note,) = hashes.folder.iterdir()
    stamp = json.dumps(json.loads(note.read_bytes())["stamp"]).encode()
    note.write_bytes(torn.replace(b"STAMP", stamp))
    assert hashes.sha256(old) == expected


def test_a_read_only_folder_of_hashes_still_gives_the_hash(public_folder: Path) -> None:
    data, notes = public_folder / "data", public_folder / "notes"
    data.write_bytes(b"one")
    os.utime(data, LONG_AGO)
    notes.mkdir()
    forbid_writing(notes)
    with as_ordinary_user():
        digest = FileHashes(notes).sha256(data)
    assert (digest, list(notes.iterdir())) == (hashlib.sha256(b"one").hexdigest(), [])


def test_a_folder_of_hashes_that_cannot_be_made_still_gives_the_hash(public_folder: Path) -> None:
    data = public_folder / "data"
    data.write_bytes(b"one")
    os.utime(data, LONG_AGO)
    forbid_writing(public_folder)
    with as_ordinary_user():
        digest = FileHashes(public_folder / "cache" / "notes").sha256(data)
    assert digest == hashlib.sha256(b"one").hexdigest()


def test_a_folder_of_hashes_below_a_file_still_gives_the_hash(tmp_path: Path) -> None:
    for name in ("data", "file"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, LONG_AGO)
    assert len(FileHashes(tmp_path / "file" / "notes").sha256(tmp_path / "data")) == 64


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


def test_a_combined_digest_moves_with_its_folder(hashes: FileHashes, tmp_path: Path) -> None:
    digests = []
    for root in (tmp_path / "here", tmp_path / "there"):
        (root / "sub").mkdir(parents=True)
        (root / "a").write_bytes(b"1")
        (root / "sub" / "b").write_bytes(b"2")
        digests.append(hashes.combined([root / "a", root / "sub" / "b"], root))
    assert digests[0] == digests[1]


def test_a_combined_digest_does_not_depend_on_the_order_of_files(hashes: FileHashes, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for each in files:
        each.write_text(each.name)
    assert hashes.combined(files, tmp_path) == hashes.combined(reversed(files), tmp_path)


def test_a_combined_digest_depends_on_the_names(hashes: FileHashes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = hashes.combined([tmp_path / "a"], tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert hashes.combined([tmp_path / "b"], tmp_path) != before


def test_a_file_whose_name_is_no_text_has_a_hash_like_any_other(hashes: FileHashes, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    path.write_bytes(b"words")
    os.utime(path, (1, 1))
    assert hashes.sha256(path) == hashes.sha256(path) == file_sha256(path)
