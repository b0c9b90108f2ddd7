"""Cover of the outlier channels where each further sample of a channel still counts, by the logarithm.

A smooth form of COVERCAL's objective (arXiv 2604.24008, eq. 4) that never saturates: it weighs how often a channel
fires among the chosen samples, not only whether it does.
"""

from covercal.coverage import greedy_soft_cover
from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order


class SoftCoverageSelector:
    """Chooses the samples of the largest sum over channels of w * log(1 + chosen samples that fire it)."""

    reads = frozenset({"outliers"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order; the seed has no effect."""
        if evidence.coverage is None or evidence.weights is None:
            raise ValueError("the soft coverage selector reads the coverage matrix and the weights")
        samples, gains = greedy_soft_cover(evidence.coverage, evidence.weights, fitting(extent, evidence))
        return Order(samples, gains)
