"""The values that each weight of a matrix may take, turned so that what one column needs lies together."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from covercal.quantizers.grid import Grid
from covercal.quantizers.salient import KEPT_BITS, SalientGrid


@dataclass(frozen=True, slots=True)
class SalientLevels:
    """`SalientGrid`, turned: mask (columns, rows), scale and low (groups, rows)."""

    mask: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    dtype: torch.dtype

    def nearest(self, values: Tensor, group: int) -> Tensor:
        """Return the nearest salient values, (…, rows)."""
        if self.bits == KEPT_BITS:
            return values.to(self.dtype).to(values.dtype)
        steps = torch.round((values - self.low[group]) / self.scale[group]).clamp_(0, 2**self.bits - 1)
        return (steps * self.scale[group] + self.low[group]).to(self.dtype).to(values.dtype)


@dataclass(frozen=True, slots=True)
class Levels:
    """What every weight of a matrix may become.

    Attributes
    ----------
    scale, zero
        (groups, rows), in the dtype of the weights: value = (code - zero) * scale, codes in [0, top].
    top
        Largest code.
    width
        Columns of a group.
    salient
        Levels of the salient weights, which are not on this grid.
    """

    scale: Tensor
    zero: Tensor
    top: int
    width: int
    salient: SalientLevels | None = None

    @classmethod
    def of(cls, grid: Grid, columns: int, salient: SalientGrid | None = None) -> Self:
        """Return the levels of a matrix with so many columns."""
        turned = None
        if salient is not None:
            mask, scale, low = (part.T.contiguous() for part in (salient.mask, salient.scale, salient.low))
            turned = SalientLevels(mask, scale, low, salient.bits, salient.dtype)
        width = columns // grid.scale.shape[1]
        return cls(grid.scale.T.contiguous(), grid.zero.T.contiguous(), grid.settings.top, width, turned)

    def nearest(self, values: Tensor, column: int, out: Tensor | None = None) -> Tensor:
        """Return the nearest level of values of one column, (…, rows); halves go to the even code.

        Parameters
        ----------
        out
            Where they are written; of the same shape.
        """
        group = column // self.width
        scale, zero = self.scale[group], self.zero[group]
        plain = torch.addcdiv(zero, values, scale, out=out).round_().clamp_(0, self.top).sub_(zero).mul_(scale)
        if self.salient is None:
            return plain
        return torch.where(self.salient.mask[column], self.salient.nearest(values, group), plain, out=out)

    def all_nearest(self, values: Tensor) -> Tensor:
        """Return the nearest levels of a whole turned matrix, (columns, rows)."""
        found = torch.empty_like(values)
        for column in range(len(values)):
            self.nearest(values[column], column, out=found[column])
        return found

    def around(self, values: Tensor, column: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the levels among which the `count` nearest to each value are, and whether each may be taken.

        Parameters
        ----------
        values
            (…, rows).

        Returns
        -------
        levels, allowed
            (…, rows, candidates). A salient weight has one candidate.
        """
        group = column // self.width
        scale, zero = self.scale[group], self.zero[group]
        size = min(2 * count - 1, self.top + 1)
        center = (values / scale).add_(zero).round_().clamp_(0, self.top)
        first = (center - (size - 1) // 2).clamp_(0, self.top + 1 - size)
        codes = first[..., None] + torch.arange(size, dtype=values.dtype, device=values.device)
        levels = codes.sub_(zero[:, None]).mul_(scale[:, None])
        allowed = torch.ones_like(levels, dtype=torch.bool)
        if self.salient is not None:
            mask = self.salient.mask[column]
            nearest = self.salient.nearest(values, group)
            levels = torch.where(mask[:, None], nearest[..., None], levels)
            allowed[..., mask, 1:] = False
        return levels, allowed
