"""Samples that match the pool's distribution of activation magnitude.

A rival in COVERCAL (arXiv 2604.24008, section 4), which says no more than that. Here the pool is ranked by magnitude
and its quantiles are visited in the order of a randomly rotated van der Corput sequence (van der Corput 1935; rotation:
Cranley and Patterson 1976).
"""

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting, of_every_sample
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import exact_mean

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class StratifiedMagnitudeSelector:
    """Chooses samples spread evenly over the quantiles of mean |x|, for every budget at once."""

    reads = frozenset({"statistics"})
    seeded = True
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the samples whose ranks the rotated sequence visits; the seed rotates it."""
        extent = fitting(extent, evidence)
        magnitude = of_every_sample(evidence.magnitude, evidence, "the magnitudes (statistics)")
        by_rank = np.argsort(_relative_magnitude(magnitude), kind="stable")
        return Order(by_rank[spread_ranks(evidence.samples, seed)[:extent]].astype(np.int64))


def spread_ranks(count: int, seed: int) -> Int64:
    """Return a permutation of the ranks 0 … count-1 of which every prefix is spread evenly.

    Of n ranks, each of q = 2**k equal parts of the range holds n/q rounded down or up, where q divides `count`. Up to
    the largest power of two in `count`, every rank is equally likely at each place.
    """
    points = 1
    visits = np.zeros(1, dtype=np.int64)  # the integers below `points` with their bits reversed
    while points < count:
        visits = np.concatenate([2 * visits, 2 * visits + 1])
        points *= 2
    rotation = int(np.random.default_rng(seed).integers(max(points * count, 1)))
    ranks = (visits * count + rotation) % max(points * count, 1) // points  # in integers: no point is rounded
    _, first_visits = np.unique(ranks, return_index=True)
    return np.asarray(ranks[np.sort(first_visits)])


def _relative_magnitude(magnitude: Floats) -> Floats:
    """Return (samples,): mean over sites of magnitude / the site's pool mean, so that no site dominates."""
    mean = exact_mean(np.ascontiguousarray(magnitude.T))
    relative = np.divide(magnitude, mean, out=np.zeros_like(magnitude), where=mean > 0)
    return np.asarray(relative.sum(axis=1) / max(mean.size, 1))
