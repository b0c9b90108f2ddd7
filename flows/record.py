"""A run under way, and what is kept of it when it ends: its record, and its page."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from covercal.errors import EvaluationError
from covercal.recipe import Recipe, plain
from flows.console import new_console, say
from flows.execution import Recorder
from flows.report import Concluded, Took, lean, told, write_page, write_sweep
from flows.requirements import shortcomings
from flows.sweep import CellResult, sweep_summary, task_failures
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.manifest import Ref
from storage.runs import RunRecord, StageRecord, new_run_name, write_run


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that came to its end.

    Attributes
    ----------
    summary
        Everything it found; the same for each run of a recipe.
    told
        The summary, and how this run went: command, time, versions, and one row per stage.
    record, report
        Files: the run record, and the page; no page for a run that ends at the selection.
    failed
        What could not be done on the way, and what the recipe requires and the run misses, in sentences.
    figures
        The artifact with the report's figures.
    """

    summary: dict[str, Any]
    told: dict[str, Any]
    record: Path
    report: Path | None
    failed: list[str]
    figures: Ref | None = None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Return one row per stage: what the store decided, why, and the time."""
        rows: list[dict[str, Any]] = self.told["stages"]
        return rows


@dataclass(frozen=True, slots=True)
class FinishedSweep:
    """A sweep that came to its end.

    Attributes
    ----------
    results
        What each cell found, or the error that ended it.
    summary
        Everything it found, as plain JSON.
    record, written
        Files: the run record; `sweep.json` and `sweep.html`.
    """

    results: list[CellResult]
    summary: dict[str, Any]
    record: Path
    written: list[Path]

    @property
    def failed(self) -> str:
        """Return sentences about the cells, and the tasks of others, that failed; empty when none did."""
        broken = [each.error.splitlines()[0] for each in self.results if each.error]
        tasks = task_failures(self.results)
        said = [f"{len(broken)} of {len(self.results)} cells failed; the first: {broken[0]}"] if broken else []
        if tasks:
            said.append(f"{len(tasks)} task{'s' * (len(tasks) != 1)} of cells failed; the first: {tasks[0]}")
        return "\n".join(said)


@dataclass(frozen=True, slots=True)
class Running:
    """A run under way.

    Attributes
    ----------
    recipe, store
        What runs, and where its artifacts lie.
    command
        What was typed, or which deployment this is a run of.
    recorder
        What became of every artifact so far.
    """

    recipe: Recipe
    store: ArtifactStore
    command: str
    recorder: Recorder = field(default_factory=Recorder)
    name: str = field(default_factory=new_run_name)
    began: float = field(default_factory=time.monotonic)
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a record also of a run that ends in an error, or by Ctrl-C; the error goes on.

        A record that cannot be written, often for the same cause, is told on stderr and does not replace the error.
        """
        try:
            yield
        except BaseException as error:
            try:
                self._write("failed", {}, error)
            except StorageError as fault:
                say(new_console(as_json=True), f"This run leaves no record. {fault}")
            raise

    def finish(self, concluded: Concluded) -> Finished:
        """Write record and page."""
        took = self._took()
        value = told(self.recipe, concluded, took)
        page = None if concluded.figures is None else write_page(self.store, concluded.figures, self.name, value)
        short = shortcomings(self.recipe, concluded.summary, self.recorder.events)
        lost = EvaluationError(" ".join(short)) if short else None
        record = self._write("failed" if short else "completed", lean(concluded.summary), lost)
        return Finished(concluded.summary, value, record, page, short, concluded.figures)

    def finish_sweep(self, results: list[CellResult], output: Path | None = None) -> FinishedSweep:
        """Write the record of a sweep, and its report to `output`, by default among the store's reports."""
        failed = {"failed": sum(bool(each.error) for each in results), "failed_tasks": len(task_failures(results))}
        state = "failed" if any(failed.values()) else "completed"
        record = self._write(state, {"cells": len(results), **failed}, None)
        summary = sweep_summary(self.recipe, results)
        written = write_sweep(output or self.store.root / "reports" / self.name, summary, self._took())
        return FinishedSweep(results, summary, record, written)

    def _took(self) -> Took:
        seconds = time.monotonic() - self.began
        return Took(
            self.name, self.command, self.when.isoformat(timespec="seconds"), seconds, tuple(self.recorder.events)
        )

    def _write(self, state: str, result: dict[str, Any], error: BaseException | None) -> Path:
        record = RunRecord(
            run=self.name,
            command=self.command,
            started=self.when.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 3),
            state=state,
            recipe=plain(self.recipe),
            stages=[
                StageRecord(e.label, e.stage, e.key, str(e.decision), e.reason, e.seconds) for e in self.recorder.events
            ],
            result=result,
            error=f"{type(error).__name__}: {error}" if error is not None else "",
        )
        return write_run(self.store.root, record)
