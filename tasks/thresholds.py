"""Stage `outliers`: thresholds by site, outlier channels, their weights, and which sample fires which channel."""

from typing import Any

import numpy as np
import numpy.typing as npt

from covercal.errors import CovercalError
from storage.arrays import read_array, write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import query, read_table, write_table
from tasks.cached import Build, cached
from tasks.capture import CHANNELS, PEAK

THRESHOLDS = "thresholds.parquet"
OUTLIERS = "outliers.parquet"
COVERAGE = "coverage.zarr"

# Mean and standard deviation of |x| over all tokens and channels of a site (COVERCAL, arXiv 2604.24008, section 3.1:
# tau = mu + 6 sigma, one per layer). The sums are float64; E[x^2] - E[|x|]^2 loses nothing that matters here, since |x|
# has a standard deviation of the order of its mean.
SIGMA_SQL = """
    SELECT site, any_value(block) AS block, any_value(linears) AS linears,
           count(DISTINCT position) AS channels,
           sum(absolute_sum) / sum(tokens) AS mean,
           sqrt(greatest(sum(square_sum) / sum(tokens) - pow(sum(absolute_sum) / sum(tokens), 2), 0)) AS sigma,
           mean + ? * sigma AS threshold
    FROM channels GROUP BY site ORDER BY site
"""

# Weight of an outlier channel (eq. 4): (reference peak / threshold)^2 * L2 norm of the weight column that reads it.
OUTLIER_SQL = """
    SELECT c.position, c.site, c.block, c.channel, c.linears, t.threshold, c.reference_peak, c.column_norm,
           pow(c.reference_peak / t.threshold, 2) * c.column_norm AS weight
    FROM (SELECT position, any_value(site) AS site, any_value(block) AS block, any_value(channel) AS channel,
                 any_value(linears) AS linears, max(peak)::DOUBLE AS reference_peak,
                 any_value(column_norm)::DOUBLE AS column_norm
          FROM channels GROUP BY position) AS c
    JOIN thresholds AS t USING (site)
    WHERE c.reference_peak > t.threshold
    ORDER BY c.position
"""


@cached(
    "outliers",
    version=1,
    names={"rule": "outliers.rule", "k": "outliers.k", "weighting": "outliers.weighting"},
)
def find_outliers(build: Build, *, statistics: tuple[Ref, ...], rule: str, k: float, weighting: str) -> dict[str, Any]:
    """Find the outlier channels of a pool and the coverage matrix, bit-packed (samples, ceil(channels / 8))."""
    if (rule, weighting) != ("sigma", "full"):
        raise CovercalError(f"There is no threshold rule {rule!r} with weighting {weighting!r}.")
    shards = [build.store.path(ref) for ref in statistics]
    channels = [folder / CHANNELS for folder in shards]
    thresholds = query(SIGMA_SQL, {"channels": channels}, [k])
    write_table(build.folder / THRESHOLDS, thresholds)
    tables = {"channels": channels, "thresholds": [build.folder / THRESHOLDS]}
    outliers = query(OUTLIER_SQL, tables)
    write_table(build.folder / OUTLIERS, outliers)
    positions = outliers["position"].to_numpy()
    limits = outliers["threshold"].to_numpy()
    advance = build.progress(len(shards), "shards")
    packed = []
    for folder in shards:
        peaks = read_array(folder / PEAK, positions)
        packed.append(np.packbits(peaks.astype(np.float64) > limits, axis=1))
        advance(1)
    write_array(build.folder / COVERAGE, np.concatenate(packed))
    return {"outliers": len(positions), "channels": int(thresholds["channels"].to_numpy().sum())}


def coverage_matrix(store: ArtifactStore, outliers: Ref) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Return the coverage matrix, bool (samples, outlier channels), and the weights, float64 (outlier channels,)."""
    folder = store.path(outliers)
    weights = read_table(folder / OUTLIERS, ["weight"])["weight"].to_numpy()
    packed = read_array(folder / COVERAGE).astype(np.uint8)
    return np.unpackbits(packed, axis=1, count=weights.size).astype(bool), weights
