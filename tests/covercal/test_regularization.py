"""Shrinkage and damping against their formulas in numpy, and the Ledoit-Wolf share against element-wise variances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.gram import SiteStatistics, SiteSums, Wanted
from covercal.quantizers.factor import factorize
from covercal.quantizers.regularization import (
    damping_weights,
    floored,
    ledoit_wolf_share,
    off_diagonal_square,
    regularized,
    saliency,
)
from tests.covercal.layers import Floats, layer, matrix_of

seeds = st.integers(0, 2**32 - 1)


def positive(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.exp(np.random.default_rng(seed).normal(size=count)))


def shrunk(gram: Tensor, share: float, towards: Tensor | None = None) -> Tensor:
    return matrix_of(regularized(gram, share, towards, 0.0, None))


# --- shrinkage -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1), st.booleans())
def test_shrinkage_mixes_the_matrix_and_a_diagonal(seed: int, share: float, own: bool) -> None:
    _, gram = layer(seed, 1, 12)
    other = gram.diagonal() if own else positive(seed, 12)
    expected = (1 - share) * gram.numpy() + share * np.diag(other.numpy())
    found = shrunk(gram, share, None if own else other).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1))
def test_shrinkage_towards_its_own_diagonal_keeps_the_diagonal_to_the_bit(seed: int, share: float) -> None:
    _, gram = layer(seed, 1, 12)
    assert torch.equal(shrunk(gram, share).diagonal(), gram.diagonal())


@pytest.mark.parametrize("towards", [None, positive(0, 12)], ids=["own", "pool"])
def test_no_shrinkage_changes_nothing(towards: Tensor | None) -> None:
    _, gram = layer(0, 1, 12)
    assert torch.equal(shrunk(gram, 0.0, towards), gram)


@pytest.mark.parametrize("towards", [None, positive(0, 12)], ids=["own", "pool"])
def test_full_shrinkage_leaves_the_diagonal_alone(towards: Tensor | None) -> None:
    _, gram = layer(0, 1, 12)
    diagonal = gram.diagonal() if towards is None else towards
    assert torch.equal(shrunk(gram, 1.0, towards), torch.diag(diagonal))


def test_shrinkage_lifts_a_singular_matrix_off_zero() -> None:
    ones = torch.ones(6, 6, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(shrunk(ones, 0.3))[0]) == pytest.approx(0.3)


def test_shrinkage_does_not_change_the_matrix() -> None:
    _, gram = layer(0, 1, 12)
    kept = gram.clone()
    shrunk(gram, 0.5, positive(0, 12))
    assert torch.equal(gram, kept)


# --- shrinkage and damping together --------------------------------------------------------------------------------


def by_hand(gram: Tensor, share: float, towards: Tensor | None, damping: float, weights: Tensor | None) -> Floats:
    """Return a Gram matrix shrunk first, then damped relative to the mean of the diagonal that this gives."""
    own = gram.numpy()
    diagonal = (1 - share) * np.diag(own) + share * (np.diag(own) if towards is None else towards.numpy())
    used = diagonal > 0
    diagonal = np.where(used, diagonal, diagonal[used].mean())
    added = damping * diagonal.mean() * (np.ones(len(own)) if weights is None else weights.numpy())
    return (1 - share) * (own - np.diag(np.diag(own))) + np.diag(diagonal + added)


REGULARIZATIONS = pytest.mark.parametrize(
    ("share", "towards", "damping", "weights"),
    [
        (0.0, None, 0.01, None),
        (0.3, None, 0.1, None),
        (0.3, positive(0, 12), 0.1, None),
        (0.0, None, 0.5, positive(1, 12)),
        (0.7, positive(0, 12), 0.5, positive(1, 12)),
        (1.0, None, 0.0, None),
    ],
)


@pytest.mark.parametrize("dead", [[], [0, 7]], ids=["all_used", "some_unused"])
@REGULARIZATIONS
def test_a_matrix_is_shrunk_first_and_damped_then(
    share: float, towards: Tensor | None, damping: float, weights: Tensor | None, dead: list[int]
) -> None:
    _, gram = layer(2, 1, 12)
    gram[dead], gram[:, dead] = 0, 0
    expected = by_hand(gram, share, towards, damping, weights)
    np.testing.assert_allclose(
        matrix_of(regularized(gram, share, towards, damping, weights)).numpy(), expected, rtol=1e-12
    )


@given(seeds, st.floats(0, 1), st.integers(0, 11), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_a_product_is_that_with_the_whole_matrix(seed: int, share: float, start: int, count: int) -> None:
    _, gram = layer(seed, 1, 12)
    metric = regularized(gram, share, positive(seed, 12), 0.1, None)
    columns = slice(start, min(start + count, 12))
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, columns.stop - start)))
    expected = matrix @ matrix_of(metric)[columns]
    torch.testing.assert_close(metric.product(matrix, columns), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dead", [[], [0, 7]], ids=["all_used", "some_unused"])
@REGULARIZATIONS
def test_what_is_factorised_is_the_matrix_shrunk_first_and_damped_then(
    share: float, towards: Tensor | None, damping: float, weights: Tensor | None, dead: list[int], ordered: bool
) -> None:
    _, gram = layer(2, 1, 12)
    gram[dead], gram[:, dead] = 0, 0
    factor = factorize(gram, damping, activation_order=ordered, weights=weights, shrinkage=share, towards=towards)
    upper, order = (factor.lower.flip(0, 1) * factor.roots.flip(0)).numpy(), factor.order.numpy()
    expected = by_hand(gram, share, towards, factor.damping, weights)[order][:, order]
    np.testing.assert_allclose(upper @ upper.T, expected, rtol=1e-10, atol=1e-12)


# --- its share, estimated ------------------------------------------------------------------------------------------


def own_matrices(seed: int, sequences: int, channels: int = 6, tokens: int = 40, spread: float = 0.3) -> Floats:
    """Return the Gram matrices of sequences whose channels depend on each other a little differently in each."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(channels, channels))
    mixing = common + spread * generator.normal(size=(sequences, channels, channels))
    x = mixing @ generator.normal(size=(sequences, channels, tokens))
    return x @ x.transpose(0, 2, 1) / tokens


