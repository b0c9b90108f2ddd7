"""GPTQ and rounding to nearest of one weight, put together from their parts as the solver does it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.quantizers.factor import factorize
from covercal.quantizers.grid import Grid, quantize
from covercal.quantizers.levels import Levels
from covercal.quantizers.sequential import round_sequentially


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    damping: float = 0.01
    activation_order: bool = True
    shrinkage: float = 0.0


@dataclass(frozen=True, slots=True)
class Rounded:
    codes: Tensor
    damping: float = 0.0
    attempts: int = 0
    dead: int = 0


def gptq(weight: Tensor, gram: Tensor, grid: Grid, settings: RoundingSettings) -> Rounded:
    whole, share = gram.clone(), settings.shrinkage
    whole[~torch.eye(len(gram), dtype=torch.bool)] *= 1.0 - share
    factor = factorize(whole, settings.damping, activation_order=settings.activation_order)
    rounded = round_sequentially(weight.T.contiguous(), factor, Levels.of(grid, weight.shape[1])).T
    codes = quantize(rounded, *grid.columns(weight.shape[1]), grid.settings.bits)
    return Rounded(codes, factor.damping, factor.attempts, factor.dead)


def round_to_nearest(weight: Tensor, gram: Tensor | None, grid: Grid, settings: RoundingSettings) -> Rounded:
    rounded = Levels.of(grid, weight.shape[1]).all_nearest(weight.T.contiguous()).T
    return Rounded(quantize(rounded, *grid.columns(weight.shape[1]), grid.settings.bits))
