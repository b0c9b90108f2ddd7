import json
from typing import Any

import pytest

from covercal.recipe import load_recipe
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.report import Took, conclude, told
from storage.artifacts import ArtifactStore
from tasks.figures import read_figures
from tasks.report import Figure, run_figures, run_page, sweep_figures, sweep_page
from tests import tiny
from tests.covercal.test_language_tasks import write_task
from tests.tasks.report.reading import Element, read
from tests.tasks.report.summaries import run_summary, sweep_summary


@pytest.fixture(scope="session")
def summary() -> dict[str, Any]:
    """The summary of a run; no test changes it."""
    return run_summary()


@pytest.fixture(scope="session")
def figures(summary: dict[str, Any]) -> dict[str, Figure]:
    """The figures of that run by name."""
    return {each.name: each for each in run_figures(summary)}


@pytest.fixture(scope="session")
def run_html(summary: dict[str, Any], figures: dict[str, Figure]) -> str:
    """The page of that run."""
    return run_page(summary, list(figures.values()))


@pytest.fixture(scope="session")
def page(run_html: str) -> Element:
    """The page of that run, read."""
    return read(run_html)


@pytest.fixture(scope="session")
def sweep() -> dict[str, Any]:
    """The summary of a sweep; no test changes it."""
    return sweep_summary()


@pytest.fixture(scope="session")
def sweep_drawn(sweep: dict[str, Any]) -> dict[str, Figure]:
    """The figures of that sweep by name."""
    return {each.name: each for each in sweep_figures(sweep)}


@pytest.fixture(scope="session")
def sweep_html(sweep: dict[str, Any], sweep_drawn: dict[str, Figure]) -> str:
    """The page of that sweep."""
    return sweep_page(sweep, list(sweep_drawn.values()))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Figure]]:
    """What a real run of a tiny model with a task tells, and its figures."""
    folder = tmp_path_factory.mktemp("tiny")
    value = tiny.recipe_value(folder)
    value["evaluation"]["tasks"] = [{"path": str(write_task(folder / "tasks")), "limit": 6}]
    (folder / "recipe.yaml").write_text(json.dumps(value), encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml")
    recorder = Recorder()
    execution = Direct(ArtifactStore(folder / "cache"), recorder)
    chain = run_chain(recipe, identify(recipe, execution.store), execution, until="report")
    concluded = conclude(recipe, chain, execution, recorder.events, until="report")
    took = Took("run", "covercal run recipe.yaml", "2026-01-01T00:00:00+00:00", 1.0, tuple(recorder.events))
    return told(recipe, concluded, took), read_figures(execution.store, concluded.figures)


@pytest.fixture(scope="session")
def tiny_drawn(tiny_run: tuple[dict[str, Any], list[Figure]]) -> dict[str, Figure]:
    """The figures of that real run by name."""
    return {each.name: each for each in tiny_run[1]}


@pytest.fixture(scope="session")
def tiny_html(tiny_run: tuple[dict[str, Any], list[Figure]]) -> str:
    """The page of that real run."""
    return run_page(*tiny_run)
