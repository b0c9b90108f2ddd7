"""Stage `task_scores`: one model on one task of the lm-evaluation-harness, item by item."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covercal.errors import InputError
from covercal.recipe import LanguageTask, TextSource
from covercal.task_files import TaskParts, describe_task, hub_label
from storage.artifacts import ArtifactStore
from storage.keys import canonical_json, hash_tagged
from storage.manifest import Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, ByDigest, cached
from tasks.identities import ModelIdentity, TokenizerIdentity, dataset_commit, file_hashes
from tasks.model import checkpoint_decoder, load_tokenizer, original_decoder, quiet_transformers, trusts_copy

if TYPE_CHECKING:
    from covercal.decoder import Decoder
    from covercal.quantization_settings import Dtype

SCORES = "scores.json"
ITEMS = "items.parquet"
NO_ITEMS = "none: a metric of all items at once"


@dataclass(frozen=True, slots=True)
class TaskIdentity:
    """A task by its content.

    Attributes
    ----------
    task
        As in the recipe.
    name
        Of the task or group.
    config
        Digest of the configuration with its includes, and of the Python files that it names.
    data
        Digest of its data files and of the commits of its data sets on the hub.
    harness
        Version of lm-eval: prompts, filters and the drawing of examples are its code.
    commits
        Of its data sets on the hub, by their `hub_label`; they are read at these.
    """

    task: LanguageTask
    name: str
    config: str
    data: str
    harness: str
    commits: tuple[tuple[str, str], ...] = ()

    def key_material(self) -> dict[str, Any]:
        """Return the fingerprints, and how much of the task is run."""
        asked = {"limit": self.task.limit, "shots": self.task.shots, "seed": self.task.seed}
        return {"name": self.name, "config": self.config, "data": self.data, "harness": self.harness, **asked}

    def check_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        """Raise when the task's files are no longer those that were fingerprinted.

        Raises
        ------
        InputError
            Naming the task.
        """
        config, data = _fingerprints(describe_task(self.task), dict(self.commits), store)
        if (config, data) != (self.config, self.data):
            raise InputError(f"Task {self.task.called} was changed while it was read; nothing was kept, run again.")


def identify_task(task: LanguageTask, store: ArtifactStore) -> TaskIdentity:
    """Find a task, check its files, and fingerprint all that its requests are made of.

    Raises
    ------
    InputError
        When it is unknown, or a file is missing, cut short or no task.
    """
    parts = describe_task(task)
    commits = {hub_label(*each): dataset_commit(TextSource(hub=each[0], revision=each[1])) for each in parts.hub}
    config, data = _fingerprints(parts, commits, store)
    return TaskIdentity(task, parts.name, config, data, version("lm_eval"), tuple(commits.items()))


def _fingerprints(parts: TaskParts, commits: Mapping[str, str], store: ArtifactStore) -> tuple[str, str]:
    """Return the digests of a task's configuration with its Python files, and of its data."""
    hashes = file_hashes(store)
    functions = [hashes.sha256(path) for path in parts.functions]
    files = [hashes.sha256(path) for path in parts.data]
    config = hash_tagged("task", canonical_json({"config": parts.config, "functions": functions}))
    return config, hash_tagged("task data", canonical_json({"files": files, "hub": dict(commits)}))


