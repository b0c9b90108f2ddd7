"""What a task is by its content, whose scores a key stands for, and the comparison of two models' items."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest

from covercal.errors import InputError
from covercal.recipe import LanguageTask, Model
from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Outcome, Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, ByDigest, cached
from tasks.identities import ModelIdentity, identify_model
from tasks.language_tasks import (
    ITEMS,
    NO_ITEMS,
    SCORES,
    compare_tasks,
    identify_task,
    read_task_scores,
    score_task,
)
from tasks.progress import Progress, listening
from tests import tiny
from tests.covercal.test_language_tasks import CHOICES, LAST_WORD, PAGES, items, write_task

Change = Callable[[Path], Any]


@cached("checkpoint", version=1)
def copy_model(build: Build, *, model: ModelIdentity) -> None:
    """Stand in for a quantised model: the files of a model as an artifact."""
    shutil.copytree(model.folder, build.folder, dirs_exist_ok=True)


@dataclass
class World:
    """Two tiny models and a task in a store."""

    files: Path
    store: ArtifactStore

    def model(self, name: str) -> ModelIdentity:
        return identify_model(Model(source=str(self.files / name)), self.store)

    def checkpoint(self, name: str) -> ByDigest:
        return ByDigest(copy_model.run(self.store, "checkpoint", {"model": self.model(name)}).ref)

    def task(self, config: dict[str, Any] = CHOICES, **settings: Any) -> LanguageTask:
        path = write_task(self.files / "tasks", config, f"{config['task']}.yaml")
        return LanguageTask(path=str(path), **settings)

    def inputs(self, **changed: Any) -> dict[str, Any]:
        task = changed.pop("task", None) or self.task(limit=6)
        place = {"model": self.model("one"), "imported": None, "dtype": "float32", "device": "cpu", "checkpoint": None}
        return {**place, "task": identify_task(task, self.store)} | changed

    def run(self, **changed: Any) -> Outcome:
        return score_task.run(self.store, "tasks", self.inputs(**changed))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("one", "two")):
        tiny.save_model(files / name, seed=seed)
    return World(files, ArtifactStore(tmp_path_factory.mktemp("cache")).prepare())


def key(world: World, **changed: Any) -> str:
    return str(score_task.request(world.inputs(**changed)).key)


# --- what a task is ------------------------------------------------------------------------------------------------


def task_folder(folder: Path) -> Path:
    write_task(folder, CHOICES, "base.yaml")
    (folder / "words.py").write_text("def ask(doc):\n    return doc['query']\n", encoding="utf-8")
    (folder / "task.yaml").write_text(
        "include: base.yaml\ntask: mine\ndoc_to_text: !function words.ask\n", encoding="utf-8"
    )
    return folder / "task.yaml"


def append(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


CHANGES: dict[str, Change] = {
    "the task file": append("task.yaml", "target_delimiter: ''\n"),
    "what it includes": append("base.yaml", "description: Think.\n"),
    "its functions": append("words.py", "# other\n"),
    "its data": append("items.jsonl", json.dumps(items(1)[0]) + "\n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_task_is_another_one_when_its_content_changes(what: str, tmp_path: Path, store: ArtifactStore) -> None:
    task = LanguageTask(path=str(task_folder(tmp_path / "tasks")))
    before = identify_task(task, store)
    CHANGES[what](tmp_path / "tasks")
    after = identify_task(task, store)
    assert before.key_material() != after.key_material()
    assert (before.config == after.config) == (what == "its data")


def test_a_task_is_the_same_wherever_it_lies_and_whenever_it_was_written(tmp_path: Path, store: ArtifactStore) -> None:
    here = identify_task(LanguageTask(path=str(task_folder(tmp_path / "here"))), store)
    there = identify_task(LanguageTask(path=str(task_folder(tmp_path / "quite" / "elsewhere"))), store)
    os.utime(tmp_path / "here" / "items.jsonl", (1, 1))
    again = identify_task(LanguageTask(path=str(tmp_path / "here" / "task.yaml")), store)
    assert here.key_material() == there.key_material() == again.key_material()
    assert str(tmp_path) not in json.dumps(here.key_material())


def test_a_comment_in_a_task_file_changes_nothing(tmp_path: Path, store: ArtifactStore) -> None:
    task = LanguageTask(path=str(task_folder(tmp_path)))
    before = identify_task(task, store).key_material()
    append("task.yaml", "# a remark\n")(tmp_path)
    assert identify_task(task, store).key_material() == before


def test_a_task_of_the_hub_is_its_configuration_and_the_commit_of_its_data(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr("tasks.language_tasks.dataset_commit", lambda source, commit=commit: commit)
        found[commit] = identify_task(LanguageTask(name="arc_challenge"), store)
    first, second = found.values()
    assert first.config == second.config
    assert first.data != second.data
    monkeypatch.setattr("tasks.language_tasks.dataset_commit", lambda source: "a" * 40)
    other = identify_task(LanguageTask(name="arc_easy"), store)
    assert (other.data, other.config != first.config) == (first.data, True)


def test_two_revisions_of_one_data_set_are_two(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": "hf://datasets/o/n@v1/a.jsonl", "test": "hf://datasets/o/n@v2/a.jsonl"}
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}))
    monkeypatch.setattr("tasks.language_tasks.dataset_commit", lambda source: f"commit of {source.revision}")
    commits = identify_task(LanguageTask(path=str(path)), store).commits
    assert dict(commits) == {"o/n@v1": "commit of v1", "o/n@v2": "commit of v2"}


# --- keys ----------------------------------------------------------------------------------------------------------


def test_every_setting_of_a_task_and_the_dtype_are_in_the_key(world: World) -> None:
    tasks = [world.task(limit=6, **more) for more in ({}, {"shots": 1}, {"seed": 1})]
    tasks += [world.task(limit=5), world.task(), world.task(LAST_WORD, limit=6)]
    keys = [key(world, task=task) for task in tasks] + [key(world, dtype="bfloat16")]
    assert len(set(keys)) == len(keys)


def test_another_version_of_lm_eval_is_another_key(world: World) -> None:
    inputs = world.inputs()
    newer = {**inputs, "task": replace(inputs["task"], harness="9.9")}
    assert score_task.request(inputs).key != score_task.request(newer).key


def test_no_two_models_share_a_key(world: World) -> None:
    checkpoints = [world.checkpoint(name) for name in ("one", "two")]
    keys = [key(world, model=world.model(name)) for name in ("one", "two")]
    keys += [key(world, checkpoint=checkpoint) for checkpoint in checkpoints]
    assert len(set(keys)) == 4


def test_a_checkpoint_is_known_by_its_content_alone(world: World) -> None:
    checkpoint = world.checkpoint("two")
    twin = ByDigest(replace(checkpoint.ref, key="f" * 64))
    keys = {key(world, checkpoint=each, model=world.model(m)) for each in (checkpoint, twin) for m in ("one", "two")}
    assert len(keys) == 1


def test_an_original_with_another_tokenizer_is_another_model(world: World) -> None:
    model = world.model("one")
    assert key(world, model=model) != key(world, model=replace(model, tokenizer="0" * 64))


@pytest.mark.parametrize("changed", [{"device": "cuda"}, {"imported": Ref("model", "f" * 64)}])
def test_where_a_model_lies_and_runs_is_not_in_the_key(world: World, changed: dict[str, Any]) -> None:
    assert key(world, **changed) == key(world)


# --- scores --------------------------------------------------------------------------------------------------------


def test_each_model_has_its_own_scores(world: World) -> None:
    task = world.task(LAST_WORD, limit=6)
    refs = {
        "one": world.run(task=task, model=world.model("one")).ref,
        "two": world.run(task=task, model=world.model("two")).ref,
        "copy of two": world.run(task=task, checkpoint=world.checkpoint("two")).ref,
    }
    values = {name: read_task_scores(world.store, ref)["metrics"]["perplexity"]["value"] for name, ref in refs.items()}
    assert values["one"] != values["two"] == values["copy of two"]


def test_the_second_time_is_a_hit_with_the_same_bytes_in_another_store(world: World, tmp_path: Path) -> None:
    first = world.run()
    fresh = World(world.files, ArtifactStore(tmp_path).prepare())
    assert world.run().decision is Decision.HIT
    assert fresh.run().ref == first.ref


def test_scores_say_what_was_run(world: World) -> None:
    outcome = world.run(task=world.task(limit=6, shots=2))
    scores = read_task_scores(world.store, outcome.ref)
    wanted = {"task": "choices", "metric": "acc_norm", "higher_is_better": True, "shots": 2, "limit": 6, "items": 6}
    assert {name: scores[name] for name in wanted} == wanted
    assert scores["path"] == "shared contexts"
    assert outcome.info == {"items": 6, "path": "shared contexts"}
    columns = read_table(world.store.path(outcome.ref) / ITEMS)
    rows = columns.filter(np.array(columns["metric"].to_pylist()) == "acc_norm")
    assert scores["value"] == np.mean(rows["value"].to_pylist())
    assert rows["item"].to_pylist() == list(range(6))


def test_progress_counts_the_requests(world: World, tmp_path: Path) -> None:
    heard: list[Progress] = []
    with listening(heard.append):
        World(world.files, ArtifactStore(tmp_path).prepare()).run()
    told = [each for each in heard if each.label == "tasks"]
    assert (told[0].done, told[-1].done, told[-1].total, told[-1].unit) == (0, 18, 18, "requests")


# --- comparison ----------------------------------------------------------------------------------------------------


@cached("task_scores_by_hand", version=1)
def written_scores(build: Build, *, scores: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Stand in for a model: scores and items as they are given."""
    (build.folder / SCORES).write_text(json.dumps(scores), encoding="utf-8")
    numbers = [{**row, "value": float(row["value"])} for row in rows]
    write_table(build.folder / ITEMS, {name: [row[name] for row in numbers] for name in rows[0]})


