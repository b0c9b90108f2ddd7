"""Thresholds against numpy, the standard library and DuckDB in float64."""

import statistics
from collections.abc import Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from covercal import thresholds
from covercal.thresholds import PEAK_RULES, RULES, WEIGHTINGS, above, packed_above, poorly_reconstructed, quantile

Floats = npt.NDArray[np.float64]
Peaks = npt.NDArray[np.float32]
SHARES = (0.0, 1e-9, 0.25, 0.3, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0)
KS = {"mad": (0.5, 3.0, 12.0), "quantile": (0.01, 0.5, 0.999), "median": (0.5, 1.0, 20.0), "absolute": (0.1, 6.0)}
rules_and_ks = pytest.mark.parametrize(("rule", "k"), [(rule, k) for rule, ks in KS.items() for k in ks])

finite = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=1, max_dims=2, max_side=30),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)
shares = st.floats(0, 1)


def random_peaks(seed: int, samples: int = 13, channels: int = 9) -> Peaks:
    """Return peaks (samples, channels) of which a few are huge."""
    generator = np.random.default_rng(seed)
    return (np.abs(generator.standard_t(2, (samples, channels))) * generator.lognormal(0, 1, channels)).astype(
        np.float32
    )


def rounding(values: Peaks) -> float:
    """Return what a few roundings in float64 may come to on numbers of this size."""
    return float(4 * np.finfo(np.float64).eps * np.abs(values).max())


# --- quantiles -----------------------------------------------------------------------------------------------------


@given(finite, shares)
def test_a_quantile_is_numpys_with_linear_interpolation(values: Peaks, share: float) -> None:
    expected = np.quantile(values.astype(np.float64), share, method="linear")
    assert quantile(values, share) == pytest.approx(float(expected), rel=0, abs=rounding(values))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 117])
def test_a_quantile_is_quantile_cont_in_sql(share: float, count: int) -> None:
    values = random_peaks(count, count, 1)
    sql = f"SELECT quantile_cont(value, {share!r}::DOUBLE) FROM (SELECT unnest($1::DOUBLE[]) AS value)"
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        (expected,) = connection.execute(sql, [values.ravel().astype(np.float64).tolist()]).fetchone() or (None,)
    assert quantile(values, share) == pytest.approx(expected, rel=0, abs=rounding(values))


def in_order(values: Peaks, share: float) -> float:
    """Return the quantile from all values in order."""
    ordered, place = np.sort(values, axis=None), share * (values.size - 1)
    low = int(place)
    below, over = float(ordered[low]), float(ordered[min(low + 1, values.size - 1)])
    return below + (place - low) * (over - below)


@pytest.fixture(scope="module")
def many() -> Peaks:
    """More values than are drawn, not next to each other, many of them equal."""
    peaks = np.random.default_rng(3).lognormal(0, 2, (700, 600)).astype(np.float32)
    peaks[::3] = np.float32(0.5)
    assert peaks[:, 50:450].size > thresholds.DRAWN
    return peaks[:, 50:450]


@pytest.mark.parametrize("share", [*SHARES, 0.37])
def test_a_quantile_of_many_values_is_that_of_all_in_order(many: Peaks, share: float) -> None:
    assert quantile(many, share) == in_order(many, share)
    assert quantile(many.reshape(-1), share) == in_order(many, share)


@pytest.mark.parametrize("ends", [(-1.0, 0.0), (1e6, 1e9), (0.5, 0.5), (2.0, 1.0)])
def test_a_draw_that_does_not_enclose_the_quantile_changes_nothing(
    many: Peaks, ends: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "_enclosing", lambda drawn, share: ends)
    for share in SHARES:
        assert quantile(many, share) == in_order(many, share)


