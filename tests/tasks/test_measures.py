"""The measures of a set on a tiny model, against Python sets made from the stored peaks."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from covercal.recipe import Model, TextSource
from storage.arrays import read_array
from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Ref
from storage.tables import read_table
from tasks.cached import Build
from tasks.capture import CHANNELS, ENERGY, PEAK, capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.measures import cover_measures, domain_mix, measure_set, read_measures
from tasks.pool import make_pool, sample_columns
from tasks.thresholds import OUTLIERS, coverage_matrix, find_outliers
from tests import tiny

SAMPLES = 24
SHARD_SAMPLES = 10  # the last shard is shorter
SETS = [(5,), (0, 7), (1, 2, 3, 9, 11, 20), tuple(range(SAMPLES))]
every_set = pytest.mark.parametrize("samples", SETS, ids=len)


@dataclass
class Measured:
    """Texts as samples of a tiny model, and their activations."""

    store: ArtifactStore
    samples: Ref
    statistics: tuple[Ref, ...]

    def array(self, name: str) -> npt.NDArray[np.float64]:
        """Return an array of the statistics over all samples."""
        return np.concatenate([read_array(self.store.path(ref) / name) for ref in self.statistics]).astype(np.float64)

    def energies(self) -> list[npt.NDArray[np.float64]]:
        """Return the energies, (samples, channels of the site), site after site."""
        sites = read_table(self.store.path(self.statistics[0]) / CHANNELS)["site"].to_numpy()
        return [self.array(ENERGY)[:, sites == site] for site in np.unique(sites)]


@dataclass
class Pool(Measured):
    """A pool, whose outlier channels count."""

    def outliers(self, k: float = 4.0) -> Ref:
        inputs = {"statistics": self.statistics, "rule": "sigma", "k": k, "weighting": "full"}
        return find_outliers.run(self.store, "outliers", {**inputs, "lowered": (), "lowered_k": None}).ref

    def channels(self, k: float = 4.0) -> list[dict[str, Any]]:
        """Return the outlier channels."""
        rows: list[dict[str, Any]] = read_table(self.store.path(self.outliers(k)) / OUTLIERS).to_pylist()
        return rows

    def weight(self, channels: set[int], k: float = 4.0) -> float:
        rows = self.channels(k)
        return math.fsum(rows[i]["weight"] for i in channels)

    def fired(self, by: Measured, k: float = 4.0) -> list[set[int]]:
        """Return, for each sample of a set, the pool's outlier channels above whose threshold it comes."""
        rows, peaks = self.channels(k), by.array(PEAK)
        return [{i for i, row in enumerate(rows) if peak[row["position"]] > row["threshold"]} for peak in peaks]

    def inputs(self, samples: tuple[int, ...], k: float = 4.0) -> dict[str, Any]:
        return {"pool": self.samples, "outliers": self.outliers(k), "statistics": self.statistics, "samples": samples}

    def measures(self, samples: tuple[int, ...], k: float = 4.0) -> dict[str, Any]:
        made = measure_set.run(self.store, "measures", self.inputs(samples, k))
        return read_measures(self.store, made.ref)


def measure_texts(
    store: ArtifactStore, files: Path, texts: Path, samples: int | None = None, sites: str = "linear_inputs"
) -> tuple[Ref, tuple[Ref, ...]]:
    """Cut texts into samples, run them through the model, and return the samples and their statistics."""
    model = identify_model(Model(source=str(files / "model")), store)
    source = identify_text(TextSource(path=str(texts), domain="domain"), store)
    settings = {"lengths": (16, 24), "packing": "join", "samples": samples, "seed": 0, "imported": None}
    cut = {"sources": (source,), "tokenizer": TokenizerIdentity(model), **settings}
    pool = make_pool.run(store, "pool", cut).ref
    place = {"model": model, "imported": None, "pool": pool, "dtype": "float32", "device": "cpu"}
    wanted = [{**place, "sites": sites, "skip_tokens": 1, "shard": s} for s in pool_shards(store, pool, SHARD_SAMPLES)]
    return pool, tuple(capture_shard.run(store, "statistics", each).ref for each in wanted)