def by_hand(
    store: ArtifactStore,
    values: list[float],
    aggregation: str = "mean",
    weights: list[float] | None = None,
    **more: Any,
) -> Ref:
    rows = [
        {
            "subtask": f"part {i % 2}" if more else "all",
            "metric": "m",
            "item": i,
            "value": str(value),
            "weight": 1.0 if weights is None else weights[i],
            **dict.fromkeys(("document", "prompt", "target"), str(i)),
        }
        for i, value in enumerate(values)
    ]
    rows += [{**row, "metric": "another", "value": 7.0} for row in rows]
    scores = {"task": "t", "metric": "m", "aggregation": aggregation, **more}
    return written_scores.run(store, "scores", {"scores": scores, "rows": rows}).ref


def test_right_and_wrong_answers_are_compared_by_mcnemars_test(store: ArtifactStore) -> None:
    ours, theirs = [1.0] * 9 + [0.0] * 11, [1.0] + [0.0] * 17 + [1.0] * 2
    found = compare_tasks(store, by_hand(store, ours), by_hand(store, theirs))
    assert found["mean"] == pytest.approx(6 / 20)
    assert found["p_value"] == pytest.approx(binomtest(8, 10).pvalue)
    assert found["low"] < 0.3 < found["high"]
    assert (found["test"].startswith("exact McNemar"), found["metric"]) == (True, "m")