def test_only_few_of_many_values_are_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = np.random.default_rng(4).standard_exponential((700, 400)).astype(np.float32)
    sizes, plain = [], np.partition

    def counting(values: Peaks, places: tuple[int, int]) -> Peaks:
        sizes.append(values.size)
        return plain(values, places)

    monkeypatch.setattr(np, "partition", counting)
    for share in (0.5, 0.999):
        quantile(peaks, share)
    assert max(sizes) < peaks.size / 20


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_the_median_deviation_of_many_values_is_that_of_all_in_order(many: Peaks, k: float) -> None:
    middle = in_order(many, 0.5)
    spread = in_order(np.abs(many - np.float32(middle)), 0.5)
    assert PEAK_RULES["mad"](many, k) == middle + k * 1.4826 * spread


@pytest.mark.parametrize("step", range(17))
def test_a_quantile_that_falls_on_a_value_is_that_value(step: int) -> None:
    values = random_peaks(step, 17, 1)
    assert quantile(values, step / 16) == np.sort(values.ravel())[step]


@given(finite, st.tuples(shares, shares))
def test_a_larger_share_never_has_a_smaller_quantile(values: Peaks, pair: tuple[float, float]) -> None:
    low, high = sorted(pair)
    assert quantile(values, low) <= quantile(values, high) + rounding(values)


@given(finite, shares, st.randoms(use_true_random=False))
def test_neither_order_nor_shape_changes_a_quantile(values: Peaks, share: float, source: object) -> None:
    shuffled = values.ravel().tolist()
    source.shuffle(shuffled)
    assert quantile(np.array(shuffled, dtype=np.float32), share) == quantile(values, share)


def test_a_quantile_leaves_its_values_in_their_order() -> None:
    values = random_peaks(0)
    before = values.copy()
    quantile(values, 0.5)
    np.testing.assert_array_equal(values, before)


# --- rules ---------------------------------------------------------------------------------------------------------


def expected_limit(rule: str, peaks: Peaks, k: float) -> float:
    """Return a threshold in float64 by the standard library, but for the quantile."""
    values = peaks.ravel().astype(np.float64).tolist()
    if rule == "mad":
        middle = statistics.median(values)
        return middle + k * 1.4826 * statistics.median([abs(value - middle) for value in values])
    if rule == "quantile":
        return float(np.quantile(values, k))
    return k * statistics.median(values) if rule == "median" else k


def test_sigma_and_the_rules_on_peaks_are_all_there_are() -> None:
    assert RULES == ("sigma", "mad", "quantile", "median", "absolute")
    assert set(PEAK_RULES) == set(KS)


def test_every_weighting_is_described() -> None:
    assert list(WEIGHTINGS) == ["full", "squared_norm", "magnitude", "column_norm", "unweighted"]
    assert all(WEIGHTINGS.values())


@rules_and_ks
@pytest.mark.parametrize("shape", [(13, 9), (4, 5), (1, 1), (2, 1)])
def test_a_threshold_is_that_of_all_peaks_of_the_site_in_float64(rule: str, k: float, shape: tuple[int, int]) -> None:
    for seed in range(5):
        peaks = random_peaks(seed, *shape)
        slack = k * float(np.spacing(np.median(peaks))) if rule == "mad" else 0  # deviations are taken in float32
        assert PEAK_RULES[rule](peaks, k) == pytest.approx(expected_limit(rule, peaks, k), rel=1e-6, abs=2 * slack)


def test_the_scaled_deviation_of_a_normal_distribution_is_its_sigma() -> None:
    peaks = np.random.default_rng(0).normal(50, 2, (1000, 200)).astype(np.float32)
    assert PEAK_RULES["mad"](peaks, 6.0) == pytest.approx(50 + 6 * 2, rel=0.005)


@pytest.mark.parametrize("rule", ["mad", "median"])
def test_it_does_not_matter_how_huge_a_minority_of_the_peaks_is(rule: str) -> None:
    peaks = np.sort(random_peaks(0).ravel())
    large, huge = peaks.copy(), peaks.copy()
    large[-50:], huge[-50:] = 1e4, 1e30  # 50 of 117
    assert PEAK_RULES[rule](large, 3.0) == PEAK_RULES[rule](huge, 3.0)


