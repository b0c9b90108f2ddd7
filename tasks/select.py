"""Stage `selection`: the pool's samples in the order of choice; a budget is a prefix of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from covercal.recipe import Selection
from covercal.selectors.registry import Evidence, selector
from storage.arrays import Columns, read_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, cached
from tasks.capture import ENERGY, MAGNITUDE, SKETCH, VARIANCE
from tasks.losses import LOSSES
from tasks.pool import sample_columns
from tasks.thresholds import packed_coverage, site_bounds

ORDER = "order.parquet"
SMALLEST_EXTENT = 1024


def extent(budget: int, samples: int) -> int:
    """Return how many samples to order: one order serves all budgets up to 1,024, or up to the next power of two."""
    return min(samples, max(SMALLEST_EXTENT, 1 << (budget - 1).bit_length()))


def selection_inputs(
    wanted: Selection,
    samples: int,
    *,
    pool: Ref,
    outliers: Ref | None,
    statistics: tuple[Ref, ...],
    losses: tuple[Ref, ...] = (),
) -> dict[str, Any]:
    """Return the inputs of `order_samples`: only what the selector reads, and the seed only where it matters."""
    chosen = selector(wanted.selector)
    return {
        "selector": wanted.selector,
        "pool": pool,
        "outliers": outliers if "outliers" in chosen.reads else None,
        "statistics": statistics if "statistics" in chosen.reads else None,
        "losses": losses if "losses" in chosen.reads else None,
        "extent": _extent_of(wanted, chosen.nested, samples),
        "seed": wanted.seed if chosen.seeded else None,
        "given": wanted.samples or None,
    }


def _extent_of(wanted: Selection, nested: bool, samples: int) -> int:
    if wanted.samples:
        return len(wanted.samples)
    return extent(wanted.budget, samples) if nested else wanted.budget


@cached(
    "selection",
    version=2,
    names={
        "selector": "selection.selector",
        "extent": "selection.budget (ordered)",
        "seed": "selection.seed",
        "given": "selection.samples",
    },
)
def order_samples(
    build: Build,
    *,
    selector: str,
    pool: Ref,
    outliers: Ref | None,
    statistics: tuple[Ref, ...] | None,
    losses: tuple[Ref, ...] | None,
    extent: int,
    seed: int | None,
    given: tuple[int, ...] | None,
) -> dict[str, Any]:
    """Order the samples of a pool."""
    evidence = _evidence(build.store, pool, outliers, statistics or (), losses or (), given or ())
    order = _selector(selector).order(evidence, extent, seed or 0)
    columns = {"rank": pa.array(np.arange(extent, dtype=np.int32)), "sample": pa.array(order.samples.astype(np.int32))}
    if order.gains is not None:
        columns["gain"] = pa.array(order.gains)
    if order.rounds is not None:
        columns["round"] = pa.array(order.rounds.astype(np.int32))
    write_table(build.folder / ORDER, columns)
    return {"samples": evidence.samples, "ordered": extent}


def _evidence(
    store: ArtifactStore,
    pool: Ref,
    outliers: Ref | None,
    statistics: tuple[Ref, ...],
    losses: tuple[Ref, ...],
    given: tuple[int, ...],
) -> Evidence:
    columns = sample_columns(store, pool, "domain", "text", "length")
    found: dict[str, Any] = {}
    if outliers is not None:
        found["coverage"], found["weights"] = packed_coverage(store, outliers)
    if statistics:
        folders = [store.path(ref) for ref in statistics]
        for name, file in (("variance", VARIANCE), ("magnitude", MAGNITUDE), ("sketch", SKETCH)):
            found[name] = np.concatenate([read_array(folder / file) for folder in folders])
        found["energies"] = lambda: site_energies(folders)
    if losses:
        found["losses"] = np.concatenate([read_table(store.path(r) / LOSSES)["loss"].to_numpy() for r in losses])
    lengths = np.asarray(columns["length"], dtype=np.int64)
    return Evidence(len(lengths), columns["domain"], columns["text"], lengths, given=given, **found)


def site_energies(folders: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield, site after site, the samples' mean x**2 by channel, float32 (samples, channels of the site)."""
    energies = Columns([folder / ENERGY for folder in folders])
    for first, end in site_bounds(folders):
        yield np.asarray(energies.read(first, end), dtype=np.float32)


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
