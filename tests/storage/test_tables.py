"""Tables are reproducible files, and SQL over them agrees with NumPy in float64."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.tables import query, read_table, write_table


def measurements(seed: int, rows: int = 500) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"channel": rng.integers(0, 7, rows), "peak": rng.lognormal(0, 3, rows)}


@pytest.fixture
def shards(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Three Parquet files and the columns they hold together."""
    parts = [measurements(seed) for seed in range(3)]
    paths = [tmp_path / f"{index}.parquet" for index in range(3)]
    for path, part in zip(paths, parts, strict=True):
        write_table(path, part)
    return paths, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_table_comes_back(tmp_path: Path) -> None:
    columns = {"sample": [0, 1], "text": ["", "é\n"], "tokens": [[1, 2, 3], []], "score": [0.1, None]}
    write_table(tmp_path / "t.parquet", columns)
    assert read_table(tmp_path / "t.parquet").to_pydict() == columns


def test_an_empty_table_keeps_its_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", {"sample": pa.array([], pa.int64())})
    assert read_table(tmp_path / "t.parquet").to_pydict() == {"sample": []}


def test_only_the_wanted_columns_are_read(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", {"a": [1], "b": [2], "c": [3]})
    assert read_table(tmp_path / "t.parquet", ["c", "a"]).to_pydict() == {"c": [3], "a": [1]}


def test_the_same_columns_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(tmp_path / name, measurements(0))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_mapping_and_an_arrow_table_give_the_same_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "one", measurements(0))
    write_table(tmp_path / "two", pa.table(measurements(0)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_values_give_other_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "one", {"a": [1, 2]})
    write_table(tmp_path / "two", {"a": [1, 3]})
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_a_view_is_the_union_of_its_files_in_their_order(shards: tuple[list[Path], dict[str, np.ndarray]]) -> None:
    paths, columns = shards
    found = query("SELECT channel, peak FROM shards", {"shards": paths})
    np.testing.assert_array_equal(found["channel"].to_numpy(), columns["channel"])
    np.testing.assert_array_equal(found["peak"].to_numpy(), columns["peak"])


@pytest.mark.parametrize("name", ["[ab]", "x*", "?", "{a,b}"])
def test_a_path_is_a_name_and_never_a_pattern(tmp_path: Path, name: str) -> None:
    for each, value in ((name, "mine"), ("a", "other"), ("xy", "other")):
        (tmp_path / each).mkdir()
        write_table(tmp_path / each / "t.parquet", {"whose": [value]})
    found = query("SELECT whose FROM t", {"t": [tmp_path / name / "t.parquet"]})
    assert found.to_pydict() == {"whose": ["mine"]}


def test_files_are_joined_by_the_names_of_their_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "one", {"a": [1], "b": [2]})
    write_table(tmp_path / "two", {"b": [4], "a": [3]})
    found = query("SELECT a, b FROM t", {"t": [tmp_path / "one", tmp_path / "two"]})
    assert found.to_pydict() == {"a": [1, 3], "b": [2, 4]}


def test_parameters_take_the_place_of_question_marks_in_their_order(
    shards: tuple[list[Path], dict[str, np.ndarray]],
) -> None:
    paths, columns = shards
    found = query("SELECT peak FROM s WHERE channel = ? AND peak > ? ORDER BY peak", {"s": paths}, [3, 0.5])
    wanted = np.sort(columns["peak"][(columns["channel"] == 3) & (columns["peak"] > 0.5)])
    np.testing.assert_array_equal(found["peak"].to_numpy(), wanted)


def test_a_parameter_is_a_value_and_never_sql(tmp_path: Path) -> None:
    hostile = "x' OR 1=1 --"
    write_table(tmp_path / "t", {"domain": ["code", hostile]})
    assert query("SELECT * FROM t WHERE domain = ?", {"t": [tmp_path / "t"]}, [hostile]).to_pydict() == {
        "domain": [hostile]
    }


@pytest.mark.parametrize(
    ("sql", "formula"),
    [
        ("avg(peak)", np.mean),
        ("stddev_pop(peak)", np.std),
        ("max(peak)", np.max),
        ("sum(peak * peak)", lambda x: np.sum(x * x)),
        ("quantile_cont(peak, 0.999)", lambda x: np.quantile(x, 0.999)),
    ],
    ids=["mean", "deviation", "max", "squares", "quantile"],
)
def test_an_aggregate_over_several_files_equals_numpy_in_float64(
    shards: tuple[list[Path], dict[str, np.ndarray]], sql: str, formula: object
) -> None:
    paths, columns = shards
    found = query(f"SELECT channel, {sql} AS value FROM s GROUP BY channel ORDER BY channel", {"s": paths})
    wanted = [formula(columns["peak"][columns["channel"] == each]) for each in range(7)]
    np.testing.assert_allclose(found["value"].to_numpy(), wanted, rtol=1e-12)


def test_two_views_can_be_joined(tmp_path: Path) -> None:
    write_table(tmp_path / "peaks", {"channel": [0, 1, 2], "peak": [5.0, 6.0, 7.0]})
    write_table(tmp_path / "limits", {"channel": [2, 0], "limit": [9.0, 4.0]})
    found = query(
        'SELECT channel FROM peaks JOIN limits USING (channel) WHERE peak > "limit"',
        {"peaks": [tmp_path / "peaks"], "limits": [tmp_path / "limits"]},
    )
    assert found.to_pydict() == {"channel": [0]}


def test_the_same_query_gives_the_same_bits(shards: tuple[list[Path], dict[str, np.ndarray]]) -> None:
    paths, _ = shards
    sql = "SELECT channel, sum(peak) AS total, avg(peak) AS mean FROM s GROUP BY channel ORDER BY channel"
    first, *others = (query(sql, {"s": paths}) for _ in range(5))
    assert all(each.equals(first) for each in others)


def test_a_query_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "t", {"a": [1]})
    query("SELECT a FROM t", {"t": [tmp_path / "t"]})
    assert [each.name for each in tmp_path.iterdir()] == ["t"]


def test_a_view_of_one_query_is_gone_in_the_next(tmp_path: Path) -> None:
    write_table(tmp_path / "t", {"a": [1]})
    query("SELECT a FROM t", {"t": [tmp_path / "t"]})
    with pytest.raises(Exception, match="Table with name t does not exist"):
        query("SELECT a FROM t", {})
