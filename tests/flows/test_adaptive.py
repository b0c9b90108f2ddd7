"""Adaptive refinement: quantise, lower the threshold where the error is large, choose again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from covercal.recipe import load_recipe
from flows.chain import Chain, run_chain
from flows.execution import Direct, Event, Planned, Recorder
from flows.inputs import identify
from flows.summary import stage_rows, summarize
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.losses import LOSSES
from tasks.quantize import LINEARS
from tasks.select import chosen_samples
from tasks.thresholds import OUTLIERS, THRESHOLDS
from tests import tiny
from tests.flows.test_run import counted_sequences

WriteRecipe = Callable[..., Path]
Rows = dict[str, dict[str, Any]]
FIRST_ROUND = ["outliers", "selection", "first try"]
SECOND_ROUND = ["refined", "reselection", "checkpoint"]
LIMITS = {"k": 4.0, "adaptive_k": 2.0}
SITES = [4, 1]  # of the rough linears, among all inputs of linears and among the inputs of blocks


def gone_through(
    path: Path, store: ArtifactStore, *overrides: str, planned: bool = False, until: str = "evaluation"
) -> tuple[Chain, list[Event]]:
    """Run or plan a recipe; return its artifacts and every event."""
    recipe, recorder = load_recipe(path, overrides), Recorder()
    execution = Planned(store, recorder) if planned else Direct(store, recorder)
    return run_chain(recipe, identify(recipe, store), execution, until=until), recorder.events


def run_here(path: Path, store: ArtifactStore, *overrides: str) -> tuple[Chain, Rows]:
    chain, events = gone_through(path, store, *overrides)
    return chain, {row["stage"]: row for row in stage_rows(events)}


def plan_here(path: Path, store: ArtifactStore, *overrides: str) -> Rows:
    _, events = gone_through(path, store, *overrides, planned=True)
    return {row["stage"]: row for row in stage_rows(events)}


def decisions(rows: Rows) -> dict[str, str]:
    return {name: row["decision"] for name, row in rows.items()}


def not_hit(rows: Rows) -> list[str]:
    return [name for name, row in rows.items() if row["decision"] != "hit"]


def of_row(store: ArtifactStore, rows: Rows, name: str) -> Ref:
    """Return the artifact of a row that has one."""
    return next(manifest.ref for manifest in store.manifests() if manifest.key == rows[name]["key"])


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second block begins badly: a faint input channel has such weights that no others fit the grid."""
    model = tiny.tiny_model()
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.input_layernorm.weight[5] = 0.01
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight[:, 5] = 30
    folder = tmp_path_factory.mktemp("rough") / "model"
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plain(write_recipe: WriteRecipe) -> Path:
    """A recipe of which no site is reconstructed poorly; nothing is evaluated."""
    return write_recipe(evaluation={"divergence": []}, outliers=LIMITS)


@pytest.fixture
def poor(write_recipe: WriteRecipe, rough: Path) -> Path:
    """The same with a model of which one site is."""
    return write_recipe(model={"source": str(rough)}, evaluation={"divergence": []}, outliers=LIMITS)


ADAPTIVE = "outliers.adaptive=true"

# --- the rows ------------------------------------------------------------------------------------------------------


def test_refinement_adds_a_first_try_and_a_second_round(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe(outliers={"adaptive": True, **LIMITS})
    _, rows = run_here(path, store)
    expected = ["pool", "texts", "statistics", *FIRST_ROUND, "refined", "reselection", "measures"]
    assert list(rows) == [*expected, "reference", "nearest", "checkpoint", "evaluation"]


def test_without_refinement_there_is_one_round(plain: Path, store: ArtifactStore) -> None:
    _, rows = run_here(plain, store)
    assert list(rows) == ["pool", "statistics", "outliers", "selection", "measures", "checkpoint"]


def test_a_plan_has_the_rows_of_the_run(poor: Path, store: ArtifactStore) -> None:
    before = plan_here(poor, store, ADAPTIVE)
    _, rows = run_here(poor, store, ADAPTIVE)
    assert list(before) == list(rows) == list(plan_here(poor, store, ADAPTIVE))


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "run"])
def test_a_selection_alone_tries_once_and_ends_with_the_second_choice(
    poor: Path, store: ArtifactStore, planned: bool
) -> None:
    chain, events = gone_through(poor, store, ADAPTIVE, planned=planned, until="selection")
    labels = list(dict.fromkeys(event.label for event in events))
    assert labels == ["pool", "statistics", *FIRST_ROUND, "refined", "reselection", "measures"]
    assert (chain.checkpoint, chain.nearest, chain.texts) == (None, None, ())


