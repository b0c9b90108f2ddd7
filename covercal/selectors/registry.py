"""Selectors by name; adding one is one new file and one line here."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

SELECTORS: Mapping[str, str] = MappingProxyType(
    {
        "coverage": "covercal.selectors.coverage:CoverageSelector",
        "random": "covercal.selectors.random:RandomSelector",
    }
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a selector may read of the pool.

    Attributes
    ----------
    samples
        Size of the pool.
    coverage
        bool (samples, outlier channels): which sample fires which channel; None unless the selector reads it.
    weights
        float64 (outlier channels,); None unless the selector reads it.
    """

    samples: int
    coverage: npt.NDArray[np.bool_] | None = None
    weights: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """Samples in the order of choice; the first `k` are the choice for a budget of `k`.

    Attributes
    ----------
    samples
        int64 (extent,), indices into the pool, without repeats.
    gains
        float64 (extent,), what each added to the selector's objective; None when it has none.
    rounds
        int64 (extent,), the round of coverage each belongs to; None when there are no rounds.
    """

    samples: npt.NDArray[np.int64]
    gains: npt.NDArray[np.float64] | None = None
    rounds: npt.NDArray[np.int64] | None = None


class Selector(Protocol):
    """A way to order the pool's samples."""

    reads: frozenset[str]
    """Stages whose artifacts it reads besides the pool."""
    seeded: bool
    """Whether its order depends on the seed."""

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the first `extent` samples of the order."""
        ...


def selector(name: str) -> Selector:
    """Return the selector called `name`."""
    module, _, attribute = SELECTORS[name].partition(":")
    made: Selector = getattr(importlib.import_module(module), attribute)()
    return made
