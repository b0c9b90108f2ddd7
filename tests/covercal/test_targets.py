"""CoreQ's and GPTAQ's targets against their textbook procedures, and against least squares on the inputs themselves.

Oracles work on explicit inputs, (channels, tokens), in float64.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.quantizers.factor import Factor, factorize
from covercal.quantizers.grid import Grid
from covercal.quantizers.levels import Levels
from covercal.quantizers.sequential import round_sequentially
from covercal.quantizers.targets import carried_drift, corrected_target, reachable, reachable_share
from tests.covercal.layers import Floats, by_column, damped, grid_of, layer

seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Mismatched:
    """A weight, the inputs that it was made for and those that it gets: x = inputs + dx."""

    weight: Tensor
    inputs: Floats
    dx: Floats

    @property
    def gram(self) -> Tensor:
        return torch.from_numpy(self.inputs @ self.inputs.T)

    @property
    def drift(self) -> Tensor:
        return torch.from_numpy(self.dx @ self.inputs.T)

    @property
    def outputs_drift(self) -> Tensor:
        return self.weight @ self.drift

    @property
    def outputs_energy(self) -> float:
        return float(np.square(self.weight.numpy() @ self.dx).sum())

    def loss(self, rounded: Tensor) -> float:
        """Return ||W X_f - Q X_q||^2."""
        lost = self.weight.numpy() @ (self.inputs + self.dx) - rounded.numpy() @ self.inputs
        return float(np.square(lost).sum())


def mismatched(seed: int, rows: int, channels: int, tokens: int = 400, size: float = 0.1) -> Mismatched:
    """Return correlated inputs, and a mismatch of which most is a linear map of them."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(channels, channels)) @ generator.normal(size=(channels, tokens)) / channels**0.5
    inputs = (mixed + generator.normal(size=(channels, tokens))) * np.exp(0.5 * generator.normal(size=(channels, 1)))
    linear = generator.normal(size=(channels, channels)) @ inputs / channels**0.5
    dx = size * (linear + generator.normal(size=(channels, tokens)))
    return Mismatched(torch.from_numpy(generator.normal(size=(rows, channels))), inputs, dx)


def rounded(weight: Tensor, factor: Factor, grid: Grid, drift: Tensor | None = None) -> Tensor:
    levels = Levels.of(grid, weight.shape[1])
    return round_sequentially(weight.T.contiguous(), factor, levels, drift).T


def nearest(values: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    return (np.clip(np.rint(values / scale + zero), 0, 2**bits - 1) - zero) * scale


def successive_rounding(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Floats:
    """Return CoreQ's sweep (2602.05902) for alpha 0: lower Cholesky factor, ascending diagonal, last column first."""
    hessian = damped(gram, damping).numpy()
    columns = len(hessian)
    order = np.argsort(np.diag(hessian), kind="stable")
    lower = np.linalg.cholesky(hessian[order][:, order])
    shares = np.tril(lower / np.diag(lower), -1)
    wanted = weight.numpy()[:, order]
    scale, zero = by_column(grid.scale, columns)[:, order], by_column(grid.zero, columns)[:, order]
    found = np.zeros_like(wanted)
    for j in reversed(range(columns)):
        value = wanted[:, j] + (wanted[:, j + 1 :] - found[:, j + 1 :]) @ shares[j + 1 :, j]
        found[:, j] = nearest(value, scale[:, j], zero[:, j], grid.settings.bits)
    natural = np.empty_like(found)
    natural[:, order] = found
    return natural


def gptaq(case: Mismatched, grid: Grid, damping: float, alpha: float, *, ordered: bool) -> Floats:
    """Return the loop of GPTAQ (2504.02692), column by column, with the factor of the inverse."""
    hessian, drift = damped(case.gram, damping).numpy(), case.drift.numpy()
    columns = len(hessian)
    order = np.argsort(-np.diag(hessian), kind="stable") if ordered else np.arange(columns)
    hessian, drift = hessian[order][:, order], drift[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    carried = alpha * np.triu(drift @ upper.T, 1) @ upper
    left = case.weight.numpy()[:, order].copy()
    scale, zero = by_column(grid.scale, columns)[:, order], by_column(grid.zero, columns)[:, order]
    found = np.zeros_like(left)
    for j in range(columns):
        value = left[:, j].copy()
        found[:, j] = nearest(value, scale[:, j], zero[:, j], grid.settings.bits)
        error = (value - found[:, j]) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:]) - np.outer(value, carried[j, j:])
    natural = np.empty_like(found)
    natural[:, order] = found
    return natural


# --- successive rounding -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 8), st.sampled_from([None, 6, 18]), st.booleans(), st.sampled_from([0.0, 0.01, 0.5]))
def test_coreq_with_alpha_0_rounds_as_gptq_in_activation_order(
    seed: int, bits: int, group_size: int | None, symmetric: bool, damping: float
) -> None:
    weight, gram = layer(seed, 6, 36)
    grid = grid_of(weight, bits, group_size, symmetric=symmetric)
    factor = factorize(gram, damping, activation_order=True)
    found = rounded(weight, factor, grid).numpy()
    np.testing.assert_array_equal(found, successive_rounding(weight, gram, grid, damping))


@pytest.mark.parametrize("columns", [1, 64, 65, 200])
def test_coreq_with_alpha_0_rounds_as_gptq_whatever_the_columns_are_to_the_block(columns: int) -> None:
    weight, gram = layer(columns, 12, columns, tokens=600)
    grid = grid_of(weight, 3)
    found = rounded(weight, factorize(gram, 0.01, activation_order=True), grid).numpy()
    np.testing.assert_array_equal(found, successive_rounding(weight, gram, grid, 0.01))


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans(), st.sampled_from([0.0, 0.01, 0.5]))
def test_the_loss_of_any_row_is_the_sum_over_columns_of_what_each_was_off_by(
    seed: int, ordered: bool, damping: float
) -> None:
    weight, gram = layer(seed, 5, 36)
    other, _ = layer(seed + 1, 5, 36)
    factor = factorize(gram, damping, activation_order=ordered)
    error = (weight - other)[:, factor.order]
    off = error + error @ factor.lower.flip(0, 1).triu(1)  # t - q
    expected = np.einsum("ri,ij,rj->r", weight - other, damped(gram, damping), weight - other)
    np.testing.assert_allclose((off.square() @ factor.roots.flip(0).square()).numpy(), expected, rtol=1e-9)


