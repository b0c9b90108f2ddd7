"""The chain of steps from texts to an evaluated checkpoint, written once for planning and for running."""

from dataclasses import dataclass, replace
from typing import Any

from covercal.recipe import Recipe
from flows.choosing import Measured, choice, find_channels, measure_choice, pool_losses, pool_statistics, show_choice
from flows.execution import Execution
from flows.inputs import Inputs
from flows.judging import (
    EvaluatedTask,
    EvaluatedText,
    evaluate,
    layer_errors,
    original_outputs,
    score_tasks,
    text_samples,
)
from flows.quantizing import Models, chosen_checkpoint, nearest_checkpoint, random_checkpoints
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.capture import pool_shards
from tasks.identities import TokenizerIdentity
from tasks.model import import_model
from tasks.pool import make_pool
from tasks.quantize import LINEARS
from tasks.thresholds import poor_sites


@dataclass(frozen=True, slots=True)
class Chain:
    """The artifacts of a run; in a plan some are pending, and those that its end does not need are None."""

    imported: Any
    pool: Any
    statistics: Any
    outliers: Any
    selection: Any = None
    measures: Any = None
    checkpoint: Any = None
    nearest: Any = None
    texts: tuple[EvaluatedText, ...] = ()
    tasks: tuple[EvaluatedTask, ...] = ()
    overview: Any = None
    layers: tuple[Any, Any] | None = None
    """Errors of every linear: of round-to-nearest and of this run."""


def run_chain(recipe: Recipe, inputs: Inputs, execution: Execution, *, until: str = "evaluation") -> Chain:
    """Go through the chain; `until` ends it at `outliers`, `selection` or `evaluation`.

    `report` goes on after that, to what puts a run into proportion: random choice, other selectors, the error of every
    linear.
    """
    model = inputs.model
    imported = execution.run("model", import_model, model=model) if model.gguf else None
    place = {"model": model, "imported": imported, "dtype": recipe.model.dtype, "device": recipe.device}
    tokenizer = TokenizerIdentity(model)
    pool = execution.run(
        "pool",
        make_pool,
        sources=inputs.sources,
        tokenizer=tokenizer,
        imported=imported,
        lengths=recipe.pool.lengths,
        packing=recipe.pool.packing,
        samples=recipe.pool.samples,
        seed=recipe.pool.seed,
    )
    texts = text_samples(recipe, inputs, execution, tokenizer, imported) if until in ("evaluation", "report") else ()
    shards = execution.read("pool", pool_shards, pool, recipe.statistics.shard_samples)
    measured = Measured(
        pool,
        shards,
        pool_statistics(recipe, execution, pool, shards, place),
        pool_losses(recipe, execution, pool, shards, place, shown=until == "report") if until != "outliers" else None,
    )
    if until == "outliers":
        outliers = find_channels(recipe, execution, measured, "outliers", ())
        return Chain(imported, pool, measured.statistics, outliers)
    outliers, selection = choice(recipe, execution, measured, ("outliers", "selection"), ())
    if recipe.outliers.adaptive:
        first = chosen_checkpoint(recipe, execution, measured, selection, place, inputs, "first try")
        lowered = execution.read("first try", _poor_sites, outliers, first)
        outliers, selection = choice(recipe, execution, measured, ("refined", "reselection"), lowered)
    measures = measure_choice(recipe, execution, measured, outliers, selection)
    chosen = Chain(imported, pool, measured.statistics, outliers, selection, measures)
    if until == "selection":
        return chosen
    whole = until == "report"
    overview = show_choice(recipe, execution, measured, outliers, selection) if whole else None
    references = original_outputs(recipe, execution, texts, place)
    judged = bool(texts or recipe.evaluation.tasks)
    models = Models(
        nearest_checkpoint(recipe, execution, place, inputs) if judged else None,
        chosen_checkpoint(recipe, execution, measured, selection, place, inputs),
        random_checkpoints(recipe, execution, measured, place, inputs) if judged and whole else (),
    )
    return replace(
        chosen,
        overview=overview,
        checkpoint=models.run,
        nearest=models.nearest,
        texts=evaluate(recipe, inputs, execution, texts, references, models, place),
        layers=layer_errors(recipe, execution, texts, models, place) if whole else None,
        tasks=score_tasks(recipe, inputs, execution, models, place),
    )


def _poor_sites(store: ArtifactStore, outliers: Ref, checkpoint: Ref) -> tuple[int, ...]:
    return poor_sites(store, outliers, read_table(store.path(checkpoint) / LINEARS).to_pylist())
