"""Stage `selection`: the pool's samples in the order of choice; a budget is a prefix of it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from covercal.selectors.registry import Evidence, selector
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, cached
from tasks.pool import sample_columns
from tasks.thresholds import coverage_matrix

ORDER = "order.parquet"
SMALLEST_EXTENT = 1024


def extent(budget: int, samples: int) -> int:
    """Return how many samples to order: one order serves all budgets up to 1,024, or up to the next power of two."""
    return min(samples, max(SMALLEST_EXTENT, 1 << (budget - 1).bit_length()))


def selection_inputs(name: str, pool: Ref, outliers: Ref, budget: int, samples: int, seed: int) -> dict[str, Any]:
    """Return the inputs of `order_samples`: only what the selector reads, and the seed only where it matters."""
    chosen = selector(name)
    return {
        "selector": name,
        "pool": pool,
        "outliers": outliers if "outliers" in chosen.reads else None,
        "extent": extent(budget, samples),
        "seed": seed if chosen.seeded else None,
    }


@cached(
    "selection",
    version=1,
    names={"selector": "selection.selector", "extent": "selection.budget (ordered)", "seed": "selection.seed"},
)
def order_samples(
    build: Build, *, selector: str, pool: Ref, outliers: Ref | None, extent: int, seed: int | None
) -> dict[str, Any]:
    """Order the samples of a pool."""
    samples = len(sample_columns(build.store, pool, "sample")["sample"])
    coverage, weights = coverage_matrix(build.store, outliers) if outliers is not None else (None, None)
    order = _selector(selector).order(Evidence(samples, coverage, weights), extent, seed or 0)
    columns = {"rank": pa.array(np.arange(extent, dtype=np.int32)), "sample": pa.array(order.samples.astype(np.int32))}
    if order.gains is not None:
        columns["gain"] = pa.array(order.gains)
    if order.rounds is not None:
        columns["round"] = pa.array(order.rounds.astype(np.int32))
    write_table(build.folder / ORDER, columns)
    return {"samples": samples, "ordered": extent}


_selector = selector  # the build function has an input of that name


def chosen_samples(store: ArtifactStore, selection: Ref, budget: int) -> npt.NDArray[np.int64]:
    """Return the samples that a budget chooses, in the order of choice."""
    column = read_table(store.path(selection) / ORDER, ["sample"])["sample"]
    chosen: npt.NDArray[np.int64] = column.to_numpy()[:budget].astype(np.int64)
    return chosen


def gains(store: ArtifactStore, selection: Ref, budget: int) -> list[float | None]:
    """Return what each chosen sample added to the selector's objective; None where it has none."""
    table = read_table(store.path(selection) / ORDER)
    if "gain" not in table.column_names:
        return [None] * budget
    return [float(value) for value in table["gain"].to_pylist()[:budget]]
