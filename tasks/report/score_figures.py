"""Figures of what quantising cost: divergence by domain, error by block, task accuracy."""

import math
from typing import Any

import numpy as np

from tasks.report.dots import MARKS, Dot, DotRow, dot_plot, dot_plot_height, models_of, set_log
from tasks.report.drawing import WIDTH, Sheet, fitting, rendered
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import half_width, known, number, one_line, percent, percent_span, plural, span
from tasks.report.results import in_shares

MOST_ROWS = 24


# --- divergence by domain ------------------------------------------------------------------------------------------


def _without_scores(summary: Summary) -> str:
    if not summary.get("evaluation"):
        return "The recipe evaluates no held-out text."
    if not any(known(dot.value) for row in _score_rows(summary["evaluation"][0]) for dot in row.dots.values()):
        return "No score of the held-out texts is a finite number."
    return ""


def _measure(text: dict[str, Any]) -> str:
    return "divergence" if text["kind"] == "divergence" else "loss"


def _score_rows(text: dict[str, Any]) -> list[DotRow]:
    """Return one row for all sequences and one for every domain; the original has no divergence from itself."""
    measure = _measure(text)
    ids = [m for m in MARKS if m in text and not (measure == "divergence" and m == "original")]
    domains = list(dict.fromkeys(name for model in ids for name in text[model].get("domains") or {}))
    rows = [DotRow("all texts", {m: _score(text[m]["all"], measure) for m in ids})]
    if len(domains) > 1:
        for name in domains:
            mine = {m: text[m]["domains"][name] for m in ids if name in (text[m].get("domains") or {})}
            rows.append(DotRow(str(name), {m: _score(scores, measure) for m, scores in mine.items()}))
    rows[1:] = sorted(rows[1:], key=lambda row: -row.dots["run"].value if "run" in row.dots else 0.0)
    return rows


def _score(scores: dict[str, Any], measure: str) -> Dot:
    value = float(scores[measure]) if known(scores.get(measure)) else math.nan
    half = half_width(scores.get(f"{measure}_error"), scores.get("sequences"))
    return Dot(value, value - half, value + half)


def scores_by_domain(summary: Summary) -> list[Figure]:
    """Draw the divergence (or the loss) of every model by domain, a figure for each text that is scored by domain."""
    texts = summary["evaluation"]
    wanted = [text for text in texts if text["kind"] == "divergence"] or texts[:1]
    return [_domain_figure(summary, text, at) for at, text in enumerate(wanted)]


def _domain_figure(summary: Summary, text: dict[str, Any], at: int) -> Figure:
    measure = _measure(text)
    rows = _score_rows(text)
    shown = rows[:MOST_ROWS]
    names = models_of(summary, set(rows[0].dots))
    what = "KL to the original" if measure == "divergence" else "Loss"

    def draw(sheet: Sheet) -> None:
        dot_plot(sheet, shown, names, f"{what}, nats per token", lambda value: f"{value:g}")

    title = f"{what} by domain" if len(rows) > 1 else what
    if len(summary["evaluation"]) > 1:
        title += f", {one_line(text['text'], 40)}"
    overall = "; ".join(f"{names[m]} {number(rows[0].dots[m].value)}" for m in names)
    alt = (
        f"Dot plot with 95% intervals, {plural(len(shown), 'row')}: {', '.join(one_line(r.name, 40) for r in shown)}. "
        f"All texts: {overall}."
    )
    cells = [(one_line(row.name), *(_cell(row.dots[m]) if m in row.dots else "" for m in names)) for row in rows]
    table = Table(("domain", *(f"{words}, 95% interval" for words in names.values())), tuple(cells))
    name = "divergence" if not at else f"divergence-{at + 1}"
    height = dot_plot_height(len(shown), names)
    return rendered(name, title, _domain_caption(rows, names, what), alt, table, height, draw)


def _cell(dot: Dot) -> str:
    return number(dot.value) + (f" ({span(dot.low, dot.high)})" if known(dot.low) else "")


