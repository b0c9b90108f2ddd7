"""Prefixes that hold the pool's shares, of domains and of quantiles."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.selectors.registry import Evidence, selector
from covercal.selectors.stratified_domain import turns
from covercal.selectors.stratified_magnitude import spread_ranks

sizes_of_domains = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 80)), min_size=1, max_size=9)


def of_domains(domains: list[str], seed: int = 0, extent: int | None = None) -> list[int]:
    evidence = Evidence(len(domains), domains=domains)
    extent = len(domains) if extent is None else extent
    return selector("stratified_domain").order(evidence, extent, seed).samples.tolist()


def of_magnitude(magnitude: np.ndarray, seed: int = 0, extent: int | None = None) -> list[int]:
    evidence = Evidence(len(magnitude), magnitude=magnitude.astype(np.float32))
    extent = len(magnitude) if extent is None else extent
    return selector("stratified_magnitude").order(evidence, extent, seed).samples.tolist()


@settings(deadline=None)
@given(sizes_of_domains)
def test_every_prefix_holds_each_domains_exact_share_rounded_down_or_up(sizes: list[int]) -> None:
    taken = Counter()
    for count, turn in enumerate(turns(np.array(sizes), sum(sizes)).tolist(), start=1):
        taken[turn] += 1
        for domain, size in enumerate(sizes):
            share = Fraction(count * size, sum(sizes))
            assert math.floor(share) <= taken[domain] <= math.ceil(share)


def test_the_largest_deficit_alone_would_leave_a_domain_more_than_one_sample_short() -> None:
    sizes = np.array([1, 1, 3, 60, 60, 3, 60, 1])
    taken, worst = np.zeros(8), 0.0
    for count in range(1, 190):
        taken[np.argmax(count * sizes / 189 - taken)] += 1
        worst = max(worst, float(np.abs(count * sizes / 189 - taken).max()))
    assert worst > 1.2  # the reason for deadlines


def test_equal_domains_take_turns_by_name() -> None:
    domains = ["b", "a", "c"] * 4
    assert [domains[s] for s in of_domains(domains)] == ["a", "b", "c"] * 4


def test_the_larger_domain_comes_first() -> None:
    domains = ["a"] + ["b"] * 9
    assert domains[of_domains(domains)[0]] == "b"


def test_samples_within_a_domain_come_at_random() -> None:
    chosen = Counter(
        of_domains(["a"] * 6 + ["b"] * 6, seed, extent=4)[place] for seed in range(600) for place in (0, 2)
    )
    counts = np.array([chosen[s] for s in range(6)])
    assert counts.sum() == 1200
    assert abs(counts - 200).max() < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))  # five standard deviations of a fair draw


def test_the_domains_of_an_order_do_not_depend_on_the_seed() -> None:
    domains = [f"domain {d}" for d in np.random.default_rng(0).integers(0, 5, 40)]
    assert len({tuple(domains[s] for s in of_domains(domains, seed)) for seed in range(5)}) == 1


def test_as_many_domains_as_samples_are_each_taken_once() -> None:
    domains = [f"{d:02}" for d in np.random.default_rng(1).permutation(30)]
    assert [domains[s] for s in of_domains(domains)] == sorted(domains)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_the_ranks_visited_are_a_permutation(count: int, seed: int) -> None:
    assert sorted(spread_ranks(count, seed).tolist()) == list(range(count))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_prefix_holds_each_quantiles_exact_share_rounded_down_or_up(power: int, size: int, seed: int) -> None:
    parts = 2**power
    ranks = spread_ranks(parts * size, seed)
    held = np.cumsum(ranks[:, None] // size == np.arange(parts), axis=0)
    shares = np.arange(1, parts * size + 1)[:, None] / parts  # exact: a power of two
    assert (held >= np.floor(shares)).all()
    assert (held <= np.ceil(shares)).all()


@pytest.mark.parametrize("count", [10, 97, 1000])
def test_a_prefix_stays_near_uniform_where_the_parts_do_not_divide_the_pool(count: int) -> None:
    ranks = spread_ranks(count, seed=4)
    for extent in range(1, count + 1):
        expected = np.sort(ranks[:extent])
        gap = np.abs(np.arange(1, extent + 1) / extent - (expected + 1) / count).max()
        assert gap <= (2 + math.log2(extent + 1)) / extent + 1 / count  # as van der Corput's discrepancy


def test_every_rank_is_equally_likely_at_each_place() -> None:
    visited = np.array([spread_ranks(12, seed)[:8] for seed in range(3000)])
    for place in range(8):
        counts = np.bincount(visited[:, place], minlength=12)
        assert abs(counts - 250).max() < 5 * np.sqrt(3000 / 12 * 11 / 12)


def test_the_ranks_are_those_of_the_mean_relative_magnitude() -> None:
    magnitude = np.random.default_rng(0).lognormal(0, 1, (32, 3)).astype(np.float32)
    score = (magnitude.astype(np.float64) / magnitude.astype(np.float64).mean(axis=0)).mean(axis=1)
    by_rank = np.argsort(score)
    np.testing.assert_array_equal(of_magnitude(magnitude, seed=7), by_rank[spread_ranks(32, seed=7)])


def test_no_site_dominates_by_its_scale() -> None:
    magnitude = np.random.default_rng(3).lognormal(0, 1, (40, 3))
    assert of_magnitude(magnitude * np.array([1.0, 2.0**40, 2.0**-40])) == of_magnitude(magnitude)


def test_a_site_without_activations_changes_nothing() -> None:
    magnitude = np.random.default_rng(3).lognormal(0, 1, (40, 3))
    assert of_magnitude(np.hstack([magnitude, np.zeros((40, 1))])) == of_magnitude(magnitude)


def test_a_half_of_the_pool_holds_one_of_each_pair_of_neighbours_in_magnitude() -> None:
    magnitude = np.random.default_rng(5).permutation(64)[:, None] + 1.0
    for seed in range(10):
        ranks = magnitude[of_magnitude(magnitude, seed, extent=32), 0].astype(int) - 1
        gaps = np.diff(np.sort(ranks))
        assert (gaps == 2).all()


def test_equal_magnitudes_give_the_visited_ranks_themselves() -> None:
    evidence = Evidence(20, magnitude=np.ones((20, 2), np.float32))
    for other in (evidence, replace(evidence, magnitude=np.zeros((20, 2), np.float32))):
        found = selector("stratified_magnitude").order(other, 20, seed=9).samples
        np.testing.assert_array_equal(found, spread_ranks(20, seed=9))
