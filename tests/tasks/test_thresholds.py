from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from covercal.decoder import make_decoder
from covercal.errors import CovercalError
from covercal.recipe import Model, TextSource
from storage.arrays import write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Outcome, Ref, Request
from storage.tables import read_table, write_table
from tasks.capture import CHANNELS, PEAK, capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.pool import make_pool, sample_tokens
from tasks.thresholds import OUTLIERS, THRESHOLDS, coverage_matrix, find_outliers
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


def outliers(store: ArtifactStore, refs: tuple[Ref, ...], k: float = 6.0) -> Outcome:
    inputs = {"statistics": refs, "rule": "sigma", "k": k, "weighting": "full"}
    return find_outliers.run(store, "outliers", inputs)


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


# --- against float64 -----------------------------------------------------------------------------------------------

KS = (0.5, 3.0, 6.0, 12.0)


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


def test_a_k_that_nothing_exceeds_leaves_a_coverage_matrix_without_columns(store: ArtifactStore) -> None:
    made = outliers(store, statistics(store, activations()), 1e6)
    coverage, weights = coverage_matrix(store, made.ref)
    assert coverage.shape == (sum(samples for samples, _ in SHARDS), 0)
    assert weights.shape == (0,)
    assert made.info["outliers"] == 0


def test_two_stores_make_the_same_bytes_of_the_same_statistics(store: ArtifactStore, tmp_path: Path) -> None:
    other = ArtifactStore(tmp_path / "other")
    first, second = (outliers(each, statistics(each, activations()), 2.0).ref for each in (store, other))
    assert first == second
    assert first.digest


# --- keys and refusals ---------------------------------------------------------------------------------------------


def test_statistics_rule_k_and_weighting_are_in_the_key() -> None:
    refs = tuple(Ref("statistics", digit * 64) for digit in "12")
    plain = {"statistics": refs, "rule": "sigma", "k": 6.0, "weighting": "full"}
    changes = [{}, {"statistics": refs[:1]}, {"statistics": refs[::-1]}, {"rule": "x"}, {"k": 5.0}, {"weighting": "x"}]
    assert len({find_outliers.request(plain | change).key for change in changes}) == len(changes)


@pytest.mark.parametrize("wrong", [{"rule": "quantile"}, {"weighting": "none"}])
def test_an_unknown_rule_or_weighting_is_refused_by_name(store: ArtifactStore, wrong: dict[str, str]) -> None:
    inputs = {"statistics": statistics(store, activations()), "rule": "sigma", "k": 6.0, "weighting": "full"} | wrong
    with pytest.raises(CovercalError, match=next(iter(wrong.values()))):
        find_outliers.run(store, "outliers", inputs)


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


@pytest.mark.parametrize("k", [2.0, 4.0])
def test_from_texts_to_outliers_everything_agrees_with_the_model_in_float64(
    store: ArtifactStore, tmp_path: Path, k: float
) -> None:
    tiny.recipe_value(tmp_path)
    model = identify_model(Model(source=str(tmp_path / "model")), store)
    source = identify_text(TextSource(path=str(tmp_path / "pool.jsonl"), domain="domain"), store)
    place = {"imported": None, "model": model}
    pool = make_pool.run(
        store,
        "pool",
        {
            "sources": (source,),
            "tokenizer": TokenizerIdentity(model),
            "imported": None,
            "lengths": (16, 32),
            "packing": "join",
            "samples": 12,
            "seed": 0,
        },
    ).ref
    settings = {"sites": "linear_inputs", "skip_tokens": 1, "dtype": "float32", "device": "cpu"}
    refs = tuple(
        capture_shard.run(store, "statistics", {**place, **settings, "pool": pool, "shard": shard}).ref
        for shard in pool_shards(store, pool, 5)
    )
    made = outliers(store, refs, k).ref
    rows = float64_inputs(tmp_path / "model", sample_tokens(store, pool))
    by_site = [np.concatenate([row[site].ravel() for row in rows]) for site in range(len(rows[0]))]
    limits = [x.mean() + k * x.std() for x in by_site]
    expected_peaks = np.stack([np.concatenate([x.max(axis=0) for x in row]) for row in rows])
    flat_limits = np.repeat(limits, [x.shape[1] for x in rows[0]])
    np.testing.assert_allclose(table(store, made, THRESHOLDS)["threshold"], limits, rtol=1e-5)
    positions = table(store, made)["position"]
    assert positions.tolist() == np.flatnonzero((expected_peaks > flat_limits).any(axis=0)).tolist()
    coverage, _ = coverage_matrix(store, made)
    np.testing.assert_array_equal(coverage, (expected_peaks > flat_limits)[:, positions])
