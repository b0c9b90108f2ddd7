"""A run record comes back as it was written, the oldest first."""

import errno
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from storage.errors import MissingArtifactError, StorageError
from storage.runs import (
    RunRecord,
    StageRecord,
    find_run,
    new_run_name,
    parse_run,
    pin_run,
    pinned_runs,
    read_runs,
    run_bytes,
    save_run,
    write_run,
)
from tests.storage.faults import as_ordinary_user, forbid_writing

NAMES = ["20250101T000000-aaaaaa", "20250101T000000-bbbbbb", "20250202T000000-cccccc"]


def record(run: str) -> RunRecord:
    return RunRecord(
        run=run,
        command="run recipe.yaml",
        started="2025-01-02T03:04:05+00:00",
        seconds=1.5,
        state="done",
        recipe={"pool": {"samples": 8, "sources": [{"path": "é.jsonl"}]}},
        stages=[
            StageRecord("pool", "pool", "0" * 64, "built", "first of its stage", 0.25),
            StageRecord("statistics 1/2", "statistics", "1" * 64, "hit", "in the store", 0.0),
        ],
        result={"coverage": 0.5},
    )


def test_a_run_record_comes_back(tmp_path: Path) -> None:
    write_run(tmp_path, record("20250102T030405-aaaaaa"))
    assert list(read_runs(tmp_path)) == [record("20250102T030405-aaaaaa")]


def test_a_failed_run_keeps_its_error(tmp_path: Path) -> None:
    failed = RunRecord(
        "20250102T030405-aaaaaa", "run", "2025-01-02T03:04:05+00:00", 0.0, "failed", {}, [], error="disk full"
    )
    write_run(tmp_path, failed)
    assert list(read_runs(tmp_path)) == [failed]


def test_runs_are_listed_from_the_oldest_on(tmp_path: Path) -> None:
    names = ["20250101T000000-bbbbbb", "20241231T235959-cccccc", "20250101T000001-aaaaaa"]
    for each in names:
        write_run(tmp_path, record(each))
    assert [each.run for each in read_runs(tmp_path)] == [names[1], names[0], names[2]]


def test_the_path_of_a_record_is_where_it_lies(tmp_path: Path) -> None:
    path = write_run(tmp_path, record("20250102T030405-aaaaaa"))
    assert list((tmp_path / "runs").iterdir()) == [path]


def test_writing_a_run_again_replaces_its_record(tmp_path: Path) -> None:
    for state in ("running", "done"):
        write_run(tmp_path, RunRecord("20250102T030405-aaaaaa", "run", "2025-01-02T03:04:05+00:00", 0.0, state, {}, []))
    assert [each.state for each in read_runs(tmp_path)] == ["done"]


def test_a_half_written_record_is_not_listed(tmp_path: Path) -> None:
    path = write_run(tmp_path, record("20250102T030405-aaaaaa"))
    path.with_name("20250102T030406-bbbbbb.json.0123.partial").write_bytes(path.read_bytes()[:40])
    assert [each.run for each in read_runs(tmp_path)] == ["20250102T030405-aaaaaa"]


def test_a_store_without_runs_lists_none(tmp_path: Path) -> None:
    assert list(read_runs(tmp_path)) == []


def test_a_path_in_a_recipe_is_written_as_text(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        RunRecord(
            "20250102T030405-aaaaaa", "run", "2025-01-02T03:04:05+00:00", 0.0, "done", {"output": Path("a/b")}, []
        ),
    )
    assert next(read_runs(tmp_path)).recipe == {"output": os.path.join("a", "b")}  # noqa: PTH118


def test_a_folder_of_runs_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=str(tmp_path / "runs")):
        write_run(tmp_path, record("20250102T030405-aaaaaa"))