# --- CoreQ's target ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_corrected_target_is_its_formula_with_an_inverse(alpha: float, damping: float, ordered: bool) -> None:
    case = mismatched(1, 7, 40)
    factor = factorize(case.gram, damping, activation_order=ordered)
    weight, drift = case.weight.numpy(), case.drift.numpy()
    expected = weight + alpha * weight @ drift @ np.linalg.inv(damped(case.gram, damping).numpy())
    found = corrected_target(case.weight, case.outputs_drift, factor, alpha).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_with_alpha_0_the_target_is_the_weight() -> None:
    case = mismatched(1, 7, 40)
    factor = factorize(case.gram, 0.01, activation_order=True)
    assert torch.equal(corrected_target(case.weight, case.outputs_drift, factor, 0.0), case.weight)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([0.0, 0.25, 0.7, 1.0]))
def test_every_rounding_is_as_far_from_the_target_as_from_the_interpolated_output_but_for_one_constant(
    seed: int, alpha: float
) -> None:
    case = mismatched(seed, 4, 20, tokens=80)
    target = corrected_target(case.weight, case.outputs_drift, factorize(case.gram, 0.0, activation_order=True), alpha)
    wanted = case.weight.numpy() @ (case.inputs + alpha * case.dx)
    generator = np.random.default_rng(seed)
    constants = []
    for size in (0.0, 0.1, 1.0, 3.0):
        other = target.numpy() + size * generator.normal(size=target.shape)
        from_output = np.square(wanted - other @ case.inputs).sum(axis=1)
        constants.append(from_output - np.square((target.numpy() - other) @ case.inputs).sum(axis=1))
    limit = 1e-9 * np.square(wanted).sum()
    np.testing.assert_allclose(constants[1:], np.broadcast_to(constants[0], (3, 4)), rtol=1e-7, atol=limit)


def test_with_alpha_1_and_no_damping_the_target_is_the_least_squares_fit_to_the_original_output() -> None:
    case = mismatched(3, 5, 30)
    output = case.weight.numpy() @ (case.inputs + case.dx)
    fitted = np.linalg.lstsq(case.inputs.T, output.T, rcond=None)[0].T
    factor = factorize(case.gram, 0.0, activation_order=True)
    np.testing.assert_allclose(
        corrected_target(case.weight, case.outputs_drift, factor, 1.0).numpy(), fitted, rtol=1e-8
    )


# --- how much can be undone ----------------------------------------------------------------------------------------


def share(case: Mismatched, damping: float = 0.0) -> float:
    factor = factorize(case.gram, damping, activation_order=True)
    return reachable_share(reachable(case.outputs_drift, factor), case.outputs_energy)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 24), st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_the_reachable_share_is_that_of_the_projection_on_the_rows_of_the_inputs(
    seed: int, channels: int, size: float
) -> None:
    case = mismatched(seed, 4, channels, tokens=4 * channels + 10, size=size)
    basis = np.linalg.qr(case.inputs.T)[0]
    lost = case.weight.numpy() @ case.dx
    expected = np.square(lost @ basis).sum() / np.square(lost).sum()
    assert share(case) == pytest.approx(expected, rel=1e-8)


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 24), st.integers(1, 60), st.sampled_from([0.0, 1e-4, 0.01, 1.0]))
def test_the_reachable_share_lies_between_0_and_1_however_few_tokens_there_are(
    seed: int, channels: int, tokens: int, damping: float
) -> None:
    assert 0.0 <= share(mismatched(seed, 3, channels, tokens), damping) <= 1.0


