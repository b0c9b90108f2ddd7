"""Round to nearest against a search over all codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from covercal.quantizers.grid import Grid, GridSettings, min_max_grid
from covercal.quantizers.registry import METHODS
from covercal.quantizers.rounding import RoundingSettings, rounder
from covercal.quantizers.rtn import round_to_nearest


def weight_and_grid(bits: int, group_size: int | None, symmetric: bool, seed: int = 0) -> tuple[Tensor, Grid]:
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight, min_max_grid(weight, GridSettings(bits, group_size, symmetric, torch.bfloat16))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_is_the_nearest_of_all_codes(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, grid = weight_and_grid(bits, group_size, symmetric, bits)
    scale, zero = (np.repeat(each.numpy(), 48 // each.shape[1], axis=1)[..., None] for each in (grid.scale, grid.zero))
    distance = np.abs((np.arange(2**bits) - zero) * scale - weight.numpy()[..., None])
    codes = round_to_nearest(weight, None, grid, RoundingSettings()).codes
    np.testing.assert_array_equal(codes.numpy(), distance.argmin(axis=2))


def test_the_gram_matrix_has_no_effect() -> None:
    weight, grid = weight_and_grid(3, 16, False)
    gram = torch.diag(torch.arange(1.0, 49.0, dtype=torch.float64))
    with_gram = round_to_nearest(weight, gram, grid, RoundingSettings())
    assert torch.equal(with_gram.codes, round_to_nearest(weight, None, grid, RoundingSettings()).codes)


def test_the_settings_have_no_effect() -> None:
    weight, grid = weight_and_grid(3, 16, False)
    other = round_to_nearest(weight, None, grid, RoundingSettings(damping=5.0, activation_order=False))
    assert torch.equal(other.codes, round_to_nearest(weight, None, grid, RoundingSettings()).codes)


def test_nothing_is_reported_as_damped_or_dead() -> None:
    weight, grid = weight_and_grid(3, 16, False)
    found = round_to_nearest(weight, None, grid, RoundingSettings())
    assert (found.damping, found.attempts, found.dead) == (0.0, 0, 0)


def test_the_name_rtn_gives_round_to_nearest() -> None:
    assert rounder("rtn") is round_to_nearest


def test_round_to_nearest_asks_for_no_calibration() -> None:
    assert not METHODS["rtn"].calibrated