def _domain_caption(rows: list[DotRow], names: dict[str, str], what: str) -> str:
    rival = "nearest" if "nearest" in names else next((m for m in names if m != "run"), "")
    pairs = [
        (row.name, row.dots["run"].value, row.dots[rival].value) for row in rows if {"run", rival} <= set(row.dots)
    ]
    if not pairs:
        return f"{what}: " + "; ".join(f"{names[m]} {number(rows[0].dots[m].value)}" for m in names) + "."
    _, run, other = pairs[0]
    words = f"Over all texts {number(run)} for this run against {number(other)} for {names[rival]}"
    domains = pairs[1:]
    if not domains:
        return words + "."
    lower = sum(mine < theirs for _, mine, theirs in domains)
    worst = max(domains, key=lambda pair: pair[1])
    return (
        f"{words}; lower in {lower} of {plural(len(domains), 'domain')}. "
        f"This run is worst on {one_line(worst[0], 40)}, at {number(worst[1])}."
    )


# --- error by block ------------------------------------------------------------------------------------------------


def _without_layers(summary: Summary) -> str:
    if not (summary.get("layers") or {}).get("linears"):
        return str(summary.get("why_no_layers") or "The errors of the single linears were not measured in this run.")
    return ""


def error_by_block(summary: Summary) -> list[Figure]:
    """Draw the relative output error of every linear by block, one panel for each kind of linear."""
    linears = summary["layers"]["linears"]
    kinds = list(dict.fromkeys(str(each["kind"]) for each in linears))
    panel_rows = math.ceil(len(kinds) / 2)

    def draw(sheet: Sheet) -> None:
        _draw_errors(sheet, linears, kinds)

    both = [each for each in linears if known(each["nearest"]) and known(each["run"])]
    lower = sum(each["run"] < each["nearest"] for each in both)
    medians = {m: float(np.median([each[m] for each in both])) if both else math.nan for m in ("nearest", "run")}
    worst = max(both, key=lambda each: each["run"], default=None)
    caption = (
        f"Median relative error {number(medians['run'])} for this run against {number(medians['nearest'])} for round "
        f"to nearest; lower in {lower:,} of {plural(len(both), 'linear')}."
    )
    if worst is not None:
        caption += f" Worst: {one_line(worst['name'], 80)}, {number(worst['run'])}."
    alt = (
        f"{plural(len(kinds), 'small line chart')}, one for each kind of linear "
        f"({', '.join(one_line(kind) for kind in kinds)}): relative output error by block, "
        f"round to nearest dashed with squares, this run solid. {caption}"
    )
    return [
        rendered(
            "layers", "Relative error by block", caption, alt, _error_table(linears, kinds), 52 + 138 * panel_rows, draw
        )
    ]


def _error_table(linears: list[dict[str, Any]], kinds: list[str]) -> Table:
    rows = []
    for kind in kinds:
        mine = [each for each in linears if str(each["kind"]) == kind]
        values = {m: [each[m] for each in mine if known(each[m])] for m in ("nearest", "run")}
        cells = [
            f"{number(float(np.median(v)))} ({span(min(v), max(v))})" if v else number(None) for v in values.values()
        ]
        rows.append((one_line(kind), str(len(mine)), *cells))
    return Table(("kind", "linears", "round to nearest, median (range)", "this run, median (range)"), tuple(rows))


