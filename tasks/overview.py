"""Stage `overview`: what a report shows of a choice: its texts, its coverage beside other choices, what it misses."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from covercal.coverage import covered_channels
from covercal.measures import channel_map, coverage_curve
from covercal.selectors.registry import selector as named_selector
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.cached import Build, cached
from tasks.measures import domain_mix
from tasks.pool import sample_columns
from tasks.select import chosen_samples
from tasks.thresholds import THRESHOLDS, coverage_matrix, outlier_columns

OVERVIEW = "overview.json"
TEXT = 400  # characters of a sample that are shown
MAP_COLUMNS = 512
RANDOM_ORDERS = 50
BAND = (2.5, 97.5)  # percentiles of the random orders


@cached("overview", version=2, names={"budget": "selection.budget", "selector": "selection.selector"})
def make_overview(
    build: Build, *, pool: Ref, outliers: Ref, selection: Ref, budget: int, selector: str, rivals: Mapping[str, Ref]
) -> None:
    """Gather what a report shows of the chosen samples; `rivals` are the orders of other selectors by name."""
    store = build.store
    coverage, weights = coverage_matrix(store, outliers)
    chosen = chosen_samples(store, selection, budget)
    covered = covered_channels(coverage, chosen)
    columns = sample_columns(store, pool, "domain", "text", "length")
    value = {
        "pool_domains": domain_mix(columns["domain"]),
        "texts": _texts(columns, chosen, coverage_curve(coverage, weights, chosen)),
        "curves": _curves(store, coverage, weights, budget, {selector: selection} | dict(rivals)),
        "outlier_map": {"sites": _map(store, outliers, covered)},
        "missed": _missed(store, outliers, ~covered),
    }
    (build.folder / OVERVIEW).write_text(json.dumps(value), encoding="utf-8")


def read_overview(store: ArtifactStore, ref: Ref) -> dict[str, Any]:
    """Return what a report shows of a choice."""
    value: dict[str, Any] = json.loads((store.path(ref) / OVERVIEW).read_bytes())
    return value


def _texts(
    columns: dict[str, list[Any]], chosen: npt.NDArray[np.int64], curve: npt.NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Return the chosen samples in their order, with the share of the outlier weight that each is first to cover."""
    return [
        {
            "rank": rank,
            "sample": int(sample),
            "domain": columns["domain"][sample],
            "gain": float(gain),
            "tokens": columns["length"][sample],
            "text": columns["text"][sample][:TEXT],
        }
        for rank, (sample, gain) in enumerate(zip(chosen, np.diff(curve, prepend=0.0), strict=True))
    ]


def _curves(
    store: ArtifactStore,
    coverage: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.float64],
    budget: int,
    orders: Mapping[str, Ref],
) -> dict[str, Any]:
    """Return the weighted coverage of every order at a row of budgets, and what random orders reach."""
    samples = len(coverage)
    budgets = sorted({1 << power for power in range(samples.bit_length())} | {budget, samples} - {0})
    budgets = [each for each in budgets if each <= samples]
    found = {}
    for name, ref in orders.items():
        curve = coverage_curve(coverage, weights, chosen_samples(store, ref, samples))
        known = [each for each in budgets if each <= len(curve)] if named_selector(name).nested else [len(curve)]
        found[name] = [float(curve[each - 1]) if each in known else None for each in budgets]
    chance = (np.random.default_rng(seed).permutation(samples) for seed in range(RANDOM_ORDERS))
    at = np.asarray(budgets) - 1
    random = np.stack([coverage_curve(coverage, weights, order)[at] for order in chance])
    low, high = np.percentile(random, BAND, axis=0)
    band = {"mean": random.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}
    return {"budgets": budgets, "selectors": found, "random": band}


def _map(store: ArtifactStore, outliers: Ref, covered: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Return which channels are outlier channels, and which of them the choice misses: a row for each block.

    Sites of one name lie together; experts do, too, the worst of them in each place.
    """
    columns = outlier_columns(store, outliers, "site", "channel")
    rows: dict[str, dict[int, npt.NDArray[np.int8]]] = {}
    widths: dict[str, int] = {}
    for site in read_table(store.path(outliers) / THRESHOLDS).to_pylist():
        name = re.sub(r"\.\d+\.", ".*.", str(site["linears"]))
        mine = columns["site"] == site["site"]
        cells = channel_map(columns["channel"][mine].astype(np.int64), ~covered[mine], site["channels"], MAP_COLUMNS)
        block = int(site["block"])
        earlier = rows.setdefault(name, {}).get(block)
        rows[name][block] = cells if earlier is None else np.maximum(earlier, cells)
        widths[name] = int(site["channels"])
    return [
        {
            "name": name,
            "channels": widths[name],
            "blocks": list(blocks),
            "cells": [cells.tolist() for cells in blocks.values()],
        }
        for name, blocks in rows.items()
    ]


def _missed(store: ArtifactStore, outliers: Ref, missed: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Return block and linears of every site, how many outlier channels it has, and which share of them is missed."""
    columns = outlier_columns(store, outliers, "site", "weight")
    found = []
    for site in read_table(store.path(outliers) / THRESHOLDS).to_pylist():
        mine = columns["site"] == site["site"]
        weight = float(columns["weight"][mine].sum())
        lost = float(columns["weight"][mine & missed].sum())
        found.append(
            {
                "block": int(site["block"]),
                "linears": str(site["linears"]).split(", "),
                "outlier_channels": int(mine.sum()),
                "uncovered": int((mine & missed).sum()),
                "uncovered_weight": lost / weight if weight else 0.0,
            }
        )
    return found
