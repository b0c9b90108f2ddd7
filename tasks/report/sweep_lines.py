"""Figures of a sweep that run along the budget: quality, and coverage."""

import json
import math
from typing import Any

import numpy as np

from tasks.report.drawing import WIDTH, Sheet, fitting, named_style, rendered, spread
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import count, known, number, one_line, percent, plural
from tasks.report.sweep_fields import (
    BUDGET,
    RANDOM,
    SELECTOR,
    cell_fields,
    ends_of,
    good_cells,
    number_or_nan,
    panel_of,
    panel_words,
    row_name,
    selector_of,
    several_budgets,
)

PANEL, GAP = 230, 84  # pixels: height of a panel, and what is between two


# --- lines against the budget ---------------------------------------------------------------------------------------

Point = tuple[float, float, float]  # budget, mean, half the width of the 95% interval (NaN: not known)
Panels = dict[str, dict[str, list[Point]]]  # panel -> selector -> points in the order of budgets


def _lines(rows: list[tuple[dict[str, Any], float, float]]) -> Panels:
    panels: Panels = {}
    for fields, mean, interval in rows:
        if known(mean):
            line = panels.setdefault(panel_of(fields), {}).setdefault(selector_of(fields), [])
            line.append((float(fields[BUDGET]), mean, interval))
    return {panel: {name: sorted(points) for name, points in lines.items()} for panel, lines in sorted(panels.items())}


def _without_budgets(summary: Summary) -> str:
    rows = summary.get("rows") or []
    if not rows:
        return "No cell of the sweep ended well."
    if not several_budgets([row["fields"] for row in rows]):
        return "The sweep has a single budget."
    return "" if any(known(row["mean"]) for row in rows) else "No row has a number that rows can be compared by."


def against_budget(summary: Summary) -> list[Figure]:
    """Draw the main number against the budget, a line with a band for each selector, a panel for each other setting."""
    rows = [(row["fields"], number_or_nan(row["mean"]), number_or_nan(row.get("interval"))) for row in summary["rows"]]
    panels = _lines(rows)
    names = _names(panels)
    measure = one_line(summary["measure"], 60)
    height = len(panels) * (PANEL + GAP)

    def draw(sheet: Sheet) -> None:
        _draw_panels(sheet, panels, names, measure, lambda v: f"{v:g}")

    headers = ("setting", "selector", "budget", "mean", "± 95%", "runs")
    cells = tuple(
        (
            panel_words(panel_of(row["fields"])) or "–",
            one_line(selector_of(row["fields"])),
            count(row["fields"][BUDGET]),
            number(row["mean"]),
            number(row.get("interval")),
            str(len(row["values"])),
        )
        for row in summary["rows"]
    )
    alt = (
        f"Line chart, {plural(len(panels), 'panel')}. Across: samples chosen. Up: {measure}, lower is better. "
        f"Selectors: {', '.join(names)}. {_best_words(summary['rows'])}"
    )
    return [
        rendered(
            "budget", "Quality against budget", _best_words(summary["rows"]), alt, Table(headers, cells), height, draw
        )
    ]


def _names(panels: Panels) -> list[str]:
    """Return every selector, random choice first (it is drawn below the others)."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    return sorted(names, key=lambda name: name != RANDOM)


def _best_words(rows: list[dict[str, Any]]) -> str:
    """Name the lowest row of every panel."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        panel = panel_of(row["fields"])
        if known(row["mean"]) and (panel not in best or row["mean"] < best[panel]["mean"]):
            best[panel] = row
    if not best:
        return "No row has a finite number."
    said = [f"{row_name(row['fields'])} at {number(row['mean'])}" for row in list(best.values())[:4]]
    return ("Lowest: " if len(best) == 1 else "Lowest in each panel: ") + "; ".join(said) + "."


def _style(name: str, names: list[str]) -> tuple[str, dict[str, Any]]:
    if name == RANDOM:
        return "random", {"marker": "", "linestyle": (0, (2, 1.2)), "linewidth": 2.5}
    colour, style = named_style([each for each in names if each != RANDOM].index(name))
    return colour, {**style, "linewidth": 2, "markersize": 6}


def _draw_panels(sheet: Sheet, panels: Panels, names: list[str], measure: str, scale: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    left, width = 56, 218
    for at, (panel, lines) in enumerate(panels.items()):
        top, height = 28 + at * (PANEL + GAP), PANEL
        axes = sheet.axes(left, top, width, height)
        values = [v for points in lines.values() for _, mean, half in points for v in ends_of(mean, half)]
        pad = 0.05 * (max(values) - min(values) or 1)
        axes.set_ylim(min(values) - pad, max(values) + pad)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: scale(round(value, 10)))
        budgets = sorted({int(point[0]) for points in lines.values() for point in points})
        _budget_axis(axes, budgets, width)
        ends = []
        for name in [each for each in names if each in lines]:
            colour, style = _style(name, names)
            _line(sheet, axes, lines[name], colour, style)
            ends.append((name, colour, style["marker"], lines[name][-1]))
        _label_ends(sheet, axes, ends, (left, top, width, height), budgets)
        sheet.text(8, top - 16, panel_words(panel) or measure, weight="bold")
        sheet.text(left + width / 2, top + height + 38, "samples chosen (log scale)", "muted", ha="center")


