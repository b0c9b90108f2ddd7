"""A quality bar: who reaches it, who does not, and what a run that misses it ends as."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covercal.errors import InputError
from covercal.recipe import Recipe, load_recipe, parse_recipe
from flows.execution import FAILED, Event
from flows.inputs import identify
from flows.requirements import missed, shortcomings
from storage.artifacts import ArtifactStore
from tests.flows.test_cli import Command, command
from tests.flows.test_run import run_here

__all__ = ["command"]

WriteRecipe = Callable[..., Path]
BASE = {
    "model": {"source": "m"},
    "pool": {"sources": [{"path": "p"}]},
    "evaluation": {"divergence": [{"path": "d"}], "tasks": [{"name": "arc"}]},
}


def recipe(**require: Any) -> Recipe:
    return parse_recipe({**BASE, "require": require}, Path("/"))


def summary(*divergences: float, task: float | None = 0.5) -> dict[str, Any]:
    texts = [
        {"text": f"text{i}", "run": {"all": {"divergence": kl, "agreement": 1 - kl, "perplexity": 10 + kl}}}
        for i, kl in enumerate(divergences)
    ]
    scores = {} if task is None else {"run": {"value": task}}
    return {"evaluation": texts, "tasks": [{"task": "arc", "scores": scores}]}


def test_a_recipe_that_requires_nothing_misses_nothing() -> None:
    assert missed(recipe(), summary(9.0, task=None)) == []


@pytest.mark.parametrize(("reached", "short"), [(0.19, False), (0.2, False), (0.2000001, True), (float("nan"), True)])
def test_a_bar_is_reached_at_its_very_value_and_never_by_no_number(reached: float, short: bool) -> None:
    assert bool(missed(recipe(divergence={"max": 0.2}), summary(reached))) == short


def test_every_text_has_to_reach_it_and_the_one_that_does_not_is_named() -> None:
    (sentence,) = missed(recipe(divergence={"max": 0.2}), summary(0.1, 0.3))
    assert sentence == "the KL to the original, in nats per token, on text1 is 0.3; require asks for at most 0.2"


def test_lower_bounds_both_bounds_and_tasks() -> None:
    assert missed(recipe(agreement={"min": 0.8}), summary(0.1)) == []
    assert "at least 0.8" in missed(recipe(agreement={"min": 0.8}), summary(0.3))[0]
    assert "at least 5 and at most 10" in missed(recipe(perplexity={"min": 5, "max": 10}), summary(0.3))[0]
    assert missed(recipe(tasks={"arc": {"min": 0.6}}), summary(0.1)) == [
        "task arc is 0.5; require asks for at least 0.6"
    ]


def test_a_task_without_a_score_is_missed() -> None:
    (failed,) = missed(recipe(tasks={"arc": {"min": 0.1}}), summary(0.1, task=None))
    (unknown,) = missed(recipe(tasks={"other": {"min": 0.1}}), summary(0.1))
    assert "task arc has no score" in failed
    assert "task other has no score" in unknown


def test_failures_and_missed_bars_are_told_together() -> None:
    events = [Event("tasks", "task_scores", "", FAILED, "InputError: no"), Event("pool", "pool", "k", "hit", "there")]
    one, other = shortcomings(recipe(divergence={"max": 0.2}), summary(0.3), events)
    assert one == "1 evaluation failed; the first: tasks: InputError: no"
    assert other.startswith("The run misses what its recipe requires: the KL")
    assert shortcomings(recipe(), {"selection": {}}, []) == []


def test_of_two_entries_of_one_task_both_have_to_reach_the_bar() -> None:
    value = summary(0.1, task=0.9)
    value["tasks"] = [{"task": "arc", "scores": {"run": {"value": each}}} for each in (0.3, 0.9)]
    assert missed(recipe(tasks={"arc": {"min": 0.6}}), value) == ["task arc is 0.3; require asks for at least 0.6"]


def test_a_task_that_is_required_and_not_measured_is_named_before_any_work(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    path = write_recipe(
        evaluation={"tasks": [{"path": str(tmp_path / "own.yaml")}]}, require={"tasks": {"owm": {"min": 0.1}}}
    )
    with pytest.raises(InputError, match=r"require.tasks names 'owm', which is no task of evaluation.tasks: own\."):
        identify(load_recipe(path), store)


@pytest.mark.parametrize("section", ["divergence", "agreement", "perplexity", "tasks"])
def test_what_is_not_measured_cannot_be_required(section: str) -> None:
    bar = {"arc": {"min": 0.1}} if section == "tasks" else {"max": 0.1}
    with pytest.raises(InputError, match=rf"require\.{section} needs"):
        parse_recipe({**BASE, "evaluation": {}, "require": {section: bar}}, Path("/"))


def test_a_bar_without_a_bound_is_refused() -> None:
    with pytest.raises(InputError, match="give `max`, `min` or both"):
        recipe(divergence={})


def test_a_run_that_misses_its_bar_is_complete_says_so_and_ends_with_1(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe(require={"divergence": {"max": 1e-9}})
    run_here(path, store)
    code, out, err = command("run", path, "--json")
    value = json.loads(out)
    assert code == 1
    assert "require asks for at most 1e-09" in err
    assert Path(value["checkpoint"]).is_dir()
    assert Path(value["report"]).is_file()
    record = json.loads(Path(value["record"]).read_text())
    assert (record["state"], "require asks" in record["error"]) == ("failed", True)


def test_a_bar_changes_no_key(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    run_here(write_recipe(), store)
    _, rows = run_here(write_recipe(require={"divergence": {"max": 1.0}}), store)
    assert {row["decision"] for row in rows.values()} == {"hit"}
    assert load_recipe(write_recipe(require={"divergence": {"max": 1.0}})).require.divergence is not None
