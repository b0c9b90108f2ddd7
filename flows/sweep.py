"""A grid of runs that share every stage they can, one failing cell never losing the others."""

import itertools
import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from covercal.comparison import student_quantile
from covercal.errors import CovercalError
from covercal.recipe import Recipe, parse_recipe, plain, short_names, with_fields
from covercal.selectors.registry import selector
from flows.chain import run_chain
from flows.execution import Execution
from flows.inputs import Inputs, identify
from flows.summary import summarize, sweep_name
from flows.verdict import not_judged, sweep_verdict
from storage.artifacts import ArtifactStore
from storage.errors import StorageError

SEED = "selection.seed"
POOL_SEED = "pool.seed"
REPEATS = (SEED, POOL_SEED)  # cells that differ by these alone are one row
SELECTOR = "selection.selector"
BUDGET = "selection.budget"
RANDOM = "random"
MODELS = ("original", "nearest", "run")
ROUNDING = 1e-12  # of two means, far below every difference that a measure tells


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep: what is set in it, and the recipe that makes."""

    fields: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Return what sets it apart, such as `coverage, 8, seed 0`."""
        return _cell_name(self.fields)


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell found, or the error that ended it.

    Attributes
    ----------
    fields
        What is set in the cell.
    measures, quantization
        Of the chosen set, and of the checkpoint.
    scores
        For every evaluation text: its name, kind, and the scores of original, nearest and run over all sequences.
    tasks
        For every task: its name, main metric, whether higher is better, what original, nearest and run scored where
        they did, and the error of what failed.
    error
        Empty when the cell ended well.
    """

    fields: dict[str, Any]
    measures: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


Tell = Callable[[int, Cell, CellResult], None]


@dataclass(frozen=True, slots=True)
class TaskMean:
    """The main metric of one task in the cells of a row that have it: each value, mean and interval as in `Row`."""

    metric: str
    higher_is_better: bool
    values: tuple[float, ...]
    mean: float
    interval: float


@dataclass(frozen=True, slots=True)
class Row:
    """Cells that differ by a seed alone: that of the choice, or that of the pool.

    Attributes
    ----------
    fields
        What they have in common.
    values
        The main number of each, in the order of the seeds.
    mean, interval
        Their mean, and half the width of its 95% interval (Student's t); NaN for a single value. Over several pools
        both are of the pools' means: the runs of one pool share its luck.
    difference, difference_interval
        How far the mean lies above that of random choice of the same size, and half the width of the 95% interval (see
        `against_random`); NaN where no random choice was run, or for random choice itself.
    percentile
        Share of the random choices of the same size from the same pool that are worse; NaN as for the difference.
    random_mean
        What the difference is from: the mean of random choice over the pools that both have; NaN as for the difference.
    tasks
        By the task's name.
    """

    fields: dict[str, Any]
    values: tuple[float, ...]
    mean: float
    interval: float
    difference: float
    difference_interval: float
    percentile: float
    random_mean: float
    tasks: dict[str, TaskMean]


def _cell_name(fields: dict[str, Any]) -> str:
    short = short_names(fields)
    return ", ".join(f"{short[name]} {value}" for name, value in fields.items())


def cells(recipe: Recipe) -> list[Cell]:
    """Return the cells of a recipe's `sweep`; a seed that a selector does not read makes no further cell."""
    names = list(recipe.sweep)
    found: dict[str, Cell] = {}
    for values in itertools.product(*(recipe.sweep[name] for name in names)):
        fields = dict(zip(names, values, strict=True))
        chosen = fields.get(SELECTOR, recipe.selection.selector)
        if SEED in fields and not selector(str(chosen)).seeded:
            fields[SEED] = recipe.selection.seed
        named = f"of the sweep's cell ({_cell_name(fields)})"
        cell = Cell(fields, parse_recipe(with_fields(recipe, fields), Path("/"), named))
        found.setdefault(json.dumps(cell.recipe.model_dump(mode="json"), sort_keys=True), cell)
    return list(found.values())


def run_cells(
    wanted: Sequence[Cell],
    store: ArtifactStore,
    execution: Callable[[Cell], Execution],
    tell: Tell = lambda number, cell, result: None,
    check: Callable[[Recipe, Inputs], None] = lambda recipe, inputs: None,
    at_once: int = 1,
) -> Iterator[CellResult]:
    """Run every cell, after `check`, and yield what it found; an error of one cell is its result; the next one runs.

    `at_once` cells go on at the same time, which only helps where their steps run elsewhere.
    """
    found = _in_turn if at_once == 1 else partial(_at_once, at_once)
    work = [partial(_run_cell, cell, store, execution, check) for cell in wanted]
    for number, (cell, result) in enumerate(zip(wanted, found(work), strict=True), start=1):
        tell(number, cell, result)
        yield result


def _in_turn(work: Sequence[Callable[[], CellResult]]) -> Iterator[CellResult]:
    return (each() for each in work)


def _at_once(count: int, work: Sequence[Callable[[], CellResult]]) -> Iterator[CellResult]:
    """Yield the results in the order of the cells; what has not begun when a run is interrupted never does."""
    with ThreadPoolExecutor(count) as threads:
        running = [threads.submit(copy_context().run, each) for each in work]
        try:
            yield from (each.result() for each in running)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _run_cell(
    cell: Cell,
    store: ArtifactStore,
    execution: Callable[[Cell], Execution],
    check: Callable[[Recipe, Inputs], None],
) -> CellResult:
    try:
        inputs = identify(cell.recipe, store)
        check(cell.recipe, inputs)
        chain = run_chain(cell.recipe, inputs, execution(cell))
        summary = summarize(cell.recipe, chain, store)
        scores = [_overall(each) for each in summary["evaluation"]]
        tasks = _task_scores(summary["tasks"])
        return CellResult(
            cell.fields, summary["selection"], summary["quantization"], scores, tasks, error=_no_number(scores)
        )
    except (CovercalError, StorageError) as error:
        return CellResult(cell.fields, error=f"{type(error).__name__}: {error}")
    except Exception as error:  # a bug in one selector must not cost a night's other cells; the trace is kept
        return CellResult(cell.fields, error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _overall(text: dict[str, Any]) -> dict[str, Any]:
    """Return a text's scores over all sequences."""
    models = {name: text[name]["all"] for name in MODELS}
    return {"text": text["text"], "kind": text["kind"], **models}


def _task_scores(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what every model scored on every task; a second task of the same name is called `name #2`."""
    found: list[dict[str, Any]] = []
    for place, each in enumerate(tasks):
        earlier = sum(other["task"] == each["task"] for other in tasks[:place])
        name = f"{each['task']} #{earlier + 1}" if earlier else each["task"]
        shown = {"metric": each.get("metric", ""), "higher_is_better": each.get("higher_is_better", True)}
        scores = {model: each["scores"][model]["value"] for model in MODELS if model in each["scores"]}
        found.append({"task": name, **shown, **scores, "error": each["error"]})
    return found


def _no_number(scores: Sequence[dict[str, Any]]) -> str:
    """Return the error of a cell whose main number cannot be compared with that of others; empty when it can."""
    main, value = _main_score(scores), main_number(scores)
    if main is None or math.isfinite(value):
        return ""
    return f"EvaluationError: the {main['kind']} on {main['text']} is {value:g}; only finite numbers can be compared"


def found_words(result: CellResult) -> str:
    """Return a cell's main number and what it scored on tasks, or the first line of its error."""
    if result.error:
        return result.error.splitlines()[0]
    main = [f"{main_number(result.scores):.4f}"] if result.scores else []
    tasks = [f"{each['task']} {each['run']:.4f}" for each in result.tasks if "run" in each]
    return ", ".join([*main, *tasks, *task_failures([result])]) or "nothing measured"


def task_failures(results: Sequence[CellResult]) -> list[str]:
    """Return a line for every task that could not be scored in a cell, for one of its models or for all."""
    return [
        f"{task['task']} failed: {task['error'].splitlines()[0]}"
        for each in results
        for task in each.tasks
        if task["error"]
    ]


def main_number(scores: Sequence[dict[str, Any]]) -> float:
    """Return what cells are compared by: divergence on the first text that has one, else the first perplexity.

    NaN where nothing was measured on a text.
    """
    main = _main_score(scores)
    value = None if main is None else main["run"].get(main["kind"])
    return math.nan if value is None else float(value)


def _main_score(scores: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((each for each in scores if each["kind"] == "divergence"), scores[0] if scores else None)


def rows(results: Sequence[CellResult]) -> list[Row]:
    """Return one row for all cells that differ by a seed alone."""
    groups: dict[str, list[CellResult]] = {}
    for result in results:
        if not result.error:
            groups.setdefault(_without(result.fields, *REPEATS), []).append(result)
    rivals = {
        _without(group[0].fields, *REPEATS, SELECTOR): _main_numbers(group)
        for group in groups.values()
        if group[0].fields.get(SELECTOR) == RANDOM
    }
    found = []
    for group in groups.values():
        fields = {name: value for name, value in group[0].fields.items() if name not in REPEATS}
        values, pools = tuple(main_number(each.scores) for each in group), _main_numbers(group)
        others = rivals.get(_without(fields, SELECTOR), {}) if fields.get(SELECTOR) != RANDOM else {}
        compared = against_random(pools, others, exact=_without_chance(fields))
        found.append(Row(fields, values, *_mean_and_interval(pools), *compared, _task_means(group)))
    return found


def _without_chance(fields: dict[str, Any]) -> bool:
    """Return whether the cells of a row have a selector that chooses the same samples whatever its seed."""
    return SELECTOR in fields and not selector(str(fields[SELECTOR])).seeded


def _main_numbers(group: Sequence[CellResult]) -> dict[Any, list[float]]:
    return _by_pool([(each, main_number(each.scores)) for each in group])


def _by_pool(numbers: Sequence[tuple[CellResult, float]]) -> dict[Any, list[float]]:
    pools: dict[Any, list[float]] = {}
    for each, number in numbers:
        pools.setdefault(each.fields.get(POOL_SEED), []).append(number)
    return pools


def _task_means(group: Sequence[CellResult]) -> dict[str, TaskMean]:
    scored: dict[str, list[tuple[CellResult, dict[str, Any]]]] = {}
    for each in group:
        for task in each.tasks:
            if "run" in task:
                scored.setdefault(task["task"], []).append((each, task))
    found = {}
    for name, pairs in scored.items():
        first, values = pairs[0][1], tuple(float(task["run"]) for _, task in pairs)
        pools = _by_pool([(each, value) for (each, _), value in zip(pairs, values, strict=True)])
        found[name] = TaskMean(first["metric"], first["higher_is_better"], values, *_mean_and_interval(pools))
    return found


def _mean_and_interval(pools: dict[Any, list[float]]) -> tuple[float, float]:
    """Return the mean of numbers by pool and half the width of its 95% interval; several pools count once each."""
    values = [float(np.mean(each)) for each in pools.values()] if len(pools) > 1 else next(iter(pools.values()))
    return float(np.mean(values)), half_interval(values)


def against_random(
    values: dict[Any, list[float]], rivals: dict[Any, list[float]], *, exact: bool
) -> tuple[float, float, float, float]:
    """Compare one selector's numbers with those of random choice; lower numbers are better.

    Parameters
    ----------
    values, rivals
        The numbers by pool.
    exact
        Whether the selector has no chance in it, so that one number of a pool is all there is to know of it there.

    Returns
    -------
    difference, interval
        Mean of the first less mean of the second, and half the width of its 95% interval. Over several pools it is
        that of the paired differences, one for each pool (Student's t). Over one pool it is Welch's, where a
        selector without chance adds nothing to it: the luck of a pool's draw is not in it. The interval is NaN where
        a single number leaves its spread unknown.
    percentile
        Share of the pairs from one pool where the random choice is worse.
    random_mean
        Mean of the second over the pools that both have.
        All four are NaN where no pool has both.
    """
    shared = [pool for pool in values if pool in rivals]
    if not shared:
        return math.nan, math.nan, math.nan, math.nan
    percentile = float(np.mean([other > value for pool in shared for value in values[pool] for other in rivals[pool]]))
    random_mean = float(np.mean([np.mean(rivals[pool]) for pool in shared]))
    differences = [_difference(float(np.mean(values[pool])), float(np.mean(rivals[pool]))) for pool in shared]
    if len(shared) > 1:
        return float(np.mean(differences)), half_interval(differences), percentile, random_mean
    drawn = [rivals[shared[0]], *([] if exact else [values[shared[0]]])]
    return differences[0], _welch_half_interval(drawn), percentile, random_mean


def _difference(mean: float, other: float) -> float:
    """Return how far a mean lies above another; 0 where only the rounding of equal values lies between them."""
    return 0.0 if math.isclose(mean, other, rel_tol=ROUNDING) else mean - other


def _welch_half_interval(drawn: Sequence[Sequence[float]]) -> float:
    """Return half the width of the 95% interval of a difference of means; NaN where one of them is a single value.

    Parameters
    ----------
    drawn
        The values of each mean that is known from a few values only; one that is known exactly is left out.
    """
    if any(len(each) < 2 for each in drawn):
        return math.nan
    parts = [(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in drawn]
    squared = sum(part for part, _ in parts)
    if squared == 0:
        return 0.0
    freedom = squared**2 / sum(part**2 / degrees for part, degrees in parts)
    return student_quantile(0.975, freedom) * math.sqrt(squared)


def half_interval(values: Sequence[float]) -> float:
    """Return half the width of the 95% interval of a mean (Student's t); NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return student_quantile(0.975, len(values) - 1) * error


def _without(fields: dict[str, Any], *names: str) -> str:
    return json.dumps({name: value for name, value in fields.items() if name not in names}, sort_keys=True)


def sweep_summary(recipe: Recipe, results: Sequence[CellResult]) -> dict[str, Any]:
    """Return everything that a sweep found, as plain JSON."""
    found = results_summary(results)
    return {
        "name": sweep_name(recipe),
        "verdict": sweep_verdict(
            recipe, found["rows"], sum(bool(each.error) for each in results), len(task_failures(results))
        ),
        "recipe": plain(recipe),
        **found,
    }


def results_summary(results: Sequence[CellResult]) -> dict[str, Any]:
    """Return what the figures of a sweep show: the measure, its rows, and the cells."""
    return {
        "measure": measure_words(results),
        "rows": [_plain(asdict(row)) for row in rows(results)],
        "cells": [_plain(asdict(each)) for each in results],
    }


def measure_words(results: Sequence[CellResult]) -> str:
    """Return what the main number is."""
    main = next((_main_score(each.scores) for each in results if each.scores), None)
    if main is None:
        return "nothing measured on texts"
    is_divergence = main["kind"] == "divergence"
    return "KL(original || quantised), nats per token" if is_divergence else f"perplexity on {main['text']}"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, with null for every number that is not known."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sweep_table(found: Sequence[Row]) -> Table:
    """Return one line for each group of cells that differ by a seed alone."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for row in found for name in row.fields))
    for short in short_names(names).values():
        table.add_column(escape(short), no_wrap=True)
    measured, compared = (any(not math.isnan(getattr(row, n)) for row in found) for n in ("mean", "difference"))
    tasks = {name: task for row in found for name, task in row.tasks.items()}
    table.add_column("runs", justify="right")
    for name in (*(("mean ± 95%",) if measured else ()), *(("minus random ± 95%",) if compared else ())):
        table.add_column(name, no_wrap=True)
    if compared:
        table.add_column("beats", justify="right")
    for name, task in tasks.items():
        table.add_column(escape(f"{name}, {task.metric} ± 95%"), no_wrap=True)
    for row in found:
        cells = [escape(str(row.fields.get(name, ""))) for name in names]
        cells.append(str(len(row.values)))
        if measured:
            cells.append(_with_interval(row.mean, row.interval))
        if compared:
            cells.append(_with_interval(row.difference, row.difference_interval, sign="+"))
            cells.append("" if math.isnan(row.percentile) else f"{row.percentile:.0%}")
        scored = [row.tasks.get(name) for name in tasks]
        cells += ["" if task is None else _with_interval(task.mean, task.interval) for task in scored]
        table.add_row(*cells)
    return table


def table_words(recipe: Recipe, found: Sequence[Row]) -> list[str]:
    """Return the sentences that say how to read the table of a sweep."""
    words = []
    if any(not math.isnan(row.difference) for row in found):
        words.append(
            "Lower is better. Below zero: better than a random set of that size; beats: share of random sets that do "
            "worse."
        )
    elif any(not math.isnan(row.mean) for row in found):
        words.append("Lower is better. With `random` among the selectors, each is compared with chance.")
    tasks = {name: task.higher_is_better for row in found for name, task in row.tasks.items()}
    for better, way in ((True, "Higher"), (False, "Lower")):
        if named := [name for name, higher in tasks.items() if higher == better]:
            words.append(f"{way} is better on {', '.join(named)}.")
    return [*words, *not_judged(recipe)]


def _with_interval(value: float, interval: float, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    return f"{value:{sign}.4f}" + (f" ± {interval:.4f}" if not math.isnan(interval) else "")
