"""What sets the rows and the cells of a sweep apart, in words."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from covercal.recipe import short_names
from tasks.report.figure import Summary
from tasks.report.numerals import known, one_line

SELECTOR, BUDGET = "selection.selector", "selection.budget"
POOL_SEED = "pool.seed"
SEEDS = ("selection.seed", POOL_SEED)
RANDOM = "random"


def settings(fields: Mapping[str, Any], shown: Iterable[str]) -> list[str]:
    """Return some of the swept fields and their values in words, such as `bits 4`, each told from all others."""
    short = short_names(fields)
    return [f"{one_line(short[name]).replace('_', ' ')} {one_line(fields[name], 40)}" for name in shown]


def row_name(fields: dict[str, Any]) -> str:
    """Return what sets a row apart, such as `coverage@8, bits 3`."""
    selector, budget = fields.get(SELECTOR), fields.get(BUDGET)
    first = one_line(selector, 30) if selector is not None else ""
    if budget is not None:
        first += f"@{budget}" if first else f"budget {budget}"
    rest = settings(fields, [name for name in fields if name not in (SELECTOR, BUDGET, *SEEDS)])
    return ", ".join(part for part in (first, *rest) if part) or "this recipe"


def selector_of(fields: dict[str, Any]) -> str:
    """Return the selector of a row or cell."""
    return str(fields.get(SELECTOR, "this recipe"))


def panel_of(fields: dict[str, Any]) -> str:
    """Return what a row has in common with the others of its panel, as JSON so that it can be told apart and sorted."""
    left = {name: value for name, value in fields.items() if name not in (SELECTOR, BUDGET, *SEEDS)}
    return json.dumps(left, sort_keys=True, default=str)


def panel_words(panel: str) -> str:
    """Return a panel of `panel_of` in words; empty when nothing else was swept."""
    fields = json.loads(panel)
    return ", ".join(settings(fields, fields))


def several_budgets(fields: list[dict[str, Any]]) -> bool:
    """Return whether rows or cells differ in their budgets, all known."""
    return len({each.get(BUDGET) for each in fields}) > 1 and all(known(each.get(BUDGET)) for each in fields)


def good_cells(summary: Summary) -> list[dict[str, Any]]:
    """Return the cells that ended well and whose coverage is known."""
    cells = summary.get("cells") or ()
    return [c for c in cells if not c.get("error") and known((c.get("measures") or {}).get("weighted_coverage"))]


def cell_fields(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell's fields with its budget, which a sweep need not set."""
    budget = cell["fields"].get(BUDGET, cell["measures"].get("budget"))
    return {**cell["fields"], **({BUDGET: budget} if budget is not None else {})}


def number_or_nan(value: Any) -> float:
    """Return a number of the summary; NaN where it is not known."""
    return float(value) if known(value) else math.nan


def ends_of(mean: float, interval: float) -> tuple[float, ...]:
    """Return both ends of an interval, or the mean alone where its width is not known."""
    return (mean - interval, mean + interval) if known(interval) else (mean,)
