"""D-optimal design: the samples that together pin down most directions (Kiefer and Wolfowitz 1960).

The log determinant is monotone and submodular, so greedy comes within 1 - 1/e of the best choice.
"""

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import exact_mean, inner, sketch_columns

Floats = npt.NDArray[np.float64]


class LogDetSelector:
    """Chooses the samples of the largest log det(I + sum of f f^T / lambda), f the sketch.

    lambda is the pool's mean squared component of a sketch: the prior I then weighs as much as one average sample
    spread evenly over all directions, and the order does not depend on the scale of the sketch.
    """

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order, a gain being the growth of the log determinant; the seed has no effect."""
        extent = fitting(extent, evidence)
        features = _scaled(sketch_columns(evidence))
        covariance = np.eye(features.shape[0])  # the inverse of I + sum of f f^T over the chosen
        spread = np.asarray((features * features).sum(axis=0))  # f^T covariance f of every sample
        left = np.ones(evidence.samples, dtype=bool)
        order = np.empty(extent, dtype=np.int64)
        gains = np.empty(extent, dtype=np.float64)
        for rank in range(extent):
            best = int(np.argmax(np.where(left, spread, -1.0)))
            order[rank], gains[rank] = best, np.log1p(spread[best])
            left[best] = False
            toward = inner(covariance, features[:, best])  # it is symmetric
            shrunk = toward / np.sqrt(1 + spread[best])
            covariance -= np.outer(shrunk, shrunk)  # Sherman and Morrison 1950
            spread = np.maximum(spread - inner(features, shrunk) ** 2, 0.0)
        return Order(order, gains)


def _scaled(columns: Floats) -> Floats:
    """Return sketches divided by the root of lambda."""
    largest = float(np.abs(columns).max(initial=0.0))
    if largest == 0:
        return columns
    columns = columns / largest  # so that no square overflows or vanishes
    return np.asarray(columns / np.sqrt(exact_mean(columns**2).mean()))
