"""The Prefect flows: what the command line runs, and what deployments name as their entrypoints.

The sections `Args:` are in the form that Prefect reads: they are the descriptions in the dashboard's form.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import deployment, flow_run

from covercal.errors import CovercalError
from covercal.recipe import Recipe
from flows.audit import audit as audit_set
from flows.audit import calibration_source
from flows.chain import run_chain
from flows.dashboard import show_audit, show_run, show_sweep
from flows.engine import cells_at_once, task_runner
from flows.execution import Direct, Planned, Recorder, Tracked
from flows.inputs import Inputs, check_model, identify
from flows.notify import notify
from flows.parameters import Bits, Count, MethodName, RecipeSource, SelectorName, asked_recipe
from flows.plan import is_complete
from flows.record import Finished, FinishedSweep, Running
from flows.report import conclude
from flows.summary import model_name, run_name, sweep_name
from flows.sweep import Tell, cells, run_cells
from storage.artifacts import ArtifactStore
from tasks.cached import open_store


@dataclass(frozen=True, slots=True)
class _Typed:
    """What the command line has begun itself and keeps the record of."""

    running: Running
    tell: Tell
    output: Path | None


MOST_BEGUN = 5
FORM_FIELDS = ("selection.selector", "selection.budget", "quantization.method", "quantization.bits")
OPTIONS: Any = {
    "task_runner": task_runner(),
    "persist_result": False,
    "on_failure": [notify],
    "on_crashed": [notify],
}
_typed: ContextVar[_Typed | None] = ContextVar("typed", default=None)


@contextmanager
def keeping(
    running: Running, tell: Tell = lambda number, cell, result: None, output: Path | None = None
) -> Iterator[None]:
    """Let a flow of this context go on with `running`, a sweep tell its finished cells and write its report there."""
    token = _typed.set(_Typed(running, tell, output))
    try:
        yield
    finally:
        _typed.reset(token)


def _begin(recipe: Recipe) -> tuple[_Typed, AbstractContextManager[None]]:
    """Return the run of this flow, and the context in which its record is kept: the command line has one already."""
    typed = _typed.get()
    if typed is not None:
        return typed, nullcontext()
    running = Running(recipe, open_store(), _command())
    running.store.send_unsent()
    return _Typed(running, lambda number, cell, result: None, None), running.kept()


def _command() -> str:
    """Return the command that repeats this flow run."""
    parameters = {name: value for name, value in flow_run.get_parameters().items() if value not in (None, [], ())}
    if deployment.get_name() is None:
        return f"prefect flow {flow_run.get_flow_name()}"
    name = f"{flow_run.get_flow_name()}/{deployment.get_name()}"
    return f"prefect deployment run {shlex.quote(name)} --params {shlex.quote(json.dumps(parameters, default=str))}"


def _check(recipe: Recipe, inputs: Inputs, store: ArtifactStore, until: str) -> None:
    """Check the model before any heavy work; the command line has done so, and what is in the store was checked."""
    if _typed.get() is not None:
        return
    planned = Recorder()
    run_chain(recipe, inputs, Planned(store, planned, builds=frozenset(), explains=False), until=until)
    if not is_complete(planned.events):
        check_model(recipe, inputs, Direct(store, Recorder()))


def _check_begun() -> None:
    """Raise when a run has lost its worker so often that it is the likely reason."""
    begun = flow_run.get_run_count()
    if _unattended() and begun > MOST_BEGUN:
        raise CovercalError(
            f"This run has begun {begun - 1} times, and its worker was lost each time; the workers' logs say how. "
            "Is the memory enough? What is finished is kept: a new run goes on from it."
        )


def _unattended() -> bool:
    return deployment.get_id() is not None


def _named(words: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """Return a function that names a flow run; a recipe that is wrong fails the run itself, with its own sentence."""

    def name() -> str:
        parameters = flow_run.get_parameters()
        kind = str(flow_run.get_flow_name())
        try:
            return f"{kind} {words(parameters)}"
        except CovercalError:
            return f"{kind} · {parameters.get('recipe')}"

    return name


def _quantize_recipe(parameters: dict[str, Any]) -> Recipe:
    """Return the recipe of a run of `quantize`, its form's fields filled in."""
    fields = {name: parameters.get(name.rpartition(".")[2]) for name in FORM_FIELDS}
    return asked_recipe(parameters["recipe"], fields, parameters.get("changes") or [])