def estimated(matrices: Floats, weights: Floats | None = None) -> float:
    """Return the share for the Gram matrices of sequences that weigh as given, or the same."""
    weights = np.ones(len(matrices)) if weights is None else weights
    weights = weights / weights.sum()
    off = matrices * (1 - np.eye(matrices.shape[1]))
    gram = torch.from_numpy(np.tensordot(weights, matrices, 1))
    return ledoit_wolf_share(gram, float(weights @ np.square(off).sum((1, 2))), float(np.square(weights).sum()))


def by_elements(matrices: Floats, weights: Floats) -> float:
    """Return the sum of the variances of a weighted mean's elements over that of their squares, off the diagonal."""
    off = ~np.eye(matrices.shape[1], dtype=bool)
    weights = weights / weights.sum()
    variance = sum(float(np.cov(each, aweights=weights, ddof=1)) for each in matrices[:, off].T)
    return min(variance * np.square(weights).sum() / np.square(weights @ matrices[:, off]).sum(), 1.0)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(2, 20), st.sampled_from([0.05, 0.3, 1.0, 3.0]))
def test_the_share_is_the_variance_of_the_mean_over_the_squares_off_the_diagonal(
    seed: int, sequences: int, spread: float
) -> None:
    matrices = own_matrices(seed, sequences, spread=spread)
    off = ~np.eye(6, dtype=bool)
    variance = matrices.var(axis=0, ddof=1)[off].sum() / sequences
    expected = min(variance / np.square(matrices.mean(axis=0)[off]).sum(), 1.0)
    assert estimated(matrices) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(2, 20), st.sampled_from([0.05, 0.3, 1.0]))
def test_sequences_that_weigh_differently_give_the_variance_of_their_weighted_mean(
    seed: int, sequences: int, spread: float
) -> None:
    matrices = own_matrices(seed, sequences, spread=spread)
    weights = positive(seed, sequences).numpy()
    assert estimated(matrices, weights) == pytest.approx(by_elements(matrices, weights), rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 8), st.sampled_from([1, 2, 40]))