def test_damping_lowers_the_reachable_share() -> None:
    case = mismatched(2, 4, 24)
    shares = [share(case, damping) for damping in (0.0, 0.01, 0.1, 1.0)]
    assert shares == sorted(set(shares), reverse=True)


def test_all_of_a_mismatch_that_is_a_linear_map_of_the_inputs_is_reachable() -> None:
    case = mismatched(2, 4, 24)
    linear = np.random.default_rng(0).normal(size=(24, 24)) @ case.inputs
    assert share(Mismatched(case.weight, case.inputs, linear)) == pytest.approx(1.0)


def test_nothing_of_a_mismatch_that_is_orthogonal_to_the_inputs_is_reachable() -> None:
    case = mismatched(2, 4, 24)
    basis = np.linalg.qr(case.inputs.T)[0]
    assert share(Mismatched(case.weight, case.inputs, case.dx - case.dx @ basis @ basis.T)) == pytest.approx(0.0)


def test_with_fewer_tokens_than_channels_all_of_any_mismatch_seems_reachable() -> None:
    assert share(mismatched(2, 4, 40, tokens=20), damping=1e-9) == pytest.approx(1.0, abs=1e-5)


def test_without_a_mismatch_the_share_is_0() -> None:
    case = mismatched(2, 4, 24)
    assert share(Mismatched(case.weight, case.inputs, np.zeros_like(case.dx))) == 0.0


@pytest.mark.parametrize(("reached", "whole", "expected"), [(-1e-9, 1.0, 0.0), (1.1, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_what_rounding_pushes_out_of_the_bounds_is_put_back(reached: float, whole: float, expected: float) -> None:
    assert reachable_share(reached, whole) == expected


def test_what_is_reachable_for_a_weight_is_the_sum_of_its_parts() -> None:
    case = mismatched(4, 9, 24)
    factor = factorize(case.gram, 0.01, activation_order=True)
    parts = [reachable(part, factor) for part in case.outputs_drift.split([1, 5, 3])]
    assert sum(parts) == pytest.approx(reachable(case.outputs_drift, factor), rel=1e-12)


# --- GPTAQ ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 6]),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    ordered=st.booleans(),
    damping=st.sampled_from([0.01, 0.1]),
)
def test_every_level_is_gptaqs(
    seed: int, bits: int, group_size: int | None, alpha: float, ordered: bool, damping: float
) -> None:
    case = mismatched(seed, 6, 24, tokens=150, size=0.3)
    grid = grid_of(case.weight, bits, group_size)
    factor = factorize(case.gram, damping, activation_order=ordered)
    found = rounded(case.weight, factor, grid, carried_drift(case.drift, factor, alpha)).numpy()
    np.testing.assert_array_equal(found, gptaq(case, grid, damping, alpha, ordered=ordered))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 17, 64, 65, 150])
@pytest.mark.usefixtures("small_blocks")
def test_every_level_is_gptaqs_whatever_the_columns_are_to_block_and_panel(columns: int, ordered: bool) -> None:
    case = mismatched(columns, 8, columns, size=0.3)
    grid = grid_of(case.weight, 3)
    factor = factorize(case.gram, 0.01, activation_order=ordered)
    found = rounded(case.weight, factor, grid, carried_drift(case.drift, factor, 0.25)).numpy()
    np.testing.assert_array_equal(found, gptaq(case, grid, 0.01, 0.25, ordered=ordered))


def test_gptaq_without_a_mismatch_is_gptq() -> None:
    case = mismatched(5, 8, 70)
    grid, factor = grid_of(case.weight, 3), factorize(case.gram, 0.01, activation_order=True)
    none = carried_drift(torch.zeros_like(case.drift), factor, 1.0)
    assert torch.equal(rounded(case.weight, factor, grid, none), rounded(case.weight, factor, grid))


# --- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_the_corrected_target_loses_less_of_the_original_output_than_gptaq_and_gptq(
    seed: int, bits: int
) -> None:
    case = mismatched(seed, 16, 32, size=0.3)
    grid, factor = grid_of(case.weight, bits, 8), factorize(case.gram, 0.01, activation_order=True)
    plain = case.loss(rounded(case.weight, factor, grid))
    carried = case.loss(rounded(case.weight, factor, grid, carried_drift(case.drift, factor, 0.25)))
    for alpha in (1.0, share(case, 0.01)):
        target = corrected_target(case.weight, case.outputs_drift, factor, alpha)
        assert case.loss(rounded(target, factor, grid)) < carried < plain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_for_a_small_mismatch_the_corrected_target_loses_less_on_average(bits: int) -> None:
    ratios = []
    for seed in range(12):
        case = mismatched(seed, 16, 32, size=0.03)
        grid, factor = grid_of(case.weight, bits, 8), factorize(case.gram, 0.01, activation_order=True)
        target = corrected_target(case.weight, case.outputs_drift, factor, 1.0)
        ratios.append(case.loss(rounded(target, factor, grid)) / case.loss(rounded(case.weight, factor, grid)))
    assert np.mean(ratios) < 1
