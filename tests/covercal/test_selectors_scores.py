"""Selectors that sort by one score, or take what they are told."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.selectors.registry import Evidence, selector

few_numbers = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0, 1e300]), min_size=1, max_size=12)


def order_of(name: str, evidence: Evidence, extent: int | None = None) -> list[int]:
    found = selector(name).order(evidence, evidence.samples if extent is None else extent, seed=0)
    assert found.gains is None
    assert found.rounds is None
    return found.samples.tolist()


def test_first_takes_the_pool_from_its_beginning() -> None:
    assert order_of("first", Evidence(9), 4) == [0, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_longest_sorts_by_tokens_then_characters_then_index(sizes: list[tuple[int, int]]) -> None:
    lengths = np.array([tokens for tokens, _ in sizes])
    evidence = Evidence(len(sizes), texts=["é" * characters for _, characters in sizes], lengths=lengths)
    assert order_of("longest", evidence) == sorted(range(len(sizes)), key=lambda s: (-sizes[s][0], -sizes[s][1], s))


@given(few_numbers)
def test_max_perplexity_sorts_by_falling_loss_then_index(losses: list[float]) -> None:
    evidence = Evidence(len(losses), losses=np.array(losses))
    assert order_of("max_perplexity", evidence) == sorted(range(len(losses)), key=lambda s: (-losses[s], s))


@given(few_numbers)
def test_min_perplexity_sorts_by_rising_loss_then_index(losses: list[float]) -> None:
    evidence = Evidence(len(losses), losses=np.array(losses))
    assert order_of("min_perplexity", evidence) == sorted(range(len(losses)), key=lambda s: (losses[s], s))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(0, 5))
def test_max_variance_sorts_by_the_sum_over_sites(seed: int, samples: int, sites: int) -> None:
    variance = np.random.default_rng(seed).integers(0, 3, (samples, sites)).astype(np.float32)
    totals = [math.fsum(row) for row in variance.tolist()]
    evidence = Evidence(samples, variance=variance)
    assert order_of("max_variance", evidence) == sorted(range(samples), key=lambda s: (-totals[s], s))


def test_variances_are_summed_in_more_than_their_own_precision() -> None:
    variance = np.array([[2**24, 1.0, 0.0], [2**24, 0.0, 0.0], [2**24, 1.0, 1.0]], dtype=np.float32)
    assert order_of("max_variance", Evidence(3, variance=variance)) == [2, 0, 1]


def test_given_keeps_the_order_of_the_list() -> None:
    assert order_of("given", Evidence(6, given=(4, 0, 5, 2)), 3) == [4, 0, 5]


@pytest.mark.parametrize(
    ("listed", "extent", "said"),
    [
        ((4, 0), 3, "2 samples are given, and 3 are asked for"),
        ((4, 6), 1, "sample 6 is given, and the pool's samples are 0 to 5"),
        ((-1, 2), 1, "sample -1 is given"),
        ((2, 1, 2), 2, "sample 2 is given more than once"),
    ],
)
def test_given_says_what_is_wrong_with_the_list(listed: tuple[int, ...], extent: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        selector("given").order(Evidence(6, given=listed), extent, seed=0)


def test_a_loss_that_is_infinite_is_refused() -> None:
    evidence = Evidence(2, losses=np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="sample 1"):
        selector("min_perplexity").order(evidence, 1, seed=0)
    assert order_of("min_perplexity", replace(evidence, losses=np.array([1.0, 0.5]))) == [1, 0]
