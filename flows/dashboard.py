"""What a flow run shows on the Prefect dashboard: the verdict, its tables, and the key figures."""

import base64
from collections.abc import Sequence
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.execution import Event
from flows.report import Concluded
from flows.summary import selection_lines, stage_rows
from storage.artifacts import ArtifactStore
from tasks.figures import read_figures

KEY_FIGURES = 3
MEASURES = ("divergence", "agreement", "perplexity")


def show_run(concluded: Concluded, events: Sequence[Event], store: ArtifactStore) -> None:
    """Create the artifacts of a run."""
    summary = concluded.summary
    create_markdown_artifact(_markdown(summary), key="summary", description="Verdict")
    create_table_artifact(_stage_table(events), key="stages", description="What was cached, what ran, and why")
    if summary.get("evaluation") or summary.get("tasks"):
        create_table_artifact(result_rows(summary), key="result", description="One row a measure, one column a model")
    if concluded.figures is None:
        return
    for each in read_figures(store, concluded.figures)[:KEY_FIGURES]:
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
        numbers = {words: task["scores"].get(model, {}).get("value", "failed") for model, words in models.items()}
        rows.append({"on": task["task"], "measure": task.get("metric", ""), **numbers})
    return rows


def _markdown(summary: dict[str, Any]) -> str:
    lines = [f"**{summary['verdict']}**", ""] if summary.get("verdict") else []
    lines += [f"* {' '.join(line.split())}" for line in selection_lines(summary)]
    lines += [f"* {task['task']} failed: {task['error']}" for task in summary.get("tasks", []) if task["error"]]
    return "\n".join(lines)


def _stage_table(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("stage", "decision", "reason", "seconds")} for row in stage_rows(events)]