def test_the_name_of_a_run_tells_when_it_began() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    began = datetime.strptime(new_run_name()[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    assert before <= began <= datetime.now(UTC)


def test_names_sort_by_time() -> None:
    times = [new_run_name().split("-")[0] for _ in range(200)]
    assert times == sorted(times)


def test_a_thousand_runs_of_one_second_have_a_thousand_names() -> None:
    assert len({new_run_name() for _ in range(1000)}) == 1000


# records that come from elsewhere


def test_the_bytes_of_a_record_are_the_record() -> None:
    assert parse_run(run_bytes(record(NAMES[0]))) == record(NAMES[0])


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{}", b'{"run": "a", "stages": []}', b"\xff", b'{"stages": [1]}'])
def test_what_is_no_record_is_refused(text: bytes) -> None:
    with pytest.raises(StorageError, match=r"^A run record is not readable \(.+\)\.$"):
        parse_run(text)


@pytest.mark.parametrize("name", ["", "../runs", "a/b", "a.json", "a b", "a\n", "a" * 81, 5, None])
def test_a_record_whose_name_is_that_of_no_run_is_refused(name: Any) -> None:
    with pytest.raises(StorageError, match="not readable"):
        parse_run(json.dumps({**json.loads(run_bytes(record("a"))), "run": name}).encode())


def test_every_name_of_a_run_is_accepted() -> None:
    name = new_run_name()
    assert parse_run(run_bytes(record(name))).run == name


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]"])
def test_a_damaged_record_is_named_and_not_left_out(tmp_path: Path, damage: bytes) -> None:
    write_run(tmp_path, record(NAMES[0]))
    path = write_run(tmp_path, record(NAMES[1]))
    path.write_bytes(damage)
    with pytest.raises(StorageError, match=rf"^{path}: .*Delete the file"):
        list(read_runs(tmp_path))


def test_the_record_of_another_machine_is_kept(tmp_path: Path) -> None:
    path = save_run(tmp_path, record(NAMES[0]))
    assert list(read_runs(tmp_path)) == [record(NAMES[0])]
    assert path.parent == tmp_path / "runs"


def test_a_record_that_is_here_stays_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path, record(NAMES[0]))
    save_run(tmp_path, replace(record(NAMES[0]), state="other"))
    assert list(read_runs(tmp_path)) == [record(NAMES[0])]


# finding


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """A store with the runs `NAMES`, of which the last has failed."""
    for name, state in zip(NAMES, ("completed", "completed", "failed"), strict=True):
        write_run(tmp_path, replace(record(name), state=state))
    return tmp_path


def test_a_run_is_found_by_the_beginning_of_its_name(three_runs: Path) -> None:
    assert [find_run(three_runs, name).run for name in (NAMES[0], NAMES[1][:17], "202502")] == NAMES


def test_the_latest_run_is_the_last_that_was_completed(three_runs: Path) -> None:
    assert find_run(three_runs, "latest").run == NAMES[1]


@pytest.mark.parametrize(("name", "count"), [("20250101", 2), ("2025", 3), ("2024", 0)])
def test_a_name_that_no_run_or_several_have_is_refused_with_their_number(
    three_runs: Path, name: str, count: int
) -> None:
    with pytest.raises(MissingArtifactError, match=f"^{count} runs have a name that begins with '{name}'"):
        find_run(three_runs, name)


def test_without_a_completed_run_there_is_no_latest(tmp_path: Path) -> None:
    write_run(tmp_path, replace(record(NAMES[0]), state="failed"))
    with pytest.raises(MissingArtifactError, match=r"^0 runs"):
        find_run(tmp_path, "latest")


# pins


def test_a_store_pins_no_run_by_itself(three_runs: Path) -> None:
    assert pinned_runs(three_runs) == frozenset()


def test_a_run_is_pinned_until_it_is_unpinned(three_runs: Path) -> None:
    for name in NAMES[:2]:
        pin_run(three_runs, name)
    assert pinned_runs(three_runs) == set(NAMES[:2])
    pin_run(three_runs, NAMES[0], pinned=False)
    assert pinned_runs(three_runs) == {NAMES[1]}


@pytest.mark.parametrize("pinned", [True, False])
def test_pinning_twice_is_pinning_once(three_runs: Path, pinned: bool) -> None:
    for _ in range(2):
        pin_run(three_runs, NAMES[0], pinned=pinned)
    assert pinned_runs(three_runs) == ({NAMES[0]} if pinned else set())


@pytest.mark.parametrize("read", [lambda root: list(read_runs(root)), pinned_runs], ids=["runs", "pins"])
def test_a_folder_of_runs_that_may_not_be_listed_is_named_and_not_empty(public_folder: Path, read: Any) -> None:
    write_run(public_folder, record(NAMES[0]))
    pin_run(public_folder, NAMES[0])
    (public_folder / "runs").chmod(0o333)
    with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot list {public_folder / 'runs'}: Permission"):
        read(public_folder)


def test_a_run_that_cannot_be_pinned_is_named(public_folder: Path) -> None:
    write_run(public_folder, record(NAMES[0]))
    forbid_writing(public_folder)
    with as_ordinary_user(), pytest.raises(StorageError, match=f"Cannot write .*{NAMES[0]}.pinned: Permission denied"):
        pin_run(public_folder, NAMES[0])


def test_a_record_that_a_full_disk_does_not_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("storage.runs.write_durably", full)
    with pytest.raises(StorageError, match=rf"Cannot write run record .*{NAMES[0]}\.json: No space left on device"):
        write_run(tmp_path, record(NAMES[0]))


def test_a_pin_is_no_run(three_runs: Path) -> None:
    pin_run(three_runs, NAMES[0])
    assert [each.run for each in read_runs(three_runs)] == NAMES
