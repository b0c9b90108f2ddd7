"""The samples of the highest activation variance across sites, a rival in COVERCAL (arXiv 2604.24008, section 4)."""

from covercal.selectors.checked import fitting, highest_first, of_every_sample
from covercal.selectors.registry import Evidence, Order


class MaxVarianceSelector:
    """Chooses the samples whose variances, summed over the sites, are highest."""

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples by falling sum of variances; the seed has no effect."""
        extent = fitting(extent, evidence)
        variance = of_every_sample(evidence.variance, evidence, "the variances (statistics)")
        return Order(highest_first(variance.sum(axis=1), extent))