def test_a_metric_of_all_items_at_once_has_nothing_to_compare(store: ArtifactStore) -> None:
    scores = {"task": "t", "metric": "m", "aggregation": "matthews_corrcoef"}
    rows = [{"subtask": "all", "metric": "another", "item": 0, "value": "1", "weight": 1.0}]
    rows = [{**row, "document": "d", "prompt": "p", "target": "t"} for row in rows]
    refs = [written_scores.run(store, "scores", {"scores": scores, "rows": rows}).ref] * 2
    assert compare_tasks(store, *refs) == {
        "mean": None, "low": None, "high": None, "p_value": None, "test": NO_ITEMS, "metric": "m"
    }  # fmt: skip


def test_perplexities_are_compared_by_their_logarithms(store: ArtifactStore) -> None:
    draw = np.random.default_rng(0)
    ours, theirs = (list(-draw.gamma(5, 10, 30)) for _ in range(2))
    words = list(draw.integers(10, 90, 30).astype(float))
    ratio = {
        "perplexity": np.mean(theirs) - np.mean(ours),
        "weighted_perplexity": (sum(theirs) - sum(ours)) / sum(words),
        "bits_per_byte": (sum(theirs) - sum(ours)) / sum(words) / np.log(2),
    }
    for aggregation, expected in ratio.items():
        refs = [by_hand(store, values, aggregation, words) for values in (ours, theirs)]
        found = compare_tasks(store, *refs)
        assert found["mean"] == pytest.approx(expected)
        assert (found["low"] <= found["mean"] <= found["high"], found["metric"]) == (True, "m as loss")


