"""The first samples of the pool: what many calibration scripts take."""

import numpy as np

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order


class FirstSelector:
    """Chooses the samples in the pool's own order."""

    reads: frozenset[str] = frozenset()
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the first `extent` indices; the seed has no effect."""
        return Order(np.arange(fitting(extent, evidence), dtype=np.int64))
