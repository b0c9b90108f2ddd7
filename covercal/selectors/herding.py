"""Kernel herding with the linear kernel (Welling 2009; Chen, Welling and Smola, UAI 2010, eq. 2 and 3)."""

import numpy as np

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import exact_mean, inner, sketch_columns, unit_columns


class HerdingSelector:
    """Chooses samples whose mean direction follows that of the pool."""

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return argmax over samples left of <w, phi>, again and again, w gaining mean - phi; the seed has no effect.

        Among vectors of equal length this is the sample that brings the chosen mean nearest to the pool's.
        """
        extent = fitting(extent, evidence)
        directions = unit_columns(sketch_columns(evidence))
        mean = exact_mean(directions)
        left = np.ones(evidence.samples, dtype=bool)
        wanted = mean
        order = np.empty(extent, dtype=np.int64)
        for rank in range(extent):
            best = int(np.argmax(np.where(left, inner(directions, wanted), -np.inf)))
            order[rank] = best
            left[best] = False
            wanted = wanted + (mean - directions[:, best])
        return Order(order)