@rules_and_ks
@pytest.mark.parametrize("exponent", [-20, 3])
def test_a_threshold_goes_with_the_scale_of_the_peaks_unless_it_is_absolute(rule: str, k: float, exponent: int) -> None:
    peaks, factor = random_peaks(1), 2.0**exponent
    found = PEAK_RULES[rule](peaks * np.float32(factor), k)
    assert found == PEAK_RULES[rule](peaks, k) * (1 if rule == "absolute" else factor)


@pytest.mark.parametrize("rule", PEAK_RULES)
def test_a_higher_k_never_lowers_a_threshold(rule: str) -> None:
    limits = [PEAK_RULES[rule](random_peaks(2), k) for k in sorted(KS[rule])]
    assert limits == sorted(limits)
    assert limits[0] < limits[-1]


@pytest.mark.parametrize("rule", ["mad", "quantile"])
def test_nothing_is_above_the_threshold_of_equal_peaks(rule: str) -> None:
    for value in (0.0, 0.1, 1e-30, 3e4):
        peaks = np.full((6, 4), value, dtype=np.float32)
        assert not (peaks.astype(np.float64) > PEAK_RULES[rule](peaks, 0.5)).any()


# --- poor reconstruction -------------------------------------------------------------------------------------------


def over_limit(errors: Sequence[float]) -> list[int]:
    limit = statistics.median(errors) + 2 * statistics.pstdev(errors)
    return [index for index, error in enumerate(errors) if error > limit]


@pytest.mark.parametrize("seed", range(20))
def test_poor_is_above_the_median_plus_two_standard_deviations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    errors = generator.lognormal(0, 1, int(generator.integers(3, 60)))
    assert poorly_reconstructed(errors).tolist() == over_limit(errors.tolist())


def test_one_error_that_stands_out_is_poor() -> None:
    assert poorly_reconstructed(np.array([1.0, 1.1, 0.9, 10.0, 1.0, 1.05])).tolist() == [3]


@pytest.mark.parametrize("errors", [[], [1.0], [1.0, 1e9], [0.0] * 5, [0.1] * 7], ids=len)
def test_where_none_stands_out_none_is_poor(errors: list[float]) -> None:
    found = poorly_reconstructed(np.array(errors, dtype=np.float64))
    assert (found.size, found.dtype) == (0, np.int64)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
@example([0.0, 2.6e-227])  # its squares are smaller than any number
def test_fewer_than_half_are_ever_poor(errors: list[float]) -> None:
    assert 2 * poorly_reconstructed(np.array(errors)).size < len(errors)


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**-30, 2.0**10])
def test_the_scale_of_errors_does_not_matter(scale: float) -> None:
    errors = np.random.default_rng(5).lognormal(0, 1, 40)
    assert poorly_reconstructed(errors).size
    np.testing.assert_array_equal(poorly_reconstructed(scale * errors), poorly_reconstructed(errors))


@given(finite, st.one_of(st.floats(allow_nan=False), st.floats(-(2.0**100), 2.0**100, width=32)))
def test_what_is_above_a_limit_is_what_float64_says(peaks: Peaks, limit: float) -> None:
    np.testing.assert_array_equal(above(peaks, limit), peaks.astype(np.float64) > limit)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 1001)])
def test_packed_bits_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    peaks = np.random.default_rng(2).standard_normal((shape[0], shape[1] + 3), dtype=np.float32)[:, 2:-1]
    np.testing.assert_array_equal(packed_above(peaks, 0.7), np.packbits(peaks > 0.7, axis=1), strict=True)


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_a_limit_between_two_peaks_is_not_rounded_to_one(step: int) -> None:
    peak = np.float32(0.1)
    limit = float(peak) + step * 1e-12
    assert above(np.array([peak]), limit)[0] == (float(peak) > limit)
