"""The part of the chain that measures the pool and chooses samples."""

from dataclasses import dataclass
from typing import Any

from covercal.recipe import NOT_DRAWN, Recipe, Selection
from covercal.selectors.registry import SELECTORS, selector
from flows.execution import Execution, Pending
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.capture import capture_shard
from tasks.losses import sample_losses
from tasks.measures import measure_set
from tasks.overview import make_overview
from tasks.select import chosen_samples, order_samples, selection_inputs
from tasks.thresholds import find_outliers


@dataclass(frozen=True, slots=True)
class Measured:
    """The pool and what was measured of it; in a plan some of it is pending."""

    pool: Any
    shards: Any
    statistics: Any
    losses: Any


def pool_statistics(recipe: Recipe, execution: Execution, pool: Any, shards: Any, place: dict[str, Any]) -> Any:
    """Measure the activations of every sample, shard by shard."""
    if isinstance(shards, Pending):
        return execution.map("statistics", capture_shard, shards)
    settings = recipe.statistics
    common = {**place, "pool": pool, "sites": settings.sites, "skip_tokens": settings.skip_tokens}
    return execution.map("statistics", capture_shard, [{**common, "shard": shard} for shard in shards])


def pool_losses(
    recipe: Recipe, execution: Execution, pool: Any, shards: Any, place: dict[str, Any], *, shown: bool
) -> Any:
    """Measure how well the original predicts every sample, where a selector asks for it: one that is `shown`, too."""
    reading = (recipe.selection.selector, *(recipe.report.selectors or () if shown else ()))
    if not any("losses" in selector(name).reads for name in reading):
        return ()
    if isinstance(shards, Pending):
        return execution.map("losses", sample_losses, shards)
    return execution.map("losses", sample_losses, [{**place, "pool": pool, "shard": shard} for shard in shards])


def choice(
    recipe: Recipe, execution: Execution, measured: Measured, labels: tuple[str, str], lowered: Any
) -> tuple[Any, Any]:
    """Find outlier channels and order the samples; `lowered` are sites that a first round reconstructed poorly."""
    outliers = find_channels(recipe, execution, measured, labels[0], lowered)
    parts = {"pool": measured.pool, "outliers": outliers, "statistics": measured.statistics, "losses": measured.losses}
    if any(isinstance(part, Pending) for part in parts.values()):
        return outliers, execution.run(labels[1], order_samples, **parts)
    inputs = selection_inputs(recipe.selection, recipe.pool.samples, **parts)
    return outliers, execution.run(labels[1], order_samples, **inputs)


def find_channels(recipe: Recipe, execution: Execution, measured: Measured, label: str, lowered: Any) -> Any:
    """Find the outlier channels; at the sites `lowered`, by the lower threshold."""
    settings = recipe.outliers
    return execution.run(
        label,
        find_outliers,
        statistics=measured.statistics,
        rule=settings.rule,
        k=settings.k,
        weighting=settings.weighting,
        lowered=lowered,
        lowered_k=None if lowered == () else settings.adaptive_k,
    )


def measure_choice(recipe: Recipe, execution: Execution, measured: Measured, outliers: Any, selection: Any) -> Any:
    """Measure the chosen set against the pool."""
    chosen = execution.read(choosing_row(recipe), _chosen, selection, recipe.selection.budget)
    parts = {"pool": measured.pool, "outliers": outliers, "statistics": measured.statistics, "samples": chosen}
    return execution.run("measures", measure_set, **parts)


def choosing_row(recipe: Recipe) -> str:
    """Return the row whose choice the checkpoint is calibrated with."""
    return "reselection" if recipe.outliers.adaptive else "selection"


def _chosen(store: ArtifactStore, selection: Ref, budget: int) -> tuple[int, ...]:
    return tuple(sorted(chosen_samples(store, selection, budget).tolist()))


def show_choice(recipe: Recipe, execution: Execution, measured: Measured, outliers: Any, selection: Any) -> Any:
    """Gather what a report shows of the choice, beside what other selectors would choose from what is measured."""
    names = [name for name in shown_selectors(recipe) if name != recipe.selection.selector]
    parts = {"pool": measured.pool, "outliers": outliers, "statistics": measured.statistics, "losses": measured.losses}
    waits = any(isinstance(part, Pending) for part in parts.values())
    wanted = [
        parts
        if waits
        else selection_inputs(Selection(selector=name, budget=recipe.selection.budget), recipe.pool.samples, **parts)
        for name in names
    ]
    orders = execution.map("rivals", order_samples, wanted) if names else ()
    rivals = orders if isinstance(orders, Pending) else dict(zip(names, orders, strict=True))
    return execution.run(
        "overview",
        make_overview,
        pool=measured.pool,
        outliers=outliers,
        selection=selection,
        budget=recipe.selection.budget,
        selector=recipe.selection.selector,
        rivals=rivals,
    )


def shown_selectors(recipe: Recipe) -> tuple[str, ...]:
    """Return the selectors whose coverage a report shows: by default all that read nothing which the run lacks.

    Random choice is shown as a band, from many orders.
    """
    if recipe.report.selectors is not None:
        return recipe.report.selectors
    made = {"outliers", "statistics"} | set(selector(recipe.selection.selector).reads)
    return tuple(name for name in SELECTORS if name not in NOT_DRAWN and selector(name).reads <= made)
