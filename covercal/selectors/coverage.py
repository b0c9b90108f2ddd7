"""COVERCAL: greedy weighted cover of the outlier channels (arXiv 2604.24008, section 3)."""

from covercal.coverage import greedy_cover
from covercal.selectors.registry import Evidence, Order


class CoverageSelector:
    """Chooses the samples that together fire the most outlier weight."""

    reads = frozenset({"outliers"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order; the seed has no effect."""
        if evidence.coverage is None or evidence.weights is None:
            raise ValueError("the coverage selector reads the coverage matrix and the weights")
        cover = greedy_cover(evidence.coverage, evidence.weights, extent)
        return Order(cover.order, cover.gains, cover.rounds)
