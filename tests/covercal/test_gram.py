"""Sums over a site's inputs against X^T X and friends in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal import gram
from covercal.gram import BINS_PER_OCTAVE, SiteStatistics, SiteSums, Wanted, bin_values
from covercal.quantizers.regularization import ledoit_wolf_share

CPU = torch.device("cpu")
EVERYTHING = Wanted(
    validation=True, spread=True, magnitude=True, peak=True, drift=True, drift_energy=True, histogram=True
)


def inputs(seed: int, sequences: int, length: int, channels: int) -> Tensor:
    return torch.randn(sequences, length, channels, generator=torch.Generator().manual_seed(seed))


def summed(parts: list[Tensor], wanted: Wanted = Wanted(), weights: list[float] | None = None) -> SiteStatistics:  # noqa: B008
    sums = SiteSums(parts[0].shape[-1], CPU, wanted)
    first = 0
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        sums.add(part, weight=weight, samples=range(first, first + len(part)))
        first += len(part)
    return sums.statistics()


def products(x: Tensor) -> Tensor:
    flat = x.double().reshape(-1, x.shape[-1])
    return flat.T @ flat


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=5),
    st.integers(1, 24),
    st.integers(0, 2**31),
)
def test_the_gram_matrix_is_the_mean_over_tokens_of_the_products(
    shapes: list[tuple[int, int]], channels: int, seed: int
) -> None:
    parts = [inputs(seed + i, count, length, channels) for i, (count, length) in enumerate(shapes)]
    tokens = sum(count * length for count, length in shapes)
    close(summed(parts).gram, sum(map(products, parts)) / tokens)


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("wanted", [Wanted(drift=True, drift_energy=True), EVERYTHING])
def test_panels_of_a_symmetric_sum_make_the_whole(
    channels: int, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "SYMMETRIC_COLUMNS", 4)
    sums = SiteSums(channels, CPU, wanted)
    x, original = inputs(1, 5, 7, channels), inputs(2, 5, 7, channels)
    sums.add(x, original=original)
    found = sums.statistics()
    close(found.gram, products(x) / 35)
    close(found.drift_energy, products(original - x) / 35)
    for matrix in (found.gram, found.drift_energy):
        assert matrix is not None
        assert torch.equal(matrix, matrix.T)


def test_sequences_tokens_and_weight_are_counted() -> None:
    found = summed([inputs(0, 3, 7, 4), inputs(1, 2, 5, 4)], weights=[1.0, 3.0])
    assert (found.sequences, found.tokens, found.weight) == (5, 31, 21 + 30)


def test_with_the_inverse_length_as_weight_every_sequence_counts_the_same() -> None:
    short, long = inputs(1, 1, 3, 5), inputs(2, 1, 7, 5)
    found = summed([short, long], weights=[1 / 3, 1 / 7])
    close(found.gram, (products(short) / 3 + products(long) / 7) / 2)


def test_equal_lengths_give_the_same_bits_whether_tokens_or_sequences_weigh_the_same() -> None:
    parts = [inputs(seed, 2, 7, 5) for seed in range(3)]
    longest = 7
    assert torch.equal(summed(parts).gram, summed(parts, weights=[longest / 7] * 3).gram)


@pytest.mark.parametrize("wanted", [Wanted(), EVERYTHING], ids=["plain", "everything"])
def test_sums_are_float64(wanted: Wanted) -> None:
    found = summed([inputs(0, 2, 7, 4)], wanted)
    assert found.gram is not None
    assert found.gram.dtype == torch.float64


def test_a_small_sequence_is_not_lost_behind_a_large_one() -> None:
    sums = SiteSums(1, CPU, Wanted())
    sums.add(torch.full((1, 1, 1), 2.0**14))
    for _ in range(4):
        sums.add(torch.ones(1, 1, 1))  # float32 would drop 1 next to 2**28
    gram = sums.statistics().gram
    assert gram is not None
    assert gram.item() * 5 == 2.0**28 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    x = inputs(3, 2, 16, 5).to(dtype)
    assert torch.equal(summed([x]).gram, summed([x.float()]).gram)


def test_the_gram_matrix_of_nothing_is_zero() -> None:
    assert torch.equal(SiteSums(3, CPU, Wanted()).statistics().gram, torch.zeros(3, 3, dtype=torch.float64))


def test_telling_sequences_apart_gives_the_same_matrix() -> None:
    parts = [inputs(seed, 3, 7, 5) for seed in range(3)]
    whole, apart = summed(parts), summed(parts, Wanted(validation=True, spread=True))
    assert apart.gram is not None
    close(whole.gram, apart.gram)


def test_every_fourth_sequence_validates_and_the_others_train() -> None:
    x = inputs(0, 9, 6, 5)
    found = summed([x[:5], x[5:]], Wanted(validation=True))
    held_out, rest = x[[3, 7]], x[[0, 1, 2, 4, 5, 6, 8]]
    close(found.validation, products(held_out) / (2 * 6))
    close(found.training, products(rest) / (7 * 6))


def test_with_fewer_than_four_sequences_nothing_validates() -> None:
    found = summed([inputs(0, 3, 6, 5)], Wanted(validation=True))
    assert found.validation is None
    close(found.training, products(inputs(0, 3, 6, 5)) / 18)


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 1.0), (6, 9)), ((1 / 6, 1 / 9), (1, 1)), ((2.0, 1.0), (12, 9))])
def test_the_spread_is_the_mean_square_off_the_diagonal_of_the_sequences_own_matrices(
    weights: tuple[float, float], shares: tuple[int, int]
) -> None:
    parts = [inputs(0, 3, 6, 5), inputs(1, 2, 9, 5)]
    own = [products(sequence) / len(sequence) for part in parts for sequence in part]
    squares = [float((matrix - torch.diag(matrix.diagonal())).square().sum()) for matrix in own]
    weighing = np.repeat(shares, (3, 2))
    found = summed(parts, Wanted(spread=True), list(weights))
    assert found.mean_square == pytest.approx(np.average(squares, weights=weighing), rel=1e-5)
    assert found.concentration == pytest.approx(np.square(weighing / weighing.sum()).sum(), rel=1e-12)


def in_prefixes(x: Tensor, lengths: tuple[int, ...], wanted: Wanted, weights: list[float]) -> SiteStatistics:
    """Return the statistics of all prefixes of samples (samples, tokens, channels), a sample's after each other."""
    sums = SiteSums(x.shape[-1], CPU, wanted)
    for sample, tokens in enumerate(x):
        for length, weight in zip(lengths, weights, strict=True):
            sums.add(tokens[None, :length], weight=weight, samples=[sample])
    return sums.statistics()


