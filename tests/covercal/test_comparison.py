"""Paired comparison against brute force, scipy, published examples, and its own promise in simulation."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, bootstrap, norm, spearmanr, t

from covercal import comparison
from covercal.comparison import (
    BOOTSTRAP,
    FEW_ITEMS,
    MCNEMAR,
    mcnemar,
    paired_difference,
    rank_correlation,
    student_quantile,
    tango_interval,
)
from covercal.errors import InputError

Floats = npt.NDArray[np.float64]


def widened(items: int) -> float:
    """Return the confidence at which an interval of normal quantiles is as wide as this one."""
    return float(2 * norm.cdf(t.ppf(0.975, items - 1) * math.sqrt(items / (items - 1))) - 1)


bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def skewed(count: int, seed: int) -> tuple[Floats, Floats]:
    """Return two models' values whose differences lean to one side, as divergences do."""
    draw = np.random.default_rng(seed)
    first = draw.lognormal(0, 1, count)
    return first, first * draw.lognormal(0.05, 0.4, count)


# --- right or wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 1), (2, 7), (7, 2), (5, 0), (40, 61)])
def test_mcnemars_probability_is_the_binomial_test_of_the_items_that_differ(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(binomtest(first, first + second).pvalue, rel=1e-12)


@pytest.mark.parametrize(("first", "second"), [(1, 4), (3, 3), (0, 6), (5, 2)])
def test_mcnemars_probability_counts_the_ways_the_differing_items_may_fall(first: int, second: int) -> None:
    ways = [sum(way) for way in itertools.product((0, 1), repeat=first + second)]
    extreme = [min(ones, first + second - ones) <= min(first, second) for ones in ways]
    assert mcnemar(first, second) == pytest.approx(np.mean(extreme))


def test_without_an_item_that_differs_nothing_is_known() -> None:
    found = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (found.mean, found.p_value, found.test) == (0.0, 1.0, MCNEMAR)
    bound = norm.ppf(0.975) ** 2  # the score interval of no success in n trials ends at z^2 / (n + z^2)
    assert (found.low, found.high) == pytest.approx((-bound / (4 + bound), bound / (4 + bound)), abs=1e-9)


@given(bits)
@settings(deadline=None, max_examples=60)
def test_the_interval_of_shares_holds_their_difference_and_turns_with_the_models(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    found, turned = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-12)
    assert -1 <= found.low <= found.mean <= found.high <= 1
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low), abs=1e-9)
    assert found.p_value == turned.p_value


def likelihood_score(difference: float, first: int, second: int, items: int) -> float:
    """Return the score statistic with the nuisance share found by maximising the likelihood itself."""

    def cost(share: float) -> float:  # of items that the second alone gets right
        counts = ((first, share + difference), (second, share), (items - first - second, 1 - 2 * share - difference))
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in counts if count)

    span = (max(0.0, -difference), (1 - difference) / 2)
    share = float(minimize_scalar(cost, bounds=span, method="bounded", options={"xatol": 1e-13}).x)
    return (first - second - items * difference) / math.sqrt(items * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("first", "second", "items"), [(24, 7, 50), (3, 9, 30), (12, 12, 40), (1, 5, 9)])
def test_the_interval_of_shares_is_where_the_likelihoods_score_reaches_its_bound(
    first: int, second: int, items: int
) -> None:
    found = (first - second) / items
    bound = norm.ppf(0.975)
    low = brentq(lambda d: likelihood_score(d, first, second, items) - bound, -0.99, found - 1e-9)
    high = brentq(lambda d: likelihood_score(d, first, second, items) + bound, found + 1e-9, 0.99)
    assert tango_interval(first, second, items) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_of_shares_is_that_of_the_published_example() -> None:
    # Fagerland, Lydersen, Laake (2014), table 2: 21 patients, airway hyper-responsiveness, 1 and 7 discordant.
    low, high = tango_interval(7, 1, 21)
    assert (round(low, 3), round(high, 3)) == (0.026, 0.517)


def test_one_item_of_zeros_and_ones_leaves_everything_open() -> None:
    found = paired_difference([1], [0])
    assert (found.mean, found.p_value, found.high) == (1.0, 1.0, 1.0)
    assert found.low < 0


# --- means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_bootstrap_interval_is_scipys_of_the_same_drawing(seed: int) -> None:
    ours, theirs = skewed(40, seed)
    found = paired_difference(ours, theirs, seed=seed)
    draw = np.random.default_rng(seed)
    count, level = comparison.RESAMPLES, widened(40)
    expected = bootstrap(
        (ours - theirs,), np.mean, n_resamples=count, method="BCa", rng=draw, confidence_level=level
    ).confidence_interval
    assert found.test == BOOTSTRAP
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_weighted_mean_is_that_of_items_repeated_as_often_as_they_weigh() -> None:
    ours, theirs = skewed(12, 3)
    weights = np.arange(1.0, 13.0)
    repeated = np.repeat(ours - theirs, weights.astype(int))
    assert paired_difference(ours, theirs, weights=weights).mean == pytest.approx(repeated.mean(), rel=1e-12)


