"""COLA, stage 3: one sample for each cluster of mean activations (arXiv 2510.10618)."""

from itertools import cycle

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting
from covercal.selectors.registry import Evidence, Order
from covercal.selectors.sketches import sketch_columns, squared_distances

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
RESTARTS = 10


class ColaSelector:
    """Chooses the samples nearest the centroids of as many k-means clusters as the budget."""

    reads = frozenset({"statistics"})
    seeded = True
    nested = False

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the sample nearest each centroid, the largest cluster first; the seed starts k-means.

        A sample that is taken gives way to the next nearest. Where the pool has fewer different sketches than the
        budget, there are as many clusters as those, and they take turns.
        """
        extent = fitting(extent, evidence)
        columns = sketch_columns(evidence)
        order = np.empty(extent, dtype=np.int64)
        if extent == 0:
            return Order(order)
        left = np.ones(evidence.samples, dtype=bool)
        for rank, centroid in zip(range(extent), cycle(_centroids(columns, extent, seed)), strict=False):
            order[rank] = np.argmin(np.where(left, squared_distances(columns, centroid), np.inf))
            left[order[rank]] = False
        return Order(order)


def _centroids(columns: Floats, clusters: int, seed: int) -> Floats:
    """Return the centroids of k-means, the largest cluster's first, (clusters, width)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if columns.shape[0] == 0:
        return np.zeros((1, 0))
    sketch = np.ascontiguousarray(columns.T)
    clusters = min(clusters, len(np.unique(sketch, axis=0)))
    with threadpool_limits(limits=1):  # threads would add up the centroids in another order
        fitted = KMeans(n_clusters=clusters, n_init=RESTARTS, random_state=seed).fit(sketch)
    sizes = np.bincount(fitted.labels_, minlength=clusters)
    centroids: Floats = fitted.cluster_centers_[np.argsort(-sizes, kind="stable")]
    return centroids
