"""Tasks and linears in a whole run: who is compared, what one failure costs, and what a user is told."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from covercal.pool import Sample, spread_over_domains
from covercal.recipe import load_recipe
from flows.chain import Chain, run_chain
from flows.dashboard import result_rows
from flows.execution import FAILED, Direct, Event, Failed, Recorder
from flows.inputs import identify
from flows.report import conclude
from flows.summary import _missed_and_error, quantization_summary, result_table
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.cached import Build, ByDigest
from tasks.layers import measure_layers, read_layer_errors
from tasks.quantize import LINEARS
from tasks.report import run_left_out, run_page
from tasks.report.results import task_groups
from tasks.report.score_figures import task_scores
from tests.covercal.test_language_tasks import CHOICES, write_task
from tests.flows.test_cli import Command, command
from tests.tasks.report.reading import read
from tests.tasks.report.summaries import run_summary

__all__ = ["command"]

WriteRecipe = Callable[..., Path]


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """Two tasks on local files; the second asks for more examples than it has."""
    good = write_task(tmp_path / "good", CHOICES, "good.yaml")
    return [{"path": str(good), "limit": 4}, {"path": str(good), "limit": 4, "shots": 1000}]


def run_here(path: Path, store: ArtifactStore, *overrides: str) -> tuple[Chain, dict[str, Any], list[Event]]:
    recipe = load_recipe(path, overrides)
    recorder = Recorder()
    execution = Direct(store, recorder)
    chain = run_chain(recipe, identify(recipe, store), execution, until="report")
    return chain, conclude(recipe, chain, execution, recorder.events, until="report").summary, recorder.events


@pytest.mark.parametrize(
    ("aggregation", "shown"), [("mean", ("81.0%", "+12.0%")), ("bits_per_byte", ("0.8100", "+0.1200"))]
)
def test_only_means_of_answers_are_shown_as_shares(aggregation: str, shown: tuple[str, str]) -> None:
    task = {"task": "t", "metric": "m", "aggregation": aggregation, "scores": {"run": {"value": 0.81, "error": None}}}
    difference = {"mean": 0.12, "low": None, "high": None, "metric": "m as loss"}
    (group,) = task_groups({"tasks": [{**task, "differences": {"original": difference}}]})
    (row,) = group.rows
    assert (row.values["run"].text, row.differences["original"].text) == shown
    assert row.remark == "m; differences in m as loss"


def test_a_failed_task_loses_none_of_the_others_and_is_told(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    path = write_recipe(evaluation={"tasks": tasks})
    chain, summary, events = run_here(path, store)
    good, bad = chain.tasks
    assert list(good.scores) == ["original", "nearest", "run", "random"]
    assert not any(isinstance(each, Failed) for each in good.scores.values())
    assert all(isinstance(each, Failed) for each in bad.scores.values())
    failed = [event for event in events if event.decision == FAILED]
    assert [event.label for event in failed] == ["tasks"] * 4
    one, other = summary["tasks"]
    assert one["error"] == ""
    assert set(one["scores"]) == {"original", "nearest", "run", "random"}
    assert set(one["differences"]) == {"original", "nearest", "random"}
    assert other["scores"] == other["differences"] == {}
    assert "1000" in other["error"]
    assert set(other["errors"]) == {"original", "nearest", "run", "random"}
    rows = {(row["on"], row["measure"]): row for row in result_rows(summary)}
    assert rows[one["task"], one["metric"]]["this run"] == one["scores"]["run"]["value"]
    assert rows[other["task"], ""]["this run"] == "failed"


def test_a_model_that_was_not_to_be_scored_has_not_failed_where_another_did(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    path = write_recipe(evaluation={"tasks": tasks[1:], "task_models": ["original", "run"]})
    _, summary, _ = run_here(path, store)
    (row,) = [row for row in result_rows(summary) if row["on"] == summary["tasks"][0]["task"]]
    shown = ["failed", "not scored", "not scored", "failed"]
    assert [row[each["name"]] for each in summary["models"]] == shown
    table = result_table(summary)
    (line,) = [i for i, name in enumerate(table.columns[0].cells) if name == row["on"]]
    assert [list(column.cells)[line] for column in table.columns[1:]] == shown


def test_of_several_random_sets_a_task_says_that_the_first_was_scored(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    for sets, said in ((1, False), (2, True)):
        path = write_recipe(evaluation={"tasks": tasks[:1], "random": sets, "layers": 0})
        _, summary, _ = run_here(path, store)
        (group,) = task_groups(summary)
        labels = [*result_table(summary).columns[0].cells, group.rows[0].remark, result_rows(summary)[-1]["measure"]]
        assert sum("of 2 random sets the first" in str(label) for label in labels) == 3 * said
        assert ("Of the random sets the first was scored." in task_scores(summary)[0].caption) == said


def test_the_table_shows_half_the_width_of_the_95_percent_interval_and_says_so(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    _, summary, _ = run_here(write_recipe(evaluation={"tasks": tasks[:1]}), store)
    table = result_table(summary)
    task, scores = summary["tasks"][0], summary["evaluation"][0]["run"]["all"]
    lines = dict(zip(table.columns[0].cells, table.columns[-1].cells, strict=True))
    half = t.ppf(0.975, scores["sequences"] - 1) * scores["divergence_error"]
    assert lines["KL, nats per token ± 95%"] == f"{scores['divergence']:.4f} ± {half:.4f}"
    score = task["scores"]["run"]
    half = t.ppf(0.975, task["items"] - 1) * score["error"]
    assert lines[f"{task['task']}, {task['metric']} ± 95%"] == f"{score['value']:.4f} ± {half:.4f}"


def test_what_failed_is_tried_again_and_nothing_else_is(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    path = write_recipe(evaluation={"tasks": tasks})
    run_here(path, store)
    _, _, events = run_here(path, store)
    assert [event.decision for event in events if event.label == "tasks"] == ["hit", FAILED] * 4
    assert {event.decision for event in events if event.label != "tasks"} == {"hit"}


def test_the_command_writes_the_report_says_what_failed_and_ends_with_1(
    command: Command,
    write_recipe: WriteRecipe,
    store: ArtifactStore,
    tasks: list[dict[str, Any]],
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_recipe(evaluation={"tasks": tasks})
    code, out, err = command("run", path, "--json")
    assert code == 1
    assert "4 evaluations failed" in err
    value = json.loads(out)
    assert value["tasks"][0]["scores"]["run"]["value"] >= 0
    assert Path(value["report"]).read_text().count("1000") > 0
    assert json.loads(Path(value["record"]).read_text())["state"] == "failed"


def test_a_flow_with_a_failed_task_ends_failed_with_all_that_it_found_and_shows_it(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]], prefect_server: None
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    from flows.entrypoints import quantize

    recipe = load_recipe(write_recipe(evaluation={"tasks": tasks}))
    state = quantize(recipe.model_dump(mode="json"), return_state=True)
    assert state.is_failed()
    found = state.result(raise_on_failure=False)
    assert found.summary["tasks"][0]["scores"]["run"]["value"] >= 0
    run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as client:
        shown = {each.key: each for each in client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run))}
    assert {"summary", "stages", "result"} < set(shown)
    assert found.summary["verdict"] in shown["summary"].data
    assert sum(each.type == "image" for each in shown.values()) == 3
    assert all(each.data.startswith("data:image/png;base64,") for each in shown.values() if each.type == "image")


def test_a_sweep_shows_its_verdict_rows_cells_and_figures(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    from flows.entrypoints import sweep

    grid = {
        "selection.selector": ["coverage", "random"],
        "selection.budget": [2, 4],
        "quantization.group_size": [16, 7],
    }
    recipe = load_recipe(write_recipe(sweep=grid))
    state = sweep(recipe.model_dump(mode="json"), return_state=True)
    run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as client:
        shown = {each.key: each for each in client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run))}
    assert "4 cells failed" in shown["sweep"].data
    assert shown["sweep"].data.count("group_size 7 does not divide") == 4
    assert len(json.loads(shown["rows"].data)) == 4
    assert len(json.loads(shown["cells"].data)) == 8
    assert any(each.type == "image" for each in shown.values())


def test_a_run_of_tasks_alone_has_its_verdict(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]]
) -> None:
    _, summary, _ = run_here(write_recipe(evaluation={"tasks": tasks[:1], "divergence": []}), store)
    assert summary["verdict"].startswith(summary["tasks"][0]["task"])
    assert summary["layers"] is None
    assert [each["id"] for each in summary["models"]] == ["original", "nearest", "random", "run"]


def test_a_checkpoint_is_loaded_once_for_all_texts_and_once_for_all_tasks(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import covercal.decoder

    loaded: list[str] = []
    original = covercal.decoder.load_decoder

    def load(folder: Path, *arguments: Any, **keywords: Any) -> Any:
        loaded.extend([folder.name] if folder.is_relative_to(store.root) else [])
        return original(folder, *arguments, **keywords)

    monkeypatch.setattr(covercal.decoder, "load_decoder", load)
    text = load_recipe(write_recipe()).evaluation.divergence[0].path
    perplexity = [{"path": text, "window": 32}, {"path": text, "window": 16}]
    two = [tasks[0], {**tasks[0], "limit": 5}]
    evaluation = {"perplexity": perplexity, "tasks": two, "layers": 0, "task_models": ["original", "run"]}
    chain, summary, _ = run_here(write_recipe(evaluation=evaluation), store)
    assert loaded.count(chain.checkpoint.key) == 2  # the random set's model came between texts and tasks
    assert loaded.count(chain.nearest.key) == 1
    assert len(loaded) == 4
    assert [set(each["scores"]) for each in summary["tasks"]] == [{"original", "run"}] * 2


@pytest.mark.parametrize(("models", "sets"), [(["original", "random", "run"], 1), (["original", "run"], 0)])
def test_no_random_set_is_quantised_that_nothing_judges(
    write_recipe: WriteRecipe, store: ArtifactStore, tasks: list[dict[str, Any]], models: list[str], sets: int
) -> None:
    evaluation = {"divergence": [], "tasks": tasks[:1], "task_models": models, "random": 2, "layers": 0}
    recipe = load_recipe(write_recipe(evaluation=evaluation))
    recorder = Recorder()
    run_chain(recipe, identify(recipe, store), Direct(store, recorder), until="report")
    assert [event.label for event in recorder.events if event.label.startswith("random")] == (
        ["random 0 choice", "random 0"] * sets
    )


def test_random_sets_are_left_out_where_nothing_reads_samples_or_the_choice_is_random(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe()
    for override in ("evaluation.random=0", "selection.selector=random", "quantization.method=rtn"):
        chain, summary, _ = run_here(path, store, override)
        assert chain.texts[0].random == ()
        assert "random" not in {each["id"] for each in summary["models"]}


def test_linears_are_measured_on_the_first_sequences_which_are_of_all_domains(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample(np.array([i]), "abc"[i // 8], (str(i),)) for i in range(24)]
    tokens = [each.tokens for each in spread_over_domains(samples, 24, "abc")]
    monkeypatch.setattr("tasks.layers.sample_tokens", lambda *_: tokens)
    for name in ("original_decoder", "checkpoint_decoder"):
        monkeypatch.setattr(f"tasks.layers.{name}", lambda *_: SimpleNamespace(sites=[]))
    read: list[int] = []
    monkeypatch.setattr(
        "covercal.layer_errors.linear_errors", lambda a, b, found, _: read.extend(int(each[0]) for each in found) or {}
    )
    given = {"checkpoint": ByDigest(Ref("checkpoint", "k", "d")), "texts": ByDigest(Ref("texts", "k", "d")), "limit": 8}
    place: dict[str, Any] = {"model": None, "imported": None, "dtype": "float32", "device": "cpu"}
    measure_layers.build(Build(tmp_path, store, "layers", tmp_path), **given, **place)
    assert [i // 8 for i in read] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_linears_err_on_held_out_inputs_about_as_on_those_they_were_calibrated_with(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    chain, summary, _ = run_here(write_recipe(quantization={"method": "gptq", "bits": 4, "group_size": 16}), store)
    calibrated = {
        row["name"]: row["output_error"] for row in read_table(store.path(chain.checkpoint) / LINEARS).to_pylist()
    }
    assert chain.layers is not None
    held_out = {row["name"]: row["error"] for row in read_layer_errors(store, chain.layers[1])}
    assert list(held_out) == list(calibrated)
    ratios = np.array([held_out[name] / calibrated[name] for name in calibrated])
    assert 0.7 < np.median(ratios) < 2.0
    rows = summary["layers"]["linears"]
    assert [row["run"] for row in rows] == list(held_out.values())
    assert sum(row["run"] < row["nearest"] for row in rows) > len(rows) / 2
    covered = summary["selection"]["coverage"]
    sites = {(row["block"], row["outlier_channels"], row["uncovered"]) for row in rows}
    assert sum(each[2] for each in sites) > 0 or covered == 1.0


@pytest.mark.parametrize(
    ("output_errors", "measure", "worst", "shown"),
    [((0.2, None, 0.0), "output_error", "a", "Output error 0.1"), ((None,) * 3, "weight_error", "b", "Weight error")],
)
def test_the_worst_linear_is_that_of_one_measure(
    write_recipe: WriteRecipe,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
    output_errors: tuple[float | None, ...],
    measure: str,
    worst: str,
    shown: str,
) -> None:
    recipe = load_recipe(write_recipe(evaluation={"divergence": [], "random": 0}))
    chain = run_chain(recipe, identify(recipe, store), Direct(store, Recorder()))
    rows = [
        {"name": name, "output_error": output, "weight_error": weight}
        for name, output, weight in zip("abc", output_errors, (0.1, 0.9, 0.5), strict=True)
    ]
    monkeypatch.setattr("flows.summary.read_table", lambda *_: SimpleNamespace(to_pylist=lambda: rows))
    found = quantization_summary(recipe, chain, store)
    assert (found["worst_linear"], found["worst_measure"]) == (worst, measure)
    assert found["worst_error"] == max(row[measure] for row in rows if row[measure] is not None)
    page = read(run_page(run_summary(quantization=found), []))
    assert shown in page.text


def test_linears_of_one_input_count_once_beside_what_it_misses() -> None:
    sites = [{"block": 0, "linears": ["q", "k"], "uncovered_weight": 0.5}]
    sites += [
        {"block": 0, "linears": ["o"], "uncovered_weight": 0.1},
        {"block": 1, "linears": ["q"], "uncovered_weight": 0},
    ]
    linears = [{"block": 0, "kind": kind, "run": error} for kind, error in (("q", 1.0), ("k", 3.0), ("o", 0.5))]
    assert _missed_and_error(sites, linears) == ([0.5, 0.1], [2.0, 0.5])


def test_errors_are_not_explained_by_samples_that_the_method_does_not_read(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    _, summary, _ = run_here(write_recipe(), store, "quantization.method=cached")
    assert any(row["uncovered"] for row in summary["layers"]["linears"])
    assert summary["layers"]["correlation"] is None
    assert summary["layers"]["explanation"] == (
        "cached reads no chosen sample, so no error here comes from what they miss."
    )


def test_a_method_that_scales_inputs_has_no_view_of_linears(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    chain, summary, _ = run_here(write_recipe(quantization={"method": "awq", "bits": 4, "group_size": 16}), store)
    assert chain.layers is summary["layers"] is None
    assert summary["why_no_layers"].startswith("awq scales inputs")
    (left_out,) = [each for each in run_left_out(summary) if each.title == "Relative error by block"]
    assert left_out.why == summary["why_no_layers"]