def _budget_axis(axes: Any, budgets: list[int], width: float) -> None:
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    step = math.ceil(len(budgets) / max(2, int(width // 42)))
    shown = budgets[::-1][::step][::-1]
    axes.set_xticks(shown, [f"{each:,}" for each in shown])
    if len(budgets) > 1:
        axes.set_xlim(budgets[0] / 1.08, budgets[-1] * 1.08)


def _line(sheet: Sheet, axes: Any, points: list[Point], colour: str, style: dict[str, Any]) -> None:
    budgets, means, halves = (np.array(each) for each in zip(*points, strict=True))
    ink = sheet.colours[colour]
    halves = np.nan_to_num(halves)
    if halves.any():
        axes.fill_between(budgets, means - halves, means + halves, color=ink, alpha=0.14, linewidth=0)
    axes.plot(budgets, means, color=ink, **style)


def _label_ends(
    sheet: Sheet,
    axes: Any,
    ends: list[tuple[str, str, str, Point]],
    place: tuple[float, float, float, float],
    budgets: list[int],
) -> None:
    """Write every selector's name beside the end of its line, with its mark."""
    from matplotlib.lines import Line2D

    left, top, width, height = place
    low, high = axes.get_ylim()
    own = [top + height * (1 - (point[1] - low) / (high - low)) for *_, point in ends]
    for (name, colour, marker, _), start, y in zip(ends, own, spread(own, 17, top, top + height), strict=True):
        ys = [1 - (each + sheet.head) / sheet.height for each in (start, start, y, y)]
        xs = [(left + width + dx) / WIDTH for dx in (3, 5, 12, 15)]
        sheet.paper.add_artist(Line2D(xs, ys, color=sheet.colours[colour], linewidth=0.8))
        mark: dict[str, Any] = {"marker": marker or "_", "markersize": 6, "color": sheet.colours[colour]}
        sheet.paper.add_artist(Line2D([(left + width + 20) / WIDTH], [ys[2]], linestyle="none", **mark))
        sheet.text(left + width + 28, y, fitting(name, WIDTH - left - width - 30), colour, size=12.7)


def _without_coverage(summary: Summary) -> str:
    cells = good_cells(summary)
    if not cells:
        return "No cell of the sweep ended well."
    return "" if several_budgets([cell_fields(cell) for cell in cells]) else "The sweep has a single budget."


def coverage_against_budget(summary: Summary) -> list[Figure]:
    """Draw the mean weighted coverage of every selector's sets against the budget, a panel for each other setting."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for cell in good_cells(summary):
        fields = cell_fields(cell)
        key = panel_of(fields), selector_of(fields), int(fields[BUDGET])
        found.setdefault(key, []).append(cell["measures"]["weighted_coverage"])
    rows: list[tuple[dict[str, Any], float, float]] = [
        ({**json.loads(panel), SELECTOR: name, BUDGET: budget}, float(np.mean(values)), math.nan)
        for (panel, name, budget), values in found.items()
    ]
    panels = _lines(rows)
    names = _names(panels)

    def draw(sheet: Sheet) -> None:
        _draw_panels(sheet, panels, names, "weighted coverage", lambda v: f"{100 * v:.0f}%")

    caption = _most_words(panels)
    cells = tuple(
        (panel_words(panel_of(f)) or "–", one_line(f[SELECTOR]), count(f[BUDGET]), percent(mean)) for f, mean, _ in rows
    )
    table = Table(("setting", "selector", "budget", "mean weighted coverage"), cells)
    alt = f"Line chart of weighted coverage against budget for {', '.join(names)}. {caption}"
    height = len(panels) * (PANEL + GAP)
    return [rendered("sweep-coverage", "Coverage against budget", caption, alt, table, height, draw)]


def _most_words(panels: Panels) -> str:
    """Name the selector that covers most with the smallest budget, in every panel."""
    said = []
    for panel, lines in list(panels.items())[:4]:
        first = min(point[0] for points in lines.values() for point in points)
        at_first = {name: points[0][1] for name, points in lines.items() if points[0][0] == first}
        best = max(at_first, key=lambda name: at_first[name])
        row = {**json.loads(panel), SELECTOR: best, BUDGET: int(first)}
        said.append(f"{row_name(row)} covers {percent(at_first[best])}")
    return f"Most of the outlier weight with the smallest budget: {'; '.join(said)}."


LINE_PLANS = (
    Plan("Quality against budget", _without_budgets, against_budget),
    Plan("Coverage against budget", _without_coverage, coverage_against_budget),
)