def _plain_recipe(parameters: dict[str, Any]) -> Recipe:
    return asked_recipe(parameters["recipe"], {}, parameters.get("changes") or [])


@flow(
    name="quantize",
    flow_run_name=_named(lambda parameters: run_name(_quantize_recipe(parameters))),
    **OPTIONS,
)
def quantize(
    recipe: RecipeSource,
    selector: SelectorName | None = None,
    budget: Count | None = None,
    method: MethodName | None = None,
    bits: Bits | None = None,
    changes: list[str] = [],  # noqa: B006  # shown in the form, and never changed
    until: str = "report",
) -> Finished | State[Any]:
    """Choose calibration samples, quantise with them, evaluate, and report.

    What was computed before is not computed again.

    Args:
        recipe: Path of a recipe file on the worker's machine, or the recipe itself as JSON with absolute paths.
        selector: Who chooses the calibration samples; empty: as the recipe says.
        budget: How many samples are chosen; empty: as the recipe says.
        method: How the model is quantised; empty: as the recipe says.
        bits: Bits of a weight; empty: as the recipe says.
        changes: Other fields of the recipe to change for this run, such as `pool.samples=1024`.
        until: `report` for the whole chain, `selection` to end with the choice of samples.
    """
    _check_begun()
    form = {"selector": selector, "budget": budget, "method": method, "bits": bits}
    asked = _quantize_recipe({"recipe": recipe, "changes": changes, **form})
    typed, kept = _begin(asked)
    running = typed.running
    with kept:
        inputs = identify(asked, running.store)
        _check(asked, inputs, running.store, until)
        execution = Tracked(running.store, running.recorder, unattended=_unattended())
        chain = run_chain(asked, inputs, execution, until=until)
        concluded = conclude(asked, chain, execution, running.recorder.events, until=until)
        finished = running.finish(concluded)
    show_run(finished, running.recorder.events, running.store)
    if finished.failed:  # the run is shown as failed, and yet all that came out is in its hands
        return State(type=StateType.FAILED, message=" ".join(finished.failed), data=finished)
    return finished


@flow(
    name="sweep",
    flow_run_name=_named(lambda parameters: sweep_name(_plain_recipe(parameters))),
    **OPTIONS,
)
def sweep(recipe: RecipeSource, changes: list[str] = []) -> FinishedSweep | State[Any]:  # noqa: B006  # as above
    """Run every cell of a recipe's sweep; what cells share is computed once, and a failing cell loses no other.

    Args:
        recipe: Path of a recipe file on the worker's machine, or the recipe itself as JSON with absolute paths.
        changes: Fields of the recipe to change for this run, such as `sweep.selection.budget=[8,16]`.
    """
    _check_begun()
    asked = asked_recipe(recipe, {}, changes)
    typed, kept = _begin(asked)
    running = typed.running

    def check(cell: Recipe, inputs: Inputs) -> None:
        check_model(cell, inputs, Direct(running.store, Recorder()))

    with kept:
        wanted = cells(asked)
        tracked = Tracked(running.store, running.recorder, unattended=_unattended())
        results = list(run_cells(wanted, running.store, lambda cell: tracked, typed.tell, check, cells_at_once()))
        finished = running.finish_sweep(results, typed.output)
    show_sweep(finished)
    if finished.failed:
        return State(type=StateType.FAILED, message=finished.failed, data=finished)
    return finished


@flow(
    name="audit",
    flow_run_name=_named(lambda parameters: f"{model_name(_plain_recipe(parameters))} · {parameters['calibration']}"),
    **OPTIONS,
)
def audit(
    recipe: RecipeSource,
    calibration: str,
    text: str = "text",
    domain: str | None = None,
    changes: list[str] = [],  # noqa: B006  # as above
) -> dict[str, Any]:
    """Say how well a calibration set covers the pool's outlier channels, what it misses, and what would help.

    Args:
        recipe: Path of a recipe file on the worker's machine, or the recipe itself as JSON with absolute paths.
        calibration: Path of the calibration texts on the worker's machine: JSONL, Parquet, text, or a folder.
        text: Field that holds the text.
        domain: Field that holds the domain; empty: there is none.
        changes: Fields of the recipe to change for this run, such as `pool.samples=1024`.
    """
    _check_begun()
    asked = asked_recipe(recipe, {}, changes)
    recorder = Recorder()
    source = calibration_source(Path(calibration), text, domain)
    found = audit_set(asked, source, Tracked(open_store(), recorder, unattended=_unattended()))
    show_audit(found, recorder.events)
    return found
