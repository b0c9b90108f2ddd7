"""Dot plots: one line a row, one mark with an interval for every model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.report.drawing import GAP, KEY, WIDTH, Sheet, fitting, margin, text_width
from tasks.report.figure import Summary
from tasks.report.numerals import known, one_line

MARKS: dict[str, dict[str, Any]] = {
    "original": {"marker": "D", "markersize": 7, "fillstyle": "none"},
    "nearest": {"marker": "s", "markersize": 8, "fillstyle": "none"},
    "random": {"marker": "^", "markersize": 8},
    "run": {"marker": "o", "markersize": 9},
}
LOG_RATIO = 12  # from this ratio of largest to smallest value on, a scale is logarithmic


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its 95% interval; NaN where an end is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DotRow:
    """One line of a dot plot: its name and the dot of every model, by the model's id."""

    name: str
    dots: dict[str, Dot]


def models_of(summary: Summary, among: set[str]) -> dict[str, str]:
    """Return id -> name of the models that are among those, in the order of the summary."""
    return {each["id"]: one_line(each["name"]) for each in summary.get("models", ()) if each["id"] in among}


def dot_plot(sheet: Sheet, rows: list[DotRow], names: dict[str, str], axis: str, scale: Callable[[float], str]) -> None:
    """Draw a line for each row with a dot and an interval for every model; what a mark means stands above.

    Parameters
    ----------
    axis
        What is measured, written below.
    scale
        Text of a tick, given its value.
    """
    left, step = margin((one_line(row.name) for row in rows), 145), _step(names)
    top = 10 + 22 * _key(sheet, names)
    height = step * len(rows)
    axes = sheet.axes(left, top, WIDTH - left - 18, height)
    _scale(axes, rows, scale)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    for place, row in enumerate(rows):
        sheet.text(left - 9, top + step * (place + 0.5), fitting(row.name, left - 12), ha="right")
        if place:
            axes.axhline(place, color=sheet.colours["grid"], linewidth=1)
        for at, model in enumerate(names):
            if model in row.dots:
                _dot(sheet, axes, row.dots[model], place + (at + 1) / (len(names) + 1), model)
    sheet.text(left + (WIDTH - left - 18) / 2, top + height + 40, axis, "muted", ha="center")


def dot_plot_height(rows: int, names: dict[str, str]) -> float:
    """Return how tall a dot plot is, pixels."""
    return 10 + 22 * len(_key_lines(names)) + _step(names) * rows + 54


def _step(names: dict[str, str]) -> int:
    return 12 + 11 * len(names)


def _key_lines(names: dict[str, str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    used = 0.0
    for model, words in names.items():
        wide = KEY + text_width(words) + GAP
        if lines[-1] and used + wide > WIDTH + GAP:
            lines.append([])
            used = 0.0
        lines[-1].append(model)
        used += wide
    return lines


def _key(sheet: Sheet, names: dict[str, str]) -> int:
    lines = _key_lines(names)
    for at, models in enumerate(lines):
        sheet.key(12 + 22 * at, [(names[model], model, MARKS[model]) for model in models])
    return len(lines)


def _scale(axes: Any, rows: list[DotRow], scale: Any) -> None:
    values = [dot.value for row in rows for dot in row.dots.values() if known(dot.value)]
    ends = [end for row in rows for dot in row.dots.values() for end in (dot.low, dot.high) if known(end)]
    low, high = min([*values, *ends]), max([*values, *ends])
    if min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        set_log(axes.xaxis, min(values) * 0.7, high * 1.2)
    else:
        pad = 0.06 * (high - low or 1)
        axes.set_xlim(0 if 0 <= low < 0.5 * high else low - pad, high + pad)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: scale(value))


def set_log(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic from `low` to `high`, with plain numbers at 1, 2 and 5 of each power of ten."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    steps = (1, 2, 5) if high / low < 120 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _dot(sheet: Sheet, axes: Any, dot: Dot, y: float, model: str) -> None:
    if not known(dot.value):
        return
    colour = sheet.colours[model]
    if known(dot.low) and known(dot.high):
        axes.plot([dot.low, dot.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    style = {"linestyle": "none", "color": colour, "markeredgewidth": 1.8, "clip_on": False, **MARKS[model]}
    if style.pop("fillstyle", "") == "none":
        style["markerfacecolor"] = sheet.colours["paper"]
    axes.plot([dot.value], [y], **style)
