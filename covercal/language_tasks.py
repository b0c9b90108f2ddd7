"""Scores of a model on a task of the lm-evaluation-harness, and what every item contributed to them."""

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from covercal.errors import EvaluationError, InputError
from covercal.recipe import LanguageTask
from covercal.task_files import load_task

if TYPE_CHECKING:
    from covercal.decoder import Decoder
    from covercal.harness_model import Started

MAIN_METRICS = ("acc_norm", "acc")  # of several metrics the one that a task is known by; else the first it declares
WEIGHTED = {"weighted_perplexity": 1.0, "bits_per_byte": 1.0 / math.log(2.0)}  # exp, or 1 / ln 2, of loss per weight
GLOBAL_SEED = 1234  # of the libraries that a task's own code may draw from
NO_FILTER = "none"


@dataclass(frozen=True, slots=True)
class Item:
    """What one item contributed to one metric.

    Attributes
    ----------
    subtask, metric
        Whose; a metric of a named filter is `metric,filter`.
    item
        Number in the task's data.
    value, weight
        The number that the metric averages, and the weight it has there: a log-likelihood and the words it is of.
    document, prompt, target
        sha256 of the item, of its whole prompt with the examples, and of the right answer.
    """

    subtask: str
    metric: str
    item: int
    value: float
    weight: float
    document: str
    prompt: str
    target: str


def score_language_task(
    decoder: "Decoder",
    tokenizer: Any,
    task: LanguageTask,
    started: "Started" = lambda total, unit: lambda n: None,
    *,
    commits: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[Item]]:
    """Run a task through lm-eval, and return its scores and items.

    Parameters
    ----------
    decoder, tokenizer
        A model that is loaded whole, and its tokenizer.
    started
        Is told how many requests there are; returns what is told of finished ones.
    commits
        At which commit data sets on the hub are read: see `covercal.task_files.load_task`.

    Returns
    -------
    scores
        `task`, `metric` (the main one), `higher_is_better`, `value`, `error`, `aggregation`, `shots` (really used),
        `limit`, `items`, `metrics` (value and error of each), `subtasks` (the same of each), `weighting` (of a group:
        whether `items` or `subtasks` weigh the same) and `path` (how contexts were run).
    items
        Every number that the metrics are made of.

    Raises
    ------
    InputError
        When lm-eval cannot make a task of it, or has too few examples for the shots.
    EvaluationError
        When lm-eval cannot run it, or a number of the model is not finite.
    """
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    from covercal.harness_model import HarnessModel

    with _quiet():
        loaded = load_task(task, commits)
        for each in loaded["tasks"].values():
            _set_shots(each, task)
        model = HarnessModel(decoder, tokenizer, started)
        _seed_everything()
        try:
            results = evaluate(model, loaded, limit=task.limit, bootstrap_iters=0, log_samples=True)
        except (AssertionError, KeyError, OverflowError, TypeError, ValueError, TemplateError) as cause:
            raise EvaluationError(f"lm-eval cannot run task {task.called}: {cause or type(cause).__name__}") from cause
    items = [item for name, each in sorted(loaded["tasks"].items()) for item in _items(each, results, name)]
    _check_numbers(items)
    subtasks = {
        name: _subtask_scores(each, results, name, task.limit) for name, each in sorted(loaded["tasks"].items())
    }
    if _is_single(loaded):
        return {**next(iter(subtasks.values())), "path": model.path}, items
    return {**_group_scores(loaded, results, subtasks, task, items), "path": model.path}, items


def compared_as_loss(aggregation: str) -> bool:
    """Return whether `item_loss` makes losses of a metric's items, so that two models differ by losses."""
    return aggregation == "perplexity" or aggregation in WEIGHTED


def item_loss(value: float, weight: float, aggregation: str) -> tuple[float, float]:
    """Return an item's value such that metrics are weighted means of it, and its weight; perplexities become losses.

    An item of weight 0, such as an empty text, counts nothing.
    """
    if aggregation == "perplexity":
        return -value, 1.0
    if aggregation in WEIGHTED:
        return (-value / weight * WEIGHTED[aggregation] if weight else 0.0), weight
    return value, weight


