"""Sweeps: which cells there are, what rows say of them, and that a failing cell loses no other."""

import errno
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from covercal.errors import InputError
from covercal.quantization_settings import PRESETS, Quantization
from covercal.recipe import Bar, Recipe, load_recipe, parse_recipe, plain
from flows.dashboard import show_sweep
from flows.execution import Direct, Recorder
from flows.inputs import check_model
from flows.record import Running
from flows.report import Took, write_sweep
from flows.summary import summarize, sweep_name
from flows.sweep import (
    CellResult,
    against_random,
    cells,
    found_words,
    half_interval,
    main_number,
    rows,
    run_cells,
    sweep_summary,
    sweep_table,
    table_words,
)
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from tests.covercal.test_language_tasks import CHOICES, write_task
from tests.flows.test_cli import Command, command
from tests.tasks.report.reading import read

WriteRecipe = Callable[..., Path]
__all__ = ["command"]  # the fixture


def result(value: float, **fields: Any) -> CellResult:
    """Return a cell that ended with a divergence; `selector`, `budget`, `seed` and `pool_seed` name its fields."""
    names = {"pool_seed": "pool.seed", "bits": "quantization.bits"}
    score = {"text": "t", "kind": "divergence", "run": {"divergence": value, "perplexity": 9.0}}
    return CellResult({names.get(name, f"selection.{name}"): each for name, each in fields.items()}, scores=[score])


# --- cells ---------------------------------------------------------------------------------------------------------


def test_cells_are_all_combinations_and_a_seed_counts_only_where_it_is_read(write_recipe: WriteRecipe) -> None:
    sweep = {
        "selection.selector": ["random", "coverage"],
        "selection.budget": [2, 4],
        "selection.seed": [0, 1, 2],
    }
    found = cells(load_recipe(write_recipe(sweep=sweep)))
    names = {(c.recipe.selection.selector, c.recipe.selection.budget, c.recipe.selection.seed) for c in found}
    assert names == {("random", b, s) for b in (2, 4) for s in (0, 1, 2)} | {("coverage", b, 0) for b in (2, 4)}
    assert len(found) == len(names)


def test_a_cell_is_the_recipe_with_its_fields_set(write_recipe: WriteRecipe) -> None:
    path = write_recipe(sweep={"quantization.bits": [3, 8], "quantization.shrinkage": [0.0, 0.5]})
    for cell in cells(load_recipe(path)):
        fields = [f"{name}={value}" for name, value in cell.fields.items()]
        expected = load_recipe(path, fields)
        assert cell.recipe.quantization == expected.quantization
        assert cell.recipe.sweep == {} or cell.recipe.sweep == expected.sweep


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("pool.sequence_length.0", 16, "`pool.sequence_length` is a single value and has no fields"),
        ("quantization.bits.x.y", 4, "`quantization.bits` is a single value and has no fields"),
        ("pool.sources.5.path", "a.txt", "there is no `5` there; a list entry is named by its number from 0"),
        ("pool.sources.x.path", "a.txt", "there is no `x` there; a list entry is named by its number from 0"),
    ],
)
def test_a_swept_field_that_is_not_there_is_refused_with_a_sentence(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, field: str, value: Any, sentence: str
) -> None:
    code, _, err = command("sweep", write_recipe(sweep={field: [value]}))
    assert code == 2
    assert f"sweep.{field}: {sentence}" in err
    assert not list(store.manifests())


def test_what_is_wrong_in_a_cell_names_the_sweep_and_the_cell(command: Command, write_recipe: WriteRecipe) -> None:
    code, _, err = command("sweep", write_recipe(sweep={"selection.bugdet": [1], "pool.seed": [3]}))
    sentence = "there is no field `selection.bugdet`; did you mean `selection.budget`?"
    assert (code, err) == (2, f"error Recipe of the sweep's cell (bugdet 1, seed 3): {sentence}")


