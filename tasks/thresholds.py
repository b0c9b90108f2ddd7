"""Stage `outliers`: thresholds by site, outlier channels, their weights, and which sample fires which channel."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from covercal.coverage import PackedBits
from covercal.errors import CovercalError
from covercal.thresholds import PEAK_RULES, SIGMA, packed_above, poorly_reconstructed
from storage.arrays import Columns, read_array, write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import query, read_table, write_table
from tasks.cached import Build, cached
from tasks.capture import CHANNELS, PEAK

THRESHOLDS = "thresholds.parquet"
OUTLIERS = "outliers.parquet"
COVERAGE = "coverage.zarr"
STRIP_BITS = 2**18

# Mean and standard deviation of |x| over all tokens and channels of a site (COVERCAL, arXiv 2604.24008, section 3.1:
# tau = mu + 6 sigma, one per layer). The sums are float64; E[x^2] - E[|x|]^2 loses nothing that matters here, since |x|
# has a standard deviation of the order of its mean.
SITES_SQL = """
    SELECT site, any_value(block) AS block, any_value(linears) AS linears,
           max(position) - min(position) + 1 AS channels, min(position) AS first,
           max(peak)::DOUBLE AS peak, sum(absolute_sum) / sum(tokens) AS mean,
           sqrt(greatest(sum(square_sum) / sum(tokens) - pow(sum(absolute_sum) / sum(tokens), 2), 0)) AS sigma
    FROM channels GROUP BY site ORDER BY site
"""

BOUNDS_SQL = """
    SELECT min(position) AS first, max(position) AS last FROM channels GROUP BY site ORDER BY site
"""

WEIGHT_SQL = {
    "full": "pow(c.reference_peak / t.threshold, 2) * c.column_norm",
    "squared_norm": "pow(c.reference_peak / t.threshold, 2) * pow(c.column_norm, 2)",
    "magnitude": "pow(c.reference_peak / t.threshold, 2)",
    "column_norm": "c.column_norm",
    "unweighted": "1::DOUBLE",
}

OUTLIER_SQL = """
    SELECT c.position, c.site, c.block, c.channel, c.linears, t.threshold, c.reference_peak, c.column_norm,
           {weight} AS weight
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
    version=2,
    names={
        "rule": "outliers.rule",
        "k": "outliers.k",
        "weighting": "outliers.weighting",
        "lowered": "outliers.adaptive (sites)",
        "lowered_k": "outliers.adaptive_k",
    },
)
def find_outliers(
    build: Build,
    *,
    statistics: tuple[Ref, ...],
    rule: str,
    k: float,
    weighting: str,
    lowered: tuple[int, ...],
    lowered_k: float | None,
) -> dict[str, Any]:
    """Find the outlier channels of a pool and the coverage matrix, bit-packed (samples, ceil(channels / 8)).

    At the sites `lowered`, `lowered_k` takes the place of `k` (adaptive refinement, appendix H).
    """
    shards = [build.store.path(ref) for ref in statistics]
    channels = [folder / CHANNELS for folder in shards]
    sites = query(SITES_SQL, {"channels": channels})
    factors = [lowered_k if lowered_k is not None and site in lowered else k for site in sites["site"].to_pylist()]
    peaks = Columns([folder / PEAK for folder in shards])
    rows = sites.to_pylist()
    advance = build.progress(len(rows), "sites")
    bits, limits = BitColumns(peaks.rows), []
    every = peaks.parts((row["first"], row["first"] + row["channels"]) for row in rows)  # read once
    for row, factor, part in zip(rows, factors, every, strict=True):
        mine = np.asarray(part, dtype=np.float32)
        limit = row["mean"] + factor * row["sigma"] if rule == SIGMA else PEAK_RULES[rule](mine, factor)
        _check_limit(row, limit, rule)
        bits.add(packed_above(mine, limit), row["channels"])
        limits.append(limit)
        advance(1)
    write_table(build.folder / THRESHOLDS, sites.append_column("threshold", pa.array(limits, pa.float64())))
    tables = {"channels": channels, "thresholds": [build.folder / THRESHOLDS]}
    outliers = query(OUTLIER_SQL.format(weight=WEIGHT_SQL[weighting]), tables)
    if outliers.num_rows != bits.columns:
        raise CovercalError(
            f"The statistics' tables hold {outliers.num_rows} outlier channels and their peaks {bits.columns}; "
            "`covercal cache verify` says which artifact is damaged."
        )
    write_table(build.folder / OUTLIERS, outliers)
    write_array(build.folder / COVERAGE, bits.packed())
    return {"outliers": outliers.num_rows, "channels": sum(row["channels"] for row in rows)}


