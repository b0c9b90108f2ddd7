"""Zarr arrays inside an artifact: whole shards written at once, no missing chunk ever read as numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer.cpu import NDBuffer

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
    if _has_nan(values):
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


class Columns:
    """Several stored matrices of one width, read some columns at a time as if their rows lay in one.

    Whoever reads from left to right reads every chunk once: those that the last columns lay in are kept.

    Parameters
    ----------
    paths
        The arrays' folders.

    Raises
    ------
    StorageError
        When the widths differ, or a chunk is missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._arrays = [_opened(path) for path in paths]
        widths = {array.shape[1] for array in self._arrays}
        if len(widths) > 1:
            raise StorageError(f"Arrays {paths[0]} … have different widths: {sorted(widths)}.")
        self.rows = sum(array.shape[0] for array in self._arrays)
        self.width = widths.pop() if widths else 0
        self._chunk = max((array.chunks[1] for array in self._arrays), default=1)
        self._start = 0
        self._kept: npt.NDArray[np.generic] | None = None

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Return columns [start, stop) of all rows."""
        first = start // self._chunk * self._chunk
        end = min(-(-stop // self._chunk) * self._chunk, self.width)
        kept, kept_end = self._kept, self._start + (0 if self._kept is None else self._kept.shape[1])
        if kept is None or not self._start <= first < kept_end:
            kept = self._chunks(first, end)
        else:
            kept = kept[:, first - self._start :]
            if end > kept_end:
                kept = np.concatenate([kept, self._chunks(kept_end, end)], axis=1)
        kept.flags.writeable = False  # what is returned is a part of it
        self._start, self._kept = first, kept
        return kept[:, start - first : stop - first]

    def _chunks(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        found = np.empty((self.rows, stop - start), dtype=np.result_type(*(array.dtype for array in self._arrays)))
        row = 0
        for array, path in zip(self._arrays, self._paths, strict=True):
            part = found[row : row + array.shape[0]]
            array.get_basic_selection((slice(None), slice(start, stop)), out=NDBuffer.from_numpy_array(part))
            _without_nan(part, path)
            row += array.shape[0]
        return found


def read_array(path: Path, columns: Sequence[int] | npt.NDArray[np.intp] | None = None) -> npt.NDArray[np.generic]:
    """Return a stored matrix, or some of its columns.

    Raises
    ------
    StorageError
        When the shard is missing, or a chunk of it: floats then read as NaN, which is never stored.
    """
    array = _opened(path)
    if columns is None:
        return _without_nan(np.asarray(array[:]), path)
    return _without_nan(np.asarray(array.oindex[:, np.asarray(columns, dtype=np.intp)]), path)


def _opened(path: Path) -> zarr.Array:
    array = zarr.open_array(store=str(path), mode="r", zarr_format=3)
    if array.size and not (path / "c" / "0" / "0").is_file():
        raise _lacking(path)
    return array


def _without_nan(values: npt.NDArray[np.generic], path: Path) -> npt.NDArray[np.generic]:
    if _has_nan(values):
        raise _lacking(path)
    return values


def _has_nan(values: npt.NDArray[np.generic]) -> bool:
    """Return whether a NaN is among floats: it makes their sum NaN (as both infinities do), looked at first."""
    if values.dtype != np.float32:
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isnan(values.sum())) and bool(np.isnan(values).any())


def _lacking(path: Path) -> StorageError:
    return StorageError(f"Array {path} lacks a chunk; `covercal cache verify` names the damaged file.")
