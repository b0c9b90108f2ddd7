"""Arrays come back bit for bit, and what is missing is never read as numbers."""

import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import storage.arrays
from storage.arrays import CHUNK_COLUMNS, Columns, read_array, write_array
from storage.errors import StorageError

WIDE = 2 * CHUNK_COLUMNS + 5


def numbers(rows: int, columns: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).integers(1, 100, (rows, columns)).astype(dtype)


def shards(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file() and each.name != "zarr.json"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A stored array that spans three chunks, and its values."""
    path, values = tmp_path_factory.mktemp("wide") / "array", numbers(3, WIDE)
    write_array(path, values)
    return path, values


@given(
    values=npst.arrays(
        np.float32, npst.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(width=32, allow_nan=False)
    )
)
def test_a_float32_matrix_comes_back_bit_for_bit(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("floats") / "array"
    write_array(path, values)
    assert read_array(path).tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("extreme", ["min", "max"])
def test_an_integer_matrix_comes_back(tmp_path: Path, dtype: str, extreme: str) -> None:
    values = np.full((2, 3), getattr(np.iinfo(dtype), extreme), dtype)
    write_array(tmp_path / "array", values)
    found = read_array(tmp_path / "array")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("columns", [0, 1, CHUNK_COLUMNS - 1, CHUNK_COLUMNS, CHUNK_COLUMNS + 1, WIDE])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_every_shape_comes_back(tmp_path: Path, rows: int, columns: int) -> None:
    values = numbers(rows, columns)
    write_array(tmp_path / "array", values)
    found = read_array(tmp_path / "array")
    assert found.shape == values.shape
    np.testing.assert_array_equal(found, values)


def test_a_matrix_in_column_order_comes_back(tmp_path: Path) -> None:
    values = np.asfortranarray(numbers(4, 7))
    write_array(tmp_path / "array", values)
    np.testing.assert_array_equal(read_array(tmp_path / "array"), values)


def test_zeros_come_back_as_zeros(tmp_path: Path) -> None:
    write_array(tmp_path / "array", np.zeros((3, 5), np.float32))
    np.testing.assert_array_equal(read_array(tmp_path / "array"), np.zeros((3, 5)))


@pytest.mark.parametrize("columns", [1, CHUNK_COLUMNS, WIDE])
def test_an_array_is_one_shard_file(tmp_path: Path, columns: int) -> None:
    write_array(tmp_path / "array", numbers(3, columns))
    assert len(shards(tmp_path / "array")) == 1


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_zeros_are_one_shard_file_too(tmp_path: Path, dtype: str) -> None:
    write_array(tmp_path / "array", np.zeros((3, CHUNK_COLUMNS + 1), dtype))
    assert len(shards(tmp_path / "array")) == 1


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_array(tmp_path / name, numbers(3, WIDE))
    one, two = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


@given(columns=st.lists(st.integers(0, WIDE - 1), max_size=12))
def test_some_columns_equal_those_of_the_whole(wide: tuple[Path, np.ndarray], columns: list[int]) -> None:
    path, values = wide
    np.testing.assert_array_equal(read_array(path, columns), values[:, np.asarray(columns, dtype=int)])


def test_a_column_that_is_not_there_is_an_error(wide: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(IndexError):
        read_array(wide[0], [WIDE])


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f8", ">f2", "complex64", "complex128", "U3", "bool"])
def test_every_type_but_float32_and_integers_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="float32 or integer"):
        write_array(tmp_path / "array", np.zeros((2, 2), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_what_is_not_a_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        write_array(tmp_path / "array", np.ones(shape, np.float32))


def test_a_single_nan_is_refused(tmp_path: Path) -> None:
    values = numbers(3, 5)
    values[2, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        write_array(tmp_path / "array", values)


def test_a_refused_array_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        write_array(tmp_path / "array", np.full((2, 2), np.nan, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    values = numbers(3, 5)
    write_array(tmp_path / "array", values)
    with pytest.raises(ValueError, match="exists"):
        write_array(tmp_path / "array", values + 1)
    np.testing.assert_array_equal(read_array(tmp_path / "array"), values)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int32"])
@pytest.mark.parametrize("columns", [None, [0, 3]], ids=["whole", "columns"])
def test_a_deleted_chunk_file_is_an_error_and_not_zeros(tmp_path: Path, dtype: str, columns: list[int] | None) -> None:
    write_array(tmp_path / "array", numbers(3, 5, dtype))
    shards(tmp_path / "array")[0].unlink()
    with pytest.raises(StorageError, match=r"array lacks a chunk"):
        read_array(tmp_path / "array", columns)


@pytest.mark.parametrize("lost", [1, 4, 16, 40])
def test_a_chunk_file_cut_short_is_an_error(tmp_path: Path, lost: int) -> None:
    write_array(tmp_path / "array", numbers(3, 5))
    shard = shards(tmp_path / "array")[0]
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises((ValueError, StorageError)):
        read_array(tmp_path / "array")


# --- several arrays by columns -------------------------------------------------------------------------------------


def written(folder: Path, heights: list[int], width: int, dtype: str = "float32") -> tuple[list[Path], np.ndarray]:
    """Write arrays of these heights; return where they lie, and all their rows."""
    values = np.random.default_rng(width).integers(1, 10**6, (sum(heights), width)).astype(dtype)
    paths = [folder / str(index) for index in range(len(heights))]
    for path, part in zip(paths, np.split(values, np.cumsum(heights)[:-1]), strict=True):
        write_array(path, part)
    return paths, values


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], np.ndarray]:
    """Three stored arrays of 4, 1 and 7 rows and 23 columns in chunks of 5, and all their rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("storage.arrays.CHUNK_COLUMNS", 5)
        return written(tmp_path_factory.mktemp("unequal"), [4, 1, 7], 23)


@given(ends=st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted))
def test_a_range_of_columns_holds_the_rows_of_all_arrays(
    unequal: tuple[list[Path], np.ndarray], ends: list[int]
) -> None:
    paths, values = unequal
    found = Columns(paths).read(*ends)
    np.testing.assert_array_equal(found, values[:, slice(*ends)], strict=True)


