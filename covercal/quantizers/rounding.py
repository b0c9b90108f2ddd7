"""What every rounding method takes and returns."""

import importlib
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from covercal.quantizers.grid import Grid
from covercal.quantizers.registry import METHODS


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """How calibrated rounding goes about it.

    Attributes
    ----------
    damping
        Added to the Gram diagonal, relative to its mean.
    activation_order
        Whether columns are rounded in the order of falling Gram diagonal.
    shrinkage
        Share of the Gram matrix that is replaced by its own diagonal; 1 is round-to-nearest.
    """

    damping: float = 0.01
    activation_order: bool = True
    shrinkage: float = 0.0


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes of one weight matrix.

    Attributes
    ----------
    codes
        (rows, columns), whole float64 numbers in [0, 2**bits).
    damping
        Relative damping that was used, after any growth; 0 where none is needed.
    attempts
        Factorisations tried; more than 1 means that damping had to grow.
    dead
        Channels that no calibration token ever used; their weights are rounded to nearest.
    """

    codes: Tensor
    damping: float = 0.0
    attempts: int = 0
    dead: int = 0


class Rounder(Protocol):
    """A rounding method: weight, Gram matrix and grid in, codes out."""

    def __call__(self, weight: Tensor, gram: Tensor | None, grid: Grid, settings: RoundingSettings) -> Rounded:
        """Return the codes of `weight`."""
        ...


def rounder(method: str) -> Rounder:
    """Return the function of the method called `method`."""
    module, _, name = METHODS[method].rounder.partition(":")
    found: Rounder = getattr(importlib.import_module(module), name)
    return found
