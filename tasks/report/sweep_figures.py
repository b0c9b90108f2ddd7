"""Figures of a sweep: what a choice is worth against random choice, and whether coverage tells."""

import math
from collections.abc import Iterable
from typing import Any

from covercal.comparison import rank_correlation
from tasks.report.drawing import WIDTH, Sheet, fitting, margin, named_style, rendered
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import alike, decimals, known, number, one_line, percent, plural
from tasks.report.sweep_fields import (
    BUDGET,
    POOL_SEED,
    SELECTOR,
    cell_fields,
    ends_of,
    good_cells,
    number_or_nan,
    panel_of,
    panel_words,
    row_name,
)
from tasks.report.sweep_lines import GAP, LINE_PLANS, PANEL

MOST_ROWS = 40
ROW = 26  # pixels from one difference to the next


# --- difference to random ------------------------------------------------------------------------------------------


def _without_random(summary: Summary) -> str:
    if not any(known(row.get("difference")) for row in summary.get("rows") or ()):
        return "No row can be compared with random choice of its size: the sweep holds none."
    return ""


def against_random(summary: Summary) -> list[Figure]:
    """Draw how far every row lies above random choice of its size, with the 95% interval."""
    compared = [row for row in summary["rows"] if known(row.get("difference"))]
    order = sorted(compared, key=lambda row: (panel_of(row["fields"]), row["difference"]))
    shown = order[:MOST_ROWS]
    measure = one_line(summary["measure"], 60)

    def draw(sheet: Sheet) -> None:
        _draw_differences(sheet, shown, measure)

    lower = sum(
        row["difference"] + row["difference_interval"] < 0 for row in compared if known(row["difference_interval"])
    )
    higher = sum(
        row["difference"] - row["difference_interval"] > 0 for row in compared if known(row["difference_interval"])
    )
    caption = (
        f"Of {plural(len(compared), 'row')}, {lower} are lower (better) than random choice of the same size and "
        f"{higher} higher by more than the noise; for {len(compared) - lower - higher} the 95% "
        "interval holds zero or is not known."
    )
    if len(order) > len(shown):
        caption += f" The first {len(shown)} rows are drawn; the table holds all."
    best = min(compared, key=lambda row: row["difference"])
    alt = (
        "Dot plot of differences with 95% intervals around a line at zero. "
        f"Lowest: {row_name(best['fields'])}, {number(best['difference'], sign=True)}."
    )
    rows = tuple(
        (
            row_name(row["fields"]),
            number(row["difference"], sign=True),
            number(row["difference_interval"]),
            percent(row.get("percentile"), digits=0),
        )
        for row in order
    )
    table = Table(("row", "minus random", "± 95%", "random choices that are worse"), rows)
    height = 28 + sum(_difference_height(group) for group in _by_panel(shown).values())
    return [rendered("against-random", "Difference to random choice", caption, alt, table, height, draw)]


def _by_panel(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {panel: [row for row in rows if panel_of(row["fields"]) == panel] for panel in _panels_of(rows)}


def _panels_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(panel_of(row["fields"]) for row in rows))


def _difference_height(rows: list[dict[str, Any]]) -> float:
    return 26 + ROW * len(rows) + 64


def _draw_differences(sheet: Sheet, rows: list[dict[str, Any]], measure: str) -> None:
    sheet.text(2, 12, "left of zero: better than random", "muted")
    top = 28.0
    for panel, group in _by_panel(rows).items():
        sheet.text(2, top + 14, panel_words(panel), weight="bold")
        _draw_difference_panel(sheet, group, top + 26)
        words = f"{measure.split(',')[0]}, minus random"
        sheet.text(WIDTH - 18, top + 26 + ROW * len(group) + 38, words, "muted", ha="right")
        top += _difference_height(group)


def _draw_difference_panel(sheet: Sheet, rows: list[dict[str, Any]], top: float) -> None:
    names = [row_name({f: v for f, v in row["fields"].items() if f in (SELECTOR, BUDGET)}) for row in rows]
    left = margin(names, 180)
    width = WIDTH - left - 18
    axes = sheet.axes(left, top, width, ROW * len(rows))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    ends = [e for row in rows for e in ends_of(row["difference"], number_or_nan(row["difference_interval"]))]
    low, high = min(0.0, *ends), max(0.0, *ends)
    pad = 0.08 * (high - low or 1)
    axes.set_xlim(low - pad, high + pad)
    axes.axvline(0, color=sheet.colours["ink"], linewidth=1.2)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(value, 10):+g}".replace("-", "−") if value else "0")
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        _difference(sheet, axes, row, place + 0.5)
        sheet.text(left - 9, top + ROW * (place + 0.5), fitting(name, left - 12), ha="right")


def _difference(sheet: Sheet, axes: Any, row: dict[str, Any], y: float) -> None:
    """Draw one row: filled when its interval excludes zero, hollow when it may be noise."""
    half = number_or_nan(row["difference_interval"])
    sure = known(half) and abs(row["difference"]) > half
    ink = sheet.colours["muted" if not sure else "run" if row["difference"] < 0 else "missed"]
    if known(half):
        axes.plot([row["difference"] - half, row["difference"] + half], [y, y], color=ink, linewidth=2)
    face = ink if sure else sheet.colours["paper"]
    axes.plot([row["difference"]], [y], "o", markersize=8, color=ink, markerfacecolor=face, markeredgewidth=1.8)


def _main(cell: dict[str, Any]) -> float:
    """Return what cells are compared by: divergence on the first text that has one, else the first perplexity."""
    for score in cell.get("scores") or ():
        if score["kind"] == "divergence":
            return number_or_nan(score["run"].get("divergence"))
    return number_or_nan(cell["scores"][0]["run"].get("perplexity")) if cell.get("scores") else math.nan


