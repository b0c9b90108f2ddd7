"""Running and planning a recipe: answered from the store when it has everything, else by the Prefect flow."""

import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from covercal.errors import CovercalError, EvaluationError
from covercal.recipe import Recipe
from flows.chain import run_chain
from flows.display import Display
from flows.execution import Direct, Event, Planned, Recorder
from flows.inputs import Inputs, check_model, identify
from flows.report import Concluded, Took, conclude, lean, told, write_page
from flows.requirements import shortcomings
from flows.summary import stage_rows
from flows.sweep import Cell, CellResult, Tell, cells, found_words, run_cells
from storage.artifacts import ArtifactStore
from storage.durable import make_writable_folder
from storage.errors import StorageError
from storage.runs import RunRecord, StageRecord, new_run_name, write_run
from tasks.progress import listening

PREFECT_SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


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
    """

    summary: dict[str, Any]
    told: dict[str, Any]
    record: Path
    report: Path | None
    failed: list[str]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Return one row per stage: what the store decided, why, and the time."""
        rows: list[dict[str, Any]] = self.told["stages"]
        return rows


def configured_server() -> str:
    """Return the Prefect server of the environment or of the active Prefect profile; empty when there is none."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
    except (FileNotFoundError, tomllib.TOMLDecodeError):
        return ""
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    return str(profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL", ""))


def plan(
    recipe: Recipe, store: ArtifactStore, recorder: Recorder, *, until: str = "report"
) -> tuple[Inputs, Concluded]:
    """Go through the chain without building anything but the token sequences."""
    inputs = identify(recipe, store)
    execution = Planned(store, recorder)
    chain = run_chain(recipe, inputs, execution, until=until)
    return inputs, conclude(recipe, chain, execution, recorder.events, until=until)


def show_plan(recipe: Recipe, store: ArtifactStore, console: Console, *, until: str = "report") -> list[dict[str, Any]]:
    """Show which stages are cached and which are to do, and why; return the rows."""
    with Display(recipe, console, planned=True) as display:
        recorder = Recorder(display.start, display.event)
        plan(recipe, store, recorder, until=until)
    return stage_rows(recorder.events)


def execute(
    recipe: Recipe,
    store: ArtifactStore,
    console: Console,
    *,
    command: str,
    until: str = "report",
    verbose: bool = False,
) -> Finished:
    """Run a recipe and keep its record.

    With no Prefect server configured, a run that the store can answer is answered from it, and nothing is started.
    """
    started, when = time.monotonic(), datetime.now(UTC)
    planned = Recorder()
    if sent := store.send_unsent():
        console.print(f"{sent} artifacts that an earlier run could not send are in the remote now", highlight=False)
    inputs, concluded = plan(recipe, store, planned, until=until)
    run = new_run_name()
    made = ("built", "rebuilt", "pulled", "waited")
    cached = all(event.decision in ("hit", *made) for event in planned.events)
    built = {event.key: event for event in planned.events if event.decision in made}
    built |= {  # what decided what else is to do was pulled meanwhile
        event.key: replace(event, decision="pulled", reason=f"from{event.reason.removeprefix('in')}")
        for event in planned.events
        if event.decision == "pull" and store.look_up(event.stage, event.key).manifest is not None
    }
    with Display(recipe, console) as display, listening(display.progress):
        recorder = Recorder(display.start, display.event, built)
        try:
            if cached and not configured_server():
                _replay(planned.events, recorder)
            else:
                make_writable_folder(store.root, "The cache folder")
                built |= _check_model(recipe, inputs, store, display)
                concluded = _run_flow(recipe, recorder, console, until, verbose=verbose)
        except BaseException as error:  # Ctrl-C too: the record says how the run ended, and the error goes on
            _write(store, run, recipe, command, when, started, "failed", recorder.events, {}, error)
            raise
    seconds, events, summary = time.monotonic() - started, recorder.events, concluded.summary
    took = Took(run, command, when.isoformat(timespec="seconds"), seconds, tuple(events))
    value = told(recipe, concluded, took)
    page = None if concluded.figures is None else write_page(store, concluded.figures, run, value)
    short = shortcomings(recipe, summary, events)
    lost = EvaluationError(" ".join(short)) if short else None
    state = "failed" if short else "completed"
    record = _write(store, run, recipe, command, when, started, state, events, lean(summary), lost)
    return Finished(summary, value, record, page, short)


def execute_sweep(
    recipe: Recipe, store: ArtifactStore, console: Console, *, command: str, verbose: bool = False
) -> tuple[list[CellResult], Path, Took]:
    """Run every cell of a recipe's sweep; return what each found, the run record, and how it went.

    With no Prefect server configured, a sweep that the store can answer is answered from it.
    """
    started, when, run = time.monotonic(), datetime.now(UTC), new_run_name()
    wanted = cells(recipe)
    store.send_unsent()
    planned = Recorder()
    broken = [cell for cell in wanted if not _plannable(cell, store, planned)]
    to_do = {event.key for event in planned.events if event.decision not in ("hit", "built", "rebuilt", "pulled")}
    console.print(f"{len(wanted)} cells, {len(to_do)} artifacts or more to make", highlight=False)
    for cell in broken:
        console.print(f"  will fail: {cell.name}", highlight=False, markup=False, soft_wrap=True)
    recorder = Recorder()
    clock = time.monotonic()

    def tell(number: int, cell: Cell, result: CellResult) -> None:
        nonlocal clock
        took, clock = time.monotonic() - clock, time.monotonic()
        clocked = f"{int(took // 60)}:{int(took % 60):02d}"
        line = f"  {number:>3}/{len(wanted)}  {cell.name:<56} {found_words(result)}   {clocked}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    results: list[CellResult] = []
    error: BaseException | None = None
    try:
        if to_do or configured_server():
            results = _sweep_flow(recipe, recorder, tell, console, verbose=verbose)
        else:
            results = list(run_cells(wanted, store, lambda cell: Direct(store, recorder), tell))
    except BaseException as cause:  # Ctrl-C too: the record says how the sweep ended
        error = cause
        raise
    finally:
        failed = [each for each in results if each.error]
        state = "completed" if error is None and not failed else "failed"
        summary = {"cells": len(results), "failed": len(failed)}
        record = _write(store, run, recipe, command, when, started, state, recorder.events, summary, error)
    seconds = time.monotonic() - started
    return results, record, Took(run, command, when.isoformat(timespec="seconds"), seconds, tuple(recorder.events))


def _plannable(cell: Cell, store: ArtifactStore, planned: Recorder) -> bool:
    """Plan a cell; one that cannot be planned says why when its turn comes, after the others were planned, too."""
    try:
        run_chain(cell.recipe, identify(cell.recipe, store), Planned(store, planned))
    except (CovercalError, StorageError):
        return False
    return True


def _sweep_flow(
    recipe: Recipe,
    recorder: Recorder,
    tell: Tell,
    console: Console,
    *,
    verbose: bool,
) -> list[CellResult]:
    _prepare_prefect(console, verbose=verbose)
    from flows.quantize import recording, sweep

    with recording(recorder, tell):
        found: list[dict[str, Any]] = sweep(recipe.model_dump(mode="json"))
    return [CellResult(**each) for each in found]


def _replay(events: Sequence[Event], recorder: Recorder) -> None:
    for label in dict.fromkeys(event.label for event in events):
        mine = [event for event in events if event.label == label]
        recorder.on_start(label, len(mine))
        for event in mine:
            recorder.add(event)


def _check_model(recipe: Recipe, inputs: Inputs, store: ArtifactStore, display: Display) -> dict[str, Event]:
    """Check what can be checked of the model before any heavy work; a GGUF file is unpacked for it.

    Returns the event of the unpacking by key, when it had to be done.
    """
    unpacking = Recorder(display.start)
    check_model(recipe, inputs, Direct(store, unpacking))
    return {event.key: event for event in unpacking.events if event.decision != "hit"}


def _run_flow(recipe: Recipe, recorder: Recorder, console: Console, until: str, *, verbose: bool) -> Concluded:
    _prepare_prefect(console, verbose=verbose)
    from flows.quantize import quantize, recording

    with recording(recorder):
        state = quantize(recipe.model_dump(mode="json"), until, return_state=True)
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, Concluded):
        return found
    raise found


def _prepare_prefect(console: Console, *, verbose: bool) -> None:
    for name, value in PREFECT_SETTINGS.items():
        os.environ.setdefault(name, value)
    if not configured_server():
        console.print("starting a temporary Prefect server (PREFECT_API_URL names a lasting one) …", highlight=False)
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")


def _write(
    store: ArtifactStore,
    run: str,
    recipe: Recipe,
    command: str,
    when: datetime,
    started: float,
    state: str,
    events: Sequence[Event],
    summary: dict[str, Any],
    error: BaseException | None,
) -> Path:
    stages = [StageRecord(e.label, e.stage, e.key, str(e.decision), e.reason, e.seconds) for e in events]
    record = RunRecord(
        run=run,
        command=command,
        started=when.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        state=state,
        recipe=recipe.model_dump(mode="json"),
        stages=stages,
        result=summary,
        error=f"{type(error).__name__}: {error}" if error is not None else "",
    )
    return write_run(store.root, record)
