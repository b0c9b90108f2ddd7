"""The Prefect flow: the chain as tracked tasks, with the verdict as an artifact on the dashboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from covercal.recipe import Recipe, parse_recipe
from flows.chain import run_chain
from flows.dashboard import show_run, show_sweep
from flows.execution import Direct, Recorder, Tracked
from flows.inputs import Inputs, check_model, identify
from flows.report import Concluded, conclude
from flows.requirements import shortcomings
from flows.summary import run_name
from flows.sweep import Tell, cells, run_cells, sweep_summary
from tasks.cached import open_store

_teller: ContextVar[Tell | None] = ContextVar("teller", default=None)
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(recorder: Recorder, tell: Tell | None = None) -> Iterator[None]:
    """Let flows of this context tell their events to `recorder`, and a sweep its finished cells to `tell`."""
    token = _recorder.set(recorder)
    teller = _teller.set(tell)
    try:
        yield
    finally:
        _recorder.reset(token)
        _teller.reset(teller)


def _flow_run_name() -> str:
    return run_name(parse_recipe(flow_run.parameters["recipe"], Path("/")))


@flow(
    name="quantize",
    flow_run_name=_flow_run_name,
    # One model on one device: a second task would only wait for it.
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # Prefect leaves its type open
    persist_result=False,
)
def quantize(recipe: dict[str, Any], until: str = "report") -> Concluded | State[Any]:
    """Run a recipe: choose calibration samples, quantise with them, evaluate; return what came out.

    Parameters
    ----------
    recipe
        The recipe as JSON, paths absolute.
    until
        `report` for the whole chain, `selection` to end with the choice of samples.
    """
    typed = parse_recipe(recipe, Path("/"))
    store = open_store()
    recorder = _recorder.get() or Recorder()
    execution = Tracked(store, recorder)
    chain = run_chain(typed, identify(typed, store), execution, until=until)
    concluded = conclude(typed, chain, execution, recorder.events, until=until)
    show_run(concluded, recorder.events, store)
    short = shortcomings(typed, concluded.summary, recorder.events)
    if short:  # the run is shown as failed, and yet all that came out is in its hands
        return State(type=StateType.FAILED, message=" ".join(short), data=concluded)
    return concluded


@flow(
    name="sweep",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # as above
    persist_result=False,
)
def sweep(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Run every cell of a recipe's sweep; what cells share is computed once, and a failing cell loses no other."""
    typed = parse_recipe(recipe, Path("/"))
    store = open_store()
    recorder = _recorder.get() or Recorder()
    tell = _teller.get() or (lambda number, cell, result: None)

    def check(cell: Recipe, inputs: Inputs) -> None:
        check_model(cell, inputs, Direct(store, Recorder()))

    results = list(run_cells(cells(typed), store, lambda cell: Tracked(store, recorder), tell, check))
    show_sweep(sweep_summary(typed, results))
    return [asdict(each) for each in results]
