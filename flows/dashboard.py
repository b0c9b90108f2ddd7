"""What a flow run shows on the Prefect dashboard: the verdict, its tables, and the key figures."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.audit import audit_lines
from flows.execution import Event
from flows.record import Finished, FinishedSweep
from flows.summary import first_set_words, no_score, selection_lines, stage_rows
from flows.sweep import CellResult, found_words, task_failures
from storage.artifacts import ArtifactStore
from tasks.figures import read_figures

if TYPE_CHECKING:
    from tasks.report import Figure

KEY_FIGURES = 3
MEASURES = ("divergence", "agreement", "perplexity")


def show_run(finished: Finished, events: Sequence[Event], store: ArtifactStore) -> None:
    """Create the artifacts of a run."""
    summary = finished.summary
    create_markdown_artifact(_markdown(finished), key="summary", description="Verdict")
    create_table_artifact(_stage_table(events), key="stages", description="What was cached, what ran, and why")
    if summary.get("evaluation") or summary.get("tasks"):
        create_table_artifact(result_rows(summary), key="result", description="One row a measure, one column a model")
    if finished.figures is not None:
        _show_figures(read_figures(store, finished.figures))
    if finished.report is not None:
        _link_report(finished.report)


def show_sweep(finished: FinishedSweep) -> None:
    """Create the artifacts of a sweep."""
    from tasks.report import sweep_figures

    summary = finished.summary
    failed = [f"* {_fields(cell)}: {line}" for cell in summary["cells"] for line in _failures(CellResult(**cell))]
    page = finished.written[1]
    lines = [f"**{summary['verdict']}**", "", *failed, "", report_words(page)]
    create_markdown_artifact("\n".join(lines), key="sweep", description="Verdict")
    tasks = list(dict.fromkeys(name for row in summary["rows"] for name in row["tasks"]))
    rows = [
        {
            **row["fields"],
            **{name: row[name] for name in ("mean", "interval", "difference", "difference_interval")},
            **{name: row["tasks"].get(name, {}).get("mean") for name in tasks},
        }
        for row in summary["rows"]
    ]
    if rows:
        create_table_artifact(rows, key="rows", description=f"{summary['measure']}; difference: from random choice")
    cells = [{**cell["fields"], "result": found_words(CellResult(**cell))} for cell in summary["cells"]]
    create_table_artifact(cells, key="cells", description="One row for each cell")
    _show_figures(sweep_figures(summary))
    _link_report(page)


def show_audit(found: dict[str, Any], events: Sequence[Event]) -> None:
    """Create the artifacts of an audit."""
    lines = [f"* {' '.join(line.split())}" for line in audit_lines(found)]
    create_markdown_artifact("\n".join(lines), key="audit", description="What the calibration set covers")
    create_table_artifact(_stage_table(events), key="stages", description="What was cached, what ran, and why")
    for name, words in (("heaviest_missed", "The heaviest missed channels"), ("would_help", "What would add most")):
        if found[name]:
            create_table_artifact(found[name], key=name.replace("_", "-"), description=words)


def report_address(page: Path) -> str:
    """Return where a page of the store's reports can be opened in a browser; empty when nobody serves them."""
    served = os.environ.get("COVERCAL_REPORTS_URL", "").rstrip("/")
    return f"{served}/{page.parent.name}/{page.name}" if served else ""


def report_words(page: Path) -> str:
    """Return a line of Markdown that says where a report is."""
    address = report_address(page)
    return f"Report: [{address}]({address})" if address else f"Report: `{page}` on the worker's machine"


def _link_report(page: Path) -> None:
    if address := report_address(page):
        create_link_artifact(address, key="report", description="The report: one page, opens offline")


def _fields(cell: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell["fields"].items())


def _failures(cell: CellResult) -> list[str]:
    """Return the first line of a cell's error, else a line for every task of it that failed."""
    return cell.error.splitlines()[:1] or task_failures([cell])


def _show_figures(figures: Sequence["Figure"]) -> None:
    for each in figures[:KEY_FIGURES]:
        picture = "data:image/png;base64," + base64.b64encode(each.png).decode()
        create_image_artifact(picture, key=each.name.replace("_", "-"), description=f"{each.title}. {each.caption}")


def result_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict as rows of plain numbers."""
    models = {each["id"]: each["name"] for each in summary["models"]}
    rows = []
    for text in summary["evaluation"]:
        for measure in MEASURES:
            if measure in text["run"]["all"]:
                numbers = {words: round(text[model]["all"][measure], 5) for model, words in models.items()}
                rows.append({"on": text["text"], "measure": measure, **numbers})
    for task in summary["tasks"]:
        scores = task["scores"]
        numbers = {w: scores[m]["value"] if m in scores else no_score(task, m) for m, w in models.items()}
        rows.append({"on": task["task"], "measure": task.get("metric", "") + first_set_words(task), **numbers})
    return rows


def _markdown(finished: Finished) -> str:
    summary = finished.summary
    lines = [f"**{summary['verdict']}**", ""] if summary.get("verdict") else []
    lines += [*markdown_table(result_rows(summary)), ""] if summary.get("evaluation") or summary.get("tasks") else []
    lines += [f"* {' '.join(line.split())}" for line in selection_lines(summary)]
    lines += [f"* {task['task']} failed: {task['error']}" for task in summary.get("tasks", []) if task["error"]]
    lines += [f"* **{sentence}**" for sentence in finished.failed]
    lines += ["", report_words(finished.report)] if finished.report is not None else []
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return rows of one shape as a table of Markdown."""
    if not rows:
        return []
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return [f"| {line} |" for line in lines]


def _stage_table(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("stage", "decision", "reason", "seconds")} for row in stage_rows(events)]