def test_a_sweep_may_set_a_field_of_a_section_that_the_recipe_leaves_out(write_recipe: WriteRecipe) -> None:
    found = cells(load_recipe(write_recipe(sweep={"require.divergence.max": [0.1, 0.2]})))
    assert [cell.recipe.require.divergence for cell in found] == [Bar(max=0.1), Bar(max=0.2)]


def test_one_field_of_a_sweep_inside_another_changes_nothing_in_it(write_recipe: WriteRecipe) -> None:
    sweep = {"pool.sources": [[{"path": "/a.txt"}]], "pool.sources.0.rows": [1, 2]}
    found = cells(load_recipe(write_recipe(sweep=sweep)))
    assert [cell.recipe.pool.sources[0].rows for cell in found] == [1, 2]
    assert [cell.fields["pool.sources"] for cell in found] == [[{"path": "/a.txt"}]] * 2


def test_a_cell_reads_what_lies_beside_the_recipe(write_recipe: WriteRecipe) -> None:
    path = write_recipe(sweep={"model.source": ["tiny"], "pool.sources": [[{"path": "a.txt"}], [{"path": "b.txt"}]]})
    (path.parent / "tiny").mkdir()
    found = [cell.recipe for cell in cells(load_recipe(path))]
    assert {each.model.source for each in found} == {str(path.parent / "tiny")}
    assert [each.pool.sources[0].path for each in found] == [str(path.parent / name) for name in ("a.txt", "b.txt")]


@pytest.mark.parametrize("given", [{}, {"shrinkage": 0}, {"rounding": {"polish": 1}, "target": {"alpha": 0.5}}])
def test_a_swept_method_brings_all_that_its_preset_says(write_recipe: WriteRecipe, given: dict[str, Any]) -> None:
    methods = sorted(PRESETS)
    quantization = {"method": "gptq", "bits": 4, "group_size": 8, **given}
    read = load_recipe(write_recipe(quantization=quantization, sweep={"quantization.method": methods}))
    for recipe in (read, parse_recipe(plain(read), Path("/"))):  # as the command has it, and as the flow gets it
        assert recipe == read
        found = {cell.recipe.quantization.method: cell.recipe.quantization for cell in cells(recipe)}
        assert found == {name: Quantization(**{**quantization, "method": name}) for name in methods}


def test_two_swept_fields_of_one_last_name_are_told_apart(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(
            quantization={"method": "gptq"},
            sweep={"quantization.shrinkage.strength": [0.1], "quantization.damping.strength": [0.01], "pool.seed": [3]},
        )
    )
    (cell,) = cells(recipe)
    assert cell.name == "shrinkage.strength 0.1, damping.strength 0.01, seed 3"
    assert sweep_name(recipe) == "model · shrinkage.strength, damping.strength, seed"
    found = [replace(result(0.5), fields=cell.fields)]
    columns = [column.header for column in sweep_table(rows(found)).columns]
    assert columns[:2] == ["shrinkage.strength", "damping.strength"]
    summary = sweep_summary(recipe, found)
    assert "shrinkage.strength 0.1, damping.strength 0.01" in summary["verdict"]
    page = read(write_sweep(tmp_path / "out", summary, TOOK)[1].read_text())
    assert "shrinkage.strength 0.1, damping.strength 0.01, seed 3" in page.by_id("cells").text


# --- intervals -----------------------------------------------------------------------------------------------------

VALUES = [0.71, 0.74, 0.73, 0.79, 0.75]
RIVALS = [0.78, 0.80, 0.74, 0.83, 0.81]


def test_the_interval_of_a_mean_is_students() -> None:
    low, high = stats.t.interval(0.95, 4, np.mean(VALUES), stats.sem(VALUES))
    assert half_interval(VALUES) == pytest.approx((high - low) / 2)
    assert math.isnan(half_interval([1.0]))


def test_over_several_pools_the_difference_is_paired() -> None:
    values, rivals = ({p: [v] for p, v in enumerate(each)} for each in (VALUES, RIVALS))
    found, interval, _, _ = against_random(values, rivals, exact=False)
    expected = stats.ttest_rel(VALUES, RIVALS).confidence_interval(0.95)
    assert found == pytest.approx(np.mean(VALUES) - np.mean(RIVALS))
    assert (found - interval, found + interval) == pytest.approx((expected.low, expected.high))


