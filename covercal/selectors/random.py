"""Uniform random choice from the same pool: the rival that every other selector has to beat."""

import numpy as np

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order


class RandomSelector:
    """Chooses samples by a seeded permutation of the pool."""

    reads: frozenset[str] = frozenset()
    seeded = True
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the first `extent` entries of the permutation with this seed."""
        fitting(extent, evidence)
        return Order(np.random.default_rng(seed).permutation(evidence.samples)[:extent].astype(np.int64))
