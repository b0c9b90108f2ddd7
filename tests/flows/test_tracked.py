"""Steps as Prefect tasks, asked for by several threads of one flow."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.execution import Recorder, Tracked
from flows.sweep import Cell, CellResult, run_cells
from storage.artifacts import ArtifactStore
from tasks.cached import Build, cached
from tests.end_to_end.services import until

BUILDS: list[str] = []
WAITING = threading.Event()


@cached("slow", version=1)
def build_slowly(build: Build, *, word: str) -> None:
    WAITING.wait(20)
    BUILDS.append(word)
    (build.folder / "word").write_text(word)


@pytest.fixture(autouse=True)
def _empty() -> None:
    BUILDS.clear()
    WAITING.clear()


def test_what_two_threads_ask_for_at_the_same_time_is_one_task(store: ArtifactStore, prefect_server: None) -> None:
    @flow(task_runner=ThreadPoolTaskRunner(max_workers=4))
    def ask() -> list[Any]:
        tracked = Tracked(store, Recorder())
        with ThreadPoolExecutor(3) as threads:
            words = ["one", "one", "two"]
            asked = [threads.submit(copy_context().run, tracked.run, w, build_slowly, word=w) for w in words]
            until(lambda: len(tracked._unfinished) == 2, "both artifacts are asked for", 20)
            WAITING.set()
            found = [each.result() for each in asked]
        assert [each.decision for each in tracked.recorder.events].count("built") == 3
        assert not tracked._unfinished
        later = tracked.run("later", build_slowly, word="one")
        assert tracked.recorder.events[-1].decision == "hit"
        return [*found, later]

    one, same, two, later = ask()
    assert one == same == later != two
    assert sorted(BUILDS) == ["one", "two"]


def test_cells_run_at_the_same_time_are_told_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)

    def run_one(cell: Cell, *_: Any) -> CellResult:
        both.wait()
        return CellResult(cell.fields)

    monkeypatch.setattr("flows.sweep._run_cell", run_one)
    wanted = [Cell({"number": number}, None) for number in range(4)]  # type: ignore[arg-type]
    told: list[int] = []
    store: Any = None
    found = list(run_cells(wanted, store, lambda cell: store, lambda n, c, r: told.append(n), at_once=2))
    assert [each.fields["number"] for each in found] == [0, 1, 2, 3]
    assert told == [1, 2, 3, 4]
