"""The page of a run and of a sweep: one HTML file that asks for nothing outside itself."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks.report.drawing import COLOURS
from tasks.report.figure import Figure, Summary
from tasks.report.figures import run_left_out, sweep_left_out
from tasks.report.glossary import RUN_TERMS, SWEEP_TERMS
from tasks.report.numerals import count, duration, known, number, one_line, percent, plural, probability, size, within
from tasks.report.results import (
    Difference,
    Value,
    facts,
    linear_rows,
    result_groups,
    row_difference,
    sweep_facts,
    task_groups,
)
from tasks.report.sweep_fields import SEEDS, row_name, settings

TEMPLATES: Final = "templates"
WORST_LINEARS: Final = 10
FIRST_TEXTS: Final = 20  # of the chosen texts; the others are folded away
DECISIONS: Final = {
    "hit": "cached",
    "built": "ran",
    "pulled": "fetched from the shared cache",
    "waited": "made by another process meanwhile",
    "rebuilt": "ran again",
}
OPTIONAL: Final = (
    "device",
    "checkpoint",
    "tasks",
    "layers",
    "stages",
    "quantization",
    "selection",
    "versions",
    "finished",
)
ICON: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0a5fa8"/>'
    '<path d="M3 12l3-5 3 2 4-6" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)


def run_page(summary: Summary, figures: Sequence[Figure]) -> str:
    """Return the page of a run as HTML.

    Parameters
    ----------
    summary
        What `run --json` prints.
    figures
        From `run_figures`, shown in their order.
    """
    linears = linear_rows(summary)
    texts = (summary.get("selection") or {}).get("texts") or []
    return _page(
        "run.html.j2",
        summary,
        figures=figures,
        left_out=run_left_out(summary),
        terms=RUN_TERMS,
        models=list(summary.get("models") or ()),
        facts=facts(summary),
        results=result_groups(summary),
        tasks=task_groups(summary),
        failed_tasks=[task for task in summary.get("tasks") or () if task.get("error") or not task.get("scores")],
        worst_linears=linears[:WORST_LINEARS],
        linears=linears,
        texts=texts[:FIRST_TEXTS],
        more_texts=texts[FIRST_TEXTS:],
    )


def sweep_page(summary: Summary, figures: Sequence[Figure]) -> str:
    """Return the page of a sweep as HTML; see `run_page`."""
    cells, rows = list(summary.get("cells") or ()), list(summary.get("rows") or ())
    tasks = {name: task for row in rows for name, task in (row.get("tasks") or {}).items()}
    return _page(
        "sweep.html.j2",
        summary,
        figures=figures,
        left_out=sweep_left_out(summary),
        terms=SWEEP_TERMS,
        facts=sweep_facts(summary),
        rows=[_sweep_row(row, list(tasks)) for row in rows],
        measured=any(known(row["mean"]) for row in rows),
        swept_tasks=[
            (_task_name(name, task["metric"]), "higher" if task["higher_is_better"] else "lower")
            for name, task in tasks.items()
        ],
        cells=[_cell_row(cell) for cell in cells if not cell.get("error")],
        failed=[(_cell_name(cell["fields"]), str(cell["error"])) for cell in cells if cell.get("error")],
        failed_tasks=[
            (f"{_cell_name(cell['fields'])}: {one_line(task['task'], 60)}", str(task["error"]))
            for cell in cells
            for task in cell.get("tasks") or ()
            if task["error"]
        ],
    )


def _page(template: str, summary: Summary, **values: Any) -> str:
    script = Markup(_source("page.js"))
    return (
        _environment()
        .get_template(template)
        .render(
            summary={**dict.fromkeys(OPTIONAL), **summary},
            style=Markup(_scheme() + _source("page.css")),
            script=script,
            policy=_policy(script),
            icon="data:image/svg+xml;base64," + base64.b64encode(ICON.encode()).decode(),
            recipe=yaml.safe_dump(_plain(summary.get("recipe") or {}), sort_keys=False, allow_unicode=True, width=100),
            **values,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tasks.report", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for words in (number, percent, probability, count, duration, size, one_line, plural, known):
        environment.filters[words.__name__] = words
    environment.filters["picture"] = _picture
    environment.filters["breakable"] = _breakable
    environment.globals["decisions"] = DECISIONS
    return environment


def _picture(figure: Figure) -> Markup:
    """Return a figure's SVG, which matplotlib wrote and escaped."""
    return Markup(figure.svg)


def _breakable(name: str) -> Markup:
    """Return a name, escaped, that may go on in a new line behind a dot, `@` or `_`."""
    words = escape(one_line(name))
    for mark in ".@_":
        words = words.replace(mark, Markup(f"{mark}<wbr>"))
    return words


def _source(name: str) -> str:
    return (files("tasks.report") / TEMPLATES / name).read_text(encoding="utf-8")


def _scheme() -> str:
    """Return the colours of both schemes as CSS variables."""
    light, dark = ("".join(f"--{name}:{colours[at]};" for name, colours in COLOURS.items()) for at in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _policy(script: str) -> str:
    """Return a content security policy that lets this page show itself and run its one script, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _plain(value: Any) -> Any:
    """Return JSON of plain dictionaries and lists, which YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


# --- sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One row of a sweep as text; no difference for random choice itself, and a value for each task of the sweep."""

    name: str
    runs: int
    mean: str
    interval: str
    difference: Difference | None
    percentile: str
    tasks: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell of a sweep as text: its settings, coverage, and the scores of each text and task by name."""

    name: str
    coverage: str
    size: str
    scores: tuple[tuple[str, str], ...]


def _sweep_row(row: Mapping[str, Any], tasks: Sequence[str]) -> SweepRow:
    scored = [(row.get("tasks") or {}).get(name) for name in tasks]
    return SweepRow(
        row_name(row["fields"]),
        len(row["values"]),
        number(row["mean"]),
        within(row["mean"], row.get("interval")),
        row_difference(row),
        percent(row["percentile"], digits=0) if known(row.get("percentile")) else "",
        tuple(Value("") if t is None else Value(number(t["mean"]), within(t["mean"], t["interval"])) for t in scored),
    )


def _cell_name(fields: Mapping[str, Any]) -> str:
    return ", ".join([row_name(dict(fields)), *settings(fields, [name for name in SEEDS if name in fields])])


def _task_name(task: str, metric: str) -> str:
    return f"{one_line(task, 60)}, {one_line(metric, 40)}"


def _cell_row(cell: Mapping[str, Any]) -> CellRow:
    scores = []
    for each in cell.get("scores") or ():
        measure = "divergence" if each["kind"] == "divergence" else "perplexity"
        name = "KL" if measure == "divergence" else measure
        scores.append((f"{name}, {one_line(each['text'], 40)}", number(each["run"].get(measure))))
    tasks = [task for task in cell.get("tasks") or () if known(task.get("run"))]
    scores += [(_task_name(task["task"], task["metric"]), number(task["run"])) for task in tasks]
    measures, quantization = cell.get("measures") or {}, cell.get("quantization") or {}
    covered = percent(measures.get("weighted_coverage"))
    return CellRow(_cell_name(cell["fields"]), covered, size(quantization.get("bytes")), tuple(scores))
