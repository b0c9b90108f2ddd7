"""Running and planning a recipe: answered from the store when it has everything, else by the Prefect flow."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from covercal.errors import CovercalError
from covercal.recipe import Recipe, plain
from flows.chain import run_chain
from flows.console import say
from flows.display import Display
from flows.execution import Direct, Event, Planned, Recorder
from flows.inputs import Inputs, check_model, identify
from flows.plan import MADE, THERE, is_complete, plan
from flows.record import Finished, FinishedSweep, Running
from flows.server import configured_server, set_prefect_defaults
from flows.sweep import Cell, CellResult, Tell, cells, found_words, run_cells
from storage.artifacts import ArtifactStore
from storage.durable import make_writable_folder
from storage.errors import StorageError
from tasks.progress import listening

Found = TypeVar("Found")


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
    running = Running(recipe, store, command)
    planned = Recorder()
    if sent := store.send_unsent():
        console.print(f"{sent} artifacts that an earlier run could not send are in the remote now", highlight=False)
    inputs, concluded = plan(recipe, store, planned, until=until, explains=False)
    cached = is_complete(planned.events)
    built = {event.key: event for event in planned.events if event.decision in MADE}
    built |= {  # what decided what else is to do was pulled meanwhile
        event.key: replace(event, decision="pulled", reason=f"from{event.reason.removeprefix('in')}")
        for event in planned.events
        if event.decision == "pull" and store.look_up(event.stage, event.key).manifest is not None
    }
    with Display(recipe, console) as display, listening(display.progress):
        running = replace(running, recorder=Recorder(display.start, display.event, built))
        with running.kept():
            if cached and not configured_server():
                _replay(planned.events, running.recorder)
                return running.finish(concluded)
            make_writable_folder(store.root, "The cache folder")
            if not cached:  # what is in the store was checked when it was made
                built |= _check_model(recipe, inputs, store, display)
            return _run_flow(running, console, until, verbose=verbose)


def execute_sweep(
    recipe: Recipe,
    store: ArtifactStore,
    console: Console,
    *,
    command: str,
    output: Path | None = None,
    verbose: bool = False,
) -> FinishedSweep:
    """Run every cell of a recipe's sweep, and write its report to `output`.

    With no Prefect server configured, a sweep that the store can answer is answered from it.
    """
    running = Running(recipe, store, command)
    wanted = cells(recipe)
    store.send_unsent()
    planned = Recorder()
    broken = [cell for cell in wanted if not _plannable(cell, store, planned)]
    to_do = {event.key for event in planned.events if event.decision not in THERE}
    console.print(f"{len(wanted)} cells, {len(to_do)} artifacts or more to make", highlight=False)
    for cell in broken:
        say(console, f"  will fail: {cell.name}")
    clock = time.monotonic()

    def tell(number: int, cell: Cell, result: CellResult) -> None:
        nonlocal clock
        took, clock = time.monotonic() - clock, time.monotonic()
        clocked = f"{int(took // 60)}:{int(took % 60):02d}"
        say(console, f"  {number:>3}/{len(wanted)}  {cell.name:<56} {found_words(result)}   {clocked}")

    with running.kept():
        if to_do or configured_server():
            return _run_sweep(running, output, tell, console, verbose=verbose)
        results = list(run_cells(wanted, store, lambda cell: Direct(store, running.recorder), tell))
        return running.finish_sweep(results, output)


def _plannable(cell: Cell, store: ArtifactStore, planned: Recorder) -> bool:
    """Plan a cell; one that cannot be planned says why when its turn comes, after the others were planned, too."""
    try:
        run_chain(cell.recipe, identify(cell.recipe, store), Planned(store, planned, explains=False))
    except (CovercalError, StorageError):
        return False
    return True


def _run_sweep(running: Running, output: Path | None, tell: Tell, console: Console, *, verbose: bool) -> FinishedSweep:
    _prepare_prefect(console, verbose=verbose)
    from flows.entrypoints import keeping, sweep

    with keeping(running, tell, output):
        state = sweep(plain(running.recipe), return_state=True)
    return _found(state, FinishedSweep)


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


def _run_flow(running: Running, console: Console, until: str, *, verbose: bool) -> Finished:
    _prepare_prefect(console, verbose=verbose)
    from flows.entrypoints import keeping, quantize

    with keeping(running):
        state = quantize(plain(running.recipe), until=until, return_state=True)
    return _found(state, Finished)


def _found(state: Any, kind: type[Found]) -> Found:
    """Return what a flow run returned, also one that is shown as failed; an error that ended it is raised."""
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, kind):
        return found
    raise found


def _prepare_prefect(console: Console, *, verbose: bool) -> None:
    set_prefect_defaults()
    if not configured_server():
        console.print("starting a temporary Prefect server (PREFECT_API_URL names a lasting one) …", highlight=False)
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
