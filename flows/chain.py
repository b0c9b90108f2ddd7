"""The chain of steps from texts to an evaluated checkpoint, written once for planning and for running."""

from dataclasses import dataclass
from typing import Any

from covercal.errors import InputError
from covercal.model_files import block_count
from covercal.quantization_settings import Quantization
from covercal.recipe import Recipe
from covercal.selectors.registry import selector
from flows.execution import Direct, Execution, Pending
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.cached import ByDigest
from tasks.capture import capture_shard, pool_shards
from tasks.evaluate import evaluate_text, reference_text
from tasks.gram import held_out_shards, sum_gram
from tasks.identities import (
    ModelIdentity,
    TextIdentity,
    TokenizerIdentity,
    identify_evaluation_text,
    identify_model,
    identify_text,
    model_folder,
)
from tasks.losses import sample_losses
from tasks.measures import measure_set
from tasks.model import import_model
from tasks.pool import PerplexitySettings, make_pool, make_texts, text_settings
from tasks.quantize import LINEARS, NO_POOL, PoolInputs, calibration, quantize_block, quantize_model
from tasks.select import chosen_samples, order_samples, selection_inputs
from tasks.thresholds import find_outliers, poor_sites


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe names, by content.

    Attributes
    ----------
    model
        The model.
    sources
        The pool's texts.
    texts
        The evaluation texts: first those for perplexity, then those for divergence.
    """

    model: ModelIdentity
    sources: tuple[TextIdentity, ...]
    texts: tuple[TextIdentity, ...]


@dataclass(frozen=True, slots=True)
class EvaluatedText:
    """One evaluation text and the artifacts about it: of the original, of round-to-nearest, of this run."""

    name: str
    kind: str
    reference: Any
    nearest: Any
    run: Any


@dataclass(frozen=True, slots=True)
class Chain:
    """The artifacts of a run; in a plan some are pending."""

    imported: Any
    pool: Any
    statistics: Any
    outliers: Any
    selection: Any
    measures: Any
    checkpoint: Any
    nearest: Any
    texts: tuple[EvaluatedText, ...]


def identify(recipe: Recipe, store: ArtifactStore) -> Inputs:
    """Fingerprint everything that a recipe names.

    Raises
    ------
    InputError
        When something is not there or not usable.
    """
    evaluated = recipe.evaluation.texts
    return Inputs(
        identify_model(recipe.model, store),
        tuple(identify_text(source, store) for source in recipe.pool.sources),
        tuple(identify_evaluation_text(text, store) for text in evaluated),
    )


def run_chain(recipe: Recipe, inputs: Inputs, execution: Execution, *, until: str = "evaluation") -> Chain:
    """Go through the chain; `until` ends it at `outliers` or `selection`."""
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
    texts = () if until != "evaluation" else _texts(recipe, inputs, execution, tokenizer, imported)
    shards = execution.read("pool", pool_shards, pool, recipe.statistics.shard_samples)
    measured = Measured(
        pool,
        shards,
        _statistics(recipe, execution, pool, shards, place),
        _losses(recipe, execution, pool, shards, place) if until != "outliers" else None,
    )
    if until == "outliers":
        outliers = _outliers(recipe, execution, measured, "outliers", ())
        return Chain(imported, pool, measured.statistics, outliers, None, None, None, None, ())
    outliers, selection = _choice(recipe, execution, measured, ("outliers", "selection"), ())
    if recipe.outliers.adaptive:
        first = _checkpoint(recipe, execution, measured, selection, place, inputs, "first try")
        lowered = execution.read("first try", _poor_sites, outliers, first)
        outliers, selection = _choice(recipe, execution, measured, ("refined", "reselection"), lowered)
    measures = _measures(recipe, execution, measured, outliers, selection)
    if until == "selection":
        return Chain(imported, pool, measured.statistics, outliers, selection, measures, None, None, ())
    references = _references(recipe, execution, texts, place)
    nearest = _nearest(recipe, execution, place, inputs) if texts else None
    checkpoint = _checkpoint(recipe, execution, measured, selection, place, inputs)
    evaluated = _evaluations(recipe, inputs, execution, texts, references, (nearest, checkpoint), place)
    return Chain(imported, pool, measured.statistics, outliers, selection, measures, checkpoint, nearest, evaluated)


@dataclass(frozen=True, slots=True)
class Measured:
    """The pool and what was measured of it; in a plan some of it is pending."""

    pool: Any
    shards: Any
    statistics: Any
    losses: Any


def _texts(recipe: Recipe, inputs: Inputs, execution: Execution, tokenizer: TokenizerIdentity, imported: Any) -> Any:
    evaluated = recipe.evaluation.texts
    if not evaluated:
        return ()
    wanted = [
        {"source": identity, "tokenizer": tokenizer, "imported": imported, "settings": text_settings(text)}
        for identity, text in zip(inputs.texts, evaluated, strict=True)
    ]
    return execution.map("texts", make_texts, wanted)


def _statistics(recipe: Recipe, execution: Execution, pool: Any, shards: Any, place: dict[str, Any]) -> Any:
    if isinstance(shards, Pending):
        return execution.map("statistics", capture_shard, shards)
    settings = recipe.statistics
    common = {**place, "pool": pool, "sites": settings.sites, "skip_tokens": settings.skip_tokens}
    return execution.map("statistics", capture_shard, [{**common, "shard": shard} for shard in shards])


def _losses(recipe: Recipe, execution: Execution, pool: Any, shards: Any, place: dict[str, Any]) -> Any:
    if "losses" not in selector(recipe.selection.selector).reads:
        return ()
    if isinstance(shards, Pending):
        return execution.map("losses", sample_losses, shards)
    return execution.map("losses", sample_losses, [{**place, "pool": pool, "shard": shard} for shard in shards])


def _choice(
    recipe: Recipe, execution: Execution, measured: Measured, labels: tuple[str, str], lowered: Any
) -> tuple[Any, Any]:
    """Find outlier channels and order the samples; `lowered` are sites that a first round reconstructed poorly."""
    outliers = _outliers(recipe, execution, measured, labels[0], lowered)
    parts = {"pool": measured.pool, "outliers": outliers, "statistics": measured.statistics, "losses": measured.losses}
    if any(isinstance(part, Pending) for part in parts.values()):
        return outliers, execution.run(labels[1], order_samples, **parts)
    inputs = selection_inputs(recipe.selection, recipe.pool.samples, **parts)
    return outliers, execution.run(labels[1], order_samples, **inputs)


def _outliers(recipe: Recipe, execution: Execution, measured: Measured, label: str, lowered: Any) -> Any:
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


def _measures(recipe: Recipe, execution: Execution, measured: Measured, outliers: Any, selection: Any) -> Any:
    chosen = execution.read(_choosing(recipe), _chosen, selection, recipe.selection.budget)
    parts = {"pool": measured.pool, "outliers": outliers, "statistics": measured.statistics, "samples": chosen}
    return execution.run("measures", measure_set, **parts)


def _choosing(recipe: Recipe) -> str:
    """Return the row whose choice the checkpoint is calibrated with."""
    return "reselection" if recipe.outliers.adaptive else "selection"


def _chosen(store: ArtifactStore, selection: Ref, budget: int) -> tuple[int, ...]:
    return tuple(sorted(chosen_samples(store, selection, budget).tolist()))


def _poor_sites(store: ArtifactStore, outliers: Ref, checkpoint: Ref) -> tuple[int, ...]:
    return poor_sites(store, outliers, read_table(store.path(checkpoint) / LINEARS).to_pylist())


def _references(recipe: Recipe, execution: Execution, texts: tuple[Any, ...], place: dict[str, Any]) -> Any:
    if not texts:
        return ()
    kinds = [*(False for _ in recipe.evaluation.perplexity), *(True for _ in recipe.evaluation.divergence)]
    wanted = [
        {**place, "texts": ByDigest(text), "keep_hidden": divergence}
        for text, divergence in zip(texts, kinds, strict=True)
    ]
    return execution.map("reference", reference_text, wanted)


def _settings(recipe: Recipe, model: ModelIdentity) -> Quantization:
    """Return the settings of quantisation with the dtype of scales and unquantised weights decided."""
    settings = recipe.quantization
    if settings.storage_dtype != "auto":
        return settings
    return settings.model_copy(update={"storage_dtype": "float16" if model.dtype == "float16" else "bfloat16"})


def _nearest(recipe: Recipe, execution: Execution, place: dict[str, Any], inputs: Inputs) -> Any:
    plain = without_calibration(_settings(recipe, inputs.model))
    return execution.run("nearest", quantize_model, **place, **UNCALIBRATED, quantization=plain)


UNCALIBRATED = {"pool": None, "calibration": None, "cached_pool": NO_POOL, "blocks": ()}


def without_calibration(settings: Quantization) -> Quantization:
    """Return the settings of round-to-nearest on the same grid; what it does not read is at its default."""
    fields = {"bits", "group_size", "symmetric", "storage_dtype"}
    return Quantization(method="rtn", **settings.model_dump(include=fields))


def _checkpoint(
    recipe: Recipe,
    execution: Execution,
    measured: Measured,
    selection: Any,
    place: dict[str, Any],
    inputs: Inputs,
    label: str = "checkpoint",
) -> Any:
    settings = _settings(recipe, inputs.model)
    known = _pool_inputs(recipe, execution, measured, place)
    common = {**place, "quantization": settings}
    if settings.calibrated:
        choosing = "selection" if label == "first try" else _choosing(recipe)
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


def _evaluations(
    recipe: Recipe,
    inputs: Inputs,
    execution: Execution,
    texts: tuple[Any, ...],
    references: tuple[Any, ...],
    checkpoints: tuple[Any, Any],
    place: dict[str, Any],
) -> tuple[EvaluatedText, ...]:
    if not texts:
        return ()
    evaluated = recipe.evaluation.texts
    kinds = [
        "perplexity" if isinstance(text_settings(text), PerplexitySettings) else "divergence" for text in evaluated
    ]
    wanted = [
        {
            **place,
            "checkpoint": ByDigest(checkpoint),
            "texts": ByDigest(text),
            "reference": reference if kind == "divergence" else None,
        }
        for checkpoint in checkpoints
        for text, reference, kind in zip(texts, references, kinds, strict=True)
    ]
    scored = execution.map("evaluation", evaluate_text, wanted)
    count = len(texts)
    return tuple(
        EvaluatedText(identity.source.name, kind, references[i], scored[i], scored[count + i])
        for i, (identity, kind) in enumerate(zip(inputs.texts, kinds, strict=True))
    )


def check_model(recipe: Recipe, inputs: Inputs, execution: Direct) -> Ref | None:
    """Check the model against the recipe before any heavy work; a GGUF file is unpacked for it, and returned.

    Raises
    ------
    InputError
        As `check_inputs`.
    """
    imported = execution.run("model", import_model, model=inputs.model) if inputs.model.gguf else None
    check_inputs(recipe, inputs, model_folder(execution.store, inputs.model, imported))
    return imported


def check_inputs(recipe: Recipe, inputs: Inputs, folder: Any) -> None:
    """Check the model against the recipe without reading a weight.

    Raises
    ------
    InputError
        When the blocks cannot be found, hold what cannot be quantised, the group size does not divide an input, or no
        format holds the result.
    """
    from covercal.checkpoint import check_format
    from covercal.decoder import describe_decoder, pick_device
    from covercal.errors import QuantizationError
    from covercal.quantization import check_group_size

    pick_device(recipe.device)
    trusted = inputs.model.trust_remote_code and not inputs.model.gguf
    decoder = describe_decoder(folder, trust_remote_code=trusted)
    try:
        check_group_size(decoder.linear_shapes, recipe.quantization.group_size)
        check_format(recipe.quantization, decoder.model)
    except QuantizationError as cause:
        raise InputError(str(cause)) from cause