def test_over_one_pool_the_difference_is_welchs() -> None:
    found, interval, _, _ = against_random({None: VALUES[:3]}, {None: RIVALS}, exact=False)
    expected = stats.ttest_ind(VALUES[:3], RIVALS, equal_var=False).confidence_interval(0.95)
    assert (found - interval, found + interval) == pytest.approx((expected.low, expected.high))


def test_a_selector_without_chance_adds_nothing_to_the_interval() -> None:
    found, interval, _, _ = against_random({None: [0.7]}, {None: RIVALS}, exact=True)
    assert found == pytest.approx(0.7 - np.mean(RIVALS))
    assert interval == pytest.approx(half_interval(RIVALS))


@pytest.mark.parametrize(
    ("values", "rivals", "exact"),
    [([0.7], [0.8], True), ([0.7], [0.8], False), (VALUES, [0.8], False), ([0.7], RIVALS, False)],
)
def test_a_single_value_that_chance_had_a_part_in_leaves_the_interval_unknown(
    values: list[float], rivals: list[float], exact: bool
) -> None:
    found, interval, _, random_mean = against_random({None: values}, {None: rivals}, exact=exact)
    assert (found, random_mean) == pytest.approx((np.mean(values) - np.mean(rivals), np.mean(rivals)))
    assert math.isnan(interval)


def test_equal_values_differ_by_nothing_but_the_rounding_of_their_mean() -> None:
    value, count = next((v / 100, n) for v in range(1, 100) for n in range(7, 20) if np.mean([v / 100] * n) != v / 100)
    found, interval, _, _ = against_random({None: [value]}, {None: [value] * count}, exact=True)
    assert (found, interval < 1e-12) == (0, True)
    one, many = {0: [value], 1: [value]}, {0: [value] * count, 1: [value] * count}
    assert against_random(one, many, exact=True)[:2] == (0, 0)


def test_the_percentile_compares_within_a_pool_only() -> None:
    values = {0: [0.5], 1: [2.5]}
    rivals = {0: [1.0, 0.4, 0.6, 0.7], 1: [2.0, 2.1, 2.2, 3.0]}
    assert against_random(values, rivals, exact=False)[2] == pytest.approx((3 + 1) / 8)


def test_without_random_choice_there_is_nothing_to_compare_with() -> None:
    assert all(math.isnan(each) for each in against_random({None: [0.7]}, {}, exact=True))
    assert all(math.isnan(each) for each in against_random({0: [0.7]}, {1: [0.7]}, exact=True))


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_gather_seeds_and_compare_with_random_choice_of_the_same_size() -> None:
    found = rows(
        [
            *(result(v, selector="random", budget=8, seed=s) for s, v in enumerate(RIVALS)),
            *(result(v - 0.3, selector="random", budget=32, seed=s) for s, v in enumerate(RIVALS)),
            result(0.79, selector="coverage", budget=8, seed=0),
            result(0.60, selector="coverage", budget=32, seed=0),
            CellResult({"selection.selector": "zipcal", "selection.budget": 8}, error="it broke"),
        ]
    )
    assert [(r.fields["selection.selector"], r.fields["selection.budget"], len(r.values)) for r in found] == [
        ("random", 8, 5), ("random", 32, 5), ("coverage", 8, 1), ("coverage", 32, 1)
    ]  # fmt: skip
    assert found[0].mean == pytest.approx(np.mean(RIVALS))
    assert math.isnan(found[0].difference)
    assert found[2].percentile == pytest.approx(3 / 5)
    assert found[3].percentile == 0.0
    assert found[3].difference == pytest.approx(0.6 - (np.mean(RIVALS) - 0.3))


