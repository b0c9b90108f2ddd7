"""Stage `measures`: what a chosen set covers, how alike its samples are, how far it is from the pool."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from covercal.coverage import expected_random_coverage
from covercal.measures import always_fired, coverage_by_block, gram_distance, mean_jaccard, surrogate_bound
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import Build, cached
from tasks.pool import sample_columns
from tasks.select import site_energies
from tasks.thresholds import coverage_matrix, outlier_columns

MEASURES = "measures.json"


@cached("measures", version=2, names={"samples": "the chosen samples"})
def measure_set(
    build: Build, *, pool: Ref, outliers: Ref, statistics: tuple[Ref, ...], samples: tuple[int, ...]
) -> None:
    """Measure a set of samples of a pool against the whole pool."""
    chosen = np.asarray(samples, dtype=np.int64)
    coverage, weights = coverage_matrix(build.store, outliers)
    domains = sample_columns(build.store, pool, "domain")["domain"]
    value = {
        **cover_measures(build.store, outliers, coverage, weights, coverage[chosen]),
        "gram_distance": gram_distance(site_energies([build.store.path(ref) for ref in statistics]), chosen),
        "domains": domain_mix([domains[s] for s in samples]),
    }
    (build.folder / MEASURES).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def cover_measures(
    store: ArtifactStore,
    outliers: Ref,
    coverage: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.float64],
    fires: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Return what a set covers of the pool's outlier channels, beside random choice of its size.

    Parameters
    ----------
    store, outliers
        Where the blocks of the outlier channels are read.
    coverage, weights
        Of the pool: bool (samples, outlier channels), and (outlier channels,).
    fires
        Which sample of the set fires which channel, bool (samples of the set, outlier channels).
    """
    covered = np.asarray(fires.any(axis=0))
    random_share, random_weight = expected_random_coverage(coverage, weights, min(len(fires), len(coverage)))
    missed = surrogate_bound(covered, weights)
    total = float(weights.sum())
    return {
        "outlier_channels": int(weights.size),
        "coverage": float(covered.mean()) if covered.size else 0.0,
        "weighted_coverage": max(0.0, 1.0 - missed / total) if total else 0.0,
        "random_coverage": random_share,
        "random_weighted_coverage": random_weight,
        "coverage_by_block": coverage_by_block(covered, outlier_columns(store, outliers, "block")["block"]),
        "surrogate_bound": missed,
        "always_fired": always_fired(coverage),
        "jaccard": mean_jaccard(fires),
    }


def domain_mix(domains: list[str]) -> dict[str, int]:
    """Return how many samples each domain has, by name."""
    return {name: domains.count(name) for name in sorted(set(domains))}


def read_measures(store: ArtifactStore, measures: Ref) -> dict[str, Any]:
    """Return the measures of a set."""
    value: dict[str, Any] = json.loads((store.path(measures) / MEASURES).read_bytes())
    return value
