from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from covercal.decoder import make_decoder
from covercal.errors import CovercalError
from covercal.recipe import Model, TextSource
from covercal.thresholds import RULES, WEIGHTINGS
from storage.arrays import Columns, write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Outcome, Ref, Request
from storage.tables import read_table, write_table
from tasks.capture import CHANNELS, PEAK, capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.pool import make_pool, sample_tokens
from tasks.thresholds import (
    COVERAGE,
    OUTLIERS,
    STRIP_BITS,
    THRESHOLDS,
    WEIGHT_SQL,
    BitColumns,
    coverage_matrix,
    find_outliers,
    outlier_columns,
    poor_sites,
    site_bounds,
)
from tests import tiny

WIDTHS = (24, 40, 11)
SHARDS = ((5, 20), (3, 31), (4, 20))  # samples, tokens of each

Activations = list[npt.NDArray[np.float32]]  # one array (samples, tokens, channels) for each site


def activations(seed: int = 0, scale: float = 1.0) -> list[Activations]:
    """Return random activations, shard by shard, in which a few channels of every site stand out."""
    generator = np.random.default_rng(seed)
    loudness = [np.exp(generator.normal(0, 0.8, width)) for width in WIDTHS]
    return [
        [
            (scale * level * generator.standard_t(4, (samples, tokens, level.size))).astype(np.float32)
            for level in loudness
        ]
        for samples, tokens in SHARDS
    ]


def column_norms(seed: int = 0) -> list[npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed + 100)
    return [generator.uniform(0.5, 2, width).astype(np.float32) for width in WIDTHS]


def write_shard(folder: Path, sites: Activations, norms: Sequence[npt.NDArray[np.float32]]) -> None:
    """Write the statistics of a shard from its raw activations."""
    raw = [site.astype(np.float64) for site in sites]
    widths = [site.shape[2] for site in raw]
    peak = np.concatenate([np.abs(site).max(axis=1) for site in sites], axis=1)
    write_array(folder / PEAK, peak)
    columns: Mapping[str, Any] = {
        "position": np.arange(sum(widths), dtype=np.int32),
        "site": np.repeat(np.arange(len(widths), dtype=np.int32), widths),
        "block": np.repeat(np.arange(len(widths), dtype=np.int32) // 2, widths),
        "channel": np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        "linears": np.repeat([f"linear{index}" for index in range(len(widths))], widths),
        "absolute_sum": np.concatenate([np.abs(site).sum(axis=(0, 1)) for site in raw]),
        "square_sum": np.concatenate([np.square(site).sum(axis=(0, 1)) for site in raw]),
        "tokens": np.full(sum(widths), raw[0].shape[0] * raw[0].shape[1], dtype=np.int64),
        "peak": peak.max(axis=0),
        "column_norm": np.concatenate(norms),
    }
    write_table(folder / CHANNELS, {name: pa.array(values) for name, values in columns.items()})


def statistics(
    store: ArtifactStore, shards: list[Activations], norms: Sequence[npt.NDArray[np.float32]] | None = None
) -> tuple[Ref, ...]:
    """Return artifacts that hold the statistics of these shards."""
    norms = column_norms() if norms is None else norms
    made = []
    for shard in shards:
        digest = sha256(b"".join(site.tobytes() for site in (*shard, *norms))).hexdigest()
        request = Request("statistics", 1, {"activations": digest})
        made.append(store.build_once(request, lambda folder, shard=shard: write_shard(folder, shard, norms)).ref)
    return tuple(made)


SETTINGS: Mapping[str, Any] = {"rule": "sigma", "k": 6.0, "weighting": "full", "lowered": (), "lowered_k": None}


def outliers(store: ArtifactStore, refs: tuple[Ref, ...], k: float = 6.0, **settings: Any) -> Outcome:
    return find_outliers.run(store, "outliers", {**SETTINGS, "statistics": refs, "k": k, **settings})


def table(store: ArtifactStore, ref: Ref, name: str = OUTLIERS) -> dict[str, npt.NDArray[Any]]:
    found = read_table(store.path(ref) / name)
    return {column: found[column].to_numpy() for column in found.column_names}


def whole(shards: list[Activations]) -> list[npt.NDArray[np.float64]]:
    """Return |x| of every site over all shards, (samples and tokens, channels)."""
    return [
        np.concatenate([np.abs(shard[site].astype(np.float64)).reshape(-1, width) for shard in shards])
        for site, width in enumerate(WIDTHS)
    ]


def expected_thresholds(shards: list[Activations], k: float) -> npt.NDArray[np.float64]:
    """Return mean + k standard deviations of |x| for every site."""
    return np.asarray([site.mean() + k * site.std() for site in whole(shards)])


def peaks(shards: list[Activations]) -> npt.NDArray[np.float64]:
    """Return (samples, channels of all sites)."""
    rows = [np.concatenate([np.abs(site).max(axis=1) for site in shard], axis=1) for shard in shards]
    return np.concatenate(rows).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Found:
    """Outliers of some statistics: thresholds (sites,), positions and weights (outliers,), coverage (samples, …)."""

    thresholds: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.bool_]


