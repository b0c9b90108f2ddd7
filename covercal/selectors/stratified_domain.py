"""Random samples in the pool's own mix of domains.

The domains take turns so that each prefix of n samples holds, of every domain, its exact share of n rounded down or up.
Choosing the domain with the largest deficit would not do that (with five and more domains it can be off by more than
one sample); giving each turn to the earliest deadline does: proportionate fair scheduling on one processor (Baruah et
al. 1996, Algorithmica 15), there known from apportionment as the quota condition.
"""

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting, words_of_every_sample
from covercal.selectors.registry import Evidence, Order

Int64 = npt.NDArray[np.int64]


class StratifiedDomainSelector:
    """Chooses samples at random within domains, whose shares in every prefix are the pool's."""

    reads: frozenset[str] = frozenset()
    seeded = True
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return one sample of the domain whose turn it is, at a time; the seed orders the samples within domains."""
        extent = fitting(extent, evidence)
        domains = words_of_every_sample(evidence.domains, evidence, "the domains")
        _, domain, sizes = np.unique(np.asarray(domains, dtype=str), return_inverse=True, return_counts=True)
        generator = np.random.default_rng(seed)
        members = [generator.permutation(np.flatnonzero(domain == each)) for each in range(sizes.size)]
        taken = np.zeros_like(sizes)
        order = np.empty(extent, dtype=np.int64)
        for rank, turn in enumerate(turns(sizes.astype(np.int64), extent)):
            order[rank] = members[turn][taken[turn]]
            taken[turn] += 1
        return Order(order)


def turns(sizes: Int64, extent: int) -> Int64:
    """Return which part each of `extent` turns goes to, int64 (extent,).

    The j-th member of a part of c among N may come once (j - 1) N / c turns are over, and must come within j N / c.
    Of the parts that may come, the turn goes to the earliest deadline, then the largest deficit, then the first part.
    """
    total = int(sizes.sum())
    taken = np.zeros_like(sizes)
    order = np.empty(extent, dtype=np.int64)
    for turn in range(extent):
        deficit = (turn + 1) * sizes - taken * total  # in units of 1 / total samples
        deadline = np.where(deficit > 0, -(-(taken + 1) * total // sizes), np.iinfo(np.int64).max)
        urgent = deadline == deadline.min()
        order[turn] = np.argmax(np.where(urgent, deficit, -1))
        taken[order[turn]] += 1
    return order
