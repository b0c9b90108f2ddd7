"""Farthest first: every sample of the pool soon has a chosen one near it (Gonzalez 1985; Sener and Savarese 2018).

Within a factor of two of the smallest possible largest distance to a chosen sample.
"""

import numpy as np

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import exact_mean, sketch_columns, squared_distances


class KCenterSelector:
    """Chooses the sample nearest the mean sketch, then always the one farthest from those chosen."""

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples farthest first; the seed has no effect."""
        extent = fitting(extent, evidence)
        columns = sketch_columns(evidence)
        best = int(np.argmin(squared_distances(columns, exact_mean(columns))))
        nearest = np.full(evidence.samples, np.inf)  # squared distance to the nearest chosen sample; -1 of the chosen
        order = np.empty(extent, dtype=np.int64)
        for rank in range(extent):
            order[rank] = best
            np.minimum(nearest, squared_distances(columns, columns[:, best]), out=nearest)
            nearest[best] = -1
            best = int(np.argmax(nearest))
        return Order(order)
