from typing import Any

import pytest

from tasks.report import Figure, run_figures, run_page, sweep_figures, sweep_page
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
