"""Weights that are rounded some rows at a time, for rows do not influence each other, and put together again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from covercal.gram import WIDE_CHANNELS

# At once, so that memory is bounded; half of it beside the matrices of a wide site. Few rows are slow: a column costs
# some 20 microseconds of calls however few there are.
SLAB_WEIGHTS = 2**23
REPORTED_ROWS = 256  # at most, evenly spaced, from which a weight's output error is told


@dataclass(frozen=True, slots=True)
class Solved:
    """One quantised weight.

    Attributes
    ----------
    codes
        uint8 (rows, columns).
    scale
        (rows, groups) in the checkpoint's dtype.
    zero
        uint8 (rows, groups).
    salient
        Positions and values of the salient weights, in the checkpoint's dtype, when there are any: `mask` bool
        (rows, columns), `values` (salient,).
    output_error
        ||W X - Q X|| / ||W X|| on the inputs of the Gram matrix, W what rounding aims at; NaN without a Gram matrix.
    weight_error
        ||W - Q|| / ||W||.
    alpha
        Of the target; NaN where there is none.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    salient: tuple[Tensor, Tensor] | None
    output_error: float
    weight_error: float
    alpha: float = math.nan

    def some(self, rows: slice) -> Self:
        """Return what belongs to some rows."""
        salient = None
        if self.salient is not None:
            mask, values = self.salient
            before = int(mask[: rows.start].sum())
            salient = mask[rows], values[before : before + int(mask[rows].sum())]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=self.zero[rows], salient=salient)


@dataclass(slots=True)
class Pieces:
    """One weight, rounded piece by piece, and what that changed in it.

    Attributes
    ----------
    alpha
        Of its target.
    solved
        Its rows.
    squares
        float64 (2,): of the changes, and of the weight.
    reported
        (2, rows, columns) of each piece: what is left of the target, and the target, in the rows that the output error
        is told from. The outputs of all rows would cost as much as rounding them, and float32 does for a report.
    """

    alpha: float
    solved: list[Solved] = field(default_factory=list)
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    reported: list[Tensor] = field(default_factory=list)

    def add(self, solved: Solved, weight: Tensor, target: Tensor, rounded: Tensor, told: slice) -> None:
        """Add some rows.

        Parameters
        ----------
        weight, target, rounded
            (rows, columns).
        told
            Those of the rows that the output error is told from.
        """
        self.solved.append(solved)
        norms = [torch.linalg.vector_norm(each).double() for each in (weight - rounded, weight)]
        self.squares += torch.stack(norms).square().cpu()
        whole = target[told].float()
        self.reported.append(torch.stack([whole - rounded[told].float(), whole]))

    def joined(self, gram: Tensor | None) -> Solved:
        """Return the whole weight."""
        salient = None
        if self.solved[0].salient is not None:
            kept = [each.salient for each in self.solved if each.salient is not None]
            salient = torch.cat([mask for mask, _ in kept]), torch.cat([values for _, values in kept])
        names = ("codes", "scale", "zero")
        codes, scale, zero = (torch.cat([getattr(each, name) for each in self.solved]) for name in names)
        return Solved(codes, scale, zero, salient, self._output_error(gram), _relative(*self.squares), self.alpha)

    def _output_error(self, gram: Tensor | None) -> float:
        if gram is None:
            return math.nan
        both = torch.cat(self.reported, dim=1)
        outputs = (both.flatten(0, 1) @ gram.float()).view_as(both).mul_(both)
        return _relative(*outputs.sum(dim=(1, 2), dtype=torch.float64))


def slab_weights(columns: int) -> int:
    """Return how many weights of a site with so many columns are worked on at once."""
    return SLAB_WEIGHTS if columns <= WIDE_CHANNELS else SLAB_WEIGHTS // 2


def row_pieces(rows: Sequence[int], columns: int, width: int = 1) -> Iterator[list[tuple[int, slice]]]:
    """Yield pieces, (weight, its rows), that together take a bounded amount of memory; rows are independent."""
    limit = max(1, slab_weights(columns) // (columns * width))
    pieces: list[tuple[int, slice]] = []
    room = limit
    for index, count in enumerate(rows):
        start = 0
        while start < count:
            stop = min(start + room, count)
            pieces.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces


def reported_rows(rows: slice, total: int) -> slice:
    """Return which of some rows of a weight with so many its output error is told from."""
    step = -(-total // REPORTED_ROWS)
    return slice(-rows.start % step, None, step)


def _relative(error: Tensor, whole: Tensor) -> float:
    return math.sqrt(max(float(error), 0.0) / float(whole)) if whole > 0 else 0.0
