"""The longest samples: most tokens, among equals most characters."""

import numpy as np

from covercal.selectors.checked import fitting, of_every_sample, words_of_every_sample
from covercal.selectors.registry import Evidence, Order


class LongestSelector:
    """Chooses the samples of most tokens, then of most characters of text, then of the lowest index."""

    reads: frozenset[str] = frozenset()
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples by falling length; the seed has no effect."""
        extent = fitting(extent, evidence)
        tokens = of_every_sample(evidence.lengths, evidence, "the lengths")
        characters = np.array([len(text) for text in words_of_every_sample(evidence.texts, evidence, "the texts")])
        return Order(np.lexsort((-characters, -tokens))[:extent].astype(np.int64))