def test_rows_pair_the_pools_of_a_sweep_over_pool_seeds() -> None:
    cells_found = [
        result(v, selector=name, budget=8, pool_seed=p)
        for name, values in (("random", RIVALS), ("coverage", VALUES))
        for p, v in enumerate(values)
    ]
    random, coverage = rows(cells_found)
    assert random.values == tuple(RIVALS)
    low, high = stats.ttest_rel(VALUES, RIVALS).confidence_interval(0.95)
    assert 2 * coverage.difference_interval == pytest.approx(high - low)


@pytest.mark.parametrize(("name", "known"), [("coverage", True), ("stratified_domain", False)])
def test_one_run_of_a_selector_is_known_exactly_only_where_it_reads_no_seed(name: str, known: bool) -> None:
    random = [result(v, selector="random", budget=8, seed=s) for s, v in enumerate(RIVALS)]
    row = rows([*random, result(0.7, selector=name, budget=8, seed=0)])[1]
    assert math.isnan(row.difference_interval) != known


def test_the_difference_and_what_it_is_a_share_of_are_of_the_pools_that_both_have() -> None:
    found = rows(
        [
            *(result(1.0, selector="random", budget=8, pool_seed=p) for p in (0, 1)),
            *(result(v, selector="coverage", budget=8, pool_seed=p) for p, v in enumerate((0.9, 0.9, 3.0))),
        ]
    )
    assert (found[1].mean, found[1].difference, found[1].random_mean) == pytest.approx((1.6, -0.1, 1.0))


def test_over_several_pools_the_interval_of_a_mean_is_that_of_the_pools_means() -> None:
    pools = {0: [0.70, 0.71, 0.72], 1: [0.80, 0.81], 2: [0.90]}  # a failed cell is missing
    found = [result(v, selector="random", budget=8, pool_seed=p, seed=s) for p in pools for s, v in enumerate(pools[p])]
    (row,) = rows(found)
    means = [np.mean(each) for each in pools.values()]
    assert row.mean == pytest.approx(np.mean(means))
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert row.interval == pytest.approx((high - low) / 2)


def test_other_fields_keep_rows_apart() -> None:
    found = rows([result(b / 10, selector="random", bits=b, seed=0) for b in (3, 4)])
    assert [r.mean for r in found] == [0.3, 0.4]


def test_the_main_number_is_the_divergence_else_the_perplexity() -> None:
    perplexity = {"text": "p", "kind": "perplexity", "run": {"perplexity": 20.0}}
    assert main_number([perplexity, *result(0.5).scores]) == 0.5
    assert main_number([perplexity]) == 20.0
    assert math.isnan(main_number([]))


TOOK = Took("run", "covercal sweep recipe.yaml", "2026-01-01T00:00:00+00:00", 1.0, ())

# --- what is written -----------------------------------------------------------------------------------------------


