"""Measures of a set against Python sets and exact sums, and what must hold for any set."""

import itertools
import math
from fractions import Fraction
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.measures import (
    always_fired,
    channel_map,
    coverage_by_block,
    coverage_curve,
    gram_distance,
    mean_jaccard,
    set_distance,
    surrogate_bound,
)

Bools = npt.NDArray[np.bool_]
Energies = list[npt.NDArray[np.float32]]


@st.composite
def firings(draw: st.DrawFn, fewest: int = 1) -> Bools:
    """Which of a few samples fires which channel; some samples are silent, some alike, some channels never fire."""
    samples, channels = draw(st.integers(fewest, 9)), draw(st.integers(0, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    fires = generator.random((samples, channels)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    fires[generator.random(samples) < 0.2] = False
    fires[generator.random(samples) < 0.2] = fires[:1]
    return np.asarray(fires, dtype=np.bool_)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Energies, npt.NDArray[np.int64]]:
    """Energies of some samples at a few sites, of very unlike sizes, and a set of those samples."""
    samples, sites = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    energies = [
        generator.lognormal(generator.normal(0, 4), 2, (samples, generator.integers(1, 9))).astype(np.float32)
        for _ in range(sites)
    ]
    return energies, generator.permutation(samples)[: draw(st.integers(1, samples))]


def fired_sets(fires: Bools) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in fires]


def jaccard_by_sets(fires: Bools) -> float:
    pairs = list(itertools.combinations(fired_sets(fires), 2))
    return math.fsum(len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs) / len(pairs)


def exact_mean(rows: list[list[float]]) -> list[Fraction]:
    return [sum(map(Fraction, column), Fraction(0)) / len(rows) for column in zip(*rows, strict=True)]


def distance_by_fractions(energies: Energies, chosen: npt.NDArray[np.int64]) -> float:
    """Follow the definition in exact arithmetic up to the root."""
    squared = []
    for site in energies:
        whole, mine = exact_mean(site.tolist()), exact_mean(site[chosen].tolist())
        away = sum(((a - b) ** 2 for a, b in zip(mine, whole, strict=True)), Fraction(0))
        squared.append(away / sum((a * a for a in whole), Fraction(0)))
    return math.sqrt(sum(squared, Fraction(0)) / len(squared))


# --- coverage by block ---------------------------------------------------------------------------------------------

covered_blocks = st.lists(st.tuples(st.booleans(), st.sampled_from([0, 1, 4, 30])), max_size=40)


def as_arrays(channels: list[tuple[bool, int]]) -> tuple[Bools, npt.NDArray[np.int64]]:
    return np.array([c for c, _ in channels], dtype=np.bool_), np.array([b for _, b in channels], dtype=np.int64)


@given(covered_blocks)
def test_coverage_by_block_counts_each_blocks_channels(channels: list[tuple[bool, int]]) -> None:
    by_block: dict[int, list[bool]] = {}
    for covered, block in channels:
        by_block.setdefault(block, []).append(covered)
    expected = {block: sum(found) / len(found) for block, found in by_block.items()}
    assert coverage_by_block(*as_arrays(channels)) == pytest.approx(expected, rel=1e-15)


@given(covered_blocks.filter(bool))
def test_blocks_weighed_by_their_channels_give_the_coverage(channels: list[tuple[bool, int]]) -> None:
    covered, blocks = as_arrays(channels)
    found = coverage_by_block(covered, blocks)
    total = math.fsum(share * np.count_nonzero(blocks == block) for block, share in found.items())
    assert total == pytest.approx(np.count_nonzero(covered), rel=1e-12)


def test_blocks_without_outlier_channels_have_no_coverage() -> None:
    assert coverage_by_block(*as_arrays([])) == {}
    assert coverage_by_block(*as_arrays([(True, 7)])) == {7: 1.0}


# --- channels that every sample fires ------------------------------------------------------------------------------


@settings(deadline=None)
@given(firings())
def test_always_fired_is_the_intersection_of_all_samples(fires: Bools) -> None:
    common = set.intersection(*fired_sets(fires))
    assert always_fired(fires) == (len(common) / fires.shape[1] if fires.shape[1] else 0.0)


@settings(deadline=None)
@given(firings(fewest=2))
def test_another_sample_never_raises_what_all_fire(fires: Bools) -> None:
    assert always_fired(fires) <= always_fired(fires[:-1])


# --- likeness ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(firings(fewest=2))
def test_jaccard_is_the_mean_over_all_pairs_of_sets(fires: Bools) -> None:
    assert mean_jaccard(fires) == pytest.approx(jaccard_by_sets(fires), rel=1e-12)


@settings(deadline=None)
@given(firings(fewest=2), st.randoms(use_true_random=False))
def test_jaccard_depends_on_no_order_and_on_no_channel_that_never_fires(fires: Bools, random: Random) -> None:
    samples, channels = list(range(fires.shape[0])), list(range(fires.shape[1]))
    random.shuffle(samples)
    random.shuffle(channels)
    turned = np.concatenate([fires[samples][:, channels], np.zeros((len(samples), 3), dtype=np.bool_)], axis=1)
    assert mean_jaccard(turned) == pytest.approx(mean_jaccard(fires), rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["1100", "1100", "1100"], 1.0),
        (["1100", "0011"], 0.0),
        (["1100", "0110"], 1 / 3),
        (["0000", "0000"], 1.0),  # two that fire nothing are equal
        (["0000", "1000"], 0.0),
        (["1100", "0110", "0000"], 1 / 9),
        (["1100"], 0.0),
        ([], 0.0),
        (["", ""], 1.0),
    ],
)
def test_jaccard_of_small_sets(rows: list[str], expected: float) -> None:
    fires = np.array([[mark == "1" for mark in row] for row in rows], dtype=np.bool_)
    fires = fires.reshape(len(rows), len(rows[0]) if rows else 4)
    assert mean_jaccard(fires) == pytest.approx(expected, rel=1e-15)