def mean_error(items: Sequence[tuple[float, float]], aggregation: str) -> float | None:
    """Return the standard error of a metric over items of (value, weight), in the metric's unit; None when unknown.

    Of a mean that of the sample; of a perplexity, an exponential of a mean or of a ratio of means, the first order of
    its expansion.
    """
    if len(items) < 2 or not (aggregation == "mean" or compared_as_loss(aggregation)):
        return None
    losses = np.array([item_loss(value, weight, aggregation) for value, weight in items], dtype=np.float64)
    mean = float(losses[:, 0] @ losses[:, 1] / losses[:, 1].sum())
    shares = losses[:, 1] / losses[:, 1].mean() * (losses[:, 0] - mean)
    error = float(np.sqrt(np.sum(shares**2) / (len(items) - 1) / len(items)))
    return error * math.exp(mean) if aggregation in ("perplexity", "weighted_perplexity") else error


# --- running lm-eval -----------------------------------------------------------------------------------------------


def _set_shots(task: Any, wanted: LanguageTask) -> None:
    """Set how many examples come before an item, as lm-eval does: a task that says 0 keeps to it."""
    own = task.get_config("num_fewshot")
    if wanted.shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=wanted.shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=wanted.seed)
    examples = getattr(getattr(task, "sampler", None), "df", None)
    shots = task.get_config("num_fewshot")
    if shots and examples is not None and shots > len(examples):
        raise InputError(f"Task {wanted.called} has {len(examples)} examples; evaluation.tasks asks for {shots} shots.")


