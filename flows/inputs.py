"""What a recipe names, found by content and checked before any heavy work."""

from dataclasses import dataclass
from typing import Any

from covercal.errors import InputError
from covercal.recipe import Recipe
from flows.execution import Direct
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.identities import (
    ModelIdentity,
    TextIdentity,
    identify_evaluation_text,
    identify_model,
    identify_text,
    model_folder,
)
from tasks.language_tasks import TaskIdentity, identify_task
from tasks.model import import_model


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
    tasks
        The tasks.
    """

    model: ModelIdentity
    sources: tuple[TextIdentity, ...]
    texts: tuple[TextIdentity, ...]
    tasks: tuple[TaskIdentity, ...] = ()


def identify(recipe: Recipe, store: ArtifactStore) -> Inputs:
    """Fingerprint everything that a recipe names.

    Raises
    ------
    InputError
        When something is not there or not usable, a requirement names no task, or the pool's own texts are to judge.
    """
    tasks = tuple(identify_task(task, store) for task in recipe.evaluation.tasks)
    for name in recipe.require.tasks:
        if name not in (names := [task.name for task in tasks]):
            raise InputError(f"require.tasks names {name!r}, which is no task of evaluation.tasks: {', '.join(names)}.")
    sources = tuple(identify_text(source, store) for source in recipe.pool.sources)
    texts = tuple(identify_evaluation_text(text, store) for text in recipe.evaluation.texts)
    of_pool = {(each.content, each.source.config, each.source.split) for each in sources}
    for text in texts:
        if (text.content, text.source.config, text.source.split) in of_pool:
            raise InputError(
                f"Evaluation text {text.source.name} is a source of the pool, too: what is measured on it is not held "
                "out from the choice. Give another text, or split this one."
            )
    return Inputs(identify_model(recipe.model, store), sources, texts, tasks)


def check_model(recipe: Recipe, inputs: Inputs, execution: Direct, *, here: bool = True) -> Ref | None:
    """Check the model against the recipe before any heavy work; a GGUF file is unpacked for it, and returned.

    Parameters
    ----------
    here
        Whether the work is to be done on this machine, which must have the device then.

    Raises
    ------
    InputError
        As `check_inputs`.
    """
    imported = execution.run("model", import_model, model=inputs.model) if inputs.model.gguf else None
    check_inputs(recipe, inputs, model_folder(execution.store, inputs.model, imported), here=here)
    return imported


def check_inputs(recipe: Recipe, inputs: Inputs, folder: Any, *, here: bool = True) -> None:
    """Check the model against the recipe without reading a weight; `here` as in `check_model`.

    Raises
    ------
    InputError
        When the blocks cannot be found, hold what cannot be quantised, the group size does not divide an input, the
        share of salient weights marks none, sequences are longer than the model's table of positions, or no format
        holds the result.
    """
    from covercal.checkpoint import check_format
    from covercal.decoder import check_device_name, describe_decoder, most_positions, pick_device
    from covercal.errors import QuantizationError
    from covercal.quantization import check_group_size, check_salient

    (pick_device if here else check_device_name)(recipe.device)
    trusted = inputs.model.trust_remote_code and not inputs.model.gguf
    decoder = describe_decoder(folder, trust_remote_code=trusted)
    _check_lengths(recipe, most_positions(decoder))
    try:
        shapes = decoder.linear_shapes
        check_group_size(shapes, recipe.quantization.group_size)
        check_salient(shapes, recipe.quantization)
        check_format(recipe.quantization, decoder.model)
    except QuantizationError as cause:
        raise InputError(str(cause)) from cause


def _check_lengths(recipe: Recipe, most: int | None) -> None:
    asked = {"pool.sequence_length": max(recipe.pool.lengths)}
    for kind in ("perplexity", "divergence"):
        texts = enumerate(getattr(recipe.evaluation, kind))
        asked |= {f"evaluation.{kind}[{index}].window": text.window for index, text in texts}
    for name, length in asked.items():
        if most is not None and length > most:
            raise InputError(
                f"{name}: {length} tokens are more than the {most} positions of model.source {recipe.model.source}."
            )
