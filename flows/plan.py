"""Planning a recipe: the chain gone through without building anything heavy."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from covercal.recipe import Recipe
from flows.chain import run_chain
from flows.display import Display
from flows.execution import Event, Planned, Recorder
from flows.inputs import Inputs, identify
from flows.report import Concluded, conclude
from flows.summary import stage_rows
from storage.artifacts import ArtifactStore

MADE = ("built", "rebuilt", "pulled", "waited")


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


def is_complete(events: Sequence[Event]) -> bool:
    """Return whether a plan found everything, so that a run builds nothing."""
    return all(event.decision in ("hit", *MADE) for event in events)
