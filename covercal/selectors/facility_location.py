"""Facility location: every sample of the pool is served by a similar chosen one.

Greedy for max sum over the pool of the largest similarity to a chosen sample, which is monotone and submodular
(Nemhauser, Wolsey and Fisher 1978), by lazy evaluation (Minoux 1978).
"""

import heapq

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import sketch_columns, unit_columns

Int32 = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
BLOCK = 512  # rows of similarities made at a time
SIMILARITY_BITS = 30
PRODUCT_BITS = 52


class FacilityLocationSelector:
    """Chooses the samples that serve the pool best, with the similarity (1 + cosine) / 2 of sketches.

    Unlike a Gaussian of the distance, a cosine needs no width. Adding the 1 keeps similarities positive and changes no
    choice. So this is clustering around samples (k-medoids) by squared distance between directions.
    """

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order, a gain being the growth of the objective; the seed has no effect."""
        extent = fitting(extent, evidence)
        similarity = similarities(unit_columns(sketch_columns(evidence)))
        served = np.zeros(evidence.samples, dtype=np.int32)
        total = 0
        # What a sample gained when last asked bounds what it gains now; equal bounds come by index, as ties should.
        bounds = [(-int(row.sum(dtype=np.int64)), sample) for sample, row in enumerate(similarity)]
        heapq.heapify(bounds)
        order = np.empty(extent, dtype=np.int64)
        gains = np.empty(extent, dtype=np.float64)
        for rank in range(extent):
            while True:
                bound, best = bounds[0]
                gain = int(np.maximum(similarity[best], served).sum(dtype=np.int64)) - total
                if gain == -bound:
                    break
                heapq.heapreplace(bounds, (-gain, best))
            heapq.heappop(bounds)
            order[rank], gains[rank] = best, np.ldexp(gain, -SIMILARITY_BITS)
            np.maximum(served, similarity[best], out=served)
            total += gain
        return Order(order, gains)


def similarities(directions: Floats) -> Int32:
    """Return (1 + cosine) / 2 of every pair in units of 2**-30, int32 (samples, samples): 400 MB for 10,000 samples.

    Directions (width, samples) are rounded to 2**-26. Then a matrix product of them is exact, whatever the order of its
    sums, and so are the sums of the similarities: gains compare without error, and equal samples tie.
    """
    grid = np.rint(np.ldexp(directions, PRODUCT_BITS // 2))
    samples = grid.shape[1]
    found = np.empty((samples, samples), dtype=np.int32)
    for start in range(0, samples, BLOCK):
        rows = slice(start, start + BLOCK)
        cosine = np.ldexp(grid[:, rows].T @ grid, -PRODUCT_BITS)
        found[rows] = np.rint(np.ldexp(1 + cosine, SIMILARITY_BITS - 1))
    return found