def test_a_report_that_the_disk_has_no_room_for_is_a_sentence(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    summary = sweep_summary(load_recipe(write_recipe()), [result(0.1, selector="coverage", budget=2)])
    monkeypatch.setattr("flows.report.write_durably", no_space)
    with pytest.raises(StorageError, match=r"Cannot write the report .*out: No space left on device\."):
        write_sweep(tmp_path / "out", summary, TOOK)


def test_a_sweep_is_written_as_json_with_null_for_what_is_not_known(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    found = [result(0.1 * b, selector="coverage", budget=b) for b in (2, 4)]
    written = write_sweep(tmp_path / "out", sweep_summary(load_recipe(write_recipe()), found), TOOK)
    value = json.loads(written[0].read_text())
    assert [r["mean"] for r in value["rows"]] == [0.2, 0.4]
    assert value["rows"][0]["difference"] is value["rows"][0]["interval"] is None
    assert [path.name for path in written] == ["sweep.json", "sweep.html"]
    assert value["verdict"] in written[1].read_text()
    pictures = list((tmp_path / "out" / "figures").glob("*.png"))
    assert pictures
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in pictures)


def test_the_same_rows_give_the_same_files(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    found = [result(0.1 * b + 0.01 * s, selector="random", budget=b, seed=s) for b in (2, 4) for s in (0, 1)]
    summary = sweep_summary(load_recipe(write_recipe()), found)
    for name in ("a", "b"):
        write_sweep(tmp_path / name, summary, TOOK)
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    )
    assert one == other


def test_a_sweep_whose_every_cell_failed_still_has_its_report(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    found = [CellResult({"selection.budget": 2}, error="InputError: <b>no such thing</b>")]
    page = write_sweep(tmp_path, sweep_summary(load_recipe(write_recipe()), found), TOOK)[1].read_text()
    assert "No cell came to a result. 1 cell failed." in page
    assert "&lt;b&gt;no such thing&lt;/b&gt;" in page


@pytest.mark.parametrize("divergence", [math.nan, None])
def test_a_number_that_is_not_known_loses_no_other_and_is_null_in_the_json(
    write_recipe: WriteRecipe, tmp_path: Path, divergence: Any
) -> None:
    found = [result(divergence, selector="coverage", budget=2), result(0.5, selector="coverage", budget=4)]
    written = write_sweep(tmp_path, sweep_summary(load_recipe(write_recipe()), found), TOOK)
    value = json.loads(written[0].read_text(), parse_constant=pytest.fail)
    assert [row["mean"] for row in value["rows"]] == [None, 0.5]
    assert value["cells"][0]["scores"][0]["run"]["divergence"] is None
    assert value["verdict"].startswith("Lowest: selector coverage, budget 4 (0.5)")


def test_a_sweep_that_measures_nothing_on_texts_says_so(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    found = [CellResult({"selection.budget": budget}) for budget in (2, 4)]
    written = write_sweep(tmp_path, sweep_summary(load_recipe(write_recipe()), found), TOOK)
    assert "Nothing was measured" in json.loads(written[0].read_text())["verdict"]
    assert "No row has a number that rows can be compared by." in written[1].read_text()


def test_the_table_leaves_comparisons_out_where_nothing_is_random() -> None:
    columns = [column.header for column in sweep_table(rows([result(0.5, selector="coverage", budget=8)])).columns]
    assert columns == ["selector", "budget", "runs", "mean ± 95%"]


def test_the_table_shows_brackets_as_they_are() -> None:
    found = rows([replace(scored(0.25), fields={"pool.sources.0.path": "[/data].txt"})])
    console = Console(file=StringIO(), width=160)
    console.print(sweep_table([replace(found[0], tasks={"[/arc]": found[0].tasks["arc"]})]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/data].txt" in shown
    assert "[/arc], acc ± 95%" in shown


# --- tasks ---------------------------------------------------------------------------------------------------------


def scored(value: float | None, error: str = "", **fields: Any) -> CellResult:
    """Return a cell that ended with a score on the task `arc`, or without one."""
    task = {"task": "arc", "metric": "acc", "higher_is_better": True, "original": 0.5, "error": error}
    return replace(result(0.5, **fields), tasks=[task | ({} if value is None else {"run": value})])


def test_a_row_has_the_mean_of_every_task_over_the_cells_that_have_it() -> None:
    pools = {0: [0.30, 0.31, None], 1: [0.40, 0.42, 0.44]}
    (row,) = rows(
        [
            scored(v, "" if v else "out of memory", selector="random", budget=8, pool_seed=p, seed=s)
            for p, values in pools.items()
            for s, v in enumerate(values)
        ]
    )
    low, high = stats.t.interval(0.95, 1, 0.3625, stats.sem([0.305, 0.42]))
    task = row.tasks["arc"]
    assert (task.metric, task.higher_is_better, len(task.values), len(row.values)) == ("acc", True, 5, 6)
    assert (task.mean, task.interval) == pytest.approx((0.3625, (high - low) / 2))


def test_a_failed_task_is_told_for_its_cell_and_loses_nothing_else(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    recipe = load_recipe(write_recipe())
    found = [scored(0.25, budget=2), scored(None, "run: out of <memory>\nat some line", budget=4)]
    finished = Running(recipe, store, "covercal sweep").finish_sweep(found)
    assert finished.failed == "1 task of cells failed; the first: arc failed: run: out of <memory>"
    assert json.loads(finished.record.read_text())["state"] == "failed"
    assert finished.summary["verdict"].endswith("1 task failed.")
    assert [row["mean"] for row in finished.summary["rows"]] == [0.5, 0.5]
    assert [found_words(each) for each in found] == [
        "0.5000, arc 0.2500", "0.5000, arc failed: run: out of <memory>"
    ]  # fmt: skip
    page = read(finished.written[1].read_text())
    section = page.by_id("failed-tasks").text
    assert "1 failed task" in section
    assert "budget 4: arc run: out of <memory> at some line" in section
    assert "arc, acc: 0.2500" in page.by_id("cells").text


def test_the_dashboard_shows_tasks_and_those_that_failed(
    write_recipe: WriteRecipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}
    for kind in ("markdown", "table"):
        monkeypatch.setattr(f"flows.dashboard.create_{kind}_artifact", lambda what, key, **_: shown.update({key: what}))
    monkeypatch.setattr("flows.dashboard.create_image_artifact", lambda *_, **__: None)
    found = [scored(0.25, budget=2), scored(None, "run: out of memory", budget=4), CellResult({}, error="it broke")]
    show_sweep(Running(load_recipe(write_recipe()), store, "covercal sweep").finish_sweep(found))
    assert "* selection.budget 4: arc failed: run: out of memory\n* : it broke" in shown["sweep"]
    assert [row["arc"] for row in shown["rows"]] == [0.25, None]
    results = [cell["result"] for cell in shown["cells"]]
    assert results == ["0.5000, arc 0.2500", "0.5000, arc failed: run: out of memory", "it broke"]


def test_tasks_have_columns_of_their_own_and_say_which_way_is_better(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    found = rows([scored(v, selector="random", budget=8, seed=s) for s, v in enumerate((0.25, 0.35))])
    (column,) = [each for each in sweep_table(found).columns if each.header == "arc, acc ± 95%"]
    assert list(column.cells) == [f"0.3000 ± {half_interval([0.25, 0.35]):.4f}"]
    assert "Higher is better on arc." in table_words(recipe, found)
    alone = rows([replace(scored(0.25, budget=8), scores=[])])
    assert [each.header for each in sweep_table(alone).columns] == ["budget", "runs", "arc, acc ± 95%"]
    assert table_words(recipe, alone) == ["Higher is better on arc."]


def test_a_sweep_of_tasks_alone_keeps_and_shows_every_score(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    task = {"path": str(write_task(tmp_path / "tasks", CHOICES, "good.yaml")), "limit": 4}
    tasks = [task, {**task, "limit": 5}, {**task, "shots": 1000}]
    evaluation = {"divergence": [], "tasks": tasks, "task_models": ["original", "run"], "random": 0}
    recipe = load_recipe(write_recipe(evaluation=evaluation, sweep={"selection.budget": [2, 4]}))
    found = list(run_cells(cells(recipe), store, lambda cell: Direct(store, Recorder())))
    for each in found:
        good, more, bad = each.tasks
        assert good["original"] >= 0
        assert good["run"] >= 0
        assert (more["task"], bad["task"]) == (f"{good['task']} #2", f"{good['task']} #3")
        assert "run" not in bad
        assert "1000" in bad["error"]
    code, out, err = command("sweep", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert code == 1
    assert "2 tasks of cells failed; the first: " in err
    name = found[0].tasks[0]["task"]
    assert f"{name} {found[0].tasks[0]['run']:.4f}" in out
    assert "Lower is better." not in out
    value = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert value["verdict"].startswith(f"Best by task: {name} ")
    assert [row["tasks"][name]["mean"] for row in value["rows"]] == [each.tasks[0]["run"] for each in found]
    page = read((tmp_path / "out" / "sweep.html").read_text()).by_id("rows")
    headers = [each.text for each in page.all("table")[0].all("th") if each.attributes.get("scope") == "col"]
    assert headers[:2] == ["row", "runs"]
    assert len(headers) == 4


# --- runs ----------------------------------------------------------------------------------------------------------

GRID = {"selection.budget": [2, 4], "quantization.group_size": [16, 7]}  # 7 divides nothing


def test_a_failing_cell_loses_no_other(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    wanted = cells(load_recipe(write_recipe(sweep=GRID)))
    direct = Direct(store, Recorder())
    check = functools.partial(check_model, execution=direct)
    found = list(run_cells(wanted, store, lambda cell: direct, check=check))
    failed = {(f.fields["selection.budget"], f.fields["quantization.group_size"]) for f in found if f.error}
    assert failed == {(2, 7), (4, 7)}
    assert all("group_size 7 does not divide" in f.error for f in found if f.error)
    assert all(f.scores[0]["run"]["divergence"] > 0 for f in found if not f.error)


def test_a_cell_whose_number_is_not_finite_fails_with_a_sentence_and_keeps_what_it_found(
    write_recipe: WriteRecipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(recipe: Recipe, *arguments: Any) -> dict[str, Any]:
        summary = summarize(recipe, *arguments)
        if recipe.selection.budget == 4:
            summary["evaluation"][0]["run"]["all"]["divergence"] = math.nan
        return summary

    monkeypatch.setattr("flows.sweep.summarize", broken)
    wanted = cells(load_recipe(write_recipe(sweep={"selection.budget": [2, 4]})))
    good, bad = run_cells(wanted, store, lambda cell: Direct(store, Recorder()))
    assert (good.error, bad.error) == (
        "", "EvaluationError: the divergence on heldout.jsonl is nan; only finite numbers can be compared"
    )  # fmt: skip
    assert bad.measures["budget"] == 4


def test_the_check_comes_before_any_work_of_a_cell(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    def check(*_: object) -> None:
        raise InputError("no such thing")

    wanted = cells(load_recipe(write_recipe(sweep=GRID)))
    found = list(run_cells(wanted, store, lambda cell: Direct(store, Recorder()), check=check))
    assert {f.error for f in found} == {"InputError: no such thing"}
    assert not list(store.manifests())


def test_cells_share_every_stage_they_can(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    sweep = {"selection.selector": ["random", "coverage"], "selection.budget": [2, 4], "selection.seed": [0, 1]}
    list(run_cells(cells(load_recipe(write_recipe(sweep=sweep))), store, lambda cell: Direct(store, Recorder())))
    stages = [manifest.stage for manifest in store.manifests()]
    assert {name: stages.count(name) for name in ("pool", "outliers", "reference")} == {
        "pool": 1, "outliers": 1, "reference": 1
    }  # fmt: skip
    assert stages.count("checkpoint") == 6 + 1  # a cell each, and round-to-nearest


def test_the_command_shows_every_cell_and_fails_when_one_did(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(sweep=GRID)
    code, out, err = command("sweep", path, "--output", tmp_path / "out")
    assert code == 1
    assert "2 of 4 cells failed" in err
    assert "group_size 7 does not divide" in err
    value = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [bool(cell["error"]) for cell in value["cells"]] == [False, True, False, True]
    assert len(value["rows"]) == 2
    assert out.count("/4 ") == 4


def test_a_cell_that_cannot_even_be_planned_is_announced(command: Command, write_recipe: WriteRecipe) -> None:
    path = write_recipe(sweep={"model.source": ["/no/such/model", str(Path(write_recipe()).parent / "none")]})
    code, out, err = command("sweep", path)
    assert code == 1
    assert out.count("will fail:") == 2
    assert "2 of 2 cells failed" in err


def test_a_recipe_without_a_sweep_says_how_to_add_one(command: Command, write_recipe: WriteRecipe) -> None:
    code, _, err = command("sweep", write_recipe())
    assert code == 2
    assert "has no `sweep:`" in err
