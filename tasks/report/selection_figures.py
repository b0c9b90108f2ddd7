"""Figures of the chosen set: what it covers, where it misses, and which domains it is of."""

import math
from typing import Any

from tasks.report.drawing import (
    WIDTH,
    Sheet,
    fitting,
    margin,
    rendered,
    spread,
)
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import count, known, one_line, percent, percent_span, plural
from tasks.report.outlier_map import MAP_PLAN

RANDOM = "random"
MOST_LABELS = 14  # curves that are told apart by a name at their end
MOST_DOMAINS = 14
STEP = 38  # pixels from one domain to the next


def _budget_ticks(axes: Any, budgets: list[int], width: float) -> None:
    """Put budgets on a logarithmic x axis, leaving out labels that have no room."""
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    room = max(2, int(width // 42))
    step = math.ceil(len(budgets) / room)
    shown = budgets[::-1][::step][::-1]
    axes.set_xticks(shown, [f"{each:,}" for each in shown])


# --- coverage against budget ---------------------------------------------------------------------------------------


def _without_curves(summary: Summary) -> str:
    curves = summary.get("selection", {}).get("curves") or {}
    if len(curves.get("budgets", ())) < 2:
        return "Coverage at other budgets was not measured."
    return ""


def coverage_curves(summary: Summary) -> list[Figure]:
    """Draw weighted coverage against the budget, this run's selector emphasised, random choice as a band."""
    selection = summary["selection"]
    curves = selection["curves"]
    budgets = [int(each) for each in curves["budgets"]]
    own, budget = str(selection["selector"]), int(selection["budget"])
    lines = {str(name): _floats(values) for name, values in curves["selectors"].items() if str(name) != RANDOM}
    band = {part: _floats(values) for part, values in (curves.get("random") or {}).items()}
    reached = selection["weighted_coverage"]

    shown = _telling_budgets(budgets, budget)

    def draw(sheet: Sheet) -> None:
        drawn = {name: values[: len(shown)] for name, values in lines.items()}
        area = {part: values[: len(shown)] for part, values in band.items()}
        _draw_curves(sheet, shown, drawn, area, own, budget, reached)

    end = len(shown) - 1
    others = [values[end] for name, values in lines.items() if name != own and known(values[end])]
    alt = (
        f"Line chart. Across: samples chosen, {shown[0]:,} to {shown[-1]:,}. Up: share of the outlier channels' weight "
        f"that is covered. {plural(len(lines), 'selector')}{', and random choice with a band' if band else ''}. "
        f"{own} is at {percent(reached)} with {plural(budget, 'sample')}."
    )
    if others:
        ends = f"between {percent(min(others))} and {percent(max(others))}"
        alt += f" With {shown[-1]:,} samples the other selectors end {ends}."
    caption = _coverage_caption(selection, budgets, band)
    table = _curves_table(budgets, lines, band)
    title = "Weighted coverage against budget"
    return [rendered("coverage", title, caption, alt, table, 380, draw)]


def _telling_budgets(budgets: list[int], budget: int) -> list[int]:
    """Return the budgets to draw, to four times the run's: with the whole pool every selector covers everything."""
    return [each for each in budgets if each <= 4 * budget or each <= budgets[min(3, len(budgets) - 1)]]


def _floats(values: Any) -> list[float]:
    return [float(value) if known(value) else math.nan for value in values]


def _coverage_caption(selection: dict[str, Any], budgets: list[int], band: dict[str, list[float]]) -> str:
    budget, reached = int(selection["budget"]), selection["weighted_coverage"]
    words = f"With {plural(budget, 'sample')}, {selection['selector']} covers {percent(reached)} of the outlier weight"
    if not known(selection.get("random_weighted_coverage")):
        return words + "."
    words += f"; random choice of that size covers {percent(selection['random_weighted_coverage'])} on average"
    if budget in budgets and band:
        at = budgets.index(budget)
        words += f" (95% of random orders: {percent_span(band['low'][at], band['high'][at])})"
    if band and selection["selector"] != RANDOM:
        enough = [b for b, mean in zip(budgets, band["mean"], strict=True) if mean >= reached]
        if enough and enough[0] > budget:
            words += f", and needs about {enough[0]:,} samples for the same"
        elif not enough:
            words += f", and stays below that even with {budgets[-1]:,}"
    return words + "."


def _curves_table(budgets: list[int], lines: dict[str, list[float]], band: dict[str, list[float]]) -> Table:
    names = list(lines)
    headers = ["samples", *(one_line(name) for name in names)]
    if band:
        headers += ["random, mean", "random, 95% of orders"]
    rows = []
    for at, budget in enumerate(budgets):
        cells = [count(budget), *(percent(lines[name][at]) for name in names)]
        if band:
            cells += [percent(band["mean"][at]), percent_span(band["low"][at], band["high"][at])]
        rows.append(tuple(cells))
    return Table(tuple(headers), tuple(rows))


def _draw_curves(
    sheet: Sheet,
    budgets: list[int],
    lines: dict[str, list[float]],
    band: dict[str, list[float]],
    own: str,
    budget: int,
    reached: float,
) -> None:
    left, width, top, height = 46, 224, 14, 308
    axes = sheet.axes(left, top, width, height)
    _budget_ticks(axes, budgets, width)
    axes.set_xlim(budgets[0], budgets[-1])
    values = [v for line in (*lines.values(), *band.values()) for v in line if known(v)]
    bottom = math.floor(min(values) * 10) / 10 if values else 0.0
    axes.set_ylim(bottom, 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    ends: list[tuple[str, str, float]] = []  # name, colour, share
    if band:
        axes.fill_between(budgets, band["low"], band["high"], color=sheet.colours["random"], alpha=0.22, linewidth=0)
        axes.plot(budgets, band["mean"], color=sheet.colours["random"], linewidth=2.5, linestyle=(0, (2, 1.2)))
        ends.append((RANDOM, "random", band["mean"][-1]))
    for name, line in lines.items():
        if name != own:
            axes.plot(budgets, line, color=sheet.colours["muted"], linewidth=1, alpha=0.75)
            ends.append((name, "muted", line[-1]))
    if own in lines:
        axes.plot(budgets, lines[own], color=sheet.colours["run"], linewidth=3)
        ends.append((own, "run", lines[own][-1]))
    colour = "random" if own == RANDOM else "run"
    axes.axvline(budget, color=sheet.colours[colour], linewidth=1, linestyle=(0, (3, 3)))
    axes.plot([budget], [reached], "o", markersize=9, color=sheet.colours[colour], clip_on=False)
    _name_ends(sheet, axes, _fewer(ends, own), (left + width, top, height))
    sheet.text(left + width / 2, top + height + 40, "samples chosen (log scale)", "muted", ha="center")


def _fewer(ends: list[tuple[str, str, float]], own: str) -> list[tuple[str, str, float]]:
    """Return the curves that get a name: all, or the emphasised ones with the best and the worst of the others."""
    if len(ends) <= MOST_LABELS:
        return ends
    kept = [end for end in ends if end[0] in (own, RANDOM)]
    others = sorted((end for end in ends if end[0] not in (own, RANDOM)), key=lambda end: end[2])
    return [*kept, others[0], others[-1]]


def _name_ends(sheet: Sheet, axes: Any, ends: list[tuple[str, str, float]], place: tuple[float, float, float]) -> None:
    """Write the name of every curve beside its end, with a thin line from one to the other."""
    from matplotlib.lines import Line2D

    right, top, height = place
    low, high = axes.get_ylim()
    ends = [end for end in ends if known(end[2])]
    heights = [top + height * (1 - (share - low) / (high - low)) for _, _, share in ends]
    for (name, colour, _), own, moved in zip(ends, heights, spread(heights, 16, top, top + height), strict=True):
        ys = [1 - (y + sheet.head) / sheet.height for y in (own, own, moved, moved)]
        xs = [(right + dx) / WIDTH for dx in (2, 5, 14, 18)]
        sheet.paper.add_artist(Line2D(xs, ys, color=sheet.colours[colour], linewidth=0.8))
        weight = "bold" if colour == "run" else "normal"
        sheet.text(right + 21, moved, fitting(name, WIDTH - right - 22), colour, weight=weight, size=12.7)


# --- domains -------------------------------------------------------------------------------------------------------


def _without_domains(summary: Summary) -> str:
    selection = summary.get("selection", {})
    if not selection.get("domains") or not selection.get("pool_domains"):
        return "The domains of the pool are not known."
    if len(selection["pool_domains"]) < 2:
        return "All texts of the pool are of one domain."
    return ""


def domain_mix(summary: Summary) -> list[Figure]:
    """Draw each domain's share of the chosen set beside its share of the pool."""
    chosen, pool = summary["selection"]["domains"], summary["selection"]["pool_domains"]
    sums = (sum(chosen.values()) or 1, sum(pool.values()) or 1)
    mix = [(str(name), chosen.get(name, 0), pool.get(name, 0)) for name in dict.fromkeys([*pool, *chosen])]
    mix.sort(key=lambda each: (-each[1], -each[2], each[0]))
    shown = mix if len(mix) <= MOST_DOMAINS else [*mix[: MOST_DOMAINS - 1], _rest(mix[MOST_DOMAINS - 1 :])]
    shares = [(name, mine / sums[0], theirs / sums[1]) for name, mine, theirs in shown]

    def draw(sheet: Sheet) -> None:
        _draw_mix(sheet, shares)

    ratio = {name: (mine / sums[0]) / (theirs / sums[1]) for name, mine, theirs in mix if theirs}
    most = max(ratio, key=lambda name: ratio[name])
    least = min(ratio, key=lambda name: ratio[name])
    by_name = {name: (mine / sums[0], theirs / sums[1]) for name, mine, theirs in mix}
    words = {
        name: f"{one_line(name, 40)} ({percent(by_name[name][0])} of the set, {percent(by_name[name][1])} of the pool)"
        for name in (most, least)
    }
    caption = f"Most above its share of the pool: {words[most]}. Most below: {words[least]}."
    listed = "; ".join(
        f"{one_line(name, 40)} {percent(mine)} against {percent(theirs)}" for name, mine, theirs in shares
    )
    alt = f"Bar chart of each domain's share of the chosen set against its share of the pool: {listed}."
    rows = tuple(
        (one_line(name), count(mine), percent(mine / sums[0]), count(theirs), percent(theirs / sums[1]))
        for name, mine, theirs in mix
    )
    table = Table(("domain", "chosen", "share of the set", "in the pool", "share of the pool"), rows)
    return [rendered("domains", "Domains of the chosen set", caption, alt, table, 44 + STEP * len(shares), draw)]


def _rest(mix: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    return f"{len(mix)} other domains", sum(each[1] for each in mix), sum(each[2] for each in mix)


def _draw_mix(sheet: Sheet, shares: list[tuple[str, float, float]]) -> None:
    from matplotlib.patches import Rectangle

    left = margin((one_line(name) for name, _, _ in shares), 140)
    width = WIDTH - left - 62
    top = 38
    axes = sheet.axes(left, top, width, STEP * len(shares))
    axes.set_ylim(len(shares), 0)
    largest = max(max(mine, theirs) for _, mine, theirs in shares)
    axes.set_xlim(0, largest)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(sheet.colours["muted"])
    for place, (name, mine, theirs) in enumerate(shares):
        middle = top + STEP * (place + 0.5)
        sheet.text(left - 8, middle, fitting(name, left - 12), ha="right")
        for share, y, colour, filled in ((mine, 0.16, "run", True), (theirs, 0.54, "muted", False)):
            axes.add_patch(
                Rectangle(
                    (0, place + y),
                    share,
                    0.3,
                    facecolor=sheet.colours[colour] if filled else "none",
                    edgecolor=sheet.colours[colour],
                    linewidth=1.3,
                    clip_on=False,
                )
            )
            where = left + width * share / largest + 7
            sheet.text(where, top + STEP * (place + y + 0.15), percent(share), "run" if filled else "muted", size=12.7)
    square = {"marker": "s", "linestyle": "none", "markersize": 11}
    sheet.key(14, [("chosen set", "run", square), ("pool", "muted", {**square, "fillstyle": "none"})])


SELECTION_PLANS = (
    Plan("Weighted coverage against budget", _without_curves, coverage_curves),
    MAP_PLAN,
    Plan("Domains of the chosen set", _without_domains, domain_mix),
)