def _scored(summary: Summary) -> list[tuple[dict[str, Any], float, float]]:
    return [
        (cell_fields(cell), float(cell["measures"]["weighted_coverage"]), main)
        for cell in good_cells(summary)
        if known(main := _main(cell))
    ]


def _without_relation(summary: Summary) -> str:
    if len(_scored(summary)) < 5:
        return "Fewer than five cells have both a coverage and a score."
    return ""


def coverage_and_quality(summary: Summary) -> list[Figure]:
    """Draw the main number of every cell against its weighted coverage, a mark for each budget."""
    points = _scored(summary)
    groups: Groups = {}
    pools: dict[tuple[str, Any], dict[Any, list[tuple[float, float]]]] = {}
    for fields, covered, main in points:
        key = panel_of(fields), fields.get(BUDGET)
        groups.setdefault(key, []).append((covered, main))
        pools.setdefault(key, {}).setdefault(fields.get(POOL_SEED), []).append((covered, main))
    measure = one_line(summary["measure"], 60)
    ranks = {key: rank for key, each in pools.items() if (rank := _mean_rank(each.values())) is not None}
    panels = list(dict.fromkeys(panel for panel, _ in groups))
    several = len(panels) > 1
    words = {key: _group_words(key, several) for key in groups}

    def draw(sheet: Sheet) -> None:
        _draw_relation(sheet, groups, panels, measure)

    caption = f"Each mark is a cell. {_rank_words(ranks, words)}"
    rows = tuple((row_name(fields), percent(covered), number(main)) for fields, covered, main in points)
    table = Table(("cell", "weighted coverage", measure), rows)
    alt = f"Scatter plot of {plural(len(points), 'cell')}: weighted coverage across, {measure} up. {caption}"
    height = _budget_key_height(groups) + len(panels) * (PANEL + GAP)
    title = "Does coverage predict quality?"
    return [rendered("coverage-quality", title, caption, alt, table, height, draw)]


def _mean_rank(pools: Iterable[list[tuple[float, float]]]) -> float | None:
    """Return the mean over pools of the rank correlation inside each, for one pool may be harder than another."""
    found = [rank_correlation(*zip(*cells, strict=True)) for cells in pools if len(cells) > 4]
    ranks = [each[0] for each in found if each is not None]
    return math.fsum(ranks) / len(ranks) if ranks else None


def _rank_words(ranks: dict[tuple[str, Any], float], words: dict[tuple[str, Any], str]) -> str:
    """Say how coverage and score go together among sets of one pool and size."""
    if not ranks:
        return "Too few sets of one pool and size for a correlation."
    said = "Rank correlation of coverage and score among sets of one pool and size (negative: more cover, lower score)"
    if len(ranks) <= 3:
        return f"{said}: " + "; ".join(f"{words[key]} {_signed(value)}" for key, value in ranks.items()) + "."
    below = sum(value < 0 for value in ranks.values())
    return (
        f"{said}: from {_signed(min(ranks.values()))} to {_signed(max(ranks.values()))}, "
        f"negative in {below} of {len(ranks)} groups."
    )


def _signed(value: float) -> str:
    return alike(value, min(2, decimals(value)) or 2, sign=True)


def _group_words(key: tuple[str, Any], several: bool) -> str:
    words = plural(int(key[1]), "sample") if known(key[1]) else "all"
    return f"{words}, {panel_words(key[0])}" if several else words


Groups = dict[tuple[str, Any], list[tuple[float, float]]]  # (panel, budget) -> (weighted coverage, main number)


def _budgets_of(groups: Groups) -> list[Any]:
    return list(dict.fromkeys(budget for _, budget in groups))


def _budget_key_height(groups: Groups) -> float:
    return 22.0 * math.ceil(len(_budgets_of(groups)) / 3)


def _draw_relation(sheet: Sheet, groups: Groups, panels: list[str], measure: str) -> None:
    """Draw a panel for each setting, and a mark for each budget."""
    budgets = _budgets_of(groups)
    styles = [named_style(index) for index in range(len(budgets))]
    marks = [
        {"marker": s["marker"], "linestyle": "none", "markersize": 7, "fillstyle": "none", "markeredgewidth": 1.6}
        for _, s in styles
    ]
    for index, budget in enumerate(budgets):
        words = plural(int(budget), "sample") if known(budget) else "all"
        entry = (words, styles[index][0], marks[index])
        sheet.key(12 + 22 * (index // 3), [entry], left=2 + 140 * (index % 3))
    for at, panel in enumerate(panels):
        top = _budget_key_height(groups) + 28 + at * (PANEL + GAP)
        axes = sheet.axes(56, top, WIDTH - 74, PANEL)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.yaxis.set_major_formatter(lambda value, _: f"{round(value, 10):g}")
        axes.margins(0.06)
        for index, budget in enumerate(budgets):
            points = groups.get((panel, budget))
            if points:
                colour = sheet.colours[styles[index][0]]
                axes.plot(*zip(*points, strict=True), color=colour, clip_on=False, **marks[index])
        title = ": ".join(part for part in (panel_words(panel), measure) if part)
        sheet.text(2, top - 15, title, weight="bold")
        sheet.text(56 + (WIDTH - 74) / 2, top + PANEL + 38, "weighted coverage", "muted", ha="center")


SWEEP_PLANS = (
    Plan("Difference to random choice", _without_random, against_random),
    *LINE_PLANS,
    Plan("Does coverage predict quality?", _without_relation, coverage_and_quality),
)
