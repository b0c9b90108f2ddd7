"""The samples that the original model predicts worst, or best.

The highest perplexity is a rival in COVERCAL (arXiv 2604.24008, section 4), the lowest in data pruning (Marion et al.,
arXiv 2309.04564). Perplexity is exp of the loss, so the order of losses is the order of perplexities.
"""

from covercal.selectors.checked import fitting, highest_first, of_every_sample
from covercal.selectors.registry import Evidence, Order

LOSSES = "the losses"


class MaxPerplexitySelector:
    """Chooses the samples of the highest perplexity."""

    reads = frozenset({"losses"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples by falling loss; the seed has no effect."""
        extent = fitting(extent, evidence)
        return Order(highest_first(of_every_sample(evidence.losses, evidence, LOSSES), extent))


class MinPerplexitySelector:
    """Chooses the samples of the lowest perplexity."""

    reads = frozenset({"losses"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples by rising loss; the seed has no effect."""
        extent = fitting(extent, evidence)
        return Order(highest_first(-of_every_sample(evidence.losses, evidence, LOSSES), extent))
