"""What a run found, as one JSON object and as the table that people read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from covercal.recipe import Recipe, short_names
from flows.chain import Chain
from flows.execution import WORST_FIRST, Event, Failed
from flows.judging import EvaluatedTask, EvaluatedText, why_no_layers
from flows.verdict import explanation, verdict
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.evaluate import compare_texts, mean_scores, read_scores
from tasks.language_tasks import compare_tasks, read_task_scores
from tasks.layers import read_layer_errors
from tasks.measures import read_measures
from tasks.overview import read_overview
from tasks.quantize import LINEARS
from tasks.select import chosen_samples


def stage_rows(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return one row per stage: its worst decision, why, the counts of every decision, and the time."""
    rows = []
    for label in dict.fromkeys(event.label for event in events):
        mine = [event for event in events if event.label == label]
        worst = min(mine, key=lambda event: WORST_FIRST.index(str(event.decision)))
        rows.append(
            {
                "stage": label,
                "key": worst.key,
                "decision": str(worst.decision),
                "reason": worst.reason,
                "seconds": round(sum(event.seconds for event in mine), 3),
                "artifacts": len(mine),
                "counts": {
                    name: count for name in WORST_FIRST if (count := sum(str(event.decision) == name for event in mine))
                },
            }
        )
    return rows


