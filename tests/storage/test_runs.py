"""A run record comes back as it was written, the oldest first."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.runs import RunRecord, StageRecord, new_run_name, read_runs, write_run


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
    failed = RunRecord("20250102T030405-aaaaaa", "run", "", 0.0, "failed", {}, [], error="disk full")
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
        write_run(tmp_path, RunRecord("20250102T030405-aaaaaa", "run", "", 0.0, state, {}, []))
    assert [each.state for each in read_runs(tmp_path)] == ["done"]


def test_a_half_written_record_is_not_listed(tmp_path: Path) -> None:
    path = write_run(tmp_path, record("20250102T030405-aaaaaa"))
    path.with_name("20250102T030406-bbbbbb.json.0123.partial").write_bytes(path.read_bytes()[:40])
    assert [each.run for each in read_runs(tmp_path)] == ["20250102T030405-aaaaaa"]


def test_a_store_without_runs_lists_none(tmp_path: Path) -> None:
    assert list(read_runs(tmp_path)) == []


def test_a_path_in_a_recipe_is_written_as_text(tmp_path: Path) -> None:
    write_run(tmp_path, RunRecord("20250102T030405-aaaaaa", "run", "", 0.0, "done", {"output": Path("a/b")}, []))
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