@given(reads=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted), max_size=6))
def test_what_was_read_before_does_not_matter(unequal: tuple[list[Path], np.ndarray], reads: list[list[int]]) -> None:
    together = Columns(unequal[0])
    for start, stop in reads:
        np.testing.assert_array_equal(together.read(start, stop), unequal[1][:, start:stop], strict=True)


@pytest.mark.parametrize("widths", [[23], [1] * 23, [3, 4, 4, 5, 7], [6, 6, 6, 5], [2, 13, 8]])
def test_from_left_to_right_every_chunk_is_read_once(
    unequal: tuple[list[Path], np.ndarray], widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, read = Columns(unequal[0]), []
    plain = storage.arrays._Stored.read_into

    def counting(self: storage.arrays._Stored, part: np.ndarray, start: int) -> None:
        read.append((str(self.path), start, start + part.shape[1]))
        plain(self, part, start)

    monkeypatch.setattr("storage.arrays._Stored.read_into", counting)
    start = 0
    for width in widths:
        together.read(start, start + width)
        start += width
    assert {name for name, _, _ in read} == {str(path) for path in unequal[0]}
    for path in {name for name, _, _ in read}:
        mine = sorted((a, b) for name, a, b in read if name == path)
        assert [a for a, _ in mine] == [0, *(b for _, b in mine[:-1])]  # end to end, none twice
        assert all(a % 5 == 0 for a, _ in mine)
        assert mine[-1][1] == 23


def test_what_was_read_cannot_be_changed(unequal: tuple[list[Path], np.ndarray]) -> None:
    together = Columns(unequal[0])
    for start, stop in ((0, 2), (3, 8), (20, 22)):  # a chunk, one kept and one more, one further on
        with pytest.raises(ValueError, match="read-only"):
            together.read(start, stop)[0, 0] = 1


def test_the_arrays_of_that_fixture_have_several_chunks(unequal: tuple[list[Path], np.ndarray]) -> None:
    assert {zarr.open_array(path).chunks[1] for path in unequal[0]} == {5}


@pytest.mark.parametrize("step", [1000, CHUNK_COLUMNS, CHUNK_COLUMNS + 1, WIDE])
def test_columns_next_to_each_other_make_up_the_whole(tmp_path: Path, step: int) -> None:
    paths, values = written(tmp_path, [2, 3], WIDE)
    together = Columns(paths)
    parts = [together.read(start, min(start + step, WIDE)) for start in range(0, WIDE, step)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), values)


def test_several_arrays_have_the_rows_of_all_and_the_width_of_each(unequal: tuple[list[Path], np.ndarray]) -> None:
    together = Columns(unequal[0])
    assert (together.rows, together.width) == (12, 23)


def test_no_array_has_no_rows_and_no_columns() -> None:
    none = Columns([])
    assert (none.rows, none.width) == (0, 0)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_several_arrays_keep_their_type(tmp_path: Path, dtype: str) -> None:
    paths, values = written(tmp_path, [2, 1], 9, dtype)
    np.testing.assert_array_equal(Columns(paths).read(3, 8), values[:, 3:8], strict=True)


