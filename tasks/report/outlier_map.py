"""The map of outlier channels: which block has one where, and whether the chosen set covers it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report.drawing import WIDTH, Sheet, rendered
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import count, known, one_line, percent, plural

COLUMNS = 190  # of the map: two pixels each
NONE, COVERED, MISSED = 0, 1, 2


def _without_map(summary: Summary) -> str:
    sites = (summary.get("outlier_map") or {}).get("sites") or []
    if not any(cell for site in sites for block in site["cells"] for cell in block):
        return "No channel of the pool is an outlier channel, so there is nothing to map."
    return ""


def outlier_map(summary: Summary) -> list[Figure]:
    """Draw every site's channels by block: no outlier, outlier and covered, outlier and missed."""
    sites = summary["outlier_map"]["sites"]
    tallies = [_tally(site["cells"]) for site in sites]
    tall = [max(54, min(150, 5 * len(site["blocks"]))) for site in sites]

    def draw(sheet: Sheet) -> None:
        _draw_map(sheet, sites, tall)

    covered, missed = (sum(tally[state] for tally in tallies) for state in (COVERED, MISSED))
    caption = _map_caption(summary.get("selection", {}), sites, tallies)
    alt = (
        f"Map with one panel for each of {plural(len(sites), 'site')}; blocks run down, channels across. "
        f"Of the cells with an outlier channel {covered:,} are covered (short blue marks) "
        f"and {missed:,} missed (tall magenta marks)."
    )
    rows = tuple(
        (one_line(site["name"]), count(site["channels"]), count(tally[COVERED]), count(tally[MISSED]))
        for site, tally in zip(sites, tallies, strict=True)
    )
    table = Table(("site", "channels", "cells covered", "cells missed"), rows)
    height = 34 + sum(each + 58 for each in tall)
    return [rendered("outlier-map", "Where the outlier channels are", caption, alt, table, height, draw)]


def _tally(cells: list[list[int]]) -> dict[int, int]:
    return {state: sum(row.count(state) for row in cells) for state in (NONE, COVERED, MISSED)}


def _map_caption(selection: dict[str, Any], sites: list[dict[str, Any]], tallies: list[dict[int, int]]) -> str:
    words = ""
    if known(selection.get("coverage")) and known(selection.get("outlier_channels")):
        total = int(selection["outlier_channels"])
        covered = round(selection["coverage"] * total)
        words = f"The chosen set covers {covered:,} of {total:,} outlier channels ({percent(selection['coverage'])}). "
    worst = max(range(len(sites)), key=lambda at: tallies[at][MISSED])
    if not tallies[worst][MISSED]:
        return words + "Nothing is missed."
    all_missed = sum(tally[MISSED] for tally in tallies)
    share = percent(tallies[worst][MISSED] / all_missed, digits=0)
    return words + f"Of the cells with a missed channel, {share} are at the input of {one_line(sites[worst]['name'])}."


def _draw_map(sheet: Sheet, sites: list[dict[str, Any]], tall: list[int]) -> None:
    bar = {"marker": "|", "linestyle": "none", "markeredgewidth": 2.5}
    sheet.key(
        12,
        [
            ("outlier, covered", "run", {**bar, "markersize": 7}),
            ("outlier, missed", "missed", {**bar, "markersize": 15}),
        ],
    )
    top = 34
    for site, height in zip(sites, tall, strict=True):
        sheet.text(2, top + 10, one_line(site["name"], 48), weight="bold")
        axes = sheet.axes(28, top + 24, WIDTH - 28 - 6, height)
        _draw_site(sheet, axes, site)
        words = f"down: blocks; across: {site['channels']:,} channels"
        sheet.text(WIDTH - 6, top + 24 + height + 13, words, "muted", ha="right")
        top += height + 58


def _draw_site(sheet: Sheet, axes: Any, site: dict[str, Any]) -> None:
    """Draw a site: three rows of pixels a block, of which a covered channel fills one and a missed channel all."""
    states = binned(np.asarray(site["cells"], dtype=np.uint8), COLUMNS)
    blocks, columns = states.shape
    axes.grid(visible=False)
    for state, colour in ((COVERED, "run"), (MISSED, "missed")):
        rows = (1,) if state == COVERED else (0, 1, 2)
        mask = np.zeros((blocks, 3, columns), dtype=bool)
        for row in rows:
            mask[:, row] = states == state
        axes.imshow(
            _pixels(mask.reshape(blocks * 3, columns), colour),
            aspect="auto",
            interpolation="none",
            extent=(0, columns, blocks, 0),
        )
    places = sorted({0, blocks - 1} | set(range(0, blocks, 10))) if blocks > 12 else [0, blocks - 1]
    places = [p for p in places if p in (0, blocks - 1) or blocks - 1 - p > 3]
    axes.set_yticks([p + 0.5 for p in places], [str(site["blocks"][p]) for p in places])
    axes.set_xticks([])
    axes.set_ylim(blocks, 0)


MAP_COLOURS = {"run": (0x4A, 0x8F, 0xCF), "missed": (0xD6, 0x45, 0x8F)}  # pixels know no scheme: 3 : 1 on either


def _pixels(mask: npt.NDArray[np.bool_], colour: str) -> npt.NDArray[np.uint8]:
    pixels = np.zeros((*mask.shape, 4), dtype=np.uint8)
    pixels[mask] = (*MAP_COLOURS[colour], 255)
    return pixels


def binned(states: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Return states (blocks, channels) with neighbouring channels joined to at most `columns`, the worst kept."""
    channels = states.shape[1]
    if channels <= columns:
        return states
    starts = np.linspace(0, channels, columns, endpoint=False).astype(int)
    return np.maximum.reduceat(states, starts, axis=1)


MAP_PLAN = Plan("Where the outlier channels are", _without_map, outlier_map)
