"""Salient weights: which they are, what they may become, and which levels lie around a value."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.quantizers.grid import GridSettings
from covercal.quantizers.levels import Levels
from covercal.quantizers.salient import average_bits, salient_grid, salient_mask
from tests.covercal.layers import Floats, allowed_values, grid_of, problem

seeds = st.integers(0, 2**32 - 1)
SCOPES = ["tensor", "row", "group"]
shares = st.sampled_from([0.0, 0.03, 0.08, 0.5, 0.99])


def normal(seed: int, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)))


def largest(magnitude: Floats, count: int) -> npt.NDArray[np.bool_]:
    """Return which of some different values are the largest."""
    return magnitude >= np.partition(magnitude, len(magnitude) - count)[len(magnitude) - count]


# --- which they are ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 6), shares, st.sampled_from(SCOPES))
def test_the_salient_weights_are_the_largest_of_their_scope(seed: int, rows: int, share: float, scope: str) -> None:
    weight = normal(seed, rows, 40)
    width = {"tensor": rows * 40, "row": 40, "group": 8}[scope]
    count = round(share * width)
    parts = np.abs(weight.numpy()).reshape(-1, width)
    expected = np.stack([largest(part, count) if count else np.zeros(width, bool) for part in parts])
    np.testing.assert_array_equal(salient_mask(weight, share, scope, 8).numpy(), expected.reshape(rows, 40))


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 6), st.sampled_from([0.03, 0.08, 0.5]))
def test_the_salient_weights_are_those_that_the_adaptive_lasso_leaves(seed: int, rows: int, share: float) -> None:
    weight = normal(seed, rows, 40)
    w = weight.numpy()
    squares = np.sort(np.square(w), axis=None)[::-1]
    count = round(share * w.size)
    strength = (squares[count - 1] + squares[count]) / 2
    left = np.sign(w) * np.maximum(np.abs(w) - strength / np.abs(w), 0)
    np.testing.assert_array_equal(salient_mask(weight, share, "tensor", 8).numpy(), left != 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_among_equals_the_first_are_salient(scope: str) -> None:
    width = {"tensor": 80, "row": 40, "group": 8}[scope]
    signs = torch.tensor([-1.0, 1.0]).repeat(40).reshape(2, 40)
    expected = torch.arange(80).reshape(2, 40) % width < round(0.25 * width)
    assert torch.equal(salient_mask(signs, 0.25, scope, 8), expected)


def test_a_group_is_a_whole_row_when_there_are_no_groups() -> None:
    weight = normal(0, 4, 40)
    assert torch.equal(salient_mask(weight, 0.1, "group", None), salient_mask(weight, 0.1, "row", None))


# --- how many bits they cost ---------------------------------------------------------------------------------------


def test_a_weight_takes_the_papers_4_81_bits() -> None:
    assert average_bits(4, 128, share=0.08, salient_bits=4) == pytest.approx(4.81)


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(4, 128, 4.25), (3, 64, 3.5), (2, 32, 3.0)])
def test_without_salient_weights_only_scales_and_zero_points_are_added(
    bits: int, group_size: int, expected: float
) -> None:
    assert average_bits(bits, group_size) == pytest.approx(expected)


def test_the_bits_of_a_matrix_are_those_of_its_parts() -> None:
    salient, plain, groups = 10, 118, 1  # one group of 128; a place in it takes 7 bits
    whole = plain * 3 + salient * (6 + 7) + groups * 48
    assert average_bits(3, 128, share=10 / 128, salient_bits=6, group_bits=48) == pytest.approx(whole / 128)


# --- what they may become ------------------------------------------------------------------------------------------


def apart(weight: Tensor, mask: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Levels:
    chosen = GridSettings(3, 8, symmetric=False, scale_dtype=dtype)
    return Levels.of(grid_of(weight, 3, 8), weight.shape[1], salient_grid(weight, mask, bits, chosen))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_groups_salient_weights_are_off_by_half_a_step_of_their_own_range(dtype: torch.dtype, bits: int) -> None:
    weight = normal(0, 6, 40)
    mask = salient_mask(weight, 0.3, "tensor", 8)
    found = apart(weight, mask, bits, dtype).all_nearest(weight.T.contiguous()).T
    coarseness = 2 * torch.finfo(dtype).eps
    for row in range(6):
        for start in range(0, 40, 8):
            own = mask[row, start : start + 8]
            values, got = (part[row, start : start + 8][own] for part in (weight, found))
            if own.any():
                half = (values.max() - values.min()) / (2**bits - 1) / 2
                assert ((got - values).abs() <= half + coarseness * values.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_groups_only_salient_weight_is_kept_but_for_the_dtype(dtype: torch.dtype) -> None:
    weight = normal(1, 6, 40)
    mask = torch.zeros(6, 40, dtype=torch.bool)
    mask[:, ::8] = True
    found = apart(weight, mask, 4, dtype).all_nearest(weight.T.contiguous()).T
    assert ((found - weight).abs() <= torch.finfo(dtype).eps * weight.abs())[mask].all()


def test_a_group_without_salient_weights_is_rounded_as_if_there_were_none_anywhere() -> None:
    weight = normal(2, 6, 40)
    mask = torch.zeros(6, 40, dtype=torch.bool)
    mask[:, :8] = True
    found = apart(weight, mask, 4).all_nearest(weight.T.contiguous()).T
    plain = Levels.of(grid_of(weight, 3, 8), 40).all_nearest(weight.T.contiguous()).T
    assert torch.equal(found[:, 8:], plain[:, 8:])


def test_grids_of_groups_without_salient_weights_are_finite() -> None:
    weight = normal(2, 6, 40)
    found = salient_grid(weight, torch.zeros(6, 40, dtype=torch.bool), 4, GridSettings(3, 8, False, torch.bfloat16))
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert torch.equal(found.low, torch.zeros(6, 5, dtype=torch.float64))


def test_a_group_that_is_all_salient_is_rounded_on_its_min_max_grid() -> None:
    weight = normal(3, 6, 40)
    low, high = (end[..., None].numpy() for end in weight.reshape(6, 5, 8).aminmax(dim=2))
    step = (high - low) / 15
    expected = np.rint((weight.numpy().reshape(6, 5, 8) - low) / step) * step + low
    found = apart(weight, torch.ones(6, 40, dtype=torch.bool), 4, torch.float64).all_nearest(weight.T.contiguous()).T
    np.testing.assert_allclose(found.numpy(), expected.reshape(6, 40), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_lowest_values_are_representable_in_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    weight = normal(4, 6, 40)
    found = salient_grid(weight, salient_mask(weight, 0.3, "row", 8), 4, GridSettings(3, 8, False, dtype))
    for part in (found.scale, found.low):
        assert torch.equal(part.to(dtype).double(), part)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_value_goes_to_one_that_a_checkpoint_can_hold(dtype: torch.dtype, bits: int) -> None:
    weight = normal(4, 6, 40)
    levels = apart(weight, torch.ones(6, 40, dtype=torch.bool), bits, dtype)
    found = levels.all_nearest(normal(5, 40, 6))
    around, _ = levels.around(normal(6, 30, 6), 7, 3)
    for values in (found, around[..., 0]):
        assert torch.equal(values.to(dtype).double(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_any_value_rounded_to_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    weight = normal(5, 6, 40)
    levels = apart(weight, torch.ones(6, 40, dtype=torch.bool), 16, dtype)
    other = normal(6, 40, 6) * 5
    assert torch.equal(levels.all_nearest(other), other.to(dtype).double())


# --- the nearest levels --------------------------------------------------------------------------------------------


def values_around(seed: int, levels: list[Floats]) -> Floats:
    """Return values between, on, below and above the levels of some weights, (values, rows)."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.uniform(2 * v[0] - v[-1], 2 * v[-1] - v[0], size=50) for v in levels], axis=1)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 4), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_value_goes_to_the_nearest_of_all_its_levels(seed: int, bits: int, share: float) -> None:
    chosen = problem(seed, 4, 12, bits, 4, share=share)
    for column in range(12):
        values = values_around(seed, chosen.values[column])
        found = chosen.levels.nearest(torch.from_numpy(values), column).numpy()
        for row, levels in enumerate(chosen.values[column]):
            closest = np.abs(values[:, row, None] - levels).argmin(axis=1)
            np.testing.assert_array_equal(found[:, row], levels[closest])


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 4), st.integers(1, 20))
def test_the_levels_around_a_value_contain_the_nearest_ones_once_each(seed: int, bits: int, count: int) -> None:
    weight = normal(seed, 4, 8)
    grid = grid_of(weight, bits, 4)
    levels, every = Levels.of(grid, 8), allowed_values(grid, 8)
    wanted = min(count, 2**bits)
    for column in (0, 7):
        values = values_around(seed, every[column])
        found, allowed = levels.around(torch.from_numpy(values), column, count)
        assert allowed.all()
        for row in range(4):
            distance = np.abs(values[:, row, None] - every[column][row])
            nearest = every[column][row][np.argsort(distance, axis=1)[:, :wanted]]
            for each, around in zip(nearest, found[:, row].numpy(), strict=True):
                assert set(each) <= set(around) <= set(every[column][row])
                assert all(low < high for low, high in pairwise(around))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_values_in_the_middle_between_two_levels_have_both_around_them(count: int) -> None:
    weight = normal(0, 4, 8)
    grid = grid_of(weight, 3, None)
    levels, every = Levels.of(grid, 8), allowed_values(grid, 8)
    for step in range(7):
        middle = torch.tensor([(v[step] + v[step + 1]) / 2 for v in every[0]])
        found, _ = levels.around(middle, 0, count)
        for row, around in enumerate(found.numpy()):
            either = {every[0][row][step], every[0][row][step + 1]}
            assert either & set(around) if count == 1 else either <= set(around)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 6))
def test_a_salient_weight_has_its_nearest_level_around_it_alone(seed: int, count: int) -> None:
    chosen = problem(seed, 6, 12, 2, 4, share=0.3)
    for column in range(12):
        values = torch.from_numpy(values_around(seed, chosen.values[column]))
        found, allowed = chosen.levels.around(values, column, count)
        expected = chosen.levels.nearest(values, column)
        for row in range(6):
            left = allowed[:, row].sum(dim=1)
            if chosen.mask[column, row]:
                assert (left == 1).all()
                assert torch.equal(found[:, row][allowed[:, row]], expected[:, row])
            else:
                assert (left == min(2 * count - 1, 4)).all()