def _draw_errors(sheet: Sheet, linears: list[dict[str, Any]], kinds: list[str]) -> None:
    styles = {
        "nearest": {"linestyle": (0, (3, 1.5)), "marker": "s", "markersize": 3, "linewidth": 1.3},
        "run": {"linestyle": "-", "linewidth": 2.4},
    }
    sheet.key(
        12,
        [("round to nearest", "nearest", {**styles["nearest"], "markersize": 6}), ("this run", "run", styles["run"])],
    )
    values = [each[m] for each in linears for m in styles if known(each[m]) and each[m] > 0]
    low, high = (min(values) * 0.8, max(values) * 1.25) if values else (0.1, 1.0)
    blocks = [each["block"] for each in linears]
    for at, kind in enumerate(kinds):
        left, top = (46, 234)[at % 2], 52 + 138 * (at // 2)
        axes = sheet.axes(left, top, 172, 84)
        set_log(axes.yaxis, low, high)
        if at % 2:
            axes.set_yticklabels([])
        axes.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        mine = sorted((each for each in linears if str(each["kind"]) == kind), key=lambda each: each["block"])
        for model, style in styles.items():
            points = [(each["block"], each[model]) for each in mine if known(each[model]) and each[model] > 0]
            axes.plot(*zip(*points, strict=True), color=sheet.colours[model], **style) if points else None
        sheet.text(left, top - 12, fitting(kind, 165), weight="bold", size=12.7)
    bottom = 52 + 138 * math.ceil(len(kinds) / 2)
    sheet.text(WIDTH / 2, bottom - 14, "across: block; up: relative error (log scale)", "muted", ha="center")


# --- tasks ---------------------------------------------------------------------------------------------------------


def _without_tasks(summary: Summary) -> str:
    if not summary.get("tasks"):
        return "The recipe names no tasks."
    if not any(task.get("scores") for task in summary["tasks"]):
        return "No task ended well; the table of tasks says why."
    return ""


def task_scores(summary: Summary) -> list[Figure]:
    """Draw the score of every model on every task, with 95% intervals."""
    tasks = [task for task in summary["tasks"] if task.get("scores")]
    rows = [
        DotRow(one_line(task["task"]), {m: _task_dot(s, task) for m, s in task["scores"].items() if m in MARKS})
        for task in tasks
    ]
    names = models_of(summary, {model for row in rows for model in row.dots})
    metrics = sorted({str(task["metric"]) for task in tasks})
    shares = all(map(in_shares, tasks))

    def draw(sheet: Sheet) -> None:
        words = one_line(", ".join(metrics), 40)
        dot_plot(sheet, rows, names, words, (lambda v: percent(v, digits=0)) if shares else (lambda v: f"{v:g}"))

    listed = "; ".join(
        f"{row.name}: "
        + ", ".join(f"{names[m]} {_task_value(row.dots[m].value, shares)}" for m in names if m in row.dots)
        for row in rows
    )
    cells = tuple((row.name, *(_task_cell(row.dots.get(m), shares) for m in names)) for row in rows)
    return [
        rendered(
            "tasks",
            "Tasks",
            _task_caption(tasks, names),
            f"Dot plot with 95% intervals. {listed}.",
            Table(("task", *(f"{words}, 95% interval" for words in names.values())), cells),
            dot_plot_height(len(rows), names),
            draw,
        )
    ]


def _task_dot(score: dict[str, Any], task: dict[str, Any]) -> Dot:
    value = float(score["value"]) if known(score.get("value")) else math.nan
    half = half_width(score.get("error"), task.get("items"))
    return Dot(value, value - half, value + half)


def _task_value(value: float, shares: bool) -> str:
    return percent(value) if shares else number(value)


def _task_cell(dot: Dot | None, shares: bool) -> str:
    if dot is None:
        return number(None)
    interval = (percent_span if shares else span)(dot.low, dot.high)
    return _task_value(dot.value, shares) + (f" ({interval})" if known(dot.low) else "")


def _task_caption(tasks: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Say on how many tasks the run is told apart from the original, and which of several random sets was scored."""
    several = any((task.get("random_sets") or 1) > 1 for task in tasks) and "random" in names
    return _told_apart(tasks, names) + (" Of the random sets the first was scored." if several else "")


def _told_apart(tasks: list[dict[str, Any]], names: dict[str, str]) -> str:
    compared = [task["differences"]["original"] for task in tasks if "original" in (task.get("differences") or {})]
    sure = [d for d in compared if known(d.get("low")) and known(d.get("high"))]
    if not sure:
        return f"Scores of {plural(len(names), 'model')} on {plural(len(tasks), 'task')}."
    apart = sum(d["low"] > 0 or d["high"] < 0 for d in sure)
    return (
        f"On {apart or 'none'} of {plural(len(sure), 'task')} the difference between this run and the original is "
        "larger than the noise of the items asked (its 95% interval excludes zero)."
    )


SCORE_PLANS = (
    Plan("KL by domain", _without_scores, scores_by_domain),
    Plan("Relative error by block", _without_layers, error_by_block),
)
TASK_PLANS = (Plan("Tasks", _without_tasks, task_scores),)
