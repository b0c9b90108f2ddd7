"""The samples that the recipe lists, in its order."""

import numpy as np

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order


class GivenSelector:
    """Chooses what it is told to."""

    reads: frozenset[str] = frozenset()
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the first `extent` samples of the list; the seed has no effect.

        Raises
        ------
        ValueError
            When the list is shorter than `extent`, names a sample twice, or one that the pool does not have.
        """
        given = np.asarray(evidence.given, dtype=np.int64)
        outside = given[(given < 0) | (given >= evidence.samples)]
        if outside.size:
            raise ValueError(f"sample {outside[0]} is given, and the pool's samples are 0 to {evidence.samples - 1}")
        samples, times = np.unique(given, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"sample {samples[times > 1][0]} is given more than once")
        if fitting(extent, evidence) > given.size:
            raise ValueError(f"{given.size} samples are given, and {extent} are asked for")
        return Order(given[:extent])