def _check_limit(row: dict[str, Any], limit: float, rule: str) -> None:
    """Raise when a threshold is 0: every weight above it would be infinite."""
    if not limit > 0 and row["peak"] > limit:
        where = f"block {row['block']}, {row['linears']}"
        raise CovercalError(
            f"outliers.rule {rule} gives threshold {limit:g} at {where}: most of its activations are 0. "
            "`rule: sigma` follows the largest ones."
        )


def poor_sites(store: ArtifactStore, outliers: Ref, linears: list[dict[str, Any]]) -> tuple[int, ...]:
    """Return the sites whose linears a first round of quantisation reconstructed poorly.

    Parameters
    ----------
    store, outliers
        Where the sites are read.
    linears
        Rows of a checkpoint's report: `name` and `output_error`, None where nothing was calibrated: an expert that
        met too few tokens. A site of such linears alone is not poor.
    """
    sites = read_table(store.path(outliers) / THRESHOLDS, ["site", "block", "linears"]).to_pylist()
    site_of = {f".{row['block']}.{name}": row["site"] for row in sites for name in row["linears"].split(", ")}
    errors = defaultdict(list)
    for row in linears:
        ends = (row["name"][at:] for at, letter in enumerate(row["name"]) if letter == ".")  # the longest first
        end = next(filter(site_of.__contains__, ends), None)
        if end is not None and row["output_error"] is not None:
            errors[site_of[end]].append(row["output_error"])
    known = [row["site"] for row in sites if row["site"] in errors]
    found = np.array([np.sqrt(np.mean(np.square(errors[site]))) for site in known])
    return tuple(known[i] for i in poorly_reconstructed(found))


class BitColumns:
    """Packs those columns of a wide bool matrix that are anywhere true, eight to a byte; they come some at a time.

    Parameters
    ----------
    rows
        Of the matrix.
    """

    def __init__(self, rows: int) -> None:
        self.columns = 0
        self._left = np.zeros((rows, 0), dtype=np.uint8)  # what fills no byte yet, a bit to a byte
        self._bytes: list[npt.NDArray[np.uint8]] = []

    def add(self, bits: npt.NDArray[np.uint8], columns: int) -> None:
        """Append some columns, uint8 (rows, ceil(columns / 8)), packed themselves."""
        anywhere = np.unpackbits(np.bitwise_or.reduce(bits, axis=0), count=columns)
        chosen = np.flatnonzero(anywhere)
        self.columns += chosen.size
        if chosen.size == columns and not columns % 8 and not self._left.shape[1]:
            self._bytes.append(bits)
            return
        width = self._left.shape[1] + chosen.size
        whole = np.empty((len(bits), width // 8), dtype=np.uint8)
        left = np.empty((len(bits), width % 8), dtype=np.uint8)
        step = max(1, STRIP_BITS // max(columns, 1))  # rows whose bits stay in the processor's cache
        # by a mask instead of places, 15 times slower
        for rows in (slice(start, start + step) for start in range(0, len(bits), step)):
            some = np.take(np.unpackbits(bits[rows], axis=1, count=columns), chosen, axis=1)
            joined = np.concatenate([self._left[rows], some], axis=1)
            whole[rows] = np.packbits(joined[:, : width - width % 8], axis=1)
            left[rows] = joined[:, width - width % 8 :]
        self._bytes.append(whole)
        self._left = left

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return uint8 (rows, ceil(columns / 8)), as numpy.packbits of the whole."""
        return np.concatenate([*self._bytes, np.packbits(self._left, axis=1)], axis=1)


def packed_coverage(store: ArtifactStore, outliers: Ref) -> tuple[PackedBits, npt.NDArray[np.float64]]:
    """Return the coverage matrix (samples, outlier channels), packed, and the weights, float64 (outlier channels,)."""
    folder = store.path(outliers)
    weights = read_table(folder / OUTLIERS, ["weight"])["weight"].to_numpy()
    return PackedBits(read_array(folder / COVERAGE).astype(np.uint8, copy=False), weights.size), weights


def coverage_matrix(store: ArtifactStore, outliers: Ref) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Return the coverage matrix, bool (samples, outlier channels), and the weights, float64 (outlier channels,)."""
    packed, weights = packed_coverage(store, outliers)
    return packed.unpacked(), weights


def outlier_columns(store: ArtifactStore, outliers: Ref, *names: str) -> dict[str, Any]:
    """Return columns of the outlier channels as arrays."""
    table = read_table(store.path(outliers) / OUTLIERS, names)
    return {name: table[name].to_numpy() for name in names}


def site_bounds(folders: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the columns of every site, from one shard's channels."""
    for row in query(BOUNDS_SQL, {"channels": [folders[0] / CHANNELS]}).to_pylist():
        yield row["first"], row["last"] + 1
