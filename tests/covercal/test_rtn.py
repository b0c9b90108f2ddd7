"""Round to nearest against a search over all codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from covercal.quantization_settings import Quantization
from covercal.quantizers.grid import Grid, GridSettings, min_max_grid
from tests.covercal.rounding import RoundingSettings, round_to_nearest


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


def test_round_to_nearest_asks_for_no_calibration() -> None:
    assert not Quantization(method="rtn").calibrated