# --- surrogate bound -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e12)), max_size=60))
def test_the_bound_is_the_weight_that_is_not_covered(channels: list[tuple[bool, float]]) -> None:
    covered = np.array([c for c, _ in channels], dtype=np.bool_)
    weights = np.array([w for _, w in channels], dtype=np.float64)
    assert surrogate_bound(covered, weights) == pytest.approx(math.fsum(w for c, w in channels if not c), rel=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2**40)), min_size=1, max_size=60), st.data())
def test_covering_a_channel_lowers_the_bound_by_its_weight(
    channels: list[tuple[bool, int]], data: st.DataObject
) -> None:
    covered = np.array([c for c, _ in channels], dtype=np.bool_)
    weights = np.array([w for _, w in channels], dtype=np.float64)  # whole numbers: their sums are exact
    one = data.draw(st.integers(0, len(channels) - 1))
    more = covered.copy()
    more[one] = True
    lowered = 0 if covered[one] else channels[one][1]
    assert surrogate_bound(more, weights) == surrogate_bound(covered, weights) - lowered
    assert surrogate_bound(np.ones_like(covered), weights) == 0


# --- distance of Gram diagonals ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(pools())
def test_gram_distance_follows_its_definition_in_exact_arithmetic(pool: tuple[Energies, npt.NDArray[np.int64]]) -> None:
    energies, chosen = pool
    expected = distance_by_fractions(energies, chosen)
    assert gram_distance(energies, chosen) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(pools())
def test_a_pool_is_no_distance_from_itself_in_any_order(pool: tuple[Energies, npt.NDArray[np.int64]]) -> None:
    energies, _ = pool
    samples = np.arange(len(energies[0]))
    assert gram_distance(energies, samples) == 0
    assert gram_distance(energies, samples[::-1]) == pytest.approx(0, abs=1e-12)