def cover_by_sets(pool: Pool, fired: list[set[int]], k: float = 4.0) -> dict[str, Any]:
    """Return what a set covers of a pool's outlier channels, counted by hand."""
    rows, covered = pool.channels(k), set().union(*fired)
    everything = set(range(len(rows)))
    blocks = {row["block"]: {i for i in everything if rows[i]["block"] == row["block"]} for row in rows}
    alike = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(fired, 2)]
    return {
        "outlier_channels": len(rows),
        "coverage": len(covered) / len(rows),
        "weighted_coverage": pool.weight(covered, k) / pool.weight(everything, k),
        "surrogate_bound": pool.weight(everything - covered, k),
        "always_fired": len(set.intersection(*pool.fired(pool, k))) / len(rows),
        "jaccard": math.fsum(alike) / len(alike) if alike else 0.0,
        "coverage_by_block": {str(block): len(covered & mine) / len(mine) for block, mine in blocks.items()},
    }


def gram_distance_by_hand(own: Sequence[npt.NDArray[np.float64]], pool: Sequence[npt.NDArray[np.float64]]) -> float:
    """Return the root mean over sites of the squared relative distance of mean energies."""
    squared = [
        np.linalg.norm(mine.mean(axis=0) - whole.mean(axis=0)) ** 2 / np.linalg.norm(whole.mean(axis=0)) ** 2
        for mine, whole in zip(own, pool, strict=True)
    ]
    return math.sqrt(math.fsum(squared) / len(squared))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.recipe_value(folder)
    return folder


@pytest.fixture(scope="module")
def pool(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    return Pool(store, *measure_texts(store, files, files / "pool.jsonl", SAMPLES))


def test_the_pool_has_channels_that_tell_its_samples_apart(pool: Pool) -> None:
    fired = pool.fired(pool)
    assert 0 < min(map(len, fired)) < max(map(len, fired)) < len(set().union(*fired)) == len(pool.channels())


@every_set
def test_a_set_covers_what_its_peaks_say(pool: Pool, samples: tuple[int, ...]) -> None:
    fired = pool.fired(pool)
    expected = cover_by_sets(pool, [fired[s] for s in samples])
    found = pool.measures(samples)
    by_block = expected.pop("coverage_by_block")
    assert found["coverage_by_block"] == pytest.approx(by_block, rel=1e-12)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, SAMPLES])
def test_random_coverage_is_the_mean_over_all_sets_of_that_size(pool: Pool, size: int) -> None:
    coverage, weights = coverage_matrix(pool.store, pool.outliers())
    covered = [coverage[list(chosen)].any(axis=0) for chosen in combinations(range(SAMPLES), size)]
    found = pool.measures(tuple(range(size)))
    assert found["random_coverage"] == pytest.approx(np.mean(covered), rel=1e-12)
    expected = np.mean([weights[each].sum() for each in covered]) / weights.sum()
    assert found["random_weighted_coverage"] == pytest.approx(expected, rel=1e-12)


@every_set
def test_gram_distance_is_that_of_the_stored_energies(pool: Pool, samples: tuple[int, ...]) -> None:
    sites = pool.energies()
    assert len(sites) == 4 * tiny.BLOCKS
    expected = gram_distance_by_hand([site[list(samples)] for site in sites], sites)
    assert pool.measures(samples)["gram_distance"] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@every_set
def test_the_domain_mix_counts_the_set(pool: Pool, samples: tuple[int, ...]) -> None:
    domains = sample_columns(pool.store, pool.samples, "domain")["domain"]
    mix = pool.measures(samples)["domains"]
    assert sum(mix.values()) == len(samples)
    assert mix == {name: sum(domains[s] == name for s in samples) for name in {domains[s] for s in samples}}


