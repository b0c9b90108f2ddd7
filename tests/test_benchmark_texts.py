"""The texts that several benchmark processes share."""

import gzip
import json
from pathlib import Path

from benchmarks.smollm2 import split


def _pool(path: Path, count: int) -> Path:
    rows = [{"text": f"text number {number}", "domain": "web"} for number in range(count)]
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows))
    return path


def _texts(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.jsonl")}


def test_a_second_split_leaves_equal_files_alone_and_replaces_others(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    pool = _pool(tmp_path / "pool.jsonl.gz", 100)
    split(pool, folder)
    before = _written(folder)
    split(pool, folder)
    assert _written(folder) == before
    kept = _texts(folder, "pool.jsonl")
    split(_pool(tmp_path / "pool.jsonl.gz", 200), folder)
    assert len(_texts(folder, "pool.jsonl")) > len(kept)


def test_every_text_is_in_the_pool_or_held_out(tmp_path: Path) -> None:
    split(_pool(tmp_path / "pool.jsonl.gz", 100), tmp_path)
    pool, held_out = _texts(tmp_path, "pool.jsonl"), _texts(tmp_path, "heldout.jsonl")
    assert held_out
    assert sorted(pool + held_out) == sorted(f"text number {number}" for number in range(100))
