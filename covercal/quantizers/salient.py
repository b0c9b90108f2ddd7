"""Statistical pre-calibration: the largest weights on a grid of their own (arXiv 2501.09107; AdpQ, 2405.13358).

The paper's adaptive LASSO keeps w where |w| > lambda / |w|, that is, where |w| is above a threshold: the salient
weights are the largest ones of whatever the threshold is shared over.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.quantizers.grid import GridSettings, grouped, representable

KEPT_BITS = 16  # salient weights of so many bits are kept as they are, rounded to the checkpoint's dtype


@dataclass(frozen=True, slots=True)
class SalientGrid:
    """What the salient weights of a matrix may become.

    Attributes
    ----------
    mask
        bool (rows, columns): which weights are salient.
    scale, low
        float64 (rows, groups): step, and smallest value, of each group's salient weights; representable in `dtype`.
    bits
        Of their codes; 16 when they are kept, rounded to `dtype`.
    dtype
        In which a checkpoint keeps 16-bit numbers.
    """

    mask: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    dtype: torch.dtype


def scope_size(shape: tuple[int, int], scope: str, group_size: int | None) -> int:
    """Return how many weights of a matrix (rows, columns) compete with each other in a scope: see `salient_mask`."""
    rows, columns = shape
    return {"tensor": rows * columns, "row": columns, "group": group_size or columns}[scope]


def salient_mask(weight: Tensor, share: float, scope: str, group_size: int | None) -> Tensor:
    """Return which weights are the largest by magnitude: round(share * size) of each tensor, row or group.

    Among equals, those of the lowest index.

    Parameters
    ----------
    weight
        (rows, columns).
    scope
        `tensor`, `row` or `group`.

    Returns
    -------
    mask
        bool (rows, columns).
    """
    rows, columns = weight.shape
    width = scope_size((rows, columns), scope, group_size)
    magnitude = weight.abs().reshape(-1, width)
    largest = torch.argsort(magnitude, dim=1, descending=True, stable=True)[:, : round(share * width)]
    mask = torch.zeros(magnitude.shape, dtype=torch.bool, device=weight.device)
    return mask.scatter_(1, largest, value=True).reshape(rows, columns)


def salient_grid(weight: Tensor, mask: Tensor, bits: int, settings: GridSettings) -> SalientGrid:
    """Return the min-max grid of each group's salient weights alone.

    A group without any gets a grid that nothing uses; a single one lies on its grid but for the dtype.
    """
    groups, masked = grouped(weight, settings.group_size), grouped(mask, settings.group_size)
    low = torch.where(masked, groups, torch.inf).amin(dim=2)
    high = torch.where(masked, groups, -torch.inf).amax(dim=2)
    low, high = (torch.where(masked.any(dim=2), end, 0.0) for end in (low, high))
    low = low.to(settings.scale_dtype).to(weight.dtype)
    scale = representable((high - low) / (2 ** min(bits, KEPT_BITS - 1) - 1), settings.scale_dtype)
    return SalientGrid(mask, scale, low, bits, settings.scale_dtype)


def average_bits(
    bits: int, group_size: int, *, share: float = 0.0, salient_bits: int = 4, group_bits: float = 32.0
) -> float:
    """Return the bits that a weight takes on average.

    Parameters
    ----------
    bits, group_size
        Of the grid.
    share, salient_bits
        Salient weights; of each, the place within its group is stored too.
    group_bits
        What a group stores beside its codes. 32 is one 16-bit scale and one 16-bit zero point, as the paper counts:
        4.81 bits at 8% of 4 bits in groups of 128 (its equation 13 in our reading).
    """
    place = math.ceil(math.log2(group_size)) if share else 0
    return (1 - share) * bits + share * (salient_bits + place) + group_bits / group_size
