"""Parquet tables inside an artifact, and DuckDB queries over them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(path: Path, columns: Mapping[str, Any] | pa.Table) -> None:
    """Write a Parquet file; the same columns give the same bytes."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    pq.write_table(table, path, compression="zstd")


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file, or some of its columns."""
    return pq.read_table(path, columns=list(columns) if columns is not None else None)


def query(sql: str, tables: Mapping[str, Sequence[Path]], parameters: Sequence[Any] = ()) -> pa.Table:
    """Return the result of one SQL query over Parquet files.

    Parameters
    ----------
    sql
        The query; each name in `tables` is a view over the union of its files.
    tables
        Parquet files by view name.
    parameters
        Values of the query's `?`.

    Notes
    -----
    In memory (a `.duckdb` file admits one writer and then no reader) and on one thread: a parallel sum of
    floats depends on the order in which threads finish, and the same input must give the same bytes.
    """
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        for name, files in tables.items():
            connection.read_parquet([_literal(f) for f in files]).create_view(name)
        return connection.sql(sql, params=list(parameters)).to_arrow_table()


def _literal(path: Path) -> str:
    """Return a path with the characters quoted that DuckDB reads as a pattern."""
    return "".join(f"[{c}]" if c in "*?[{" else c for c in str(path))