def test_the_interval_of_a_weighted_mean_is_scipys_of_the_ratio() -> None:
    ours, theirs = skewed(50, 5)
    weights = np.random.default_rng(5).uniform(0.2, 3.0, 50)
    found = paired_difference(ours, theirs, weights=weights)

    def ratio(total: Floats, weight: Floats, axis: int = -1) -> Floats:
        return np.asarray(total.sum(axis=axis) / weight.sum(axis=axis))

    draw = np.random.default_rng(0)
    count, level, both = comparison.RESAMPLES, widened(50), (weights * (ours - theirs), weights)
    expected = bootstrap(
        both, ratio, paired=True, n_resamples=count, method="BCa", rng=draw, confidence_level=level
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_zeros_and_ones_with_weights_are_a_weighted_mean() -> None:
    found = paired_difference([1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1], weights=[1, 2, 3, 4, 5, 5])
    assert (found.mean, found.test) == (pytest.approx((1 - 3 + 4) / 20), BOOTSTRAP)


def test_equal_weights_are_no_weights() -> None:
    ours, theirs = skewed(30, 1)
    assert paired_difference(ours, theirs, weights=[2.0] * 30).low == pytest.approx(
        paired_difference(ours, theirs).low, rel=1e-9
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_probability_is_below_5_percent_just_where_the_interval_leaves_out_zero(seed: int) -> None:
    ours, theirs = skewed(30, seed)
    edge = paired_difference(ours, theirs).low
    inside, outside = (paired_difference(ours, theirs + edge + step) for step in (0.01, -0.01))
    assert inside.low < 0 < inside.high
    assert inside.p_value >= 1 - comparison.CONFIDENCE
    assert outside.low > 0
    assert outside.p_value <= 1 - comparison.CONFIDENCE


def test_the_probability_of_many_even_items_is_that_of_the_t_test() -> None:
    draw = np.random.default_rng(4)
    ours = draw.normal(size=2000)
    theirs = ours + draw.normal(0.004, 0.1, 2000)
    differences = ours - theirs
    expected = 2 * norm.sf(abs(differences.mean()) / differences.std(ddof=1) * math.sqrt(2000))
    assert 0.01 < expected < 0.9
    assert paired_difference(ours, theirs).p_value == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("scale", [1e-6, 7.0])
def test_the_unit_does_not_matter(scale: float) -> None:
    ours, theirs = skewed(25, 2)
    found, scaled = paired_difference(ours, theirs), paired_difference(ours * scale, theirs * scale)
    assert scaled.p_value == pytest.approx(found.p_value, rel=1e-6)
    assert (scaled.low, scaled.high) == pytest.approx((found.low * scale, found.high * scale), rel=1e-6)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_so() -> None:
    ours, theirs = skewed(40, 0)
    found, again, other = (paired_difference(ours, theirs, seed=seed) for seed in (0, 0, 1))
    assert found == again
    assert found.low != other.low
    assert found.low == pytest.approx(other.low, abs=0.05 * (found.high - found.low))


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = skewed(33, 0)
    whole = paired_difference(ours, theirs)
    monkeypatch.setattr(comparison, "DRAWS_AT_ONCE", 5000)
    assert paired_difference(ours, theirs) == whole


@pytest.mark.parametrize("kind", ["skewed", "shares"])
def test_the_interval_holds_the_truth_about_19_times_in_20(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 999)
    held, rounds = 0, 300
    for seed in range(rounds):
        draw = np.random.default_rng(seed)
        if kind == "shares":
            ours = draw.random(60) < 0.6
            theirs = np.where(draw.random(60) < 0.25, draw.random(60) < 0.4, ours)
            truth = 0.25 * (0.6 - 0.4)
        else:
            ours = draw.lognormal(0, 0.7, 60)
            theirs = ours - draw.gamma(2.0, 0.1, 60)
            truth = 0.2
        found = paired_difference(ours.astype(float), theirs.astype(float))
        held += found.low <= truth <= found.high
    assert 0.91 <= held / rounds <= 0.985


def test_two_equal_models_differ_significantly_about_once_in_20(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 999)
    small = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        small += paired_difference(draw.normal(size=40), draw.normal(size=40)).p_value < 0.05
    assert 0.02 <= small / 300 <= 0.09


# --- edges ---------------------------------------------------------------------------------------------------------


def test_a_single_item_has_a_difference_and_no_interval() -> None:
    found = paired_difference([2.5], [1.0])
    assert (found.mean, found.test) == (1.5, FEW_ITEMS)
    assert all(map(math.isnan, (found.low, found.high, found.p_value)))


@pytest.mark.parametrize("items", [2, 3, 5])
def test_fewer_items_than_signs_could_tell_apart_have_no_interval(items: int) -> None:
    found = paired_difference(*skewed(items, 0))
    assert found.test == FEW_ITEMS
    assert all(map(math.isnan, (found.low, found.high, found.p_value)))


@pytest.mark.parametrize("items", [6, 8, 12])
def test_the_interval_of_a_few_items_holds_the_truth_nearly_19_times_in_20(
    items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 999)
    found = [paired_difference(np.random.default_rng(seed).normal(size=items), np.zeros(items)) for seed in range(400)]
    assert 0.90 <= np.mean([each.low <= 0 <= each.high for each in found]) <= 0.985


def test_models_that_are_the_same_do_not_differ() -> None:
    found = paired_difference([0.5, 0.25, 3.0], [0.5, 0.25, 3.0])
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("items", [6, 12])
def test_one_difference_on_every_item_is_as_likely_as_all_signs_falling_one_way(items: int) -> None:
    theirs = np.arange(items) + 2.0
    found = paired_difference(theirs + 0.5, theirs)
    assert (found.low, found.high) == (0.5, 0.5)
    assert found.p_value == 2 * 0.5**items


def test_a_few_items_never_say_more_than_their_signs_can() -> None:
    ours = np.array([1.0, 2.0, 3.5, 1.7, 2.1, 2.2])
    assert paired_difference(ours, ours - [0.5, 0.51, 0.5, 0.52, 0.5, 0.5]).p_value == pytest.approx(2**-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", [0, 1, 2])
def test_a_number_that_is_not_finite_is_named(value: float, whose: int) -> None:
    numbers: list[list[float]] = [[1.0, 2.0, 3.0], [1.0, 2.5, 3.0], [1.0, 1.0, 1.0]]
    numbers[whose][2] = value
    owner = ("the first model", "the second model", "the weights")[whose]
    with pytest.raises(InputError, match=rf"Item 2 of {owner} is {value}; only finite"):
        paired_difference(numbers[0], numbers[1], weights=numbers[2])


@pytest.mark.parametrize(
    ("values", "others", "weights", "message"),
    [
        ([], [], None, "there are 0 and 0"),
        ([1.0], [1.0, 2.0], None, "there are 1 and 2"),
        ([1.0, 2.0], [1.0, 2.0], [1.0], "there are 1 for 2 items"),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 0.0], "Item 1 has weight 0; weights are above 0"),
        ([1.0, 2.0], [1.0, 2.0], [-1.0, 1.0], "Item 0 has weight -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    values: Sequence[float], others: Sequence[float], weights: Sequence[float] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        paired_difference(values, others, weights=weights)


def test_what_is_no_number_is_null_in_json() -> None:
    assert paired_difference([0.5], [0.25]).plain() == {
        "mean": 0.25, "low": None, "high": None, "p_value": None, "test": FEW_ITEMS
    }  # fmt: skip


def test_ranks_correlate_as_by_hand() -> None:
    found = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 100.0, 20.0, 3000.0])
    assert found is not None
    assert found[0] == pytest.approx(1 - 6 * 2 / (4 * 15))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=4, max_size=40))
def test_ranks_correlate_as_in_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = [float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs]
    found = rank_correlation(a, b)
    if found is not None:
        expected = spearmanr(a, b)
        assert found[0] == pytest.approx(expected.statistic, abs=1e-12)
        assert found[1] == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_ranks_in_one_order_correlate_fully() -> None:
    assert rank_correlation([1.0, 2.0, 9.0, 10.0], [-3.0, 0.0, 1.0, 2.0]) == (1.0, 0.0)
    assert rank_correlation([1.0, 2.0, 9.0, 10.0], [3.0, 0.0, -1.0, -2.0]) == (-1.0, 0.0)


@pytest.mark.parametrize(("level", "degrees"), [(0.975, 4), (0.975, 1), (0.9, 2.7), (0.5, 30)])
def test_quantiles_of_students_t_are_scipys(level: float, degrees: float) -> None:
    assert student_quantile(level, degrees) == pytest.approx(t.ppf(level, degrees), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("flat", [[], [1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 2.0]])
def test_what_hardly_differs_has_no_correlation(flat: list[float]) -> None:
    assert rank_correlation(flat, list(range(len(flat)))) is None
