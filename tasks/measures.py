"""Stage `measures`: what a chosen set covers, how alike its samples are, how far it is from the pool."""

import json
from typing import Any

import numpy as np

from covercal.coverage import covered_channels, expected_random_coverage
from covercal.measures import always_fired, coverage_by_block, gram_distance, mean_jaccard, surrogate_bound
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import Build, cached
from tasks.pool import sample_columns
from tasks.select import site_energies
from tasks.thresholds import coverage_matrix, outlier_columns

MEASURES = "measures.json"


@cached("measures", version=1, names={"samples": "the chosen samples"})
def measure_set(
    build: Build, *, pool: Ref, outliers: Ref, statistics: tuple[Ref, ...], samples: tuple[int, ...]
) -> None:
    """Measure a set of samples of a pool against the whole pool."""
    chosen = np.asarray(samples, dtype=np.int64)
    coverage, weights = coverage_matrix(build.store, outliers)
    covered = covered_channels(coverage, chosen)
    random_share, random_weight = expected_random_coverage(coverage, weights, chosen.size)
    domains = sample_columns(build.store, pool, "domain")["domain"]
    mine = [domains[s] for s in samples]
    total = float(weights.sum())
    value = {
        "outlier_channels": int(weights.size),
        "coverage": float(covered.mean()) if covered.size else 0.0,
        "weighted_coverage": 1.0 - surrogate_bound(covered, weights) / total if total else 0.0,
        "random_coverage": random_share,
        "random_weighted_coverage": random_weight,
        "coverage_by_block": coverage_by_block(covered, outlier_columns(build.store, outliers, "block")["block"]),
        "surrogate_bound": surrogate_bound(covered, weights),
        "always_fired": always_fired(coverage),
        "jaccard": mean_jaccard(coverage[chosen]),
        "gram_distance": gram_distance(site_energies([build.store.path(ref) for ref in statistics]), chosen),
        "domains": {name: mine.count(name) for name in sorted(set(mine))},
    }
    (build.folder / MEASURES).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def read_measures(store: ArtifactStore, measures: Ref) -> dict[str, Any]:
    """Return the measures of a set."""
    value: dict[str, Any] = json.loads((store.path(measures) / MEASURES).read_bytes())
    return value