def found_in(store: ArtifactStore, ref: Ref) -> Found:
    """Return what an artifact holds."""
    coverage, weights = coverage_matrix(store, ref)
    positions = table(store, ref)["position"].astype(np.int64)
    return Found(table(store, ref, THRESHOLDS)["threshold"], positions, weights, coverage)


def expected(
    shards: list[Activations],
    rule: str = "sigma",
    k: float = 6.0,
    weighting: str = "full",
    lowered: Sequence[int] = (),
    lowered_k: float | None = None,
) -> Found:
    """Return what must be found, from the raw activations by numpy in float64."""
    of_site = np.split(peaks(shards), np.cumsum(WIDTHS)[:-1], axis=1)
    factors = [k if lowered_k is None or site not in lowered else lowered_k for site in range(len(WIDTHS))]
    limits = np.array(
        [LIMITS[rule](x, p, factor) for x, p, factor in zip(whole(shards), of_site, factors, strict=True)]
    )
    by_channel, reference = np.repeat(limits, WIDTHS), peaks(shards).max(axis=0)
    positions = np.flatnonzero(reference > by_channel)
    ratio = (reference / by_channel)[positions]
    norm = np.concatenate(column_norms()).astype(np.float64)[positions]
    fires = (peaks(shards) > by_channel)[:, positions]
    return Found(limits, positions, WEIGHTS[weighting](ratio, norm), fires)


Floats = npt.NDArray[np.float64]
LIMITS: Mapping[str, Callable[[Floats, Floats, float], float]] = {  # of a site's tokens |x| and its peaks
    "sigma": lambda x, _, k: float(x.mean() + k * x.std()),
    "mad": lambda _, p, k: float(np.median(p) + k * 1.4826 * np.median(np.abs(p - np.median(p)))),
    "quantile": lambda _, p, k: float(np.quantile(p, k)),
    "median": lambda _, p, k: float(k * np.median(p)),
    "absolute": lambda _, __, k: k,
}
WEIGHTS: Mapping[str, Callable[[Floats, Floats], Floats]] = {  # of peak / threshold and the norm of the column
    "full": lambda ratio, norm: ratio**2 * norm,
    "squared_norm": lambda ratio, norm: (ratio * norm) ** 2,
    "magnitude": lambda ratio, _: ratio**2,
    "column_norm": lambda _, norm: norm,
    "unweighted": lambda ratio, _: np.ones_like(ratio),
}


