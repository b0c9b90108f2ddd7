"""Uniform integer grids: scale and zero point per group of columns, rounding to codes, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.errors import QuantizationError


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


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of one weight matrix.

    Attributes
    ----------
    scale
        float64 (rows, groups), each representable in the checkpoint's dtype.
    zero
        float64 (rows, groups), whole numbers in [0, 2**bits).
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
    rows, columns = weight.shape
    size = settings.group_size or columns
    if columns % size:
        raise QuantizationError(f"a group size of {size} does not divide {columns} input channels")
    if not torch.isfinite(weight).all():
        raise QuantizationError("its weight holds NaN or infinity")
    groups = weight.reshape(rows, columns // size, size)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    levels = 2**settings.bits - 1
    if settings.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = _representable((high - low) / levels, settings.scale_dtype)
    zero = torch.full_like(scale, 2 ** (settings.bits - 1)) if settings.symmetric else torch.round(-low / scale)
    return Grid(scale, zero.clamp(0, levels), settings)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, whole float64 numbers in [0, 2**bits); halves go to the even code."""
    return torch.round(weight / scale + zero).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the weights of codes, (codes - zero) * scale."""
    return (codes - zero) * scale


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales rounded to `dtype`; an all-zero group gets 1, and none rounds down to zero."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = scale.to(dtype).double().clamp(min=torch.finfo(dtype).tiny)
    if torch.isinf(rounded).any():
        raise QuantizationError(f"a scale overflows {dtype}; use quantization.storage_dtype: bfloat16")
    return rounded
