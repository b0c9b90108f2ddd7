"""The part of the chain that quantises: with the chosen samples, and what that is compared with."""

from dataclasses import dataclass
from typing import Any

from covercal.model_files import block_count
from covercal.quantization_settings import Quantization
from covercal.recipe import Recipe, Selection
from flows.choosing import Measured, choosing_row
from flows.execution import Execution, Pending
from flows.inputs import Inputs
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.gram import held_out_shards, sum_gram
from tasks.identities import ModelIdentity, model_folder
from tasks.quantize import NO_POOL, PoolInputs, calibration, quantize_block, quantize_model
from tasks.select import chosen_samples, order_samples, selection_inputs


@dataclass(frozen=True, slots=True)
class Models:
    """The checkpoints that a run compares.

    Attributes
    ----------
    nearest, run
        Round-to-nearest, and this run's own.
    random
        Calibrated with random sets of the same size, one for each seed.
    """

    nearest: Any
    run: Any
    random: tuple[Any, ...] = ()


def _settings(recipe: Recipe, model: ModelIdentity) -> Quantization:
    """Return the settings of quantisation with the dtype of scales and unquantised weights decided."""
    settings = recipe.quantization
    if settings.storage_dtype != "auto":
        return settings
    return settings.model_copy(update={"storage_dtype": "float16" if model.dtype == "float16" else "bfloat16"})


def nearest_checkpoint(recipe: Recipe, execution: Execution, place: dict[str, Any], inputs: Inputs) -> Any:
    """Round to nearest on the same grid."""
    plain = without_calibration(_settings(recipe, inputs.model))
    return execution.run("nearest", quantize_model, **place, **UNCALIBRATED, quantization=plain)


UNCALIBRATED = {"pool": None, "calibration": None, "cached_pool": NO_POOL, "blocks": ()}


def without_calibration(settings: Quantization) -> Quantization:
    """Return the settings of round-to-nearest on the same grid; what it does not read is at its default."""
    fields = {"bits", "group_size", "symmetric", "storage_dtype"}
    return Quantization(method="rtn", **settings.model_dump(include=fields))


def chosen_checkpoint(
    recipe: Recipe,
    execution: Execution,
    measured: Measured,
    selection: Any,
    place: dict[str, Any],
    inputs: Inputs,
    label: str = "checkpoint",
) -> Any:
    """Quantise with the samples of a selection, or with what is cached of the pool; `label` is its row."""
    settings = _settings(recipe, inputs.model)
    known = _pool_inputs(recipe, execution, measured, place)
    common = {**place, "quantization": settings}
    if settings.calibrated:
        choosing = {"checkpoint": choosing_row(recipe), "first try": "selection"}.get(label, f"{label} choice")
        chosen = execution.read(choosing, _calibration, measured.pool, selection, recipe.selection.budget)
        given = {"pool": measured.pool, "calibration": chosen, "cached_pool": known, "blocks": ()}
        return execution.run(label, quantize_model, **common, **given)
    if not settings.reads_pool_gram:
        return execution.run(label, quantize_model, **common, **{**UNCALIBRATED, "cached_pool": known})
    count = execution.read("model", _block_count, place["imported"], inputs.model)
    if isinstance(count, Pending):
        return execution.run(label, quantize_model, **common, **{**UNCALIBRATED, "blocks": count})
    wanted = [{**common, "cached_pool": known, "index": index} for index in range(count)]
    blocks = execution.map("blocks", quantize_block, wanted)
    return execution.run(label, quantize_model, **common, **{**UNCALIBRATED, "blocks": blocks})


def random_checkpoints(
    recipe: Recipe, execution: Execution, measured: Measured, place: dict[str, Any], inputs: Inputs
) -> tuple[Any, ...]:
    """Quantise with random sets of the same size; there are none where no samples are read, or they are random.

    Texts judge them all, tasks the first.
    """
    own, judged = recipe.selection, recipe.evaluation
    if not recipe.quantization.calibrated or own.selector == "random":
        return ()
    scored = int(bool(judged.tasks) and "random" in judged.task_models)
    found = []
    for seed in range(judged.random if judged.texts else min(judged.random, scored)):
        label = "random" if judged.random == 1 else f"random {seed}"
        wanted = Selection(selector="random", budget=own.budget, seed=seed)
        parts = selection_inputs(wanted, recipe.pool.samples, pool=measured.pool, outliers=None, statistics=())
        order = execution.run(f"{label} choice", order_samples, **parts)
        found.append(chosen_checkpoint(recipe, execution, measured, order, place, inputs, label))
    return tuple(found)


def _pool_inputs(recipe: Recipe, execution: Execution, measured: Measured, place: dict[str, Any]) -> Any:
    """Return what is cached of the pool that quantisation reads, made if it has to be; in a plan it may be pending."""
    settings = recipe.quantization
    gram = held_out = None
    if settings.reads_pool_gram:
        if isinstance(measured.shards, Pending):
            return execution.run("gram", sum_gram, shards=measured.shards)
        common = {
            **place,
            "pool": measured.pool,
            "weight": settings.gram.weight,
            "spread": settings.reads_spread,
        }
        gram = execution.run("gram", sum_gram, **common, shards=measured.shards)
        apart = held_out_shards(measured.shards) if settings.validates else ()
        held_out = execution.run("held-out gram", sum_gram, **common, shards=apart) if apart else None
    statistics = measured.statistics if settings.reads_statistics else ()
    if isinstance(statistics, Pending):
        return statistics
    return PoolInputs(gram, held_out, statistics)


def _block_count(store: ArtifactStore, imported: Ref | None, model: ModelIdentity) -> int:
    return block_count(model_folder(store, model, imported))


def _calibration(store: ArtifactStore, pool: Ref, selection: Ref, budget: int) -> Any:
    return calibration(store, pool, chosen_samples(store, selection, budget).tolist())
