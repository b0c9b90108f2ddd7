"""The part of the chain that judges: texts, tasks, and the error of every linear."""

from dataclasses import dataclass
from typing import Any

from covercal.errors import EvaluationError
from covercal.recipe import Recipe
from flows.execution import Execution, Failed
from flows.inputs import Inputs
from flows.quantizing import Models
from tasks.cached import ByDigest
from tasks.evaluate import evaluate_text, reference_text
from tasks.identities import TokenizerIdentity
from tasks.language_tasks import score_task
from tasks.layers import measure_layers
from tasks.pool import PerplexitySettings, make_texts, text_settings


@dataclass(frozen=True, slots=True)
class EvaluatedText:
    """One evaluation text and what each model scored on it.

    Attributes
    ----------
    name, kind
        Of the text; `divergence` or `perplexity`.
    reference
        The original's scores.
    nearest, run
        Of round-to-nearest and of this run.
    random
        Of the models that were calibrated with random sets, one for each seed.
    """

    name: str
    kind: str
    reference: Any
    nearest: Any
    run: Any
    random: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluatedTask:
    """One task and what each model scored on it: a reference, or `Failed`.

    Attributes
    ----------
    name
        Of the task.
    scores
        By model: `original`, `nearest`, `random` (the first seed's), `run`.
    """

    name: str
    scores: dict[str, Any]


def text_samples(
    recipe: Recipe, inputs: Inputs, execution: Execution, tokenizer: TokenizerIdentity, imported: Any
) -> Any:
    """Tokenise every evaluation text."""
    evaluated = recipe.evaluation.texts
    if not evaluated:
        return ()
    wanted = [
        {"source": identity, "tokenizer": tokenizer, "imported": imported, "settings": text_settings(text)}
        for identity, text in zip(inputs.texts, evaluated, strict=True)
    ]
    return execution.map("texts", make_texts, wanted)


def original_outputs(recipe: Recipe, execution: Execution, texts: tuple[Any, ...], place: dict[str, Any]) -> Any:
    """Run the original over every text once."""
    if not texts:
        return ()
    kinds = [*(False for _ in recipe.evaluation.perplexity), *(True for _ in recipe.evaluation.divergence)]
    wanted = [
        {**place, "texts": ByDigest(text), "keep_hidden": divergence}
        for text, divergence in zip(texts, kinds, strict=True)
    ]
    return execution.map("reference", reference_text, wanted)


def evaluate(
    recipe: Recipe,
    inputs: Inputs,
    execution: Execution,
    texts: tuple[Any, ...],
    references: tuple[Any, ...],
    models: Models,
    place: dict[str, Any],
) -> tuple[EvaluatedText, ...]:
    """Score every checkpoint on every text; one failure loses none of the others, and then ends the run."""
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
        for checkpoint in (models.nearest, models.run, *models.random)
        for text, reference, kind in zip(texts, references, kinds, strict=True)
    ]
    scored = execution.attempt("evaluation", evaluate_text, wanted)
    failed = [each.error for each in scored if isinstance(each, Failed)]
    if failed:
        raise EvaluationError(f"{len(failed)} of {len(wanted)} evaluations failed; the first: {failed[0]}")
    count = len(texts)
    return tuple(
        EvaluatedText(
            identity.source.name,
            kind,
            references[i],
            scored[i],
            scored[count + i],
            tuple(scored[2 * count + i :: count]),
        )
        for i, (identity, kind) in enumerate(zip(inputs.texts, kinds, strict=True))
    )


def layer_errors(
    recipe: Recipe, execution: Execution, texts: tuple[Any, ...], models: Models, place: dict[str, Any]
) -> tuple[Any, Any] | None:
    """Measure the error of every linear on held-out inputs, of round-to-nearest and of this run."""
    if why_no_layers(recipe):
        return None
    text = texts[len(recipe.evaluation.perplexity)]
    wanted = [
        {**place, "checkpoint": ByDigest(checkpoint), "texts": ByDigest(text), "limit": recipe.evaluation.layers}
        for checkpoint in (models.nearest, models.run)
    ]
    nearest, run = execution.map("layers", measure_layers, wanted)
    return nearest, run


def why_no_layers(recipe: Recipe) -> str:
    """Return why the error of every linear is not measured; empty when it is."""
    settings = recipe.evaluation
    if recipe.quantization.scaling.search != "none":
        return (
            f"{recipe.quantization.method} scales inputs, which moves factors from one linear to another: "
            "their outputs cannot be compared one by one."
        )
    if not settings.layers:
        return "evaluation.layers is 0."
    return "" if settings.divergence else "It is measured on a text of evaluation.divergence, and there is none."


def score_tasks(
    recipe: Recipe, inputs: Inputs, execution: Execution, models: Models, place: dict[str, Any]
) -> tuple[EvaluatedTask, ...]:
    """Score every model on every task; one failure loses none of the others, and is kept in the result."""
    if not inputs.tasks:
        return ()
    known = {"original": None, "nearest": models.nearest, "run": models.run}
    if models.random:
        known["random"] = models.random[0]
    compared = {name: ref for name, ref in known.items() if name in recipe.evaluation.task_models}
    wanted = [
        {**place, "checkpoint": None if checkpoint is None else ByDigest(checkpoint), "task": task}
        for checkpoint in compared.values()  # model by model: each is loaded once
        for task in inputs.tasks
    ]
    scored = execution.attempt("tasks", score_task, wanted)
    step = len(inputs.tasks)
    return tuple(
        EvaluatedTask(task.name, dict(zip(compared, scored[i::step], strict=True)))
        for i, task in enumerate(inputs.tasks)
    )