# --- what is lowered -----------------------------------------------------------------------------------------------


def poor_of(store: ArtifactStore, rows: Rows) -> list[int]:
    """Return the sites above median + 2 standard deviations of the first try's errors, by numpy."""
    sites = read_table(store.path(of_row(store, rows, "outliers")) / THRESHOLDS).to_pylist()
    linears = read_table(store.path(of_row(store, rows, "first try")) / LINEARS).to_pylist()
    errors = {row["name"]: row["output_error"] for row in linears}
    of_site = [[errors[f"model.layers.{row['block']}.{name}"] for name in row["linears"].split(", ")] for row in sites]
    found = np.array([np.sqrt(np.mean(np.square(each))) for each in of_site])
    return np.flatnonzero(found > np.median(found) + 2 * found.std()).tolist()


def limits(store: ArtifactStore, ref: Ref) -> npt.NDArray[np.float64]:
    """Return by how many standard deviations each site's threshold lies above its mean."""
    table = read_table(store.path(ref) / THRESHOLDS)
    mean, sigma, threshold = (table[name].to_numpy() for name in ("mean", "sigma", "threshold"))
    return (threshold - mean) / sigma


@pytest.mark.parametrize(("sites", "site"), zip(["linear_inputs", "block_inputs"], SITES, strict=True))
def test_the_threshold_is_lowered_where_the_first_try_went_wrong_and_nowhere_else(
    poor: Path, store: ArtifactStore, sites: str, site: int
) -> None:
    chain, rows = run_here(poor, store, ADAPTIVE, f"statistics.sites={sites}")
    assert poor_of(store, rows) == [site]
    first, second = limits(store, of_row(store, rows, "outliers")), limits(store, chain.outliers)
    np.testing.assert_allclose(first, 4.0, rtol=1e-12)
    np.testing.assert_allclose(np.delete(second, site), 4.0, rtol=1e-12)
    assert second[site] == pytest.approx(2.0, rel=1e-12)


def test_a_lowered_site_has_more_outlier_channels_and_the_others_have_theirs(poor: Path, store: ArtifactStore) -> None:
    chain, rows = run_here(poor, store, ADAPTIVE)
    before, after = (
        read_table(store.path(ref) / OUTLIERS).to_pylist() for ref in (of_row(store, rows, "outliers"), chain.outliers)
    )
    elsewhere = [[row for row in each if row["site"] != SITES[0]] for each in (before, after)]
    assert elsewhere[0] == elsewhere[1]
    here = [{row["channel"] for row in each if row["site"] == SITES[0]} for each in (before, after)]
    assert here[0] < here[1]


def test_the_run_ends_with_the_second_round(poor: Path, store: ArtifactStore) -> None:
    chain, rows = run_here(poor, store, ADAPTIVE)
    assert (chain.outliers, chain.selection, chain.checkpoint) == tuple(of_row(store, rows, n) for n in SECOND_ROUND)
    assert {rows[name]["decision"] for name in (*FIRST_ROUND, *SECOND_ROUND)} == {"built"}
    first, second = (
        chosen_samples(store, ref, 4).tolist() for ref in (of_row(store, rows, "selection"), chain.selection)
    )
    assert sorted(first) != sorted(second)


def test_the_summary_is_of_the_second_round(poor: Path, store: ArtifactStore) -> None:
    chain, rows = run_here(poor, store, ADAPTIVE)
    summary = summarize(load_recipe(poor, [ADAPTIVE]), chain, store)
    assert summary["selection"]["samples"] == chosen_samples(store, chain.selection, 4).tolist()
    counts = [read_table(store.path(of_row(store, rows, name)) / OUTLIERS).num_rows for name in ("outliers", "refined")]
    assert counts[0] < counts[1] == summary["selection"]["outlier_channels"]


