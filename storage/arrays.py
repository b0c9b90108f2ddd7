"""Zarr arrays inside an artifact: whole shards written at once, no missing chunk ever read as numbers."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import SEEK_END, FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr

from storage.errors import StorageError

CHUNK_COLUMNS = 8192
SHARD = Path("c", "0", "0")
CHECKSUM_BYTES = 4  # at the end of a shard


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
        self._stored = [_Stored(path) for path in paths]
        widths = {stored.width for stored in self._stored}
        if len(widths) > 1:
            raise StorageError(f"Arrays {paths[0]} … have different widths: {sorted(widths)}.")
        self.rows = sum(stored.rows for stored in self._stored)
        self.width = widths.pop() if widths else 0
        self._chunk = max((stored.chunk for stored in self._stored), default=1)
        self._start = 0
        self._kept: npt.NDArray[np.generic] | None = None
        self._memory: list[npt.NDArray[np.uint8]] = []

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

    def parts(self, bounds: Iterable[tuple[int, int]]) -> Iterator[npt.NDArray[np.generic]]:
        """Yield the columns between each pair of bounds, the next being read while one is worked on.

        What was yielded holds until the one after it is asked for: its memory is used again, since having the system
        make pages anew takes longer than reading.
        """
        self._start, self._kept = 0, None
        self._memory = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        try:
            with ThreadPoolExecutor(1, "read-ahead") as reader:
                waiting: Future[npt.NDArray[np.generic]] | None = None
                for start, stop in bounds:
                    following = reader.submit(self.read, start, stop)
                    if waiting is not None:
                        yield waiting.result()
                    waiting = following
                if waiting is not None:
                    yield waiting.result()
        finally:  # what is read from now on has memory of its own, however this ended
            self._start, self._kept, self._memory = 0, None, []

    def _chunks(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        found = self._made((self.rows, stop - start), np.result_type(*(stored.dtype for stored in self._stored)))
        row = 0
        for stored in self._stored:
            stored.read_into(found[row : row + stored.rows], start)
            row += stored.rows
        return found

    def _made(self, shape: tuple[int, int], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """Return a new matrix; in the memory of the one before the last while parts are read."""
        if not self._memory:
            return np.empty(shape, dtype)
        size = shape[0] * shape[1] * dtype.itemsize
        self._memory.reverse()
        if self._memory[0].size < size:
            self._memory[0] = np.empty(size, np.uint8)
        return self._memory[0][:size].view(dtype).reshape(shape)


class _Stored:
    """One stored matrix, of which whole chunks are read straight into place.

    Zarr makes a copy of each and wakes two threads, which takes four times as long as reading. The file is one shard:
    the bytes of every chunk, filled up to its whole width, then where each begins and how many they are, then a sum.
    """

    def __init__(self, path: Path) -> None:
        array = _opened(path)
        self.path, self.dtype = path, array.dtype
        self.rows, self.width = array.shape
        self.chunk = array.chunks[1]
        if array.shards is None or array.compressors or array.filters or array.chunks[0] != max(self.rows, 1):
            raise StorageError(f"Array {path} is no single shard of plain chunks of all rows, as this store writes.")
        self._places = self._found_places() if array.size else []

    def read_into(self, part: npt.NDArray[np.generic], start: int) -> None:
        """Fill (rows, columns) with the columns from `start`, where a chunk begins, to where one ends."""
        if not part.size:
            return
        with _opened_file(self.path) as file:
            for first in range(start, start + part.shape[1], self.chunk):
                columns = part[:, first - start : first - start + self.chunk]
                whole = columns.flags.c_contiguous and columns.shape[1] == self.chunk
                into = columns if whole else np.empty((self.rows, self.chunk), self.dtype)
                file.seek(self._places[first // self.chunk])
                self._fill(file, into)
                if not whole:
                    columns[...] = into[:, : columns.shape[1]]
        _without_nan(part, self.path)

    def _fill(self, file: FileIO, values: npt.NDArray[np.generic]) -> None:
        left = values.reshape(-1).view(np.uint8).data
        while left:
            count = file.readinto(left)
            if not count:
                raise _lacking(self.path)
            left = left[count:]

    def _found_places(self) -> list[int]:
        """Return where in the file each chunk begins."""
        index = np.empty((-(-self.width // self.chunk), 2), dtype="<u8")
        with _opened_file(self.path) as file:
            end = file.seek(0, SEEK_END) - index.nbytes - CHECKSUM_BYTES
            if end < 0:
                raise _lacking(self.path)
            file.seek(end)
            self._fill(file, index)
        size = self.rows * self.chunk * self.dtype.itemsize
        if (index[:, 1] != size).any() or (index[:, 0] > end - size).any():  # both are 2**64 - 1 for a missing one
            raise _lacking(self.path)
        return [int(place) for place in index[:, 0]]


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
    if array.size and not (path / SHARD).is_file():
        raise _lacking(path)
    return array


def _opened_file(path: Path) -> FileIO:
    """Return the shard's file, of which the system reads far ahead: half the time a chunk from a disk."""
    try:
        file = FileIO(path / SHARD)
    except FileNotFoundError:
        raise _lacking(path) from None
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


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