def test_the_share_lies_between_0_and_1(seed: int, sequences: int, tokens: int) -> None:
    matrices = own_matrices(seed, sequences, tokens=tokens)
    assert 0.0 <= estimated(matrices, positive(seed, sequences).numpy()) <= 1.0


def test_identical_sequences_need_no_shrinkage() -> None:
    assert estimated(np.repeat(own_matrices(0, 1), 5, axis=0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("concentration", [1.0, math.nan], ids=["one", "none"])
def test_fewer_than_two_sequences_ask_for_full_shrinkage(concentration: float) -> None:
    _, gram = layer(0, 1, 6)
    assert ledoit_wolf_share(gram, 2 * off_diagonal_square(gram), concentration) == 1.0


def test_a_sequence_that_weighs_nothing_does_not_count() -> None:
    matrices = own_matrices(0, 5)
    weights = np.array([1.0, 0.0, 2.0, 1.0, 0.0])
    assert estimated(matrices, weights) == pytest.approx(estimated(matrices[[0, 2, 3]], weights[[0, 2, 3]]), rel=1e-12)


def test_a_diagonal_matrix_needs_no_shrinkage() -> None:
    assert ledoit_wolf_share(torch.eye(6, dtype=torch.float64), 0.0, 0.25) == 0.0


def test_channels_that_depend_on_each_other_by_chance_alone_are_taken_apart() -> None:
    noise = np.random.default_rng(0).normal(size=(30, 12, 25))
    assert estimated(noise @ noise.transpose(0, 2, 1) / 25) > 0.8


@pytest.mark.parametrize("sequences", [5, 20])
def test_the_share_is_near_the_one_that_comes_closest_to_the_true_matrix(sequences: int) -> None:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(8, 8)) / 3
    true, factor = mixing @ mixing.T + np.eye(8), np.linalg.cholesky(mixing @ mixing.T + np.eye(8))
    off, shares = 1 - np.eye(8), np.linspace(0, 1, 101)
    found, errors = [], np.zeros_like(shares)
    for _ in range(100):
        x = factor @ generator.normal(size=(sequences, 8, 30))
        matrices = x @ x.transpose(0, 2, 1) / 30
        found.append(estimated(matrices))
        errors += [np.square(((1 - share) * matrices.mean(axis=0) - true) * off).sum() for share in shares]
    assert np.mean(found) == pytest.approx(shares[errors.argmin()], rel=0.3)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([2.0**-30, 2.0**30]))
def test_the_share_does_not_depend_on_the_size_of_the_inputs(seed: int, factor: float) -> None:
    matrices = own_matrices(seed, 5)
    assert estimated(matrices * factor) == estimated(matrices)


# --- its share, measured -------------------------------------------------------------------------------------------

LENGTHS = (120, 60, 20, 20, 10, 10, 10, 10)


def measured(sequences: list[Floats], *, by_sequence: bool) -> SiteStatistics:
    """Return the statistics of sequences (tokens, channels), added one by one."""
    sums = SiteSums(sequences[0].shape[1], torch.device("cpu"), Wanted(spread=True))
    for number, x in enumerate(sequences):
        weight = 120 / len(x) if by_sequence else 1.0
        sums.add(torch.from_numpy(x)[None].float(), weight=weight, samples=[number])
    return sums.statistics()


def unlike_sequences(generator: np.random.Generator) -> list[Floats]:
    """Return sequences of all lengths whose tokens are alike within each one and not from one to the other."""
    common = np.random.default_rng(1).normal(size=(6, 6))
    mixings = [common + 0.7 * generator.normal(size=(6, 6)) for _ in LENGTHS]
    tokens = [generator.normal(size=(length, 6)) for length in LENGTHS]
    whitened = [x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / len(x))).T for x in tokens]
    return [x @ mixing.T for x, mixing in zip(whitened, mixings, strict=True)]


