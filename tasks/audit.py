"""How well somebody's own calibration set covers what a pool's outlier channels need, and what it lacks."""

from typing import Any

import numpy as np
import numpy.typing as npt

from covercal.coverage import covered_channels, greedy_cover
from covercal.measures import set_distance
from covercal.pool import Counts
from storage.arrays import Columns, read_array
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.manifest import Ref
from tasks.capture import ENERGY, PEAK
from tasks.measures import cover_measures, domain_mix
from tasks.pool import sample_columns
from tasks.thresholds import coverage_matrix, outlier_columns, site_bounds

SHOWN = 10
TEXT = 200  # characters of a sample that an audit shows


def audit_set(
    store: ArtifactStore,
    pool: Ref,
    statistics: tuple[Ref, ...],
    outliers: Ref,
    own: Ref,
    own_statistics: tuple[Ref, ...],
) -> dict[str, Any]:
    """Return what a calibration set covers of a pool's outlier channels, the heaviest it misses, and what would help.

    Parameters
    ----------
    store
        Where everything lies.
    pool, statistics, outliers
        The pool that stands for what the model will meet.
    own, own_statistics
        The calibration set as samples, and their activations at the same sites.
    """
    _check_sites(store, statistics, own_statistics)
    coverage, weights = coverage_matrix(store, outliers)
    fires = own_coverage(store, outliers, own_statistics)
    covered = np.asarray(fires.any(axis=0))
    best = greedy_cover(coverage, weights, min(len(fires), len(coverage)))
    total = float(weights.sum()) or 1.0
    return {
        "samples": len(fires),
        "pool_samples": len(coverage),
        **cover_measures(store, outliers, coverage, weights, fires),
        "chosen_weighted_coverage": float(weights[covered_channels(coverage, best.order)].sum()) / total,
        "gram_distance": _gram_distance(store, statistics, own_statistics),
        "domains": domain_mix(sample_columns(store, own, "domain")["domain"]),
        "dropped": Counts(**store.manifest(own).info).dropped,
        "heaviest_missed": _heaviest_missed(store, outliers, covered, weights, total),
        "would_help": _would_help(store, pool, coverage, weights, covered, total),
    }


def own_coverage(store: ArtifactStore, outliers: Ref, statistics: tuple[Ref, ...]) -> npt.NDArray[np.bool_]:
    """Return which sample of another set fires which outlier channel of the pool, bool (samples, outlier channels)."""
    columns = outlier_columns(store, outliers, "position", "threshold")
    parts = [read_array(store.path(ref) / PEAK, columns["position"]) for ref in statistics]
    return np.asarray(np.concatenate(parts).astype(np.float64) > columns["threshold"])


def _check_sites(store: ArtifactStore, pool: tuple[Ref, ...], own: tuple[Ref, ...]) -> None:
    ours, theirs = (list(site_bounds([store.path(ref) for ref in refs])) for refs in (pool, own))
    if ours != theirs:
        raise StorageError("the calibration set was not measured at the pool's sites")


def _gram_distance(store: ArtifactStore, pool: tuple[Ref, ...], own: tuple[Ref, ...]) -> float:
    ours, theirs = ([store.path(ref) for ref in refs] for refs in (pool, own))
    pool_energies, own_energies = Columns([f / ENERGY for f in ours]), Columns([f / ENERGY for f in theirs])
    found = [
        set_distance(
            np.asarray(own_energies.read(first, end)).mean(axis=0, dtype=np.float64),
            np.asarray(pool_energies.read(first, end), dtype=np.float32),
        )
        for first, end in site_bounds(ours)
    ]
    return float(np.sqrt(np.mean(found)))


def _heaviest_missed(
    store: ArtifactStore, outliers: Ref, covered: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64], total: float
) -> list[dict[str, Any]]:
    names = ("block", "linears", "channel", "threshold", "reference_peak")
    columns = outlier_columns(store, outliers, *names)
    missed = np.flatnonzero(~covered)
    heaviest = missed[np.argsort(-weights[missed], kind="stable")][:SHOWN]
    return [
        {
            "block": int(columns["block"][i]),
            "linears": str(columns["linears"][i]),
            "channel": int(columns["channel"][i]),
            "peak_over_threshold": float(columns["reference_peak"][i] / columns["threshold"][i]),
            "weight_share": float(weights[i]) / total,
        }
        for i in heaviest
    ]


def _would_help(
    store: ArtifactStore,
    pool: Ref,
    coverage: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.float64],
    covered: npt.NDArray[np.bool_],
    total: float,
) -> list[dict[str, Any]]:
    """Return the samples of the pool that would add most to the set, each after those before it."""
    missing = ~covered
    if not missing.any():
        return []
    cover = greedy_cover(coverage[:, missing], weights[missing], min(SHOWN, len(coverage)))
    columns = sample_columns(store, pool, "domain", "origins", "text")
    first_round = [(s, g) for s, g, r in zip(cover.order, cover.gains, cover.rounds, strict=True) if r == 0 and g > 0]
    return [
        {
            "sample": int(sample),
            "adds": float(gain) / total,
            "domain": columns["domain"][sample],
            "origins": columns["origins"][sample],
            "text": columns["text"][sample][:TEXT],
        }
        for sample, gain in first_round
    ]