def selection_summary(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return who was chosen and what the choice covers, beside what random choice of that size covers on average."""
    chosen = chosen_samples(store, chain.selection, recipe.selection.budget)
    return {
        "selector": recipe.selection.selector,
        "budget": recipe.selection.budget,
        "samples": chosen.tolist(),
        **read_measures(store, chain.measures),
    }


def quantization_summary(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return how the checkpoint was made and what it weighs."""
    manifest = store.manifest(chain.checkpoint)
    table = read_table(store.path(chain.checkpoint) / LINEARS).to_pylist()
    errors = [row["output_error"] for row in table if row["output_error"] is not None]
    measure = "output_error" if errors else "weight_error"  # the two are of different sizes
    worst = max((row for row in table if row[measure] is not None), key=lambda row: row[measure])
    bytes_now = _weight_bytes(store, chain.checkpoint)
    settings = recipe.quantization
    return {
        "method": settings.method,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        "linears": len(table),
        "mean_output_error": float(np.mean(errors)) if errors else None,
        "worst_linear": worst["name"],
        "worst_error": worst[measure],
        "worst_measure": measure,
        "average_bits": manifest.info["average_bits"],
        "format": manifest.info["format"],
        "why_dense": manifest.info["why_dense"],
        "left_out": manifest.info["left_out"],
        "loader": manifest.info["loader"],
        "own_code": manifest.info["own_code"],
        "notes": manifest.info["notes"],
        "grown_damping": manifest.info["grown_damping"],
        "parameters": manifest.info["parameters"],
        "quantized_parameters": manifest.info["quantized_parameters"],
        "bytes": bytes_now,
        "nearest_bytes": _weight_bytes(store, chain.nearest) if chain.nearest is not None else None,
        "original_bytes_16_bit": 2 * int(manifest.info["parameters"]),
    }


def _weight_bytes(store: ArtifactStore, checkpoint: Ref) -> int:
    files = store.manifest(checkpoint).files
    return sum(int(each["size"]) for name, each in files.items() if name.endswith(".safetensors"))


def evaluation_summary(chain: Chain, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return what every model scored on every text, and how far this run is above the others, paired by sequence."""
    return [_text_summary(text, store) for text in chain.texts]


def _text_summary(text: EvaluatedText, store: ArtifactStore) -> dict[str, Any]:
    value: dict[str, Any] = {
        "text": Path(text.name).name,
        "kind": text.kind,
        "original": read_scores(store, text.reference),
        "nearest": read_scores(store, text.nearest),
        "run": read_scores(store, text.run),
        "differences": {"nearest": compare_texts(store, text.run, [text.nearest])},
    }
    if text.random:
        found = [read_scores(store, each) for each in text.random]
        main = "divergence" if text.kind == "divergence" else "perplexity"
        values = [each["all"][main] for each in found]
        value["random"] = {**mean_scores(found), "seeds": list(range(len(found))), "values": values}
        value["differences"]["random"] = compare_texts(store, text.run, text.random)
    return value


def tasks_summary(chain: Chain, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return what every model scored on every task, and how far this run lies above the others on the same items."""
    sets = len(chain.texts[0].random) if chain.texts else 1
    return [_task_summary(task, store) | {"random_sets": sets} for task in chain.tasks]


def _task_summary(task: EvaluatedTask, store: ArtifactStore) -> dict[str, Any]:
    done = {model: ref for model, ref in task.scores.items() if not isinstance(ref, Failed)}
    failed = {model: ref.error for model, ref in task.scores.items() if isinstance(ref, Failed)}
    value: dict[str, Any] = {
        "task": task.name,
        "error": "; ".join(f"{model}: {error}" for model, error in failed.items()),
        "errors": failed,
        "scores": {},
        "differences": {},
    }
    found = {model: read_task_scores(store, ref) for model, ref in done.items()}
    for each in found.values():
        shown = ("metric", "aggregation", "shots", "limit", "items", "higher_is_better")
        value |= {name: each[name] for name in shown}
    value["scores"] = {
        model: {name: each[name] for name in ("value", "error", "metrics", "subtasks")} for model, each in found.items()
    }
    if "run" in done:
        others = {model: ref for model, ref in done.items() if model != "run"}
        value["differences"] = {model: compare_tasks(store, done["run"], ref) for model, ref in others.items()}
    return value


def layers_summary(
    recipe: Recipe, chain: Chain, store: ArtifactStore, missed: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the error of every linear on held-out inputs beside what its input's outlier channels miss.

    Parameters
    ----------
    missed
        Of the overview: for every site.
    """
    from covercal.comparison import rank_correlation

    if chain.layers is None:
        return None
    nearest, run = (read_layer_errors(store, ref) for ref in chain.layers)
    counts = ("outlier_channels", "uncovered", "uncovered_weight")
    known = {(site["block"], name): {n: site[n] for n in counts} for site in missed for name in site["linears"]}
    rows = [
        {
            **{name: mine[name] for name in ("name", "block", "kind")},
            "nearest": plain["error"],
            "run": mine["error"],
            **known.get((mine["block"], mine["kind"]), dict.fromkeys(counts, 0)),
        }
        for plain, mine in zip(nearest, run, strict=True)
    ]
    seen = [row for row in rows if row["run"] is not None]
    found = None
    words = f"{recipe.quantization.method} reads no chosen sample, so no error here comes from what they miss."
    if recipe.quantization.calibrated:
        found = rank_correlation(*_missed_and_error(missed, seen))
        words = explanation(seen, found)
    manifest = store.manifest(chain.layers[1])
    return {
        "text": Path(recipe.evaluation.divergence[0].name).name,
        "tokens": manifest.info["tokens"],
        "linears": rows,
        "correlation": None if found is None else {"spearman": found[0], "p_value": found[1]},
        "explanation": words,
    }


def _missed_and_error(
    sites: Sequence[dict[str, Any]], linears: Sequence[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Return what every input misses and the mean error of the linears that read it: they miss it together."""
    errors = {(row["block"], row["kind"]): row["run"] for row in linears}
    read = [[errors[key] for name in site["linears"] if (key := (site["block"], name)) in errors] for site in sites]
    pairs = [(site["uncovered_weight"], float(np.mean(mine))) for site, mine in zip(sites, read, strict=True) if mine]
    return [weight for weight, _ in pairs], [error for _, error in pairs]


def models_summary(recipe: Recipe, chain: Chain) -> list[dict[str, str]]:
    """Return the models that are compared, with the names that people read."""
    count = len(chain.texts[0].random) if chain.texts else 0
    if chain.tasks and not count:
        count = int("random" in chain.tasks[0].scores)
    budget = recipe.selection.budget
    sets = f"{budget} random samples" if count == 1 else f"{count} random sets of {budget}"
    named = {"original": "original", "nearest": "round to nearest", "random": sets, "run": "this run"}
    return [{"id": name, "name": words} for name, words in named.items() if count or name != "random"]


def summarize(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return everything that `run --json` prints but the stages."""
    value: dict[str, Any] = {"name": run_name(recipe), "selection": selection_summary(recipe, chain, store)}
    found = read_overview(store, chain.overview) if chain.overview is not None else {}
    if found:
        value["selection"] |= {name: found[name] for name in ("pool_domains", "texts", "curves")}
        value["outlier_map"] = found["outlier_map"]
    if chain.checkpoint is not None:
        value["quantization"] = quantization_summary(recipe, chain, store)
        value["models"] = models_summary(recipe, chain)
        value["evaluation"] = evaluation_summary(chain, store)
        value["tasks"] = tasks_summary(chain, store)
        value["layers"] = layers_summary(recipe, chain, store, found.get("missed", ()))
        value["why_no_layers"] = why_no_layers(recipe)
        value["verdict"] = verdict(recipe, value)
        value["checkpoint"] = str(store.path(chain.checkpoint))
    return value


def run_name(recipe: Recipe) -> str:
    """Return what the dashboard calls a run, such as `smollm2-135m · gptq w3 g64 · coverage@32`."""
    selection = recipe.selection
    return f"{model_name(recipe)} · {grid_name(recipe)} · {selection.selector}@{selection.budget}"


def sweep_name(recipe: Recipe) -> str:
    """Return what people call a sweep, such as `smollm2-135m · selector, budget`."""
    return f"{model_name(recipe)} · {', '.join(short_names(recipe.sweep).values())}"


def model_name(recipe: Recipe) -> str:
    """Return the model's name in lower case, without its folder."""
    return Path(recipe.model.source).name.removesuffix(".gguf").lower()


def grid_name(recipe: Recipe, method: str | None = None) -> str:
    """Return method and grid, such as `gptq w3 g64`."""
    settings = recipe.quantization
    group = f"g{settings.group_size}" if settings.group_size else "per channel"
    return f"{method or settings.method} w{settings.bits} {group}" + (" symmetric" if settings.symmetric else "")


def result_table(summary: dict[str, Any]) -> Table:
    """Return the verdict: one column per model, one row per measure."""
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    models = [each["id"] for each in summary["models"]]
    for name in ("", *(escape(each["name"]) for each in summary["models"])):
        table.add_column(name, justify="left" if not name else "right")
    for text in summary["evaluation"]:
        columns = [text[name]["all"] for name in models]
        if text["kind"] == "divergence":
            table.add_row("KL, nats per token ± 95%", *(_measured(c, "divergence") for c in columns))
            table.add_row("same top token", *(f"{c['agreement']:.1%}" for c in columns))
        table.add_row(escape(f"perplexity, {text['text']}"), *(f"{c['perplexity']:.2f}" for c in columns))
    for task in summary["tasks"]:
        label = f"{task['task']}, {task['metric']} ± 95%" if "metric" in task else task["task"]
        table.add_row(escape(label + first_set_words(task)), *(_score(task, name) for name in models))
    sizes = summary["quantization"]
    weighs = {"original": sizes["original_bytes_16_bit"], "nearest": sizes["nearest_bytes"]}
    cells = [f"{weighs.get(name, sizes['bytes']) / 1e6:.0f} MB" for name in models]
    table.add_row("size on disk (original: 16 bits)", *cells)
    return table


def _measured(scores: dict[str, Any], name: str) -> str:
    return _with_interval(scores[name], scores.get(f"{name}_error"), scores["sequences"])


def _score(task: dict[str, Any], model: str) -> str:
    found = task["scores"].get(model)
    return no_score(task, model) if found is None else _with_interval(found["value"], found["error"], task["items"])


def no_score(task: dict[str, Any], model: str) -> str:
    """Return why a model has no score on a task: only one that was to be scored has failed."""
    return "failed" if model in task["errors"] else "not scored"


def first_set_words(task: dict[str, Any]) -> str:
    """Return that of several random sets the first was scored; empty where there are no several."""
    sets = task["random_sets"]
    return f" (of {sets} random sets the first)" if sets > 1 and "random" in task["scores"] else ""


def _with_interval(value: float, error: float | None, sequences: int | None = None) -> str:
    """Return a number with half the width of the 95% interval that its standard error makes."""
    from tasks.report.numerals import half_width

    return f"{value:.4f}" + (f" ± {half_width(error, sequences):.4f}" if error else "")


def checkpoint_lines(summary: dict[str, Any]) -> list[str]:
    """Return where the checkpoint is, how it is loaded, and what of it is not as one would think."""
    quantization = summary["quantization"]
    trusting = ", trust_remote_code=True" if quantization["own_code"] else ""
    said = [f"loads with {quantization['loader']}.from_pretrained(that folder{trusting})"]
    if quantization["why_dense"]:
        said.append(f"dense, of the original's size: {quantization['why_dense']}")
    if quantization["left_out"]:
        said.append(quantization["left_out"])
    place = f"[bold]Checkpoint[/bold]   {escape(summary['checkpoint'])}"
    return [place, *(f"{'':13}{escape(each)}" for each in said)]


def selection_lines(summary: dict[str, Any]) -> list[str]:
    """Return the sentences about the chosen samples."""
    chosen = summary["selection"]
    listed = ", ".join(map(str, chosen["samples"][:12])) + (" …" if len(chosen["samples"]) > 12 else "")
    mix = ", ".join(f"{count} {name}" for name, count in sorted(chosen["domains"].items(), key=lambda d: (-d[1], d[0])))
    return [
        f"Chosen       {chosen['budget']} samples by {chosen['selector']}: {mix} (numbers {listed})",
        f"Coverage     {chosen['coverage']:.1%} of {chosen['outlier_channels']:,} outlier channels; "
        f"random choice of that size: {chosen['random_coverage']:.1%} on average",
        f"             {chosen['weighted_coverage']:.1%} of their weight; "
        f"random choice: {chosen['random_weighted_coverage']:.1%}",
        f"Likeness     two samples share {chosen['jaccard']:.1%} of the channels that either fires; "
        f"Gram diagonals {chosen['gram_distance']:.1%} off the pool's",
    ]