@settings(deadline=None)
@given(pools(), st.integers(-20, 20))
def test_no_sites_scale_counts(pool: tuple[Energies, npt.NDArray[np.int64]], power: int) -> None:
    energies, chosen = pool
    scaled = [np.ldexp(energies[0], power), *energies[1:]]  # by a power of two: exact
    assert gram_distance(scaled, chosen) == gram_distance(energies, chosen)


def test_a_set_of_one_of_two_orthogonal_samples_is_as_far_off_as_the_pool_is_long() -> None:
    site = np.array([[3, 0], [0, 3]], dtype=np.float32)  # the pool's mean is (1.5, 1.5), off by (1.5, -1.5)
    assert gram_distance([site], np.array([0])) == pytest.approx(1, rel=1e-15)
    near = np.ones((2, 5), dtype=np.float32)
    assert gram_distance([site, near], np.array([0])) == pytest.approx(math.sqrt(1 / 2), rel=1e-15)


def test_a_site_that_nothing_excites_is_no_distance_away() -> None:
    silent = np.zeros((2, 3), dtype=np.float32)
    assert gram_distance([silent], np.array([1])) == 0
    assert gram_distance([], np.array([1])) == 0


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 3.0])
def test_a_mean_of_the_pools_direction_is_off_by_its_length(factor: float) -> None:
    pool = np.random.default_rng(0).lognormal(0, 2, (50, 20)).astype(np.float32)
    mean = pool.astype(np.float64).mean(axis=0)
    assert set_distance(factor * mean, pool) == pytest.approx((factor - 1) ** 2, rel=1e-12)


def test_means_are_taken_in_float64() -> None:
    pool = np.array([[2.0**24], [1], [1], [1]], dtype=np.float32)  # in float32, 2**24 + 1 is 2**24
    assert set_distance(np.array([(2.0**24 + 3) / 4]), pool) == 0
    assert gram_distance([pool], np.array([0, 1])) == pytest.approx((2.0**24 - 1) / (2.0**24 + 3), rel=1e-14)


@settings(max_examples=100, deadline=None)
@given(firings(), st.integers(0, 2**32 - 1))
def test_a_curve_is_the_weight_that_each_prefix_of_the_order_fires(fires: Bools, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.lognormal(0, 2, fires.shape[1])
    order = generator.permutation(len(fires))[: generator.integers(1, len(fires) + 1)]
    curve = coverage_curve(fires, weights, order)
    total = math.fsum(weights)
    for count, found in enumerate(curve, start=1):
        fired = set().union(*(set(np.flatnonzero(fires[s]).tolist()) for s in order[:count]))
        expected = math.fsum(weights[list(fired)]) / total if total else 0.0
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_curve_ends_at_one_when_everything_is_covered_and_never_above() -> None:
    generator = np.random.default_rng(0)
    weights = generator.lognormal(0, 3, 5000)
    curve = coverage_curve(generator.random((40, 5000)) < 0.5, weights, np.arange(40))
    assert curve[-1] == pytest.approx(1.0, abs=1e-12)
    assert curve.max() <= 1.0
    assert (np.diff(curve) >= 0).all()


def test_a_channel_map_has_a_cell_for_each_channel_where_there_is_room() -> None:
    found = channel_map(np.array([0, 2, 5]), np.array([False, True, False]), 6, 512)
    assert found.tolist() == [1, 0, 2, 0, 0, 1]


def test_a_channel_map_with_fewer_cells_shows_the_worst_of_each() -> None:
    found = channel_map(np.array([0, 1, 4]), np.array([True, False, False]), 8, 4)
    assert found.tolist() == [2, 0, 1, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_no_outlier_channel_is_lost_on_the_map(channels: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    position = np.flatnonzero(generator.random(channels) < 0.2)
    missed = generator.random(position.size) < 0.3
    found = channel_map(position, missed, channels, columns)
    assert len(found) == min(channels, columns)
    assert (found == 2).any() == missed.any()
    assert (found > 0).any() == (position.size > 0)
    assert (found > 0).sum() <= position.size