def test_the_share_of_measured_inputs_is_that_of_their_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    sums = SiteSums(6, torch.device("cpu"), Wanted(spread=True))
    sums.add(x[:3])
    sums.add(x[3:])
    matrices = (x.double().transpose(1, 2) @ x.double() / 40).numpy()
    assert sums.statistics().ledoit_wolf == pytest.approx(estimated(matrices), rel=1e-3)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_a_sequence_counts_for_the_share_as_it_does_in_the_gram_matrix(by_sequence: bool) -> None:
    sequences = unlike_sequences(np.random.default_rng(0))
    weights = np.ones(len(LENGTHS)) if by_sequence else np.array(LENGTHS, dtype=float)
    matrices = np.stack([x.T @ x / len(x) for x in sequences])
    found = measured(sequences, by_sequence=by_sequence)
    assert found.concentration == pytest.approx(float(np.square(weights).sum() / weights.sum() ** 2))
    assert found.ledoit_wolf == pytest.approx(by_elements(matrices, weights), rel=1e-4)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_with_sequences_of_many_lengths_the_share_is_near_the_best_one(by_sequence: bool) -> None:
    generator, off = np.random.default_rng(0), 1 - np.eye(6)
    draws = [measured(unlike_sequences(generator), by_sequence=by_sequence) for _ in range(400)]
    grams = np.stack([draw.gram.numpy() for draw in draws if draw.gram is not None])
    common = np.random.default_rng(1).normal(size=(6, 6))
    true = common @ common.T + 6 * 0.7**2 * np.eye(6)  # what the sequences' matrices are on average
    shares = np.linspace(0, 1, 201)
    errors = [np.square(((1 - share) * grams - true) * off).sum() for share in shares]
    assert np.mean([draw.ledoit_wolf for draw in draws]) == pytest.approx(shares[np.argmin(errors)], rel=0.15)


# --- damping by saliency -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1))
def test_saliency_is_its_formula(seed: int, gamma: float) -> None:
    magnitude, weights = positive(seed, 12), positive(seed + 1, 12)
    expected = magnitude.numpy() ** gamma / weights.numpy() ** (1 - gamma)
    np.testing.assert_allclose(saliency(magnitude, weights, gamma).numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1))
def test_damping_weights_are_squared_saliencies_over_their_mean(seed: int, gamma: float) -> None:
    magnitude, weights = positive(seed, 12), positive(seed + 1, 12)
    squares = (magnitude.numpy() ** gamma / weights.numpy() ** (1 - gamma)) ** 2
    found = damping_weights(magnitude, weights, gamma).numpy()
    np.testing.assert_allclose(found, squares / squares.mean(), rtol=1e-12)
    assert found.mean() == pytest.approx(1.0)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 1), st.sampled_from([1e-6, 0.5, 1e6]), st.sampled_from([1e-6, 0.5, 1e6]))
def test_damping_weights_do_not_depend_on_the_size_of_inputs_or_weights(
    seed: int, gamma: float, larger: float, heavier: float
) -> None:
    magnitude, weights = positive(seed, 12), positive(seed + 1, 12)
    found = damping_weights(magnitude * larger, weights * heavier, gamma).numpy()
    np.testing.assert_allclose(found, damping_weights(magnitude, weights, gamma).numpy(), rtol=1e-9)


def test_with_gamma_1_the_weights_do_not_count() -> None:
    magnitude = positive(0, 12)
    found = damping_weights(magnitude, positive(1, 12), 1.0)
    assert torch.equal(found, damping_weights(magnitude, positive(2, 12), 1.0))


def test_with_gamma_0_the_inputs_do_not_count() -> None:
    weights = positive(0, 12)
    found = damping_weights(torch.zeros(12, dtype=torch.float64), weights, 0.0)
    assert torch.equal(found, damping_weights(positive(2, 12), weights, 0.0))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_a_column_of_zero_weights_counts_as_the_smallest_that_is_not(gamma: float) -> None:
    magnitude, weights = positive(0, 12), positive(1, 12)
    smallest = weights.clone()
    weights[3], smallest[3] = 0, weights[torch.arange(12) != 3].min()
    assert torch.equal(damping_weights(magnitude, weights, gamma), damping_weights(magnitude, smallest, gamma))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_channels_are_damped_alike_when_no_token_used_any(gamma: float) -> None:
    nothing = torch.zeros(12, dtype=torch.float64)
    assert torch.equal(damping_weights(nothing, positive(1, 12), gamma), torch.ones(12, dtype=torch.float64))


def test_nothing_but_zeros_is_divided_by_as_ones() -> None:
    assert torch.equal(floored(torch.zeros(3)), torch.ones(3))
