"""Selectors by name: the greedy cover, and seeded random choice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.coverage import greedy_cover
from covercal.selectors.registry import Evidence, selector


def evidence(seed: int = 0, samples: int = 20, channels: int = 30) -> Evidence:
    generator = np.random.default_rng(seed)
    return Evidence(samples, coverage=generator.random((samples, channels)) < 0.1, weights=generator.random(channels))


@pytest.mark.parametrize("name", ["coverage", "random"])
def test_an_order_is_a_permutation_of_the_pool(name: str) -> None:
    assert sorted(selector(name).order(evidence(), 20, seed=3).samples.tolist()) == list(range(20))


@pytest.mark.parametrize("name", ["coverage", "random"])
def test_a_smaller_extent_is_a_prefix(name: str) -> None:
    whole = selector(name).order(evidence(), 20, seed=3).samples
    for extent in range(21):
        np.testing.assert_array_equal(selector(name).order(evidence(), extent, seed=3).samples, whole[:extent])


@pytest.mark.parametrize("name", ["coverage", "random"])
def test_a_selector_says_truly_whether_its_seed_matters(name: str) -> None:
    orders = {tuple(selector(name).order(evidence(), 20, seed).samples.tolist()) for seed in range(5)}
    assert (len(orders) > 1) == selector(name).seeded


@pytest.mark.parametrize("name", ["coverage", "random"])
def test_samples_are_int64_indices(name: str) -> None:
    assert selector(name).order(evidence(), 7, seed=0).samples.dtype == np.int64


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_the_same_seed_gives_the_same_random_order(seed: int, samples: int) -> None:
    first = selector("random").order(Evidence(samples), samples, seed).samples
    np.testing.assert_array_equal(selector("random").order(Evidence(samples), samples, seed).samples, first)


def test_the_random_order_of_seed_zero_is_numpys_pcg64_permutation() -> None:
    golden = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]  # np.random.default_rng(0).permutation(10)
    assert selector("random").order(Evidence(10), 10, 0).samples.tolist() == golden


def test_every_sample_is_as_likely_to_be_chosen_at_random() -> None:
    chosen = np.concatenate([selector("random").order(Evidence(10), 3, seed).samples for seed in range(2000)])
    counts = np.bincount(chosen, minlength=10)
    assert abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)  # five standard deviations of a fair draw


def test_the_random_selector_reads_nothing_but_the_size_of_the_pool() -> None:
    assert selector("random").reads == frozenset()


def test_the_coverage_selector_gives_the_greedy_cover() -> None:
    given_ = evidence(4)
    order, cover = selector("coverage").order(given_, 20, 0), greedy_cover(given_.coverage, given_.weights, 20)
    np.testing.assert_array_equal(order.samples, cover.order)
    np.testing.assert_array_equal(order.gains, cover.gains)
    np.testing.assert_array_equal(order.rounds, cover.rounds)


def test_the_coverage_selector_says_that_it_reads_outliers() -> None:
    assert selector("coverage").reads == frozenset({"outliers"})


def test_the_coverage_selector_refuses_to_guess_without_evidence() -> None:
    with pytest.raises(ValueError, match="coverage matrix"):
        selector("coverage").order(Evidence(5), 3, 0)


def test_an_unknown_selector_is_not_found() -> None:
    with pytest.raises(KeyError, match="covrage"):
        selector("covrage")
