"""Integer grids: what they can represent, how far they are off, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.quantizers.grid import Grid, GridSettings, dequantize, min_max_grid, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = range(2, 9)


def normal(rows: int, columns: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def asymmetric(bits: int, group_size: int | None = None, dtype: torch.dtype = torch.float32) -> GridSettings:
    return GridSettings(bits, group_size, symmetric=False, scale_dtype=dtype)


def symmetric(bits: int, group_size: int | None = None, dtype: torch.dtype = torch.float32) -> GridSettings:
    return GridSettings(bits, group_size, symmetric=True, scale_dtype=dtype)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    scale, zero = grid.columns(weight.shape[1])
    return dequantize(quantize(weight, scale, zero, grid.settings.bits), scale, zero)


grid_settings = st.builds(
    GridSettings, st.integers(2, 8), st.sampled_from([None, 1, 2, 4, 8]), st.booleans(), st.sampled_from(DTYPES)
)
weights = st.builds(
    lambda rows, groups, seed, shift, size: normal(rows, 8 * groups, seed, shift) * size,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 5.0, -5.0]),
    st.sampled_from([1e-3, 1.0, 100.0]),
)


@settings(deadline=None, max_examples=150)
@given(weights, grid_settings)
def test_codes_are_whole_numbers_within_the_bits(weight: Tensor, chosen: GridSettings) -> None:
    codes = quantize(weight, *min_max_grid(weight, chosen).columns(weight.shape[1]), chosen.bits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**chosen.bits - 1


@settings(deadline=None, max_examples=150)
@given(weights, grid_settings)
def test_a_weight_inside_the_range_is_off_by_at_most_half_a_scale(weight: Tensor, chosen: GridSettings) -> None:
    grid = min_max_grid(weight, chosen)
    scale, zero = grid.columns(weight.shape[1])
    inside = (weight >= -zero * scale) & (weight <= (2**chosen.bits - 1 - zero) * scale)
    error = (rounded(weight, grid) - weight).abs()
    assert (error <= scale / 2 * (1 + 1e-9))[inside].all()


@settings(deadline=None, max_examples=150)
@given(weights, grid_settings)
def test_a_weight_outside_the_range_gets_the_nearest_end(weight: Tensor, chosen: GridSettings) -> None:
    grid = min_max_grid(weight, chosen)
    scale, zero = grid.columns(weight.shape[1])
    low, high = -zero * scale, (2**chosen.bits - 1 - zero) * scale
    outside = torch.cat([2 * low - scale, 2 * high + scale])
    codes = quantize(outside, scale.repeat(2, 1), zero.repeat(2, 1), chosen.bits)
    assert torch.equal(dequantize(codes, scale.repeat(2, 1), zero.repeat(2, 1)), torch.cat([low, high]))


@settings(deadline=None, max_examples=150)
@given(weights, grid_settings)
def test_no_weight_loses_more_than_half_a_scale_and_what_rounding_the_scale_takes(
    weight: Tensor, chosen: GridSettings
) -> None:
    grid = min_max_grid(weight, chosen)
    exact = min_max_grid(weight, GridSettings(chosen.bits, chosen.group_size, chosen.symmetric, torch.float64))
    scale, wanted = grid.columns(weight.shape[1])[0], exact.columns(weight.shape[1])[0]
    limit = scale / 2 + (2**chosen.bits - 1) * (scale - wanted).abs()
    assert ((rounded(weight, grid) - weight).abs() <= limit * (1 + 1e-9)).all()


@settings(deadline=None, max_examples=100)
@given(weights, grid_settings)
def test_zero_stays_exactly_zero_in_every_group(weight: Tensor, chosen: GridSettings) -> None:
    zeros = torch.zeros_like(weight)
    assert torch.equal(rounded(zeros, min_max_grid(weight, chosen)), zeros)


@settings(deadline=None, max_examples=100)
@given(weights, grid_settings)
def test_scales_are_representable_in_the_checkpoints_dtype(weight: Tensor, chosen: GridSettings) -> None:
    scale = min_max_grid(weight, chosen).scale
    assert scale.dtype == torch.float64
    assert torch.equal(scale.to(chosen.scale_dtype).double(), scale)


@settings(deadline=None, max_examples=100)
@given(weights, grid_settings)
def test_zero_points_are_codes(weight: Tensor, chosen: GridSettings) -> None:
    zero = min_max_grid(weight, chosen).zero
    assert torch.equal(zero, zero.round().clamp(0, 2**chosen.bits - 1))


@settings(deadline=None, max_examples=100)
@given(weights, grid_settings)
def test_quantizing_what_was_dequantized_gives_the_same_codes(weight: Tensor, chosen: GridSettings) -> None:
    scale, zero = min_max_grid(weight, chosen).columns(weight.shape[1])
    codes = quantize(weight, scale, zero, chosen.bits)
    assert torch.equal(quantize(dequantize(codes, scale, zero), scale, zero, chosen.bits), codes)


@settings(deadline=None, max_examples=100)
@given(weights, grid_settings, st.integers(-8, 8))
def test_scaling_the_weights_by_a_power_of_two_changes_no_code(
    weight: Tensor, chosen: GridSettings, exponent: int
) -> None:
    chosen = GridSettings(chosen.bits, chosen.group_size, chosen.symmetric, torch.float32)
    larger = weight * 2.0**exponent
    assert torch.equal(
        quantize(larger, *min_max_grid(larger, chosen).columns(weight.shape[1]), chosen.bits),
        quantize(weight, *min_max_grid(weight, chosen).columns(weight.shape[1]), chosen.bits),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_weights_on_a_whole_asymmetric_grid_come_back_exactly(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (6, 64), generator=generator).double()
    codes[:, ::16], codes[:, 1::16] = 0, top  # both ends in every group of 16
    scale = (torch.rand(6, 4, generator=generator) + 0.01).to(dtype).double().repeat_interleave(16, dim=1)
    zero = torch.randint(0, top + 1, (6, 4), generator=generator).double().repeat_interleave(16, dim=1)
    weight = (codes - zero) * scale
    assert torch.equal(rounded(weight, min_max_grid(weight, asymmetric(bits, 16, dtype))), weight)


@pytest.mark.parametrize("bits", BITS)
def test_an_asymmetric_scale_is_the_range_over_the_levels(bits: int) -> None:
    weight = normal(5, 24, bits)
    low = weight.reshape(5, 3, 8).amin(2).clamp(max=0)
    high = weight.reshape(5, 3, 8).amax(2).clamp(min=0)
    expected = ((high - low) / (2**bits - 1)).float().double()
    assert torch.equal(min_max_grid(weight, asymmetric(bits, 8)).scale, expected)


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_scale_is_the_largest_magnitude_over_half_the_levels(bits: int) -> None:
    weight = normal(5, 24, bits)
    expected = weight.numpy().__abs__().reshape(5, 3, 8).max(2) / ((2**bits - 1) / 2)
    np.testing.assert_array_equal(
        min_max_grid(weight, symmetric(bits, 8)).scale.numpy(), expected.astype(np.float32).astype(np.float64)
    )


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_zero_point_is_the_middle_code(bits: int, shift: float) -> None:
    zero = min_max_grid(normal(3, 16, bits, shift), symmetric(bits, 8)).zero
    assert torch.equal(zero, torch.full((3, 2), 2.0 ** (bits - 1), dtype=torch.float64))


def test_the_zero_point_of_positive_weights_is_the_lowest_code() -> None:
    assert min_max_grid(torch.tensor([[3.0, 5.0, 4.0]]).double(), asymmetric(4)).zero.item() == 0


def test_the_zero_point_of_negative_weights_is_the_highest_code() -> None:
    assert min_max_grid(torch.tensor([[-3.0, -5.0, -4.0]]).double(), asymmetric(4)).zero.item() == 15


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_group_comes_back_as_zeros(dtype: torch.dtype, is_symmetric: bool) -> None:
    weight = normal(4, 16)
    weight[:, 4:8] = 0
    grid = min_max_grid(weight, GridSettings(3, 4, is_symmetric, dtype))
    assert (rounded(weight, grid)[:, 4:8] == 0).all()


def test_an_all_zero_group_has_a_finite_scale() -> None:
    assert min_max_grid(torch.zeros(2, 8).double(), asymmetric(4, 4)).scale.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_too_small_for_the_dtype_keep_a_positive_scale(dtype: torch.dtype) -> None:
    assert (min_max_grid(normal(2, 8) * 1e-42, asymmetric(4, 4, dtype)).scale > 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_float16_holds_below_its_smallest_normal_number_are_kept(bits: int) -> None:
    weight = normal(40, 16) * 1e-4
    wanted = min_max_grid(weight, asymmetric(bits, 16, torch.float64)).scale
    found = min_max_grid(weight, asymmetric(bits, 16, torch.float16)).scale
    assert float(wanted.max()) < torch.finfo(torch.float16).tiny
    assert torch.equal(found, wanted.half().double())
    assert float((found - wanted).abs().max()) <= 2.0**-25


def test_a_scale_that_float16_would_round_to_zero_is_the_smallest_that_it_holds() -> None:
    grid = min_max_grid(normal(3, 8) * 1e-9, asymmetric(4, 8, torch.float16))
    assert set(grid.scale.flatten().tolist()) == {2.0**-24}


def test_without_a_group_size_one_scale_serves_a_row() -> None:
    weight = normal(5, 24)
    row, group = min_max_grid(weight, asymmetric(4)), min_max_grid(weight, asymmetric(4, 24))
    assert row.scale.shape == (5, 1)
    assert torch.equal(row.scale, group.scale)


def test_a_group_is_a_run_of_neighbouring_columns() -> None:
    weight = normal(3, 24)
    wider = weight.clone()
    wider[:, 9] = 50
    changed = min_max_grid(weight, asymmetric(4, 8)).scale != min_max_grid(wider, asymmetric(4, 8)).scale
    assert changed.tolist() == [[False, True, False]] * 3


def test_columns_repeat_each_groups_scale_and_zero_point() -> None:
    grid = Grid(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), asymmetric(4, 3))
    scale, zero = grid.columns(6)
    assert (scale.tolist(), zero.tolist()) == ([[1, 1, 1, 2, 2, 2]], [[3, 3, 3, 4, 4, 4]])


@pytest.mark.parametrize("size", [5, 16, 48])
def test_a_group_size_that_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(QuantizationError, match=f"group size of {size} does not divide 24 input channels"):
        min_max_grid(normal(2, 24), asymmetric(4, size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = normal(2, 8)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        min_max_grid(weight, asymmetric(4, 4))


def test_halves_go_to_the_even_code() -> None:
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    assert quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]).double(), one, zero, 4).tolist() == [0, 2, 2, 4]


def test_a_known_row_gets_known_codes() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.9, 2.0]]).double()  # scale 1, zero point 1 by hand
    grid = min_max_grid(weight, asymmetric(2))
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 1.0)
    assert quantize(weight, *grid.columns(4), 2).tolist() == [[0, 1, 2, 3]]


def test_a_scale_that_overflows_float16_is_refused_with_the_dtype_that_would_do() -> None:
    weight = torch.full((1, 4), 1e6, dtype=torch.float64)
    with pytest.raises(QuantizationError, match="storage_dtype: bfloat16"):
        min_max_grid(weight, GridSettings(2, None, False, torch.float16))
