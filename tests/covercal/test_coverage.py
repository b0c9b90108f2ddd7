"""Greedy cover against exact arithmetic, exhaustive search and invariants."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.coverage import (
    PackedBits,
    _Channels,
    covered_channels,
    expected_random_coverage,
    greedy_cover,
    greedy_soft_cover,
)

Case = tuple[np.ndarray, np.ndarray]


def plain_greedy(coverage: np.ndarray, weights: np.ndarray, budget: int) -> tuple[list[int], list[Fraction], list[int]]:
    """Recompute every gain at every step in exact arithmetic; return order, gains and (of those that gain) rounds."""
    fires = [set(np.flatnonzero(row).tolist()) for row in coverage]
    exact = [Fraction(float(weight)) for weight in weights]
    left = list(range(len(fires)))
    covered: set[int] = set()
    order, gains, rounds, current = [], [], [], 0
    while left and len(order) < budget:
        gain = [sum((exact[c] for c in fires[s] - covered), Fraction(0)) for s in left]
        if max(gain) == 0 and covered:
            covered, current = set(), current + 1
            gain = [sum((exact[c] for c in fires[s]), Fraction(0)) for s in left]
        if max(gain) == 0:
            return order + left[: budget - len(order)], gains, rounds
        best = left.pop(gain.index(max(gain)))
        order.append(best)
        gains.append(max(gain))
        rounds.append(current)
        covered |= fires[best]
    return order, gains, rounds


@st.composite
def cases(draw: st.DrawFn, samples: int = 30, channels: int = 16) -> Case:
    """A coverage matrix with repeated rows, silent samples and rare channels; weights are multiples of 1/8."""
    count, width = draw(st.integers(1, samples)), draw(st.integers(0, channels))
    density = draw(st.sampled_from([0.03, 0.15, 0.5, 0.9]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coverage = generator.random((count, width)) < density
    repeated = generator.random(count) < 0.2
    coverage[repeated] = coverage[generator.integers(0, count, int(repeated.sum()))]
    coverage[generator.random(count) < 0.1] = False
    eighths = draw(st.lists(st.integers(0, draw(st.sampled_from([1, 3, 1000]))), min_size=width, max_size=width))
    return coverage, np.asarray(eighths, dtype=np.float64) / 8


def random_case(seed: int, samples: int, channels: int, density: float) -> Case:
    generator = np.random.default_rng(seed)
    return generator.random((samples, channels)) < density, generator.lognormal(0, 2, channels)


@settings(deadline=None, max_examples=300)
@given(cases())
def test_the_order_of_all_samples_is_plain_greedys_in_exact_arithmetic(case: Case) -> None:
    coverage, weights = case
    order, _, _ = plain_greedy(coverage, weights, len(coverage))
    assert greedy_cover(coverage, weights, len(coverage)).order.tolist() == order


@settings(deadline=None, max_examples=150)
@given(cases())
def test_gains_are_the_weights_that_exact_arithmetic_newly_covers(case: Case) -> None:
    coverage, weights = case
    _, gains, _ = plain_greedy(coverage, weights, len(coverage))
    found = greedy_cover(coverage, weights, len(coverage)).gains
    assert found.tolist() == [float(g) for g in gains] + [0.0] * (len(coverage) - len(gains))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_rounds_of_samples_that_gain_are_plain_greedys(case: Case) -> None:
    coverage, weights = case
    _, gains, rounds = plain_greedy(coverage, weights, len(coverage))
    assert greedy_cover(coverage, weights, len(coverage)).rounds[: len(gains)].tolist() == rounds


@pytest.mark.parametrize("density", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_random_float_weights_give_the_order_of_exact_arithmetic(seed: int, density: float) -> None:
    coverage, weights = random_case(seed, 60, 80, density)
    order, _, _ = plain_greedy(coverage, weights, 60)
    assert greedy_cover(coverage, weights, 60).order.tolist() == order


@pytest.mark.parametrize("seed", range(4))
def test_random_float_weights_give_the_gains_of_a_float_sum(seed: int) -> None:
    coverage, weights = random_case(seed, 40, 200, 0.1)
    cover = greedy_cover(coverage, weights, 12)
    covered = np.zeros(200, dtype=bool)
    for sample, gain in zip(cover.order, cover.gains, strict=True):
        assert gain == pytest.approx(float(weights @ (coverage[sample] & ~covered)), rel=1e-12)
        covered |= coverage[sample]


def test_more_samples_than_one_transposed_strip_give_plain_greedys_order() -> None:
    generator = np.random.default_rng(5)
    coverage = generator.random((2500, 40)) < np.linspace(0.001, 0.4, 40)
    weights = generator.integers(1, 200, 40) / 8
    covered, left, order = np.zeros(40, dtype=bool), np.ones(2500, dtype=bool), []
    while len(order) < 60:
        gain = np.where(left, (coverage & ~covered) @ weights, -1)  # multiples of 1/8: the float sum is exact
        if gain.max() == 0:
            covered[:] = False
            continue
        order.append(int(gain.argmax()))
        left[order[-1]] = False
        covered |= coverage[order[-1]]
    assert greedy_cover(coverage, weights, 60).order.tolist() == order


def test_a_tie_goes_to_the_lowest_index() -> None:
    coverage = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
    assert greedy_cover(coverage, np.array([1.0, 1.0, 2.0]), 4).order.tolist() == [0, 3, 1, 2]


def test_equal_sums_of_different_weights_tie() -> None:
    coverage = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    assert greedy_cover(coverage, np.array([0.125, 0.25, 0.375, 0.75]), 2).order.tolist() == [0, 1]


def test_a_copy_of_a_chosen_sample_waits_for_the_next_round() -> None:
    coverage = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    cover = greedy_cover(coverage, np.ones(3), 3)
    assert (cover.order.tolist(), cover.rounds.tolist()) == ([0, 2, 1], [0, 0, 1])


def test_each_round_covers_anew_with_the_samples_that_are_left() -> None:
    coverage = np.tile(np.eye(2, dtype=bool), (3, 1))
    cover = greedy_cover(coverage, np.array([1.0, 2.0]), 6)
    assert cover.order.tolist() == [1, 0, 3, 2, 5, 4]
    assert cover.rounds.tolist() == [0, 0, 1, 1, 2, 2]
    assert cover.gains.tolist() == [2.0, 1.0] * 3


def test_samples_that_fire_nothing_come_last_by_index() -> None:
    coverage = np.array([[0, 0], [1, 0], [0, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)
    assert greedy_cover(coverage, np.ones(2), 6).order.tolist() == [4, 1, 3, 0, 2, 5]


def test_samples_that_fire_only_channels_without_weight_come_last_by_index() -> None:
    coverage = np.array([[1, 0], [1, 0], [0, 1]], dtype=bool)
    assert greedy_cover(coverage, np.array([0.0, 1.0]), 3).order.tolist() == [2, 0, 1]


def test_a_pool_without_outlier_channels_is_ordered_by_index() -> None:
    assert greedy_cover(np.zeros((4, 0), dtype=bool), np.zeros(0), 3).order.tolist() == [0, 1, 2]


def test_a_weight_below_the_resolution_of_the_total_is_still_covered_in_its_round() -> None:
    coverage = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    cover = greedy_cover(coverage, np.array([1.0, 1e-30, 2e-30]), 3)
    assert (cover.order.tolist(), cover.rounds.tolist()) == ([0, 3, 2], [0, 0, 0])


def test_a_heavy_channel_that_no_sample_left_fires_does_not_hide_light_ones() -> None:
    coverage = np.array([[1, 0], [0, 0], [0, 1], [0, 1]], dtype=bool)
    assert greedy_cover(coverage, np.array([1.0, 1e-30]), 4).order.tolist() == [0, 2, 3, 1]


near_powers_of_two = st.builds(
    lambda step, exponent: math.ldexp(1 + step * 2**-30, exponent),
    st.integers(0, 9),
    st.sampled_from(range(0, -99, -9)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(near_powers_of_two, min_size=1, max_size=12))
def test_samples_that_fire_one_channel_each_come_by_falling_weight(weights: list[float]) -> None:
    falling = np.argsort(-np.asarray(weights), kind="stable")
    cover = greedy_cover(np.eye(len(weights), dtype=bool), np.asarray(weights), len(weights))
    np.testing.assert_array_equal(cover.order, falling)


def test_light_channels_are_told_apart_also_in_a_round_that_no_heavy_one_is_left_for() -> None:
    coverage = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=bool)
    weights = np.array([1.0, 2.0**-36, 2.0**-36 * (1 + 2.0**-30)])
    assert greedy_cover(coverage, weights, 5).order.tolist() == [0, 2, 1, 4, 3]


def test_weights_whose_sum_overflows_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        greedy_cover(np.eye(2, dtype=bool), np.array([1.5e308, 1.7e308]), 2)


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_a_smaller_budget_is_a_prefix(case: Case, data: st.DataObject) -> None:
    coverage, weights = case
    budget = data.draw(st.integers(0, len(coverage)))
    whole, part = greedy_cover(coverage, weights, len(coverage)), greedy_cover(coverage, weights, budget)
    for name in ("order", "gains", "rounds"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:budget])


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_whole_order_is_a_permutation_of_the_samples(case: Case) -> None:
    coverage, weights = case
    assert sorted(greedy_cover(coverage, weights, len(coverage)).order.tolist()) == list(range(len(coverage)))


@settings(deadline=None, max_examples=100)
@given(cases(samples=8, channels=8), st.data())
def test_greedy_covers_at_least_its_guaranteed_share_of_the_optimum(case: Case, data: st.DataObject) -> None:
    coverage, weights = case
    budget = data.draw(st.integers(1, len(coverage)))
    best = max(
        float(weights @ coverage[list(chosen)].any(axis=0))
        for chosen in itertools.combinations(range(len(coverage)), budget)
    )
    reached = float(weights @ covered_channels(coverage, greedy_cover(coverage, weights, budget).order))
    assert reached >= (1 - 1 / math.e) * best


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(-60, 60))
def test_scaling_all_weights_by_a_power_of_two_scales_only_the_gains(case: Case, exponent: int) -> None:
    coverage, weights = case
    plain = greedy_cover(coverage, weights, len(coverage))
    scaled = greedy_cover(coverage, np.ldexp(weights, exponent), len(coverage))
    np.testing.assert_array_equal(scaled.order, plain.order)
    np.testing.assert_array_equal(scaled.gains, np.ldexp(plain.gains, exponent))


@settings(deadline=None, max_examples=150)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_channels_does_not_matter(case: Case, random: object) -> None:
    coverage, weights = case
    turned = np.arange(weights.size)
    random.shuffle(turned)
    np.testing.assert_array_equal(
        greedy_cover(coverage[:, turned], weights[turned], len(coverage)).order,
        greedy_cover(coverage, weights, len(coverage)).order,
    )


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_the_gains_of_the_first_round_add_up_to_the_weight_covered(case: Case, data: st.DataObject) -> None:
    coverage, weights = case
    cover = greedy_cover(coverage, weights, data.draw(st.integers(0, len(coverage))))
    first = cover.rounds == 0
    assert cover.gains[first].sum() == weights @ covered_channels(coverage, cover.order[first])  # eighths: exact


@settings(deadline=None, max_examples=150)
@given(cases())
def test_gains_do_not_grow_within_a_round(case: Case) -> None:
    coverage, weights = case
    cover = greedy_cover(coverage, weights, len(coverage))
    for each in set(cover.rounds.tolist()):
        assert (np.diff(cover.gains[cover.rounds == each]) <= 0).all()


def test_the_input_is_not_changed() -> None:
    coverage, weights = random_case(1, 20, 30, 0.2)
    kept = coverage.copy(), weights.copy()
    greedy_cover(coverage, weights, 20)
    np.testing.assert_array_equal(coverage, kept[0])
    np.testing.assert_array_equal(weights, kept[1])


def test_a_column_major_matrix_gives_the_order_of_a_row_major_one() -> None:
    coverage, weights = random_case(2, 25, 30, 0.2)
    np.testing.assert_array_equal(
        greedy_cover(np.asfortranarray(coverage), weights, 25).order, greedy_cover(coverage, weights, 25).order
    )


@pytest.mark.parametrize("bad", [-1.0, -5e-324, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        greedy_cover(np.ones((2, 3), dtype=bool), np.array([1.0, bad, 1.0]), 1)


@pytest.mark.parametrize(
    ("coverage", "weights"), [((2, 3), (2,)), ((2, 3), (3, 1)), ((3,), (3,)), ((2, 3, 1), (3,)), ((2, 3), ())]
)
def test_shapes_that_do_not_match_are_refused(coverage: tuple[int, ...], weights: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(samples, channels\)"):
        greedy_cover(np.ones(coverage, dtype=bool), np.ones(weights), 1)


@pytest.mark.parametrize("budget", [-1, 3])
def test_a_budget_that_the_pool_cannot_give_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="between 0 and the number of samples, 2"):
        greedy_cover(np.ones((2, 3), dtype=bool), np.ones(3), budget)


@settings(deadline=None, max_examples=50)
@given(cases(samples=8, channels=6), st.data())
def test_covered_channels_are_those_of_the_union(case: Case, data: st.DataObject) -> None:
    coverage, _ = case
    chosen = data.draw(st.lists(st.integers(0, len(coverage) - 1), unique=True))
    union = set().union(*(np.flatnonzero(coverage[s]).tolist() for s in chosen))
    found = covered_channels(coverage, np.asarray(chosen, dtype=np.int64))
    assert set(np.flatnonzero(found).tolist()) == union


@settings(deadline=None, max_examples=80)
@given(cases(samples=8, channels=6), st.data())
def test_expected_random_coverage_is_the_mean_over_all_subsets(case: Case, data: st.DataObject) -> None:
    coverage, weights = case
    budget = data.draw(st.integers(0, len(coverage)))
    subsets = [list(chosen) for chosen in itertools.combinations(range(len(coverage)), budget)]
    hits = np.array([coverage[chosen].any(axis=0) for chosen in subsets], dtype=np.float64)
    channels = hits.mean() if weights.size else 0.0
    weighted = (hits @ weights).mean() / weights.sum() if weights.sum() else 0.0
    assert expected_random_coverage(coverage, weights, budget) == pytest.approx((channels, weighted), abs=1e-12)


def test_expected_random_coverage_of_a_large_pool_is_the_hypergeometric_tail() -> None:
    coverage = np.arange(10_000)[:, None] < np.array([1, 37, 5000])
    weights = np.array([1.0, 2.0, 4.0])
    missed = [Fraction(math.comb(10_000 - n, 128), math.comb(10_000, 128)) for n in (1, 37, 5000)]
    share = float(sum(1 - m for m in missed) / 3)
    weighted = float(sum((1 - m) * int(w) for m, w in zip(missed, weights, strict=True)) / 7)
    assert expected_random_coverage(coverage, weights, 128) == pytest.approx((share, weighted), abs=1e-9)


# --- other ways to the same answer ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(cases())
def test_packed_bits_are_the_same_matrix(case: Case) -> None:
    coverage, weights = case
    packed = PackedBits.packing(coverage)
    assert packed.shape == coverage.shape
    np.testing.assert_array_equal(packed.unpacked(), coverage)
    one, other = greedy_cover(packed, weights, len(coverage)), greedy_cover(coverage, weights, len(coverage))
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("order", "gains", "rounds"))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("choose", [greedy_cover, greedy_soft_cover])
def test_tables_and_lists_of_channels_come_to_the_same(
    choose: Callable[..., Any], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    coverage, weights = random_case(7, 1500, 301, density)
    found = []
    for share, listed in itertools.product((0.0, 0.8, math.inf), (0, 2**24)):  # tables only, both, lists only; how made
        monkeypatch.setattr("covercal.coverage.TABLE_SHARE", share)
        monkeypatch.setattr("covercal.coverage.SPARSE_SHARE", math.inf)
        monkeypatch.setattr("covercal.coverage.LISTED_BYTES", listed)
        chosen = choose(coverage, weights, 60)
        found.append((chosen.order, chosen.gains) if choose is greedy_cover else chosen)
    for order, gains in found[1:]:
        np.testing.assert_array_equal(order, found[0][0])
        np.testing.assert_array_equal(gains, found[0][1])


@pytest.mark.parametrize("kept", [0, 500])
@pytest.mark.parametrize("choose", [greedy_cover, greedy_soft_cover])
def test_what_is_kept_of_a_full_matrix_is_bounded_and_changes_nothing(
    choose: Callable[..., Any], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coverage, weights = random_case(7, 300, 201, 0.4)
    made: list[_Channels] = []
    monkeypatch.setattr("covercal.coverage._Channels", lambda bits: made.append(_Channels(bits)) or made[-1])
    monkeypatch.setattr("covercal.coverage.TABLE_SHARE", math.inf)
    orders = []
    for room in (kept, 2**24):
        monkeypatch.setattr("covercal.coverage.KEPT_SAMPLES", room)
        chosen = choose(coverage, weights, 60)
        orders.append(chosen.order if choose is greedy_cover else chosen[0])
    np.testing.assert_array_equal(*orders)
    sizes = [sum(samples.size for samples in each._samples.values()) for each in made]
    assert sizes[0] < kept + 300 < sizes[1]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_order_is_apricots_where_gains_differ(seed: int) -> None:
    from apricot import MaxCoverageSelection

    coverage, _ = random_case(seed, 300, 90, 0.05)
    copies = np.random.default_rng(4).integers(1, 1000, 90)  # apricot knows no weights: a channel w times weighs w
    chosen = greedy_cover(coverage, copies.astype(np.float64), 12)
    assert not chosen.rounds.any()
    # Its lazy optimizer is not greedy: in 0.6.1 it takes a sample that gains nothing as the ninth of seed 3.
    chooser = MaxCoverageSelection(12, threshold=1.0, optimizer="naive", verbose=False)
    chooser.fit(np.repeat(coverage, copies, axis=1).astype(np.float64))
    assert chooser.ranking.tolist() == chosen.order.tolist()
    np.testing.assert_array_equal(chooser.gains, chosen.gains)