def assert_same(found: Found, wanted: Found) -> None:
    np.testing.assert_allclose(found.thresholds, wanted.thresholds, rtol=1e-6)
    np.testing.assert_array_equal(found.positions, wanted.positions)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=3e-6)
    np.testing.assert_array_equal(found.coverage, wanted.coverage)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store for tests that only read what they find; every artifact has a key of its own."""
    return ArtifactStore(tmp_path_factory.mktemp("shared"))


# --- against float64 -----------------------------------------------------------------------------------------------

KS = (0.5, 3.0, 6.0, 12.0)
RULE_KS = {"sigma": KS, "mad": (0.5, 3.0, 12.0), "quantile": (0.01, 0.5, 0.9, 0.999)}
RULE_KS |= {"median": (0.5, 1.0, 3.0), "absolute": (2.0, 5.0, 20.0)}
rules_and_ks = pytest.mark.parametrize(("rule", "k"), [(rule, k) for rule, ks in RULE_KS.items() for k in ks])


def test_every_rule_and_weighting_of_a_recipe_is_tested_here_and_has_its_sql() -> None:
    assert set(RULE_KS) == set(LIMITS) == set(RULES)
    assert set(WEIGHTS) == set(WEIGHT_SQL) == set(WEIGHTINGS)


@rules_and_ks
def test_thresholds_outliers_weights_and_coverage_are_those_of_numpy(
    shared: ArtifactStore, rule: str, k: float
) -> None:
    shards = activations(1)
    made = outliers(shared, statistics(shared, shards), k, rule=rule)
    assert_same(found_in(shared, made.ref), expected(shards, rule, k))


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("rule", RULE_KS)
def test_every_weighting_goes_with_every_rule(shared: ArtifactStore, rule: str, weighting: str) -> None:
    shards, k = activations(1), RULE_KS[rule][1]
    found = found_in(shared, outliers(shared, statistics(shared, shards), k, rule=rule, weighting=weighting).ref)
    assert 0 < found.positions.size < sum(WIDTHS)
    assert_same(found, expected(shards, rule, k, weighting))


@pytest.mark.parametrize("chunk", [1, 7, 16, 25, 75])
@pytest.mark.parametrize(("rule", "k"), [("sigma", 3.0), ("mad", 3.0), ("quantile", 0.9)])
def test_sites_may_straddle_the_chunks_of_the_stored_peaks(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, chunk: int, rule: str, k: float
) -> None:
    monkeypatch.setattr("storage.arrays.CHUNK_COLUMNS", chunk)
    shards = activations(2)
    refs = statistics(store, shards)
    assert {zarr.open_array(store.path(ref) / PEAK).chunks[1] for ref in refs} == {chunk}
    assert_same(found_in(store, outliers(store, refs, k, rule=rule).ref), expected(shards, rule, k))


@pytest.mark.parametrize("lowered", [(0,), (2,), (0, 1), (2, 0), (0, 1, 2), (7,), ()])
@pytest.mark.parametrize(("rule", "k", "lowered_k"), [("sigma", 6.0, 1.0), ("mad", 6.0, 2.0), ("absolute", 20.0, 3.0)])
def test_at_lowered_sites_the_lower_k_takes_the_place_of_k(
    shared: ArtifactStore, rule: str, k: float, lowered_k: float, lowered: tuple[int, ...]
) -> None:
    shards = activations(3)
    made = outliers(shared, statistics(shared, shards), k, rule=rule, lowered=lowered, lowered_k=lowered_k)
    assert_same(found_in(shared, made.ref), expected(shards, rule, k, lowered=lowered, lowered_k=lowered_k))


@pytest.mark.parametrize("rule", RULE_KS)
def test_lowering_every_site_is_the_lower_k_everywhere(shared: ArtifactStore, rule: str) -> None:
    low, *_, high = RULE_KS[rule]
    refs = statistics(shared, activations(3))
    lowered = outliers(shared, refs, high, rule=rule, lowered=(0, 1, 2), lowered_k=low).ref
    plain = outliers(shared, refs, low, rule=rule).ref
    assert (lowered.digest, lowered.key == plain.key) == (plain.digest, False)


def test_a_lowered_site_keeps_its_outliers_and_the_others_keep_their_weights(shared: ArtifactStore) -> None:
    refs = statistics(shared, activations(3))
    before, after = (
        table(shared, outliers(shared, refs, 6.0, **more).ref) for more in ({}, {"lowered": (1,), "lowered_k": 1.0})
    )
    assert set(before["position"]) < set(after["position"])
    weights = [dict(zip(each["position"], each["weight"], strict=True)) for each in (before, after)]
    for position, site in zip(before["position"], before["site"], strict=True):
        assert (weights[0][position] < weights[1][position]) == (site == 1)
        assert (weights[0][position] == weights[1][position]) == (site != 1)


@pytest.mark.parametrize("rule", RULE_KS)
def test_the_peaks_are_read_site_by_site(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    asked: list[tuple[int, int]] = []
    read = Columns.read
    monkeypatch.setattr(Columns, "read", lambda self, *ends: asked.append(ends) or read(self, *ends))
    outliers(store, statistics(store, activations()), RULE_KS[rule][0], rule=rule)
    assert set(asked) == {(0, 24), (24, 64), (64, 75)}
    assert len(asked) == len(WIDTHS)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_is_the_mean_plus_k_standard_deviations_over_all_tokens_of_all_shards(
    store: ArtifactStore, k: float, seed: int
) -> None:
    shards = activations(seed)
    found = table(store, outliers(store, statistics(store, shards), k).ref, THRESHOLDS)
    np.testing.assert_allclose(found["threshold"], expected_thresholds(shards, k), rtol=1e-9)


def test_the_mean_and_the_standard_deviation_are_kept_beside_the_threshold(store: ArtifactStore) -> None:
    shards = activations()
    found = table(store, outliers(store, statistics(store, shards)).ref, THRESHOLDS)
    np.testing.assert_allclose(found["mean"], [site.mean() for site in whole(shards)], rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], [site.std() for site in whole(shards)], rtol=1e-9)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("seed", range(3))
def test_the_outlier_channels_are_those_whose_peak_in_any_sample_is_above_their_sites_threshold(
    store: ArtifactStore, k: float, seed: int
) -> None:
    shards = activations(seed)
    limits = np.repeat(expected_thresholds(shards, k), WIDTHS)
    found = table(store, outliers(store, statistics(store, shards), k).ref)
    assert found["position"].tolist() == np.flatnonzero(peaks(shards).max(axis=0) > limits).tolist()


@pytest.mark.parametrize("k", KS)
def test_a_weight_is_the_squared_peak_over_the_threshold_times_the_column_norm(store: ArtifactStore, k: float) -> None:
    shards = activations()
    limits = np.repeat(expected_thresholds(shards, k), WIDTHS)
    reference = peaks(shards).max(axis=0)
    expected = (reference / limits) ** 2 * np.concatenate(column_norms()).astype(np.float64)
    found = table(store, outliers(store, statistics(store, shards), k).ref)
    np.testing.assert_allclose(found["weight"], expected[found["position"]], rtol=1e-9)
    np.testing.assert_array_equal(found["reference_peak"], reference[found["position"]])


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("seed", range(3))
def test_the_coverage_matrix_says_which_sample_is_above_the_threshold_of_which_channel(
    store: ArtifactStore, k: float, seed: int
) -> None:
    shards = activations(seed)
    limits = np.repeat(expected_thresholds(shards, k), WIDTHS)
    fires = peaks(shards) > limits
    coverage, weights = coverage_matrix(store, outliers(store, statistics(store, shards), k).ref)
    np.testing.assert_array_equal(coverage, fires[:, fires.any(axis=0)])
    assert weights.shape == (coverage.shape[1],)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_any_count_of_outliers_comes_back_from_its_packed_bits(store: ArtifactStore, count: int) -> None:
    shards = activations()
    sites = whole(shards)
    mean, sigma = (np.repeat([measure(site) for site in sites], WIDTHS) for measure in (np.mean, np.std))
    distance = (peaks(shards) - mean) / sigma
    highest = np.sort(distance.max(axis=0))[::-1]
    k = (highest[count - 1] + highest[count]) / 2
    coverage, _ = coverage_matrix(store, outliers(store, statistics(store, shards), float(k)).ref)
    assert coverage.shape[1] == count
    np.testing.assert_array_equal(coverage, (distance > k)[:, (distance > k).any(axis=0)])


@pytest.mark.parametrize("k", KS)
def test_every_outlier_channel_is_fired_by_some_sample_and_weighs_something(store: ArtifactStore, k: float) -> None:
    coverage, weights = coverage_matrix(store, outliers(store, statistics(store, activations()), k).ref)
    assert coverage.any(axis=0).all()
    assert (weights > 0).all()


def test_an_outlier_says_where_it_is(store: ArtifactStore) -> None:
    found = table(store, outliers(store, statistics(store, activations()), 3.0).ref)
    starts = np.cumsum([0, *WIDTHS])
    assert len(set(found["site"].tolist())) == len(WIDTHS)
    np.testing.assert_array_equal(found["position"], starts[found["site"]] + found["channel"])
    np.testing.assert_array_equal(found["block"], found["site"] // 2)
    assert found["linears"].tolist() == [f"linear{site}" for site in found["site"]]


def test_the_manifest_counts_outliers_and_channels(store: ArtifactStore) -> None:
    made = outliers(store, statistics(store, activations()), 3.0)
    assert made.info == {"outliers": len(table(store, made.ref)["position"]), "channels": sum(WIDTHS)}


# --- invariants ----------------------------------------------------------------------------------------------------


def test_a_higher_k_raises_thresholds_and_keeps_a_part_of_the_outliers(store: ArtifactStore) -> None:
    refs = statistics(store, activations())
    made = [outliers(store, refs, k).ref for k in KS]
    limits = [table(store, ref, THRESHOLDS)["threshold"] for ref in made]
    sets = [set(table(store, ref)["position"].tolist()) for ref in made]
    assert all((low < high).all() for low, high in pairwise(limits))
    assert all(many > few for many, few in pairwise(sets))


@pytest.mark.parametrize("scale", [4.0, 2.0**-10])
def test_the_scale_of_activations_changes_thresholds_in_proportion_and_no_outlier_or_weight(
    store: ArtifactStore, scale: float
) -> None:
    plain, scaled = (outliers(store, statistics(store, activations(scale=s))).ref for s in (1.0, scale))
    np.testing.assert_allclose(
        table(store, scaled, THRESHOLDS)["threshold"], scale * table(store, plain, THRESHOLDS)["threshold"], rtol=1e-12
    )
    np.testing.assert_array_equal(coverage_matrix(store, scaled)[0], coverage_matrix(store, plain)[0])
    np.testing.assert_allclose(coverage_matrix(store, scaled)[1], coverage_matrix(store, plain)[1], rtol=1e-12)


def test_column_norms_change_weights_in_proportion_and_nothing_else(store: ArtifactStore) -> None:
    norms = column_norms()
    plain, doubled = (
        outliers(store, statistics(store, activations(), [factor * norm for norm in norms])).ref
        for factor in (np.float32(1), np.float32(2))
    )
    np.testing.assert_array_equal(table(store, plain)["position"], table(store, doubled)["position"])
    np.testing.assert_allclose(table(store, doubled)["weight"], 2 * table(store, plain)["weight"], rtol=1e-12)


def test_another_order_of_shards_only_reorders_the_samples(store: ArtifactStore) -> None:
    refs = statistics(store, activations())
    ends = np.cumsum([samples for samples, _ in SHARDS])
    rows = np.split(np.arange(ends[-1]), ends[:-1])
    turned, turned_weights = coverage_matrix(store, outliers(store, refs[::-1]).ref)
    coverage, weights = coverage_matrix(store, outliers(store, refs).ref)
    np.testing.assert_array_equal(turned, coverage[np.concatenate(rows[::-1])])
    np.testing.assert_allclose(turned_weights, weights, rtol=1e-12)


def test_how_samples_are_cut_into_shards_does_not_matter(store: ArtifactStore) -> None:
    together = activations()[0]
    apart = [[site[sample : sample + 1] for site in together] for sample in range(SHARDS[0][0])]
    one, many = (outliers(store, statistics(store, shards)).ref for shards in ([together], apart))
    np.testing.assert_array_equal(coverage_matrix(store, one)[0], coverage_matrix(store, many)[0])
    np.testing.assert_allclose(coverage_matrix(store, one)[1], coverage_matrix(store, many)[1], rtol=1e-12)


def test_a_site_that_never_fires_has_no_outliers(store: ArtifactStore) -> None:
    shards = [[np.zeros_like(shard[0]), *shard[1:]] for shard in activations()]
    made = outliers(store, statistics(store, shards)).ref
    assert 0 not in table(store, made)["site"]
    assert table(store, made, THRESHOLDS)["threshold"][0] == 0


@pytest.mark.parametrize("rule", ["sigma", "mad", "median", "absolute"])
def test_a_k_that_nothing_exceeds_leaves_a_coverage_matrix_without_columns(shared: ArtifactStore, rule: str) -> None:
    made = outliers(shared, statistics(shared, activations()), 1e6, rule=rule)
    coverage, weights = coverage_matrix(shared, made.ref)
    assert coverage.shape == (sum(samples for samples, _ in SHARDS), 0)
    assert weights.shape == (0,)
    assert made.info["outliers"] == 0


@pytest.mark.parametrize("rule", ["quantile", "mad"])
def test_a_site_of_equal_peaks_has_no_outliers(shared: ArtifactStore, rule: str) -> None:
    shards = [[np.full_like(shard[0], 0.1), *shard[1:]] for shard in activations()]
    made = outliers(shared, statistics(shared, shards), 0.5, rule=rule).ref
    assert 0 not in table(shared, made)["site"]
    assert table(shared, made, THRESHOLDS)["threshold"][0] == np.float32(0.1)


@pytest.mark.parametrize(("rule", "k"), [("absolute", 1e-3), ("median", 1e-6), ("quantile", 1e-9)])
def test_a_k_that_everything_exceeds_makes_every_channel_an_outlier(shared: ArtifactStore, rule: str, k: float) -> None:
    shards = activations()
    made = outliers(shared, statistics(shared, shards), k, rule=rule)
    found = found_in(shared, made.ref)
    assert found.positions.tolist() == list(range(sum(WIDTHS)))
    assert made.info == {"outliers": sum(WIDTHS), "channels": sum(WIDTHS)}
    assert_same(found, expected(shards, rule, k))


def test_a_peak_that_equals_the_threshold_does_not_exceed_it(shared: ArtifactStore) -> None:
    shards = activations()
    highest = float(peaks(shards).max())
    refs = statistics(shared, shards)
    at, below = (outliers(shared, refs, k, rule="absolute").info["outliers"] for k in (highest, highest * (1 - 1e-9)))
    assert (at, below) == (0, 1)


def test_the_highest_quantile_leaves_each_site_its_highest_peak(shared: ArtifactStore) -> None:
    shards = activations()
    made = outliers(shared, statistics(shared, shards), 1 - 1e-9, rule="quantile").ref
    parts = np.split(peaks(shards).max(axis=0), np.cumsum(WIDTHS)[:-1])
    assert table(shared, made)["channel"].tolist() == [int(part.argmax()) for part in parts]
    assert coverage_matrix(shared, made)[0].sum(axis=0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("rule", ["mad", "median", "quantile"])
def test_a_threshold_of_zero_makes_no_weight_infinite(shared: ArtifactStore, rule: str) -> None:
    shards = activations()
    for shard in shards:
        shard[1][:, :, 2:] = 0  # a site behind a ReLU: most channels are silent in most samples
    with suppress(CovercalError):  # it may be refused
        _, weights = coverage_matrix(shared, outliers(shared, statistics(shared, shards), 0.5, rule=rule).ref)
        assert np.isfinite(weights).all()


def test_two_stores_make_the_same_bytes_of_the_same_statistics(store: ArtifactStore, tmp_path: Path) -> None:
    other = ArtifactStore(tmp_path / "other")
    first, second = (outliers(each, statistics(each, activations()), 2.0).ref for each in (store, other))
    assert first == second
    assert first.digest


# --- keys and refusals ---------------------------------------------------------------------------------------------


def test_statistics_and_every_setting_are_in_the_key() -> None:
    refs = tuple(Ref("statistics", digit * 64) for digit in "12")
    plain = {**SETTINGS, "statistics": refs}
    changes: list[dict[str, Any]] = [{}, {"statistics": refs[:1]}, {"statistics": refs[::-1]}]
    changes += [{"rule": "x"}, {"k": 5.0}, {"weighting": "x"}, {"lowered": (1,)}, {"lowered_k": 4.0}]
    assert len({find_outliers.request(plain | change).key for change in changes}) == len(changes)


@pytest.mark.parametrize("wrong", [{"rule": "quartile"}, {"weighting": "none"}])
def test_an_unknown_rule_or_weighting_commits_nothing(store: ArtifactStore, wrong: dict[str, str]) -> None:
    refs = statistics(store, activations())
    with pytest.raises(KeyError, match=next(iter(wrong.values()))):
        outliers(store, refs, **wrong)
    assert not list(store.manifests("outliers"))


# --- from the model ------------------------------------------------------------------------------------------------


def float64_inputs(folder: Path, tokens: list[npt.NDArray[np.int32]]) -> list[list[npt.NDArray[np.float64]]]:
    """Return |x| of each sample and site, (tokens but the first, channels), from the model in float64."""
    from transformers import AutoModelForCausalLM

    decoder = make_decoder(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    seen: list[npt.NDArray[np.float64]] = []
    for site in decoder.sites:
        decoder.linear(site, site.linears[0]).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0][0, 1:].abs().numpy())
        )
    rows = []
    for sample in tokens:
        seen.clear()
        with torch.no_grad():
            decoder.model(torch.from_numpy(sample.astype(np.int64))[None])
        rows.append(list(seen))
    return rows


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of a tiny model's activations in a store, and the activations themselves in float64."""

    store: ArtifactStore
    statistics: tuple[Ref, ...]
    rows: list[list[npt.NDArray[np.float64]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    files, store = tmp_path_factory.mktemp("files"), ArtifactStore(tmp_path_factory.mktemp("cache"))
    tiny.recipe_value(files)
    model = identify_model(Model(source=str(files / "model")), store)
    source = identify_text(TextSource(path=str(files / "pool.jsonl"), domain="domain"), store)
    place = {"imported": None, "model": model}
    wanted = {"lengths": (16, 32), "packing": "join", "samples": 12, "seed": 0}
    texts = {"sources": (source,), "tokenizer": TokenizerIdentity(model), "imported": None}
    pool = make_pool.run(store, "pool", texts | wanted).ref
    settings = {"sites": "linear_inputs", "skip_tokens": 1, "dtype": "float32", "device": "cpu"}
    refs = tuple(
        capture_shard.run(store, "statistics", {**place, **settings, "pool": pool, "shard": shard}).ref
        for shard in pool_shards(store, pool, 5)
    )
    return Measured(store, refs, float64_inputs(files / "model", sample_tokens(store, pool)))


@pytest.mark.parametrize(
    ("rule", "k"),
    [("sigma", 2.0), ("sigma", 4.0), ("mad", 3.0), ("quantile", 0.97), ("median", 3.0), ("absolute", 5.0)],
)
def test_from_texts_to_outliers_everything_agrees_with_the_model_in_float64(
    measured: Measured, rule: str, k: float
) -> None:
    store, rows = measured.store, measured.rows
    made = outliers(store, measured.statistics, k, rule=rule).ref
    of_site = [np.stack([row[site].max(axis=0) for row in rows]) for site in range(len(rows[0]))]
    tokens = [np.concatenate([row[site].ravel() for row in rows]) for site in range(len(rows[0]))]
    limits = [LIMITS[rule](x, p, k) for x, p in zip(tokens, of_site, strict=True)]
    expected_peaks = np.concatenate(of_site, axis=1)
    flat_limits = np.repeat(limits, [p.shape[1] for p in of_site])
    np.testing.assert_allclose(table(store, made, THRESHOLDS)["threshold"], limits, rtol=1e-5)
    positions = table(store, made)["position"]
    assert 0 < positions.size < flat_limits.size
    assert positions.tolist() == np.flatnonzero((expected_peaks > flat_limits).any(axis=0)).tolist()
    coverage, _ = coverage_matrix(store, made)
    np.testing.assert_array_equal(coverage, (expected_peaks > flat_limits)[:, positions])


# --- bits ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.lists(st.integers(0, 20), max_size=8), st.integers(0, 2**32))
def test_bits_that_come_some_columns_at_a_time_are_packed_as_the_whole(rows: int, widths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [generator.random((rows, width)) < generator.choice([0.05, 0.4, 1.0]) for width in widths]
    bits = BitColumns(rows)
    for part in parts:
        bits.add(np.packbits(part, axis=1), part.shape[1])
    every = np.concatenate([np.zeros((rows, 0), dtype=bool), *(part[:, part.any(axis=0)] for part in parts)], axis=1)
    assert bits.columns == every.shape[1]
    np.testing.assert_array_equal(bits.packed(), np.packbits(every, axis=1), strict=True)


def test_wide_parts_are_packed_some_rows_at_a_time() -> None:
    parts = [np.random.default_rng(width).random((37, width)) < 0.02 for width in (3, STRIP_BITS // 16 + 5)]
    bits = BitColumns(37)
    for part in parts:
        bits.add(np.packbits(part, axis=1), part.shape[1])
    every = np.concatenate([part[:, part.any(axis=0)] for part in parts], axis=1)
    np.testing.assert_array_equal(bits.packed(), np.packbits(every, axis=1), strict=True)


def test_bits_can_be_packed_more_than_once() -> None:
    bits = BitColumns(2)
    bits.add(np.packbits(np.ones((2, 3), dtype=bool), axis=1), 3)
    first = bits.packed()
    bits.add(np.packbits(np.ones((2, 7), dtype=bool), axis=1), 7)
    assert first.tolist() == [[0b11100000]] * 2
    assert bits.packed().tolist() == [[255, 0b11000000]] * 2


@pytest.mark.parametrize("k", KS)
def test_the_stored_bits_are_those_of_the_whole_matrix(shared: ArtifactStore, k: float) -> None:
    shards = activations(4)
    ref = outliers(shared, statistics(shared, shards), k).ref
    stored = zarr.open_array(shared.path(ref) / COVERAGE)
    np.testing.assert_array_equal(stored[:], np.packbits(expected(shards, k=k).coverage, axis=1), strict=True)


# --- what others read ----------------------------------------------------------------------------------------------


def test_columns_of_the_outliers_are_those_of_the_table(shared: ArtifactStore) -> None:
    ref = outliers(shared, statistics(shared, activations()), 3.0).ref
    found = outlier_columns(shared, ref, "weight", "site", "linears")
    assert list(found) == ["weight", "site", "linears"]
    for name, values in found.items():
        np.testing.assert_array_equal(values, table(shared, ref)[name])


def test_site_bounds_are_the_columns_of_every_site_in_any_shard(shared: ArtifactStore) -> None:
    folders = [shared.path(ref) for ref in statistics(shared, activations())]
    for some in (folders, folders[1:], folders[2:]):
        assert list(site_bounds(some)) == [(0, 24), (24, 64), (64, 75)]


# --- sites that were reconstructed poorly --------------------------------------------------------------------------

BLOCKS = 12
LINEARS = ("self_attn.q_proj, self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def found_sites(store: ArtifactStore) -> Ref:
    """Outliers of a model of 12 blocks, as far as poor sites need them."""
    count = BLOCKS * len(LINEARS)
    columns = {
        "site": pa.array(np.arange(count, dtype=np.int32)),
        "block": pa.array(np.arange(count, dtype=np.int32) // len(LINEARS)),
        "linears": pa.array(LINEARS * BLOCKS),
    }
    return store.build_once(
        Request("outliers", 1, {"blocks": BLOCKS}), lambda folder: write_table(folder / THRESHOLDS, columns)
    ).ref


def report(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a checkpoint's rows about its linears, with one error unless another is given."""
    names = [f"model.layers.{b}.{name}" for b in range(BLOCKS) for group in LINEARS for name in group.split(", ")]
    assert set(errors) <= set(names)
    return [{"name": name, "output_error": errors.get(name, 0.01), "outputs": 8} for name in names]


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.0.self_attn.k_proj", 0),
        ("model.layers.1.mlp.down_proj", 5),  # and not block 11
        ("model.layers.11.mlp.down_proj", 35),
        ("model.layers.10.self_attn.o_proj", 31),
    ],
)
def test_one_linear_with_a_large_error_makes_its_site_poor(
    store: ArtifactStore, found_sites: Ref, name: str, site: int
) -> None:
    assert poor_sites(store, found_sites, report({name: 0.5})) == (site,)


def test_with_equal_errors_no_site_is_poor(store: ArtifactStore, found_sites: Ref) -> None:
    assert poor_sites(store, found_sites, report({})) == ()


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_site_is_the_root_mean_square_over_its_linears(
    store: ArtifactStore, found_sites: Ref, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = [row | {"output_error": float(generator.lognormal(0, 1))} for row in report({})]
    errors = np.array([row["output_error"] for row in rows]).reshape(BLOCKS, 4)
    attention = np.sqrt((errors[:, 0] ** 2 + errors[:, 1] ** 2) / 2)
    by_site = np.stack([attention, errors[:, 2], errors[:, 3]], axis=1).ravel()
    poor = np.flatnonzero(by_site > np.median(by_site) + 2 * by_site.std())
    assert poor.size
    generator.shuffle(rows)
    assert poor_sites(store, found_sites, rows) == tuple(poor.tolist())


def test_a_linear_that_was_not_calibrated_makes_no_site_poor(store: ArtifactStore, found_sites: Ref) -> None:
    rows = report({"model.layers.0.self_attn.k_proj": 0.5})
    for row in rows:
        if row["name"].endswith(("q_proj", "layers.5.mlp.down_proj")):
            row["output_error"] = None
    assert poor_sites(store, found_sites, rows) == (0,)
    assert poor_sites(store, found_sites, [row | {"output_error": None} for row in rows]) == ()


def test_an_expert_is_of_its_own_site_though_another_blocks_name_ends_its_own(
    store: ArtifactStore, found_sites: Ref
) -> None:
    name = "mlp.experts.0.mlp.down_proj"
    sites = read_table(store.path(found_sites) / THRESHOLDS).to_pylist()
    sites.append({"site": 36, "block": 9, "linears": name})
    columns = {column: pa.array([row[column] for row in sites]) for column in ("site", "block", "linears")}
    request = Request("outliers", 1, {"experts": 1})
    ref = store.build_once(request, lambda folder: write_table(folder / THRESHOLDS, columns)).ref
    rows = [*report({}), {"name": f"model.layers.9.{name}", "output_error": 0.5}]
    assert poor_sites(store, ref, rows) == (36,)


def test_poor_sites_can_be_lowered(store: ArtifactStore, found_sites: Ref) -> None:
    lowered = poor_sites(store, found_sites, report({"model.layers.0.self_attn.o_proj": 0.5}))
    shards = activations()
    made = outliers(store, statistics(store, shards), 6.0, lowered=lowered, lowered_k=1.0)
    assert_same(found_in(store, made.ref), expected(shards, k=6.0, lowered=(1,), lowered_k=1.0))
