"""GPTQ, code by code, against optimal brain quantisation in float64, and its invariants.

The oracle works on the inverse Gram matrix itself: round one column, spread its error over the columns that are left,
remove the column from the inverse by one step of Gaussian elimination (arXiv 2208.11580, eq. 3 and 4; GPTQ's order).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.quantizers.factor import factorize
from covercal.quantizers.grid import Grid, dequantize
from tests.covercal.layers import Floats, by_column, grid_of, layer
from tests.covercal.rounding import Rounded, RoundingSettings, gptq, round_to_nearest

ORDERED = RoundingSettings(damping=0.01, activation_order=True)
NATURAL = RoundingSettings(damping=0.01, activation_order=False)


def optimal_brain_quantization(weight: Tensor, gram: Tensor, grid: Grid, chosen: RoundingSettings) -> Floats:
    """Return the codes of the textbook procedure, float64 (rows, columns)."""
    left, hessian = weight.numpy().copy(), gram.numpy()
    columns = left.shape[1]
    scale, zero = by_column(grid.scale, columns), by_column(grid.zero, columns)
    inverse = np.linalg.inv(hessian + chosen.damping * np.mean(np.diag(hessian)) * np.eye(columns))
    order = np.argsort(-np.diag(hessian), kind="stable") if chosen.activation_order else np.arange(columns)
    codes = np.empty_like(left)
    for position, column in enumerate(order):
        rest = order[position + 1 :]
        steps = np.rint(left[:, column] / scale[:, column] + zero[:, column])
        codes[:, column] = np.clip(steps, 0, 2**grid.settings.bits - 1)
        error = left[:, column] - (codes[:, column] - zero[:, column]) * scale[:, column]
        left[:, rest] -= np.outer(error / inverse[column, column], inverse[column, rest])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def loss(weight: Tensor, codes: Tensor, grid: Grid, gram: Tensor) -> float:
    """Return tr((W - Q) H (W - Q)^T)."""
    error = weight - dequantize(codes, *grid.columns(weight.shape[1]))
    return float(torch.trace(error @ gram @ error.T))


def assert_textbook(weight: Tensor, gram: Tensor, grid: Grid, chosen: RoundingSettings) -> None:
    found = gptq(weight, gram, grid, chosen).codes
    np.testing.assert_array_equal(found.numpy(), optimal_brain_quantization(weight, gram, grid, chosen))


def permuted(gram: Tensor, order: Tensor) -> Tensor:
    return gram[order][:, order]


# --- code by code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [None, 8], ids=["row", "group"])
@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_is_the_textbooks(
    bits: int, chosen: RoundingSettings, group_size: int | None, symmetric: bool
) -> None:
    weight, gram = layer(bits, 24, 48)
    assert_textbook(weight, gram, grid_of(weight, bits, group_size, symmetric=symmetric), chosen)


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 64, 65, 128, 200])
@pytest.mark.usefixtures("small_blocks")
def test_every_code_is_the_textbooks_whatever_the_columns_are_to_block_and_panel(
    columns: int, chosen: RoundingSettings
) -> None:
    weight, gram = layer(columns, 16, columns, tokens=600)
    assert_textbook(weight, gram, grid_of(weight, 3), chosen)


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
@pytest.mark.usefixtures("small_blocks")
def test_every_code_is_the_textbooks_when_a_group_crosses_blocks(chosen: RoundingSettings) -> None:
    weight, gram = layer(7, 16, 200, tokens=600)
    assert_textbook(weight, gram, grid_of(weight, 3, 40), chosen)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 4, 9, 18]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation_order=st.booleans(),
    damping=st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0]),
)
def test_every_code_is_the_textbooks_for_any_seed_and_setting(
    seed: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    activation_order: bool,
    damping: float,
) -> None:
    weight, gram = layer(seed, 6, 36)
    grid = grid_of(weight, bits, group_size, symmetric=symmetric, dtype=dtype)
    assert_textbook(weight, gram, grid, RoundingSettings(damping, activation_order))


def test_equal_diagonals_are_taken_in_the_order_of_the_columns() -> None:
    weight, gram = layer(3, 16, 80, tokens=400)
    size = gram.diagonal().sqrt()
    equal = gram / torch.outer(size, size)
    equal.diagonal().fill_(1.0)
    equal = equal * torch.outer(*[torch.tensor([1.0, 2.0]).double().repeat(40)] * 2)  # diagonals 1 and 4 only
    assert_textbook(weight, equal, grid_of(weight, 3), ORDERED)


# --- limits and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uncorrelated_inputs_make_it_round_to_nearest(bits: int, chosen: RoundingSettings) -> None:
    weight, _ = layer(bits, 20, 100)
    grid = grid_of(weight, bits, 20)
    nearest = round_to_nearest(weight, None, grid, chosen).codes
    assert torch.equal(gptq(weight, torch.eye(100).double(), grid, chosen).codes, nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_its_calibration_loss_is_below_round_to_nearests(seed: int, bits: int) -> None:
    weight, gram = layer(seed, 32, 64)
    grid = grid_of(weight, bits, 16)
    nearest = round_to_nearest(weight, None, grid, ORDERED).codes
    assert loss(weight, gptq(weight, gram, grid, ORDERED).codes, grid, gram) < loss(weight, nearest, grid, gram)


def test_representable_weights_are_kept_whatever_the_inputs() -> None:
    _, gram = layer(5, 1, 64)
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)).double()
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 5) * 0.25
    assert torch.equal(gptq(weight, gram, grid_of(weight, 4), ORDERED).codes, codes)


# --- invariants ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from([4.0, 0.25, 2.0**20, 2.0**-20]), st.booleans())
def test_the_scale_of_the_gram_matrix_does_not_matter(seed: int, bits: int, factor: float, ordered: bool) -> None:
    weight, gram = layer(seed, 8, 70)
    grid, chosen = grid_of(weight, bits, 10), RoundingSettings(activation_order=ordered)
    assert torch.equal(gptq(weight, gram * factor, grid, chosen).codes, gptq(weight, gram, grid, chosen).codes)


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
def test_layers_that_share_an_input_get_the_same_codes_stacked_or_alone(chosen: RoundingSettings) -> None:
    weight, gram = layer(2, 48, 96)
    parts = weight[:20], weight[20:]
    alone = torch.cat([gptq(part, gram, grid_of(part, 3, 16), chosen).codes for part in parts])
    assert torch.equal(gptq(weight, gram, grid_of(weight, 3, 16), chosen).codes, alone)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.booleans())
def test_permuting_the_input_channels_permutes_the_codes(seed: int, bits: int, symmetric: bool) -> None:
    weight, gram = layer(seed, 8, 70)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(70))
    plain = gptq(weight, gram, grid_of(weight, bits, symmetric=symmetric), ORDERED).codes
    turned = weight[:, order]
    found = gptq(turned, permuted(gram, order), grid_of(turned, bits, symmetric=symmetric), ORDERED).codes
    assert torch.equal(found, plain[:, order])


def test_the_natural_order_is_activation_order_on_sorted_channels() -> None:
    weight, gram = layer(6, 12, 80)
    order = torch.argsort(gram.diagonal(), descending=True)
    weight, gram = weight[:, order], permuted(gram, order)
    grid = grid_of(weight, 3, 20)
    assert torch.equal(gptq(weight, gram, grid, NATURAL).codes, gptq(weight, gram, grid, ORDERED).codes)


def test_activation_order_changes_codes() -> None:
    weight, gram = layer(6, 12, 80)
    grid = grid_of(weight, 3, 20)
    assert not torch.equal(gptq(weight, gram, grid, NATURAL).codes, gptq(weight, gram, grid, ORDERED).codes)


def test_two_calls_give_the_same_codes() -> None:
    weight, gram = layer(8, 12, 80)
    grid = grid_of(weight, 3, 20)
    assert torch.equal(gptq(weight, gram, grid, ORDERED).codes, gptq(weight, gram, grid, ORDERED).codes)


def test_the_weight_and_the_gram_matrix_are_not_changed() -> None:
    weight, gram = layer(9, 12, 80)
    gram[3], gram[:, 3] = 0, 0
    kept = weight.clone(), gram.clone()
    for chosen in (ORDERED, NATURAL):
        gptq(weight, gram, grid_of(weight, 3, 20), chosen)
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])


# --- dead channels -------------------------------------------------------------------------------------------------

DEAD = [0, 5, 6, 69]
LIVE = [column for column in range(70) if column not in DEAD]


def with_dead_channels(gram: Tensor) -> Tensor:
    gram = gram.clone()
    gram[DEAD], gram[:, DEAD] = 0, 0
    return gram


def rounded_with_dead_channels(chosen: RoundingSettings, factor: float = 1.0) -> tuple[Tensor, Tensor, Grid, Rounded]:
    weight, gram = layer(4, 16, 70)
    gram, grid = with_dead_channels(gram) * factor, grid_of(weight, 3)
    return weight, gram, grid, gptq(weight, gram, grid, chosen)


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
def test_channels_that_no_token_used_are_rounded_to_nearest(chosen: RoundingSettings) -> None:
    weight, _, grid, found = rounded_with_dead_channels(chosen)
    nearest = round_to_nearest(weight, None, grid, chosen).codes
    assert torch.equal(found.codes[:, DEAD], nearest[:, DEAD])


def test_channels_that_no_token_used_are_counted() -> None:
    assert rounded_with_dead_channels(ORDERED)[3].dead == len(DEAD)


def test_no_channel_is_counted_as_unused_when_all_are_used() -> None:
    weight, gram = layer(4, 4, 70)
    assert gptq(weight, gram, grid_of(weight, 3), ORDERED).dead == 0


@pytest.mark.parametrize("chosen", [ORDERED, NATURAL], ids=["ordered", "natural"])
@pytest.mark.parametrize("factor", [2.0**-20, 1.0, 2.0**20])
def test_channels_that_no_token_used_change_no_other_channels_codes(factor: float, chosen: RoundingSettings) -> None:
    weight, gram, grid, found = rounded_with_dead_channels(chosen, factor)
    live = torch.tensor(LIVE)
    alone = gptq(weight[:, live], permuted(gram, live), grid, chosen)
    assert torch.equal(found.codes[:, live], alone.codes)


def test_inputs_that_use_no_channel_give_round_to_nearest() -> None:
    weight, gram = layer(4, 16, 70)
    grid = grid_of(weight, 3)
    found = gptq(weight, torch.zeros_like(gram), grid, ORDERED)
    assert torch.equal(found.codes, round_to_nearest(weight, None, grid, ORDERED).codes)
    assert found.dead == 70


# --- damping -------------------------------------------------------------------------------------------------------


def test_the_damping_of_the_recipe_is_used_and_reported_when_it_suffices() -> None:
    weight, gram = layer(1, 4, 40)
    found = gptq(weight, gram, grid_of(weight, 3), RoundingSettings(damping=0.03))
    assert (found.damping, found.attempts) == (0.03, 1)


def test_damping_grows_and_says_so_when_a_singular_gram_matrix_has_none() -> None:
    weight, _ = layer(1, 4, 40)
    found = gptq(weight, torch.ones(40, 40).double(), grid_of(weight, 3), RoundingSettings(damping=0.0))
    assert found.attempts > 1
    assert found.damping > 0


def test_codes_after_growth_are_those_of_the_reported_damping() -> None:
    weight, _ = layer(1, 4, 40)
    singular, grid = torch.ones(40, 40).double(), grid_of(weight, 3)
    grown = gptq(weight, singular, grid, RoundingSettings(damping=0.0))
    assert torch.equal(gptq(weight, singular, grid, RoundingSettings(grown.damping)).codes, grown.codes)


def test_damping_grows_tenfold_an_attempt() -> None:
    indefinite = torch.eye(3).double()
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # smallest eigenvalue -0.5: a damping of 1 is the first that helps
    found = factorize(indefinite, 0.01, activation_order=False)
    assert (found.damping, found.attempts) == (pytest.approx(1.0), 3)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_the_factor_is_upper_and_gives_the_damped_gram_matrix(damping: float, ordered: bool) -> None:
    _, gram = layer(2, 1, 40)
    factor = factorize(gram, damping, activation_order=ordered)
    upper = factor.lower.flip(0, 1) * factor.roots.flip(0)
    damped = gram.numpy() + factor.damping * np.mean(np.diag(gram.numpy())) * np.eye(40)
    order = factor.order.numpy()
    assert torch.equal(upper, upper.triu())
    np.testing.assert_allclose((upper @ upper.T).numpy(), damped[order][:, order], rtol=1e-10, atol=1e-12)


def test_the_loss_is_the_sum_over_columns_of_squared_rounding_errors_times_squared_diagonals() -> None:
    weight, gram = layer(5, 12, 80)
    grid = grid_of(weight, 3, 20)
    factor = factorize(gram, 0.01, activation_order=True)
    codes = gptq(weight, gram, grid, ORDERED).codes
    rounded = dequantize(codes, *grid.columns(80))[:, factor.order]
    error = weight[:, factor.order] - rounded
    wanted = weight[:, factor.order] + error @ factor.lower.flip(0, 1).triu(1)  # what each column was rounded from
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(80).double()
    by_columns = float((factor.roots.flip(0).square() * (wanted - rounded).square()).sum())
    assert by_columns == pytest.approx(loss(weight, codes, grid, damped), rel=1e-10)


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    weight, gram = layer(1, 4, 40)
    gram[3, 7] = bad
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        gptq(weight, gram, grid_of(weight, 3), ORDERED)


def test_a_gram_matrix_that_no_damping_helps_is_refused() -> None:
    weight, _ = layer(1, 4, 40)
    indefinite = torch.eye(40).double()
    indefinite[0, 1] = indefinite[1, 0] = 100.0
    with pytest.raises(QuantizationError, match="cannot be factorised, not even with damping 10"):
        gptq(weight, indefinite, grid_of(weight, 3), ORDERED)


# --- shrinkage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_shrinkage_is_the_textbook_on_the_gram_matrix_moved_towards_its_diagonal(share: float) -> None:
    weight, gram = layer(3, 8, 70)
    grid = grid_of(weight, 3)
    moved = (1 - share) * gram + share * torch.diag(gram.diagonal())
    found = gptq(weight, gram, grid, RoundingSettings(shrinkage=share)).codes.numpy()
    np.testing.assert_array_equal(found, optimal_brain_quantization(weight, moved, grid, RoundingSettings()))


def test_full_shrinkage_is_round_to_nearest() -> None:
    weight, gram = layer(4, 8, 70)
    grid = grid_of(weight, 3)
    whole = RoundingSettings(shrinkage=1.0)
    assert torch.equal(gptq(weight, gram, grid, whole).codes, round_to_nearest(weight, None, grid, whole).codes)