def _seed_everything() -> None:
    """Seed what a task's own code may draw from: lm-eval does the same."""
    import torch

    random.seed(0)
    np.random.seed(GLOBAL_SEED)  # noqa: NPY002 - the generator that others read
    torch.manual_seed(GLOBAL_SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and notes of lm-eval and of `datasets` off the terminal: steps report their progress themselves."""
    import datasets
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bars, shown = logger.level, datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = _no_bar
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = shown
        if not bars:
            datasets.enable_progress_bars()


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


# --- scores --------------------------------------------------------------------------------------------------------


def _is_single(loaded: Mapping[str, Any]) -> bool:
    return not loaded.get("groups") and len(loaded["tasks"]) == 1


def _subtask_scores(task: Any, results: Mapping[str, Any], name: str, limit: int | None) -> dict[str, Any]:
    found = results["results"][name]
    items: dict[str, list[tuple[float, float]]] = {}
    for item in _items(task, results, name):
        items.setdefault(item.metric, []).append((item.value, item.weight))
    metrics = {}
    for key in _metric_keys(found, list(task.higher_is_better())):
        metric = _metric_name(key)
        aggregation = _aggregation(task, key)
        metrics[metric] = {
            "value": float(found[key]),
            "error": mean_error(items.get(metric, []), aggregation),
            "higher_is_better": bool(task.higher_is_better().get(key.partition(",")[0], True)),
            "aggregation": aggregation,
        }
    return _summary(name, metrics, int(results["n-shot"][name]), limit, int(found["sample_len"]), {})


def _group_scores(
    loaded: Mapping[str, Any],
    results: Mapping[str, Any],
    subtasks: Mapping[str, dict[str, Any]],
    task: LanguageTask,
    items: Sequence[Item],
) -> dict[str, Any]:
    """Return the scores of a group: lm-eval's own aggregate, or where it has none the plain mean of the subtasks."""
    top = _top_group(loaded)
    own = results["results"].get(top.name, {}) if top is not None else {}
    wanted = {_metric_name(key): key for key in _metric_keys(own, [])}
    by_size = {each.metric: each.weight_by_size for each in (top.aggregate_metric_list or ())} if top else {}
    first = next(iter(subtasks.values()))
    shared = [name for name in first["metrics"] if all(name in each["metrics"] for each in subtasks.values())]
    metrics = {}
    for metric in [name for name in shared if name in wanted] or shared:
        weighs_items = bool(wanted) and by_size.get(metric.partition(",")[0], True)
        value, error = _aggregate(
            [(each["items"], each["metrics"][metric]) for each in subtasks.values()], weighs_items
        )
        if error is None and weighs_items:  # a subtask of one item has none of its own: all items as one sample
            mine = [(item.value, item.weight) for item in items if item.metric == metric]
            error = mean_error(mine, first["metrics"][metric]["aggregation"])
        metrics[metric] = {
            **first["metrics"][metric],
            "value": float(own[wanted[metric]]) if wanted else value,
            "error": error,
            "weighting": "items" if weighs_items else "subtasks",
        }
    if not metrics:
        raise InputError(f"The tasks of {task.called} have no metric in common; name them one by one.")
    shots = max(each["shots"] for each in subtasks.values())
    count = sum(each["items"] for each in subtasks.values())
    return _summary(top.name if top else task.called, metrics, shots, task.limit, count, subtasks)


def _aggregate(found: Sequence[tuple[int, Mapping[str, Any]]], weighs_items: bool) -> tuple[float, float | None]:
    """Return the mean over subtasks of (items, metric), and its error by lm-eval's formulas."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    sizes, errors = [size for size, _ in found], [metric["error"] for _, metric in found]
    value = aggregate_subtask_metrics([metric["value"] for _, metric in found], sizes, weighs_items)
    if any(error is None for error in errors):
        return float(value), None
    return float(value), float(pooled_sample_stderr(errors, sizes) if weighs_items else unweighted_mean_stderr(errors))


def _top_group(loaded: Mapping[str, Any]) -> Any:
    """Return the group that is in no other; None when several tasks are named by a tag."""
    groups = loaded.get("groups") or {}
    inner = {each.name for group in groups.values() for each in group.get_all_groups(recursive=True)}
    return next((group for name, group in groups.items() if name not in inner), None)


def _summary(
    name: str,
    metrics: Mapping[str, dict[str, Any]],
    shots: int,
    limit: int | None,
    items: int,
    subtasks: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    main = main_metric(list(metrics))
    chosen = {"higher_is_better": True, "value": math.nan, "error": None, "aggregation": "mean"} | metrics[main]
    return {
        "task": name,
        "metric": main,
        **chosen,
        "shots": shots,
        "limit": limit,
        "items": items,
        "metrics": dict(metrics),
        "subtasks": dict(subtasks),
    }


def main_metric(names: Sequence[str]) -> str:
    """Return the metric that a task is known by: acc_norm, else acc, else the first that it declares."""
    plain = {name.partition(",")[0]: name for name in reversed(names)}
    return next((plain[name] for name in MAIN_METRICS if name in plain), names[0])


def _metric_keys(found: Mapping[str, Any], declared: Sequence[str]) -> list[str]:
    """Return the keys of lm-eval's results that are metrics (`acc,none`), the declared ones in their order first."""
    keys = [key for key, value in found.items() if "," in key and "_stderr," not in key and _is_number(value)]
    order = {name: rank for rank, name in enumerate(declared)}
    return sorted(keys, key=lambda key: order.get(key.partition(",")[0], len(order)))


def _metric_name(key: str) -> str:
    metric, _, kept = key.partition(",")
    return metric if kept == NO_FILTER else key


def _aggregation(task: Any, key: str) -> str:
    function = task.aggregation().get(key.partition(",")[0])
    return "mean" if function is None else str(getattr(function, "__name__", type(function).__name__))


# --- items ---------------------------------------------------------------------------------------------------------


def _check_numbers(items: Iterable[Item]) -> None:
    for item in items:
        if not math.isfinite(item.value):
            raise EvaluationError(f"The model gives {item.value} on item {item.item} of {item.subtask}: it is broken.")


def _items(task: Any, results: Mapping[str, Any], name: str) -> Iterator[Item]:
    """Yield every item's part in every metric that is made of one number an item, or a number and a weight."""
    for sample in results["samples"][name]:
        for metric in sample["metrics"]:
            key = f"{metric},{sample['filter']}"
            number = _number_and_weight(sample[metric], _aggregation(task, key))
            if number is not None:
                hashes = (str(sample[f"{kind}_hash"]) for kind in ("doc", "prompt", "target"))
                yield Item(name, _metric_name(key), int(sample["doc_id"]), *number, *hashes)


def _number_and_weight(value: Any, aggregation: str) -> tuple[float, float] | None:
    if _is_number(value):
        return float(value), 1.0
    if aggregation in WEIGHTED and isinstance(value, tuple | list) and len(value) == 2:
        return float(value[0]), float(value[1])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)
