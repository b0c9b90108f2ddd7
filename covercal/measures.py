"""What can be said of a calibration set before anything is quantised with it."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def coverage_by_block(covered: Bools, blocks: npt.NDArray[np.int64]) -> dict[int, float]:
    """Return, for each block with outlier channels, the share of them that is covered.

    Parameters
    ----------
    covered, blocks
        (channels,): whether a channel is covered, and the block it belongs to.
    """
    found = np.unique(blocks)
    return {int(block): float(covered[blocks == block].mean()) for block in found}


def always_fired(coverage: Bools) -> float:
    """Return the share of outlier channels that every sample of the pool fires: no choice tells them apart.

    Parameters
    ----------
    coverage
        (samples, channels).
    """
    return float(coverage.all(axis=0).mean()) if coverage.shape[1] else 0.0


def mean_jaccard(fires: Bools) -> float:
    """Return the mean Jaccard similarity of the channels that two samples of a set fire, over all pairs.

    Parameters
    ----------
    fires
        (samples of the set, channels). Two samples that fire nothing are equal; fewer than two samples give 0.
    """
    if len(fires) < 2:
        return 0.0
    ones = fires.astype(np.float32)
    both = (ones @ ones.T).astype(np.float64)
    counts = fires.sum(axis=1).astype(np.float64)
    either = counts[:, None] + counts[None, :] - both
    similar = np.divide(both, either, out=np.ones_like(both), where=either > 0)
    upper = np.triu_indices(len(fires), k=1)
    return float(similar[upper].mean())


def surrogate_bound(covered: Bools, weights: Floats) -> float:
    """Return the weight of the uncovered channels: what bounds the paper's surrogate loss (proposition 3.3)."""
    return float(weights[~covered].sum())


def gram_distance(energies: Iterable[npt.NDArray[np.float32]], chosen: npt.NDArray[np.int64]) -> float:
    """Return how far the Gram diagonals of a set are from those of the pool.

    The root mean over sites of ||mean over the set - mean over the pool||^2 / ||mean over the pool||^2.

    Parameters
    ----------
    energies
        Site after site, (samples of the pool, channels of the site).
    chosen
        Samples of the set, at least one.
    """
    if not len(chosen):
        raise ValueError("a set of no samples has no Gram matrix")
    found = [set_distance(each[chosen].mean(axis=0, dtype=np.float64), each) for each in energies]
    return float(np.sqrt(np.mean(found))) if found else 0.0


def set_distance(mean: Floats, pool: npt.NDArray[np.float32]) -> float:
    """Return the squared relative distance of a mean Gram diagonal (channels,) from the mean of a pool."""
    whole = pool.mean(axis=0, dtype=np.float64)
    length = float(whole @ whole)
    away = mean - whole
    return float(away @ away) / length if length else 0.0


def coverage_curve(coverage: Bools, weights: Floats, order: npt.NDArray[np.int64]) -> Floats:
    """Return the share of the outlier weight that the first 1, 2, ... samples of an order cover, (samples ordered,).

    Parameters
    ----------
    coverage, weights
        Of the pool: (samples, channels) and (channels,).
    order
        Samples as chosen.
    """
    total = float(weights.sum())
    missed = np.ones(weights.size, dtype=bool)
    gained = np.zeros(len(order), dtype=np.float64)
    for rank, sample in enumerate(order):
        new = missed & coverage[sample]
        gained[rank] = weights[new].sum()
        missed &= ~new
        if not missed.any():
            break
    return np.minimum(gained.cumsum() / total, 1.0) if total > 0 else gained


def channel_map(position: npt.NDArray[np.int64], missed: Bools, channels: int, columns: int) -> npt.NDArray[np.int8]:
    """Return the worst of each bin of a site's channels: 0 no outlier channel, 1 an outlier channel, 2 one missed.

    Parameters
    ----------
    position, missed
        (outlier channels,): which channel of the site each is, and whether no chosen sample fires it.
    channels
        Of the site.
    columns
        Bins at most; with fewer channels each has its own.
    """
    bins = min(channels, columns)
    found = np.zeros(bins, dtype=np.int8)
    np.maximum.at(found, position * bins // channels, np.where(missed, 2, 1).astype(np.int8))
    return found