@pytest.mark.parametrize(
    "rule",
    [("mad", 6.0, 2.0), ("quantile", 0.99, 0.9), ("median", 3.0, 1.5), ("absolute", 3.5, 2.0)],
    ids=lambda r: r[0],
)
def test_every_rule_can_be_refined(poor: Path, store: ArtifactStore, rule: tuple[str, float, float]) -> None:
    name, k, lower = rule
    overrides = (ADAPTIVE, f"outliers.rule={name}", f"outliers.k={k}", f"outliers.adaptive_k={lower}")
    chain, rows = run_here(poor, store, *overrides)
    assert poor_of(store, rows) == [SITES[0]]
    before, after = (
        read_table(store.path(ref) / THRESHOLDS)["threshold"].to_numpy()
        for ref in (of_row(store, rows, "outliers"), chain.outliers)
    )
    assert np.flatnonzero(after != before).tolist() == [SITES[0]]
    assert after[SITES[0]] < before[SITES[0]]


# --- what is computed again ----------------------------------------------------------------------------------------


def test_the_second_round_runs_nothing_over_the_pool(poor: Path, store: ArtifactStore) -> None:
    with counted_sequences(32) as seen:
        _, rows = run_here(poor, store, ADAPTIVE)
    assert rows["refined"]["decision"] == "built"
    assert sum(seen) == 16
    assert rows["statistics"]["counts"] == {"built": 2}


def test_where_nothing_is_lowered_the_second_round_is_the_first(plain: Path, store: ArtifactStore) -> None:
    chain, rows = run_here(plain, store, ADAPTIVE)
    assert poor_of(store, rows) == []
    assert {rows[name]["decision"] for name in FIRST_ROUND} == {"built"}
    assert {rows[name]["decision"] for name in SECOND_ROUND} == {"hit"}
    for first, second in zip(FIRST_ROUND, SECOND_ROUND, strict=True):
        assert rows[first]["key"] == rows[second]["key"]
    unrefined, rows = run_here(plain, store)
    assert not_hit(rows) == []
    assert chain == unrefined


def test_refinement_after_a_run_without_it_reuses_that_run_as_its_first_round(poor: Path, store: ArtifactStore) -> None:
    before, _ = run_here(poor, store)
    with counted_sequences(32) as seen:
        after, rows = run_here(poor, store, ADAPTIVE)
    assert seen == []
    assert not_hit(rows) == ["refined", "reselection", "measures", "checkpoint"]
    assert rows["first try"]["key"] == before.checkpoint.key
    assert before.checkpoint != after.checkpoint


def test_a_refined_run_hits_everywhere_the_next_time(poor: Path, store: ArtifactStore) -> None:
    first, _ = run_here(poor, store, ADAPTIVE)
    with counted_sequences(32) as seen:
        second, rows = run_here(poor, store, ADAPTIVE)
    assert not_hit(rows) == []
    assert first == second
    assert seen == []


def test_another_lower_k_leaves_the_first_round_alone(poor: Path, store: ArtifactStore) -> None:
    run_here(poor, store, ADAPTIVE)
    chain, rows = run_here(poor, store, ADAPTIVE, "outliers.adaptive_k=3")
    assert not_hit(rows)[:2] == ["refined", "reselection"]
    assert set(not_hit(rows)) <= {"refined", "reselection", "measures", "checkpoint"}
    assert limits(store, chain.outliers)[SITES[0]] == pytest.approx(3.0, rel=1e-12)


def test_another_lower_k_changes_nothing_where_nothing_is_lowered(plain: Path, store: ArtifactStore) -> None:
    run_here(plain, store, ADAPTIVE)
    _, rows = run_here(plain, store, ADAPTIVE, "outliers.adaptive_k=1")
    assert not_hit(rows) == []


