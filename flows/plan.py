"""Planning a recipe: the chain gone through without building anything heavy."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from covercal.errors import InputError
from covercal.recipe import Recipe
from flows.chain import run_chain
from flows.display import Display
from flows.execution import Direct, Event, Planned, Recorder
from flows.inputs import Inputs, check_model, identify
from flows.report import Concluded, conclude
from flows.summary import stage_rows
from storage.artifacts import ArtifactStore

MADE = ("built", "rebuilt", "pulled", "waited")
THERE = ("hit", *MADE)


def plan(
    recipe: Recipe, store: ArtifactStore, recorder: Recorder, *, until: str = "report", explains: bool = True
) -> tuple[Inputs, Concluded]:
    """Go through the chain without building anything but the token sequences; `explains` as in `Planned`."""
    inputs = identify(recipe, store)
    execution = Planned(store, recorder, explains=explains)
    chain = run_chain(recipe, inputs, execution, until=until)
    return inputs, conclude(recipe, chain, execution, recorder.events, until=until)


def show_plan(
    recipe: Recipe, store: ArtifactStore, console: Console, *, until: str = "report"
) -> tuple[list[dict[str, Any]], InputError | None]:
    """Show which stages are cached and which are to do, and why.

    Returns the rows, and the error with which a run would refuse what is to do before its work (of a GGUF file only
    once it has been unpacked).
    """
    with Display(recipe, console, planned=True) as display:
        recorder = Recorder(display.start, display.event)
        inputs, _ = plan(recipe, store, recorder, until=until)
    refused = None
    if is_complete(event for event in recorder.events if event.label == "model") and not is_complete(recorder.events):
        try:
            check_model(recipe, inputs, Direct(store, Recorder()), here=False)
        except InputError as error:
            refused = error
    return stage_rows(recorder.events), refused


def is_complete(events: Iterable[Event]) -> bool:
    """Return whether a plan found everything, so that a run builds nothing."""
    return all(event.decision in THERE for event in events)