def _scored_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with the one model that is scored: a checkpoint is all of it, an original has a tokenizer."""
    if inputs["checkpoint"] is not None:
        return {**inputs, "model": None}
    return {**inputs, "tokenizer": TokenizerIdentity(inputs["model"])}


@cached(
    "task_scores",
    version=2,
    ignored=("imported", "device"),
    names={"dtype": "model.dtype", "task": "evaluation.tasks"},
    keyed=_scored_model,
)
def score_task(
    build: Build,
    *,
    checkpoint: ByDigest | None,
    model: ModelIdentity,
    imported: Ref | None,
    task: TaskIdentity,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Score a checkpoint, or where there is none the original model, on a task."""
    from covercal.language_tasks import score_language_task

    decoder, tokenizer = _model(build.store, checkpoint, model, imported, dtype, device)
    scores, items = score_language_task(decoder, tokenizer, task.task, build.progress, commits=dict(task.commits))
    (build.folder / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf-8")
    names = ("subtask", "metric", "item", "value", "weight", "document", "prompt", "target")
    write_table(build.folder / ITEMS, {name: [getattr(item, name) for item in items] for name in names})
    return {"items": scores["items"], "path": scores["path"]}


def _model(
    store: ArtifactStore,
    checkpoint: ByDigest | None,
    model: ModelIdentity,
    imported: Ref | None,
    dtype: "Dtype",
    device: str,
) -> "tuple[Decoder, Any]":
    if checkpoint is None:
        return original_decoder(store, model, imported, dtype, device), load_tokenizer(store, model, imported)
    from transformers import AutoTokenizer

    quiet_transformers()
    folder = store.path(checkpoint.ref)
    trusted = trusts_copy(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    return checkpoint_decoder(store, checkpoint.ref, model, dtype, device), tokenizer


def read_task_scores(store: ArtifactStore, ref: Ref) -> dict[str, Any]:
    """Return the scores of a model on a task: see `covercal.language_tasks.score_language_task`."""
    value: dict[str, Any] = json.loads((store.path(ref) / SCORES).read_bytes())
    return value


def compare_tasks(store: ArtifactStore, a: Ref, b: Ref) -> dict[str, Any]:
    """Compare two models on the items of one task, in its main metric.

    Returns
    -------
    `mean` of a - b, `low` and `high` (95%; None where not known), `p_value`, `test`, and the `metric` compared: itself,
    or of a perplexity its loss in nats an item or a word; a difference of that is the logarithm of the perplexities'
    ratio. A metric that is made of all items at once, such as mcc or bleu, has no items to compare: all but `metric`
    and `test` are None.

    Raises
    ------
    InputError
        When the two are not scored on the same items.
    """
    from covercal.comparison import paired_difference
    from covercal.language_tasks import compared_as_loss

    scores = read_task_scores(store, a)
    metric, aggregation = scores["metric"], scores["aggregation"]
    ours, theirs = (_items(store.path(ref), metric, aggregation) for ref in (a, b))
    if ours.keys() != theirs.keys():
        only = next(iter(ours.keys() ^ theirs.keys()))
        raise InputError(
            f"Task {scores['task']} was not scored on the same items: {only[0]}, item {only[1]}, is not in both."
        )
    if not ours:
        return {**dict.fromkeys(("mean", "low", "high", "p_value")), "test": NO_ITEMS, "metric": metric}
    difference = paired_difference(
        [value for value, _ in ours.values()], [theirs[item][0] for item in ours], weights=_weights(ours, scores)
    )
    return {**difference.plain(), "metric": f"{metric} as loss" if compared_as_loss(aggregation) else metric}


ItemName = tuple[str, int, str, str, str]  # subtask, number, and hashes of document, prompt and target


def _items(folder: Path, metric: str, aggregation: str) -> dict[ItemName, tuple[float, float]]:
    """Return (value, weight) of every item that counts in a metric."""
    from covercal.language_tasks import item_loss

    rows = read_table(folder / ITEMS).to_pylist()
    return {
        tuple(row[name] for name in ("subtask", "item", "document", "prompt", "target")): item_loss(
            row["value"], row["weight"], aggregation
        )
        for row in rows
        if row["metric"] == metric
    }


def _weights(items: Mapping[ItemName, tuple[float, float]], scores: Mapping[str, Any]) -> list[float] | None:
    """Return what every item weighs in the main metric; None when all weigh the same."""
    weights = [weight for _, weight in items.values()]
    if scores.get("weighting") == "subtasks":
        sizes = {name: each["items"] for name, each in scores["subtasks"].items()}
        weights = [weight / sizes[item[0]] for weight, item in zip(weights, items, strict=True)]
    return weights if len(set(weights)) > 1 else None
