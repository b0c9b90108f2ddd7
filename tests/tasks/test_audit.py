"""An audit of a calibration set on a tiny model, against Python sets made from the stored peaks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.tables import read_table
from tasks.audit import SHOWN, TEXT, audit_set, own_coverage
from tasks.capture import CHANNELS, PEAK
from tasks.pool import sample_columns
from tests import tiny
from tests.tasks.test_measures import (
    SAMPLES,
    SHARD_SAMPLES,
    Measured,
    Pool,
    cover_by_sets,
    gram_distance_by_hand,
    measure_texts,
)

KS = [2.0, 4.0]  # many outlier channels, of which few samples fire all; fewer, which no ten samples fire together
every_k = pytest.mark.parametrize("k", KS)


def audit(pool: Pool, own: Measured, k: float = 4.0) -> dict[str, Any]:
    return audit_set(pool.store, pool.samples, pool.statistics, pool.outliers(k), own.samples, own.statistics)


def everything(pool: Pool, k: float) -> set[int]:
    return set(range(len(pool.channels(k))))


def best_next(pool: Pool, covered: set[int], left: set[int], k: float) -> int:
    """Return the sample that adds the most weight, the first of several."""
    fired = pool.fired(pool, k)
    return max(sorted(left), key=lambda sample: pool.weight(fired[sample] - covered, k))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, texts, and a calibration set of three short texts."""
    folder = tmp_path_factory.mktemp("files")
    tiny.recipe_value(folder)
    rows = [{"text": tiny.text(500, name, 24), "domain": name} for name in ("animals", "animals", "code")]
    rows[1]["text"] = tiny.text(501, "animals", 24)
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pool(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    return Pool(store, *measure_texts(store, files, files / "pool.jsonl", SAMPLES))


@pytest.fixture(scope="module")
def own(files: Path, pool: Pool) -> Measured:
    return Measured(pool.store, *measure_texts(pool.store, files, files / "own.jsonl"))


@every_k
def test_the_set_fires_what_its_own_peaks_say(pool: Pool, own: Measured, k: float) -> None:
    fires = own_coverage(pool.store, pool.outliers(k), own.statistics)
    assert fires.shape == (len(own.array(PEAK)), len(pool.channels(k)))
    assert [set(np.flatnonzero(row).tolist()) for row in fires] == pool.fired(own, k)


@every_k
def test_what_the_set_covers_is_counted_from_its_peaks(pool: Pool, own: Measured, k: float) -> None:
    found, expected = audit(pool, own, k), cover_by_sets(pool, pool.fired(own, k), k)
    assert 0 < expected["coverage"] < 1
    by_block = {int(block): share for block, share in expected.pop("coverage_by_block").items()}
    assert found["coverage_by_block"] == pytest.approx(by_block, rel=1e-12)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found["samples"] == len(own.array(PEAK)) == sum(found["domains"].values())


def test_gram_distance_is_that_of_both_stored_energies(pool: Pool, own: Measured) -> None:
    expected = gram_distance_by_hand(own.energies(), pool.energies())
    assert audit(pool, own)["gram_distance"] == pytest.approx(expected, rel=1e-9)


def test_the_domains_are_those_of_the_set(pool: Pool, own: Measured) -> None:
    assert set(audit(pool, own)["domains"]) == {"animals", "code"}


@every_k
def test_a_pool_audited_against_itself_covers_everything(pool: Pool, k: float) -> None:
    found = audit(pool, pool, k)
    assert (found["coverage"], found["weighted_coverage"], found["chosen_weighted_coverage"]) == (1, 1, 1)
    assert (found["surrogate_bound"], found["gram_distance"]) == (0, 0)
    assert (found["heaviest_missed"], found["would_help"]) == ([], [])


@every_k
def test_samples_of_the_pool_are_audited_as_the_pool_measures_them(pool: Pool, files: Path, k: float) -> None:
    first = Measured(pool.store, *measure_texts(pool.store, files, files / "pool.jsonl", SHARD_SAMPLES))
    assert first.statistics == pool.statistics[:1]  # a smaller pool is the beginning of a larger one
    found, expected = audit(pool, first, k), pool.measures(tuple(range(SHARD_SAMPLES)), k)
    assert expected.pop("gram_distance") == pytest.approx(found["gram_distance"], rel=1e-12)
    assert {name: json.loads(json.dumps(found[name])) for name in expected} == expected


# --- the heaviest missed -------------------------------------------------------------------------------------------


@every_k
def test_the_heaviest_missed_are_the_heaviest_of_all_that_no_sample_fires(pool: Pool, own: Measured, k: float) -> None:
    rows = pool.channels(k)
    missed = everything(pool, k) - set().union(*pool.fired(own, k))
    assert len(missed) > SHOWN
    total = pool.weight(everything(pool, k), k)
    expected = sorted((rows[i]["weight"] / total for i in missed), reverse=True)[:SHOWN]
    shares = [each["weight_share"] for each in audit(pool, own, k)["heaviest_missed"]]
    assert shares == sorted(shares, reverse=True)
    assert shares == pytest.approx(expected, rel=1e-12)


@every_k
def test_the_peaks_of_the_set_stay_below_each_missed_channel_and_a_peak_of_the_pool_does_not(
    pool: Pool, own: Measured, k: float
) -> None:
    table = read_table(pool.store.path(pool.statistics[0]) / CHANNELS).to_pylist()
    position = {(row["block"], row["linears"], row["channel"]): row["position"] for row in table}
    thresholds = {row["position"]: row["threshold"] for row in pool.channels(k)}
    for each in audit(pool, own, k)["heaviest_missed"]:
        place = position[each["block"], each["linears"], each["channel"]]
        assert own.array(PEAK)[:, place].max() <= thresholds[place]
        ratio = pool.array(PEAK)[:, place].max() / thresholds[place]
        assert each["peak_over_threshold"] == pytest.approx(ratio, rel=1e-12)
        assert ratio > 1


# --- what would help -----------------------------------------------------------------------------------------------


@every_k
def test_each_helping_sample_adds_what_it_claims_and_no_other_would_add_more(
    pool: Pool, own: Measured, k: float
) -> None:
    fired, covered = pool.fired(pool, k), set().union(*pool.fired(own, k))
    total, left = pool.weight(everything(pool, k), k), set(range(SAMPLES))
    help_ = audit(pool, own, k)["would_help"]
    assert len(help_) > 3
    for each in help_:
        assert each["sample"] == best_next(pool, covered, left, k)
        added = pool.weight(fired[each["sample"]] - covered, k)
        assert each["adds"] == pytest.approx(added / total, rel=1e-12)
        assert added > 0
        covered |= fired[each["sample"]]
        left.remove(each["sample"])


def test_fewer_than_ten_help_where_fewer_complete_the_cover(pool: Pool, own: Measured) -> None:
    found = audit(pool, own, 2.0)
    assert len(found["would_help"]) < SHOWN
    assert found["weighted_coverage"] + sum(each["adds"] for each in found["would_help"]) == pytest.approx(1, rel=1e-12)


def test_ten_help_where_ten_do_not_complete_the_cover(pool: Pool, own: Measured) -> None:
    found = audit(pool, own, 4.0)
    assert len(found["would_help"]) == SHOWN
    assert found["weighted_coverage"] + sum(each["adds"] for each in found["would_help"]) < 1


def test_a_helping_sample_is_shown_as_the_pool_holds_it(pool: Pool, own: Measured) -> None:
    columns = sample_columns(pool.store, pool.samples, "domain", "origins", "text")
    for each in audit(pool, own)["would_help"]:
        sample = each["sample"]
        assert (each["domain"], each["origins"]) == (columns["domain"][sample], columns["origins"][sample])
        assert each["text"] == columns["text"][sample][:TEXT]


@every_k
def test_the_choice_of_the_same_size_covers_what_greedy_covers(pool: Pool, own: Measured, k: float) -> None:
    covered, left = set[int](), set(range(SAMPLES))
    for _ in own.array(PEAK):
        best = best_next(pool, covered, left, k)
        covered |= pool.fired(pool, k)[best]
        left.remove(best)
    expected = pool.weight(covered, k) / pool.weight(everything(pool, k), k)
    assert audit(pool, own, k)["chosen_weighted_coverage"] == pytest.approx(expected, rel=1e-12)


# --- edges ---------------------------------------------------------------------------------------------------------


def test_a_set_larger_than_the_pool_stands_beside_the_whole_pool(pool: Pool, own: Measured) -> None:
    twice = Measured(pool.store, own.samples, (*own.statistics, *pool.statistics))
    found = audit(pool, twice)
    assert found["samples"] > SAMPLES
    assert (found["coverage"], found["random_coverage"], found["chosen_weighted_coverage"]) == (1, 1, 1)


def test_without_any_outlier_channel_nothing_is_missed_and_nothing_helps(pool: Pool, own: Measured) -> None:
    found = audit(pool, own, 1e6)
    names = ("outlier_channels", "coverage", "weighted_coverage", "chosen_weighted_coverage", "surrogate_bound")
    assert [found[name] for name in names] == [0] * 5
    assert (found["coverage_by_block"], found["heaviest_missed"], found["would_help"]) == ({}, [], [])
    assert found["gram_distance"] == audit(pool, own)["gram_distance"]


@pytest.mark.parametrize("k", [2.0, 4.0, 1e6])
def test_an_audit_is_plain_json(pool: Pool, own: Measured, k: float) -> None:
    found = audit(pool, own, k)
    found["coverage_by_block"] = {str(block): share for block, share in found["coverage_by_block"].items()}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_set_measured_at_other_sites_is_refused(pool: Pool, files: Path) -> None:
    other = Measured(pool.store, *measure_texts(pool.store, files, files / "own.jsonl", sites="block_inputs"))
    with pytest.raises(StorageError, match="the calibration set was not measured at the pool's sites"):
        audit(pool, other)
