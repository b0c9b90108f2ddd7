"""Uniform integer grids: scale and zero point per group of columns, rounding to codes, and back."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.quantizers.factor import is_finite

SMALLEST_SCALES = {torch.float16: 2.0**-24}  # below its normal numbers; those of the other dtypes are small enough


@dataclass(frozen=True, slots=True)
class GridSettings:
    """Which grid.

    Attributes
    ----------
    bits
        Codes lie in [0, 2**bits).
    group_size
        Columns that share a scale; None for one scale a row.
    symmetric
        Zero point in the middle of the codes, instead of where the smallest weight asks for it.
    scale_dtype
        Dtype in which a checkpoint keeps scales; scales are rounded to it before any weight is.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def top(self) -> int:
        """Return the largest code."""
        return int(2**self.bits - 1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of one weight matrix.

    Attributes
    ----------
    scale
        (rows, groups), each representable in the checkpoint's dtype; float64 until `to`.
    zero
        (rows, groups), whole numbers in [0, 2**bits).
    settings
        What it was made from.
    """

    scale: Tensor
    zero: Tensor
    settings: GridSettings

    def columns(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of every weight, (rows, columns) each."""
        repeat = columns // self.scale.shape[1]
        return self.scale.repeat_interleave(repeat, dim=1), self.zero.repeat_interleave(repeat, dim=1)

    def codes(self, values: Tensor) -> Tensor:
        """Return the nearest codes of values (rows, columns), uint8."""
        groups = values.reshape(*self.scale.shape, -1)
        codes = quantize(groups, self.scale[..., None], self.zero[..., None], self.settings.bits)
        return codes.to(torch.uint8).reshape(values.shape)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of codes (rows, columns)."""
        groups = codes.reshape(*self.scale.shape, -1).to(self.scale.dtype)
        return dequantize(groups, self.scale[..., None], self.zero[..., None]).reshape(codes.shape)

    def to(self, dtype: torch.dtype) -> "Grid":
        """Return the grid in the dtype of the weights that are rounded with it."""
        return replace(self, scale=self.scale.to(dtype), zero=self.zero.to(dtype))

    def rows(self, rows: slice) -> "Grid":
        """Return the grid of some rows."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])


def min_max_grid(weight: Tensor, settings: GridSettings) -> Grid:
    """Return the grid that spans each group from its smallest to its largest weight, zero included.

    Parameters
    ----------
    weight
        float64 (rows, columns).
    settings
        Bits, groups, symmetry and the dtype of scales.

    Raises
    ------
    QuantizationError
        When the group size does not divide the columns, a weight is not finite, or a scale overflows its dtype.
    """
    groups = grouped(weight, settings.group_size)
    return _spanning(groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0), settings)


GroupError = Callable[[Tensor], Tensor]


def searched_grid(weight: Tensor, settings: GridSettings, factors: list[float], error: GroupError) -> Grid:
    """Return the grid whose ends are the smallest and largest weight of each group times the best of some factors.

    Parameters
    ----------
    weight
        float64 (rows, columns).
    factors
        1 and less, the ones to prefer first: a later one has to be better.
    error
        Maps differences of weights, float32 (rows, groups, group size), to what they cost, (rows, groups).

    Raises
    ------
    QuantizationError
        As `min_max_grid`.
    """
    groups = grouped(weight, settings.group_size)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    best = _spanning(low * factors[0], high * factors[0], settings)
    single = groups.float()
    least = error(_rounding_errors(single, best))
    for factor in factors[1:]:
        tried = _spanning(low * factor, high * factor, settings)
        cost = error(_rounding_errors(single, tried))
        better = cost < least
        least = torch.where(better, cost, least)
        best = Grid(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero), settings)
    return best


def _rounding_errors(groups: Tensor, grid: Grid) -> Tensor:
    """Return what float32 weights (rows, groups, group size) gain by being rounded."""
    scale, zero = grid.scale.float()[..., None], grid.zero.float()[..., None]
    codes = (groups / scale).add_(zero).round_().clamp_(0, grid.settings.top)
    return codes.sub_(zero).mul_(scale).sub_(groups)


def squared_error(differences: Tensor) -> Tensor:
    """Return the sum of squares over each group."""
    return differences.square().sum(dim=2)


def weighted_error(energy: Tensor, group_size: int | None) -> GroupError:
    """Return the error of a group's output when its inputs, of mean squares `energy` (columns,), are uncorrelated."""
    by_group = energy.float().reshape(-1, group_size or energy.numel())
    return lambda differences: (differences.square() * by_group).sum(dim=2)


def output_error(gram: Tensor, group_size: int | None) -> GroupError:
    """Return the error of a group's output on the inputs of a Gram matrix (columns, columns), AWQ's clipping loss."""
    size = group_size or gram.shape[0]
    parts = [gram[start : start + size, start : start + size].float() for start in range(0, gram.shape[0], size)]
    blocks = torch.stack(parts) if len(parts) > 1 else parts[0][None]  # one may be half a gigabyte

    def error(differences: Tensor) -> Tensor:
        turned = differences.transpose(0, 1)
        return (torch.bmm(turned, blocks) * turned).sum(dim=2).T

    return error


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, whole numbers in [0, 2**bits); halves go to the even code."""
    return (weight / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the weights of codes, (codes - zero) * scale."""
    return (codes - zero) * scale


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """Return a weight as (rows, groups, group size).

    Raises
    ------
    QuantizationError
        When the group size does not divide the columns, or a weight is not finite.
    """
    rows, columns = weight.shape
    size = group_size or columns
    if columns % size:
        raise QuantizationError(f"a group size of {size} does not divide {columns} input channels")
    if not is_finite(weight):
        raise QuantizationError("its weight holds NaN or infinity")
    return weight.reshape(rows, columns // size, size)


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales rounded to `dtype`; an all-zero group gets 1, and none rounds down to zero.

    Raises
    ------
    QuantizationError
        When a scale overflows.
    """
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = scale.to(dtype).to(scale.dtype).clamp(min=SMALLEST_SCALES.get(dtype, torch.finfo(dtype).tiny))
    if torch.isinf(rounded).any():
        raise QuantizationError(f"a scale overflows {dtype}; use quantization.storage_dtype: bfloat16")
    return rounded


def _spanning(low: Tensor, high: Tensor, settings: GridSettings) -> Grid:
    low, high = low.double(), high.double()
    if settings.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = representable((high - low) / settings.top, settings.scale_dtype)
    zero = torch.full_like(scale, 2 ** (settings.bits - 1)) if settings.symmetric else torch.round(-low / scale)
    return Grid(scale, zero.clamp(0, settings.top), settings)
