"""The chain of steps from texts to an evaluated checkpoint, written once for planning and for running."""

from dataclasses import dataclass
from typing import Any

from covercal.errors import InputError
from covercal.quantizers.registry import METHODS
from covercal.recipe import Quantization, Recipe
from flows.execution import Execution, Pending
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import ByDigest
from tasks.capture import capture_shard, pool_shards
from tasks.evaluate import evaluate_text, reference_text
from tasks.identities import (
    ModelIdentity,
    TextIdentity,
    TokenizerIdentity,
    identify_evaluation_text,
    identify_model,
    identify_text,
)
from tasks.model import import_model
from tasks.pool import PerplexitySettings, make_pool, make_texts, text_settings
from tasks.quantize import calibration, quantize_model
from tasks.select import chosen_samples, order_samples, selection_inputs
from tasks.thresholds import find_outliers


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

    pool: Any
    outliers: Any
    selection: Any
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
    """Go through the chain; `until="selection"` ends there."""
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
    texts = () if until == "selection" else _texts(recipe, inputs, execution, tokenizer, imported)
    statistics = _statistics(recipe, execution, pool, place)
    outliers = execution.run("outliers", find_outliers, statistics=statistics, **recipe.outliers.model_dump())
    selection = _selection(recipe, execution, pool, outliers)
    if until == "selection":
        return Chain(pool, outliers, selection, None, None, ())
    references = _references(recipe, execution, texts, place)
    nearest = _nearest(recipe, execution, place, inputs) if texts else None
    checkpoint = _checkpoint(recipe, execution, pool, selection, place, inputs)
    evaluated = _evaluations(recipe, inputs, execution, texts, references, (nearest, checkpoint), place)
    return Chain(pool, outliers, selection, checkpoint, nearest, evaluated)


def _texts(recipe: Recipe, inputs: Inputs, execution: Execution, tokenizer: TokenizerIdentity, imported: Any) -> Any:
    evaluated = recipe.evaluation.texts
    if not evaluated:
        return ()
    wanted = [
        {"source": identity, "tokenizer": tokenizer, "imported": imported, "settings": text_settings(text)}
        for identity, text in zip(inputs.texts, evaluated, strict=True)
    ]
    return execution.map("texts", make_texts, wanted)


def _statistics(recipe: Recipe, execution: Execution, pool: Any, place: dict[str, Any]) -> Any:
    settings = recipe.statistics
    shards = execution.read("pool", pool_shards, pool, settings.shard_samples)
    if isinstance(shards, Pending):
        return execution.map("statistics", capture_shard, shards)
    common = {**place, "pool": pool, "sites": settings.sites, "skip_tokens": settings.skip_tokens}
    return execution.map("statistics", capture_shard, [{**common, "shard": shard} for shard in shards])


def _selection(recipe: Recipe, execution: Execution, pool: Any, outliers: Any) -> Any:
    wanted = recipe.selection
    if isinstance(pool, Pending) or isinstance(outliers, Pending):
        return execution.run("selection", order_samples, pool=pool, outliers=outliers)
    return execution.run(
        "selection",
        order_samples,
        **selection_inputs(wanted.selector, pool, outliers, wanted.budget, recipe.pool.samples, wanted.seed),
    )


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
    return execution.run(
        "nearest",
        quantize_model,
        **place,
        pool=None,
        calibration=None,
        quantization=without_calibration(_settings(recipe, inputs.model)),
    )


def without_calibration(settings: Quantization) -> Quantization:
    """Return the settings of round-to-nearest on the same grid; what it does not read is at its default."""
    fields = {"bits", "group_size", "symmetric", "storage_dtype"}
    return Quantization(method="rtn", **settings.model_dump(include=fields))


def _checkpoint(
    recipe: Recipe, execution: Execution, pool: Any, selection: Any, place: dict[str, Any], inputs: Inputs
) -> Any:
    settings = _settings(recipe, inputs.model)
    if not METHODS[settings.method].calibrated:
        plain = without_calibration(settings)
        return execution.run("checkpoint", quantize_model, **place, pool=None, calibration=None, quantization=plain)
    chosen = execution.read("selection", _calibration, pool, selection, recipe.selection.budget)
    return execution.run("checkpoint", quantize_model, **place, pool=pool, calibration=chosen, quantization=settings)


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


def check_inputs(recipe: Recipe, inputs: Inputs, folder: Any) -> None:
    """Check the model against the recipe without reading a weight.

    Raises
    ------
    InputError
        When the blocks cannot be found, hold what cannot be quantised, or the group size does not divide an input.
    """
    from covercal.decoder import describe_linears, pick_device
    from covercal.errors import QuantizationError
    from covercal.quantization import check_group_size

    pick_device(recipe.device)
    linears = describe_linears(folder, trust_remote_code=inputs.model.trust_remote_code)
    try:
        check_group_size(linears, recipe.quantization.group_size)
    except QuantizationError as cause:
        raise InputError(str(cause)) from cause
