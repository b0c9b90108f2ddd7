"""Zarr arrays inside an artifact: whole shards written at once, no missing chunk ever read as numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr

from storage.errors import StorageError

CHUNK_COLUMNS = 8192


def write_array(path: Path, values: npt.NDArray[np.generic]) -> None:
    """Write a matrix as one Zarr 3 shard file of column chunks.

    Parameters
    ----------
    path
        The array's folder; must not exist.
    values
        (rows, columns), float32 or an integer type. Floats must hold no NaN, which is the fill value.

    Raises
    ------
    ValueError
        For another number of dimensions, another float type, or NaN.
    """
    is_float = values.dtype == np.float32
    if values.ndim != 2 or not (is_float or values.dtype.kind in "iu"):
        raise ValueError(f"an array is stored as a float32 or integer matrix, not {values.dtype} {values.shape}")
    if is_float and np.isnan(values).any():
        raise ValueError("NaN marks what is missing and cannot be stored")
    rows, columns = values.shape
    chunk = (max(rows, 1), min(CHUNK_COLUMNS, max(columns, 1)))
    shard = (chunk[0], -(-max(columns, 1) // chunk[1]) * chunk[1])
    array = zarr.create_array(
        store=str(path),
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard,
        fill_value=float("nan") if is_float else 0,
        compressors=None,
        config={"write_empty_chunks": True},
    )
    array[:] = values


def read_array(path: Path, columns: Sequence[int] | npt.NDArray[np.intp] | None = None) -> npt.NDArray[np.generic]:
    """Return a stored matrix, or some of its columns.

    Raises
    ------
    StorageError
        When the shard is missing, or a chunk of it: floats then read as NaN, which is never stored.
    """
    array = zarr.open_array(store=str(path), mode="r")
    if array.size and not (path / "c" / "0" / "0").is_file():
        raise StorageError(f"Array {path} lacks a chunk; `covercal cache verify` names the damaged file.")
    if columns is None:
        values = np.asarray(array[:])
    else:
        values = np.asarray(array.oindex[:, np.asarray(columns, dtype=np.intp)])
    if values.dtype == np.float32 and np.isnan(values).any():
        raise StorageError(f"Array {path} lacks a chunk; `covercal cache verify` names the damaged file.")
    return values