def test_the_prefixes_of_every_fourth_sample_validate_and_those_of_the_others_train() -> None:
    x, lengths = inputs(0, 9, 12, 5), (4, 7, 12)
    found = in_prefixes(x, lengths, Wanted(validation=True), [1.0] * 3)
    held_out, rest = x[[3, 7]], x[[0, 1, 2, 4, 5, 6, 8]]
    close(found.validation, sum(products(held_out[:, :length]) for length in lengths) / (2 * sum(lengths)))
    close(found.training, sum(products(rest[:, :length]) for length in lengths) / (7 * sum(lengths)))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [4.0, 1.6, 1.0]])
def test_the_spread_of_prefixes_is_that_of_samples_that_hold_the_tokens_of_all_of_theirs(weights: list[float]) -> None:
    x, lengths = inputs(0, 6, 40, 5) @ (inputs(1, 1, 5, 5) + 0.3 * inputs(2, 6, 5, 5)), (10, 25, 40)
    scales = [weight**0.5 for weight in weights]
    own = [sum(products(scale * s[:n]) for scale, n in zip(scales, lengths, strict=True)) for s in x]
    weight = sum(w * n for w, n in zip(weights, lengths, strict=True))
    squares = [float((matrix - torch.diag(matrix.diagonal())).square().sum()) / weight**2 for matrix in own]
    found = in_prefixes(x, lengths, Wanted(spread=True, nested=True), weights)
    assert found.mean_square == pytest.approx(np.mean(squares), rel=1e-5)
    assert found.concentration == pytest.approx(1 / 6, rel=1e-12)
    assert found.gram is not None
    expected = ledoit_wolf_share(found.gram, float(np.mean(squares)), 1 / 6)
    assert found.ledoit_wolf == pytest.approx(expected, rel=1e-4)
    assert 0 < found.ledoit_wolf < 1


def test_samples_of_one_prefix_each_have_the_spread_of_sequences() -> None:
    x = inputs(0, 6, 12, 5)
    found, plain = in_prefixes(x, (12,), Wanted(spread=True, nested=True), [1.0]), summed([x], Wanted(spread=True))
    assert (found.mean_square, found.concentration) == (plain.mean_square, plain.concentration)


def test_a_spread_that_was_not_asked_for_is_not_a_number() -> None:
    found = summed([inputs(0, 3, 6, 5)])
    assert np.isnan([found.mean_square, found.concentration, found.ledoit_wolf]).all()


def test_of_no_sequence_nothing_is_known_of_how_they_differ() -> None:
    assert np.isnan(SiteSums(5, CPU, Wanted(spread=True)).statistics().ledoit_wolf)


def test_the_spread_of_scaled_inputs_is_not_known() -> None:
    found = summed([inputs(0, 3, 6, 5)], EVERYTHING).scaled(torch.ones(5, dtype=torch.float64))
    assert np.isnan([found.mean_square, found.concentration, found.ledoit_wolf]).all()


def test_magnitude_is_the_weighted_mean_and_peak_the_largest() -> None:
    parts = [inputs(0, 2, 6, 5), inputs(1, 1, 9, 5)]
    found = summed(parts, EVERYTHING, weights=[1.0, 2.0])
    sums = [part.double().abs().sum(dim=(0, 1)) for part in parts]
    close(found.magnitude, (sums[0] + 2 * sums[1]) / (12 + 18))
    close(found.peak, torch.cat([part.reshape(-1, 5) for part in parts]).abs().amax(dim=0).double())


