"""Samples whose mean Gram diagonal is the pool's, at every site: what GPTQ and AWQ consume of a calibration set.

Greedy for min over sets S of the sum over sites of ||mean over S of d - mean over the pool of d||**2 / ||mean over the
pool of d||**2, where d holds a sample's mean x**2 of each channel. This project's own choice; matching moments greedily
is herding (Chen, Welling and Smola, UAI 2010) with the true distance.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting, of_every_sample
from covercal.selectors.registry import Evidence, Order

Floats = npt.NDArray[np.float64]
BLOCK = 512  # rows of the kernel made at a time
TIE = 2.0**-40  # of the largest term: well above the rounding of the kernel, which differs with thread count


class GramMatchingSelector:
    """Chooses the samples whose mean Gram diagonal comes nearest to the pool's."""

    reads = frozenset({"statistics"})
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order; the seed has no effect.

        A gain is by how much the distance fell, beginning with that of the empty set, one per site; it is negative
        where every sample left would lead away. Ties (within 1e-12) go to the lowest index.
        """
        extent = fitting(extent, evidence)
        if evidence.energies is None:
            raise ValueError("the selector reads the energies (statistics), and the evidence has none")
        sites = (of_every_sample(site, evidence, "the energies (statistics)") for site in evidence.energies())
        kernel, distance = centred_kernel(sites, evidence.samples)
        diagonal = kernel.diagonal().copy()
        pull = np.zeros(evidence.samples)  # inner product of every sample with the sum of the chosen
        length = 0.0  # squared, of that sum
        left = np.ones(evidence.samples, dtype=bool)
        order = np.empty(extent, dtype=np.int64)
        gains = np.empty(extent, dtype=np.float64)
        for rank in range(extent):
            growth = 2 * pull + diagonal
            slack = TIE * (2 * float(np.abs(pull).max()) + float(diagonal.max()))
            best = int(np.argmax(left & (growth <= growth[left].min() + slack)))
            length += float(growth[best])
            nearer = length / (rank + 1) ** 2
            order[rank], gains[rank] = best, distance - nearer
            distance = nearer
            left[best] = False
            pull += kernel[best]
        return Order(order, gains)


def centred_kernel(sites: Iterable[Floats], samples: int) -> tuple[Floats, float]:
    """Return inner products of the samples' deviations from the pool's mean, and the number of sites that have energy.

    Parameters
    ----------
    sites
        Of each site, float64 (samples, channels); each is scaled by the length of its mean over the pool.

    Returns
    -------
    kernel
        float64 (samples, samples), summed over the sites: 800 MB for 10,000 samples.
    energetic
        The number of sites whose mean is not zero.
    """
    kernel = np.zeros((samples, samples))
    energetic = 0.0
    for site in sites:
        mean = site.mean(axis=0)
        length = float(np.linalg.norm(mean))
        if length == 0:
            continue
        energetic += 1
        deviation = (site - mean) / length
        for start in range(0, samples, BLOCK):
            kernel[start : start + BLOCK, start:] += deviation[start : start + BLOCK] @ deviation[start:].T
    for start in range(0, samples, BLOCK):  # the other half
        stop = start + BLOCK
        kernel[stop:, start:stop] = kernel[start:stop, stop:].T
    return kernel, energetic