def test_the_whole_pool_covers_itself_and_is_no_distance_away(pool: Pool) -> None:
    found = pool.measures(tuple(range(SAMPLES)))
    assert (found["coverage"], found["weighted_coverage"], found["random_coverage"]) == (1, 1, 1)
    assert set(found["coverage_by_block"].values()) == {1}
    assert (found["surrogate_bound"], found["gram_distance"]) == (0, 0)


def test_every_further_sample_lowers_the_bound_by_what_it_newly_fires(pool: Pool) -> None:
    fired, covered = pool.fired(pool), set[int]()
    total = pool.weight(set(range(len(pool.channels()))))
    for count in range(1, 6):
        covered |= fired[count - 1]
        found = pool.measures(tuple(range(count)))
        assert found["surrogate_bound"] == pytest.approx(total - pool.weight(covered), rel=1e-12)


def test_the_order_of_a_set_changes_none_of_its_measures(pool: Pool) -> None:
    straight, turned = pool.measures((1, 2, 3, 9)), pool.measures((9, 3, 1, 2))
    for name in straight:
        assert turned[name] == pytest.approx(straight[name], rel=1e-12)


def test_one_sample_is_like_nothing(pool: Pool) -> None:
    found = pool.measures((5,))
    assert (found["jaccard"], sum(found["domains"].values())) == (0, 1)


def test_without_any_outlier_channel_there_is_nothing_to_cover(pool: Pool) -> None:
    found = pool.measures((1, 2), k=1e6)
    assert found["coverage_by_block"] == {}
    names = ("outlier_channels", "coverage", "weighted_coverage", "random_coverage", "random_weighted_coverage")
    assert [found[name] for name in (*names, "surrogate_bound", "always_fired")] == [0] * 7
    assert found["gram_distance"] == pool.measures((1, 2))["gram_distance"]


def test_an_empty_set_covers_nothing(pool: Pool) -> None:
    coverage, weights = coverage_matrix(pool.store, pool.outliers())
    found = cover_measures(pool.store, pool.outliers(), coverage, weights, coverage[:0])
    names = ("coverage", "weighted_coverage", "random_coverage", "random_weighted_coverage", "jaccard")
    assert [found[name] for name in names] == [0] * 5
    assert set(found["coverage_by_block"].values()) == {0}
    assert found["surrogate_bound"] == pytest.approx(weights.sum(), rel=1e-12)


def test_a_set_larger_than_the_pool_stands_beside_the_whole_pool(pool: Pool) -> None:
    coverage, weights = coverage_matrix(pool.store, pool.outliers())
    found = cover_measures(pool.store, pool.outliers(), coverage, weights, np.concatenate([coverage, coverage[:3]]))
    assert (found["coverage"], found["random_coverage"]) == (1, 1)


def test_domains_are_named_in_order_and_counted() -> None:
    assert list(domain_mix(["code", "animals", "code"]).items()) == [("animals", 1), ("code", 2)]
    assert domain_mix([]) == {}


def test_two_builds_make_the_same_plain_json(pool: Pool, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        measure_set.build(Build(folder, pool.store, "measures", tmp_path / "work"), **pool.inputs((1, 2, 3)))
    first, second = ([file.read_bytes() for file in folder.iterdir()] for folder in folders)
    assert first == second
    value = json.loads(first[0], parse_constant=pytest.fail)  # no NaN, no Infinity
    assert value == pool.measures((1, 2, 3))


def test_only_another_set_is_measured_anew(pool: Pool) -> None:
    outcomes = [measure_set.run(pool.store, "measures", pool.inputs(samples)) for samples in ((4, 6), (4, 6), (4, 8))]
    assert [outcome.decision for outcome in outcomes] == [Decision.BUILT, Decision.HIT, Decision.BUILT]
    assert "the chosen samples" in outcomes[2].reason