def test_a_choice_that_reads_no_outliers_is_not_made_again(poor: Path, store: ArtifactStore) -> None:
    run_here(poor, store, "selection.selector=random")
    planned = plan_here(poor, store, ADAPTIVE, "selection.selector=random")
    _, rows = run_here(poor, store, ADAPTIVE, "selection.selector=random")
    assert not_hit(planned) == not_hit(rows) == ["refined", "measures"]


def test_two_stores_come_to_the_same_bytes(poor: Path, store: ArtifactStore, tmp_path: Path) -> None:
    first, _ = run_here(poor, store, ADAPTIVE)
    second, _ = run_here(poor, ArtifactStore(tmp_path / "other"), ADAPTIVE)
    assert first == second  # references hold digests over every file


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_of_a_new_recipe_says_which_row_each_waits_for(poor: Path, store: ArtifactStore) -> None:
    rows = plan_here(poor, store, ADAPTIVE)
    assert {manifest.stage for manifest in store.manifests()} == {"pool"}
    assert [rows[name]["decision"] for name in ("statistics", "outliers", "selection")] == ["build"] * 3
    waiting = {name: row["reason"] for name, row in rows.items() if row["decision"] == "waits"}
    assert list(waiting) == ["first try", "refined", "reselection", "measures", "checkpoint"]
    assert waiting["first try"] == "depends on selection, which is not there yet"
    assert waiting["refined"] == "depends on first try, which is not there yet"
    assert waiting["reselection"] == "depends on refined, which is not there yet"
    assert waiting["checkpoint"] == "depends on reselection, which is not there yet"


@pytest.mark.parametrize("refined", [True, False])
def test_no_row_of_a_plan_waits_for_itself(poor: Path, store: ArtifactStore, refined: bool) -> None:
    rows = plan_here(poor, store, f"outliers.adaptive={str(refined).lower()}")
    assert rows["checkpoint"]["decision"] == "waits"
    assert [name for name, row in rows.items() if row["reason"].startswith(f"depends on {name},")] == []


def test_once_the_first_try_is_there_a_plan_knows_what_is_lowered(poor: Path, store: ArtifactStore) -> None:
    run_here(poor, store)
    planned = plan_here(poor, store, ADAPTIVE)
    assert decisions(planned) == {
        **dict.fromkeys(["pool", "statistics", *FIRST_ROUND], "hit"),
        **{"refined": "build", "reselection": "build", "measures": "waits", "checkpoint": "waits"},
    }
    waiting = {planned[name]["reason"] for name in ("measures", "checkpoint")}
    assert waiting == {"depends on reselection, which is not there yet"}
    _, rows = run_here(poor, store, ADAPTIVE)
    assert planned["refined"]["key"] == rows["refined"]["key"]
    assert planned["reselection"]["key"] == rows["reselection"]["key"]


def test_once_the_first_try_is_there_a_plan_knows_that_nothing_is_lowered(plain: Path, store: ArtifactStore) -> None:
    run_here(plain, store)
    assert not_hit(plan_here(plain, store, ADAPTIVE)) == []


def test_a_plan_of_a_refined_run_hits_everywhere(poor: Path, store: ArtifactStore) -> None:
    run_here(poor, store, ADAPTIVE)
    assert not_hit(plan_here(poor, store, ADAPTIVE)) == []


def test_a_plan_waits_when_only_the_first_try_is_lost(poor: Path, store: ArtifactStore) -> None:
    _, rows = run_here(poor, store, ADAPTIVE)
    first = store.path(of_row(store, rows, "first try"))
    (first / LINEARS).unlink()
    planned = plan_here(poor, store, ADAPTIVE)
    assert decisions(planned)["first try"] == "rebuild"
    assert planned["refined"]["reason"] == "depends on first try, which is not there yet"
    assert {planned[name]["decision"] for name in SECOND_ROUND} == {"waits"}
    _, rows = run_here(poor, store, ADAPTIVE)
    assert {name: rows[name]["decision"] for name in not_hit(rows)} == {"first try": "rebuilt"}


# --- losses --------------------------------------------------------------------------------------------------------

BY_LOSS = "selection.selector=max_perplexity"