def test_the_drift_is_the_products_of_the_difference() -> None:
    x, original = inputs(0, 2, 6, 5), inputs(1, 2, 6, 5)
    sums = SiteSums(5, CPU, Wanted(drift=True, drift_energy=True))
    sums.add(x, original=original)
    found = sums.statistics()
    d, q = ((part.double()).reshape(-1, 5) for part in (original - x, x))
    close(found.drift, d.T @ q / 12)
    close(found.drift_energy, d.T @ d / 12)
    assert found.outputs_drift is found.outputs_drift_energy is None


@pytest.mark.parametrize("panel", [2, 3, 1024])
@pytest.mark.parametrize("energy", [False, True])
def test_of_narrow_weights_the_drift_is_summed_as_it_appears_in_their_outputs(
    panel: int, energy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "PANEL_ROWS", panel)
    weights = [inputs(8, 1, 3, 9)[0], inputs(9, 1, 5, 9)[0].to(torch.bfloat16)]
    plain, turned = (
        SiteSums(9, CPU, Wanted(drift=True, drift_energy=True)),
        SiteSums(9, CPU, Wanted(drift=True, drift_energy=energy), weights),
    )
    for number, weight in enumerate([1.0, 2.5]):
        x, original = inputs(number, 2, 6, 9), inputs(number + 4, 2, 6, 9)
        for sums in (plain, turned):
            sums.add(x, weight=weight, original=original)
    expected, found = plain.statistics(), turned.statistics()
    assert found.drift is found.drift_energy is None
    assert found.outputs_drift is not None
    assert expected.drift is not None
    assert expected.drift_energy is not None
    for weight, drift in zip(weights, found.outputs_drift, strict=True):
        close(drift, weight.double() @ expected.drift)
    energies = [float(torch.trace(w.double() @ expected.drift_energy @ w.double().T)) for w in weights]
    assert found.outputs_drift_energy == (pytest.approx(energies, rel=1e-5) if energy else None)


@pytest.mark.parametrize("rows", [(9,), (5, 4), (20,)])
def test_of_wide_weights_the_drift_is_summed_as_it_is(rows: tuple[int, ...]) -> None:
    weights = [inputs(8, 1, count, 9)[0] for count in rows]
    sums = SiteSums(9, CPU, Wanted(drift=True, drift_energy=True), weights)
    sums.add(inputs(0, 2, 6, 9), original=inputs(1, 2, 6, 9))
    found = sums.statistics()
    assert found.outputs_drift is found.outputs_drift_energy is None
    assert found.drift is not None


def test_without_a_drift_weights_are_not_looked_at() -> None:
    found = SiteSums(9, CPU, Wanted(), [torch.zeros(3, 9)]).statistics()
    assert found.outputs_drift is None


def test_the_histogram_counts_every_value_that_is_not_zero_in_a_bin_near_it() -> None:
    x = torch.tensor([0.0, 1.5, -1.5, 3000.0, 1e-6]).reshape(1, 5, 1)
    found = summed([x], Wanted(histogram=True))
    assert found.histogram is not None
    assert found.largest == 3000.0
    counts = {float(bin_values(CPU)[i]): int(n) for i, n in enumerate(found.histogram) if n}
    assert sorted(counts.values()) == [1, 1, 2]
    for value, count in zip((1e-6, 1.5, 3000.0), (1, 2, 1), strict=True):
        near = min(counts, key=lambda each, value=value: abs(each - value))
        assert counts[near] == count
        assert near == pytest.approx(value, rel=2 ** (0.5 / BINS_PER_OCTAVE) - 1 + 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_largest_input_tells_of_one_that_is_not_finite_whatever_comes_after_it(bad: float) -> None:
    x = inputs(0, 2, 6, 5)
    x[0, 3, 1] = bad
    assert not np.isfinite(summed([x, inputs(1, 2, 6, 5)], Wanted(gram=False, histogram=True)).largest)


def test_scaled_statistics_are_those_of_scaled_inputs() -> None:
    x, original = inputs(0, 5, 6, 5), inputs(1, 5, 6, 5)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)

    def measured(factor: Tensor) -> SiteStatistics:
        sums = SiteSums(5, CPU, EVERYTHING)
        sums.add((x / factor).float(), original=(original / factor).float())
        return sums.statistics()

    found, expected = measured(torch.ones(5)).scaled(scale), measured(scale)
    for name in ("gram", "validation", "training", "magnitude", "peak", "drift", "drift_energy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def test_what_was_not_asked_for_is_not_there() -> None:
    found = summed([inputs(0, 1, 6, 5)], Wanted(gram=False))
    assert (found.gram, found.validation, found.magnitude, found.drift, found.histogram) == (None,) * 5