def test_another_order_of_arrays_is_another_order_of_rows(unequal: tuple[list[Path], np.ndarray]) -> None:
    paths, values = unequal
    turned = np.concatenate([values[5:], values[4:5], values[:4]])
    np.testing.assert_array_equal(Columns(paths[::-1]).read(4, 16), turned[:, 4:16])


def test_arrays_of_different_widths_are_refused(tmp_path: Path) -> None:
    for width in (4, 5):
        write_array(tmp_path / str(width), numbers(2, width))
    with pytest.raises(StorageError, match=r"different widths: \[4, 5\]"):
        Columns([tmp_path / "4", tmp_path / "5"])


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("lost", [0, 1])
def test_an_array_without_its_shard_is_refused_by_its_path(tmp_path: Path, dtype: str, lost: int) -> None:
    paths, _ = written(tmp_path, [2, 2], 5, dtype)
    shards(paths[lost])[0].unlink()
    with pytest.raises(StorageError, match=rf"Array {paths[lost]} lacks a chunk"):
        Columns(paths)


def test_a_chunk_that_is_gone_is_an_error_when_its_columns_are_read(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, [2, 2], 5)
    together = Columns(paths)
    shards(paths[1])[0].unlink()  # behind its back: the fill value is NaN, which is never stored
    with pytest.raises(StorageError, match=rf"Array {paths[1]} lacks a chunk"):
        together.read(1, 3)


@pytest.mark.parametrize("lost", [1, 4, 16, 40])
def test_a_shard_cut_short_is_refused_by_its_path(tmp_path: Path, lost: int) -> None:
    paths, _ = written(tmp_path, [2, 2], WIDE)
    shard = shards(paths[1])[0]
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(StorageError, match=rf"Array {paths[1]} lacks a chunk"):
        Columns(paths)


def test_an_array_that_zarr_left_a_chunk_out_of_is_refused(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path / "array"), shape=(2, 9), dtype="float32", chunks=(2, 5), shards=(2, 10), fill_value=float("nan"),
        compressors=None,
    )  # fmt: skip
    array[:, :5] = 1.0
    with pytest.raises(StorageError, match="lacks a chunk"):
        Columns([tmp_path / "array"])


def test_an_array_of_another_layout_is_refused(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "array"), shape=(4, 9), dtype="float32", chunks=(4, 5), shards=(4, 10))[:] = 1.0
    with pytest.raises(StorageError, match="no single shard of plain chunks"):
        Columns([tmp_path / "array"])


@given(bounds=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted), max_size=6))
def test_parts_are_the_columns_one_after_the_other(
    unequal: tuple[list[Path], np.ndarray], bounds: list[list[int]]
) -> None:
    together = Columns(unequal[0])
    for _ in range(2):
        found = [part.copy() for part in together.parts((start, stop) for start, stop in bounds)]
        assert len(found) == len(bounds)
        for part, (start, stop) in zip(found, bounds, strict=True):
            np.testing.assert_array_equal(part, unequal[1][:, start:stop], strict=True)
        for start, stop in bounds:
            np.testing.assert_array_equal(together.read(start, stop), unequal[1][:, start:stop], strict=True)


def test_a_part_holds_while_the_next_is_read(unequal: tuple[list[Path], np.ndarray]) -> None:
    for (start, stop), part in zip(
        [(0, 5), (5, 8), (8, 10), (10, 17), (17, 20), (20, 23)],
        Columns(unequal[0]).parts([(0, 5), (5, 8), (8, 10), (10, 17), (17, 20), (20, 23)]),
        strict=True,
    ):
        time.sleep(0.02)  # the next is there by now
        np.testing.assert_array_equal(part, unequal[1][:, start:stop], strict=True)


def test_an_error_while_reading_ahead_is_told(tmp_path: Path) -> None:
    paths, values = written(tmp_path, [2, 2], WIDE)
    parts = Columns(paths).parts([(0, 5), (CHUNK_COLUMNS, CHUNK_COLUMNS + 1), (2 * CHUNK_COLUMNS, WIDE)])
    np.testing.assert_array_equal(next(parts), values[:, :5])
    shards(paths[0])[0].unlink()
    with pytest.raises(StorageError, match="lacks a chunk"):
        list(parts)


def test_after_parts_that_were_left_early_what_is_read_keeps_its_values(
    unequal: tuple[list[Path], np.ndarray],
) -> None:
    paths, values = unequal
    together = Columns(paths)
    parts = together.parts([(0, 5), (5, 10), (10, 15)])
    next(parts)
    parts.close()
    found = [together.read(start, start + 5) for start in (0, 5, 10, 15)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), values[:, :20])