def test_a_selector_that_reads_losses_has_them_measured(plain: Path, store: ArtifactStore) -> None:
    chain, rows = run_here(plain, store, BY_LOSS)
    assert list(rows) == ["pool", "statistics", "losses", "outliers", "selection", "measures", "checkpoint"]
    assert rows["losses"]["counts"] == {"built": 2}
    manifests = {manifest.key: manifest for manifest in store.manifests("losses")}
    read = [Ref(**each) for each in store.manifest(chain.selection).inputs if each["stage"] == "losses"]
    assert {ref.key for ref in read} == set(manifests)
    losses = np.concatenate([read_table(store.path(ref) / LOSSES)["loss"].to_numpy() for ref in read])
    assert chosen_samples(store, chain.selection, 4).tolist() == np.argsort(-losses, kind="stable")[:4].tolist()


@pytest.mark.parametrize("selector", ["coverage", "random", "max_variance"])
def test_other_selectors_measure_no_losses(plain: Path, store: ArtifactStore, selector: str) -> None:
    assert "losses" not in plan_here(plain, store, f"selection.selector={selector}")


@pytest.mark.parametrize(("until", "measured"), [("selection", False), ("evaluation", False), ("report", True)])
def test_a_selector_that_only_a_report_shows_has_its_losses_measured_for_a_report(
    plain: Path, store: ArtifactStore, until: str, measured: bool
) -> None:
    _, events = gone_through(plain, store, "report.selectors=[max_perplexity]", planned=True, until=until)
    assert ("losses" in {row["stage"] for row in stage_rows(events)}) == measured


def test_a_plan_counts_the_shards_whose_losses_are_to_do(plain: Path, store: ArtifactStore) -> None:
    rows = plan_here(plain, store, BY_LOSS)
    assert rows["losses"]["counts"] == {"build": 2}
    assert rows["selection"]["decision"] == "build"
    run_here(plain, store, BY_LOSS)
    assert not_hit(plan_here(plain, store, BY_LOSS)) == []
    more = plan_here(plain, store, BY_LOSS, "pool.samples=24")
    assert more["losses"]["counts"] == {"build": 1, "hit": 2}


def test_losses_are_measured_once_for_all_that_read_them(plain: Path, store: ArtifactStore) -> None:
    run_here(plain, store, BY_LOSS)
    changes = ["selection.selector=min_perplexity", "selection.budget=2", "outliers.k=5", "statistics.skip_tokens=2"]
    for change in changes:
        _, rows = run_here(plain, store, BY_LOSS, change)
        assert rows["losses"]["decision"] == "hit"


def test_losses_are_read_by_both_rounds(poor: Path, store: ArtifactStore) -> None:
    _, rows = run_here(poor, store, ADAPTIVE, BY_LOSS)
    assert rows["losses"]["counts"] == {"built": 2}
    assert (rows["refined"]["decision"], rows["reselection"]["decision"], rows["checkpoint"]["decision"]) == (
        "built",
        "hit",
        "hit",
    )


# --- other choices through the chain -------------------------------------------------------------------------------


def test_given_samples_are_those_that_calibrate(plain: Path, store: ArtifactStore) -> None:
    chain, _ = run_here(plain, store, "selection={selector: given, samples: [9, 2, 11], budget: 2}")
    assert chosen_samples(store, chain.selection, 2).tolist() == [9, 2]
    turned, rows = run_here(plain, store, "selection={selector: given, samples: [2, 9], budget: 2}")
    assert not_hit(rows) == ["selection"]  # the same two samples
    assert replace(turned, selection=None) == replace(chain, selection=None)


def test_a_selector_without_prefixes_chooses_anew_for_another_budget(plain: Path, store: ArtifactStore) -> None:
    for budget in (4, 2):
        chain, rows = run_here(plain, store, "selection.selector=cola", f"selection.budget={budget}")
        assert rows["selection"]["decision"] == "built"
        assert rows["statistics"]["decision"] == ("built" if budget == 4 else "hit")
        assert len(set(chosen_samples(store, chain.selection, budget).tolist())) == budget