def test_in_a_group_that_weighs_subtasks_every_subtask_weighs_the_same(store: ArtifactStore) -> None:
    sizes = {"part 0": {"items": 3}, "part 1": {"items": 2}}
    refs = [
        by_hand(store, values, subtasks=sizes, weighting="subtasks")
        for values in ([1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0])
    ]
    assert compare_tasks(store, *refs)["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_single_item_has_no_interval_and_stays_json(store: ArtifactStore) -> None:
    found = compare_tasks(store, by_hand(store, [0.3]), by_hand(store, [0.5]))
    assert (found["low"], found["high"], found["p_value"]) == (None, None, None)
    json.dumps(found, allow_nan=False)


def test_real_scores_of_two_models_are_compared_item_by_item(world: World) -> None:
    for config in (CHOICES, LAST_WORD, PAGES):
        task = world.task(config, limit=6)
        one, two = (world.run(task=task, model=world.model(name)).ref for name in ("one", "two"))
        scores = [read_task_scores(world.store, ref) for ref in (one, two)]
        found, itself = compare_tasks(world.store, one, two), compare_tasks(world.store, one, one)
        values = [np.log(each["value"]) if config is PAGES else each["value"] for each in scores]
        assert found["mean"] == pytest.approx(values[0] - values[1], abs=1e-6)
        assert (itself["mean"], itself["p_value"]) == (0.0, 1.0)


@pytest.mark.parametrize("settings", [{"limit": 5}, {"limit": 6, "shots": 1}])
def test_scores_on_other_items_or_prompts_are_not_compared(world: World, settings: dict[str, Any]) -> None:
    one, two = world.run().ref, world.run(task=world.task(**settings)).ref
    with pytest.raises(InputError, match="was not scored on the same items"):
        compare_tasks(world.store, one, two)


def test_an_infinite_number_is_named_not_left_out(store: ArtifactStore) -> None:
    with pytest.raises(InputError, match="Item 1 of the first model is -inf"):
        compare_tasks(store, by_hand(store, [0.5, -np.inf, 0.1]), by_hand(store, [0.5, 0.2, 0.1]))


# --- the recipes ---------------------------------------------------------------------------------------------------

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.mark.parametrize("name", ["paper.yaml", "paper-local.yaml"])
def test_the_tasks_of_the_recipes_are_there(name: str, monkeypatch: pytest.MonkeyPatch, store: ArtifactStore) -> None:
    from covercal.recipe import load_recipe

    if name == "paper-local.yaml" and not (RECIPES.parent.parent / "shared" / "data").is_dir():
        pytest.skip("the evaluation sets are not on this machine")
    monkeypatch.setattr("tasks.language_tasks.dataset_commit", lambda source: "a" * 40)
    recipe = load_recipe(RECIPES / name)
    found = {identify_task(task, store).name.removesuffix("_local"): task.shots for task in recipe.evaluation.tasks}
    assert {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}.items() <= found.items()


def test_every_task_file_of_the_recipes_is_named_as_no_task_of_lm_eval() -> None:
    from covercal.task_files import _manager

    files = [path for path in (RECIPES / "tasks").glob("*.yaml") if not path.name.startswith("_")]
    names = {str((value := yaml.load(path.read_text(), yaml.BaseLoader)).get("group", value["task"])) for path in files}
    assert names == {path.stem for path in files}
    assert not names & set(_manager().all_tasks)
