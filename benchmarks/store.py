"""What the store costs: deciding a hit of 500 files, and committing beside writing the same files.

`python -m benchmarks.store [--folder FOLDER] [--rounds 7] [--output FILE]`
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.real_model import report
from storage.artifacts import ArtifactStore
from storage.durable import fsync_path
from storage.manifest import Request

FILES = 500
SIZES = {"500 x 20 kB": (500, 20_000), "500 x 400 kB": (500, 400_000), "30 x 8 MB": (30, 8_000_000)}


def write_files(folder: Path, count: int, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = os.urandom(size)
    for index in range(count):
        (folder / f"{index:05d}").write_bytes(data)


def flush_files(folder: Path) -> None:
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def hit_seconds(folder: Path, rounds: int) -> list[float]:
    """Time the decision of a hit, with nothing of the store in memory but its folder's entries in the kernel's."""
    root = folder / "hits"
    wanted = Request("statistics", 1, {"files": FILES})
    ArtifactStore(root).build_once(wanted, lambda staged: write_files(staged, FILES, 100))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        ArtifactStore(root).build_once(wanted, lambda _: 1 / 0)
        times.append(time.perf_counter() - started)
    shutil.rmtree(root)
    return times


def commit_seconds(folder: Path, count: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Time, in turns, writing and flushing files by themselves, and the same files as a committed artifact."""
    times: dict[str, list[float]] = {"plain": [], "artifact": []}
    for number in range(rounds):
        os.sync()
        started = time.perf_counter()
        write_files(folder / "plain", count, size)
        flush_files(folder / "plain")
        times["plain"].append(time.perf_counter() - started)
        shutil.rmtree(folder / "plain")
        os.sync()
        store = ArtifactStore(folder / "store").prepare()
        started = time.perf_counter()
        store.build_once(Request("statistics", 1, {"n": number}), lambda staged: write_files(staged, count, size))
        times["artifact"].append(time.perf_counter() - started)
        shutil.rmtree(folder / "store")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the temporary folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.folder) as name:
        folder = Path(name)
        hits = hit_seconds(folder, 5 * wanted.rounds)
        rows: list[list[Any]] = [
            ["hit, 500 files", "", f"{median(hits) * 1000:.1f} ms", f"{max(hits) * 1000:.1f} ms at most"]
        ]
        value: dict[str, Any] = {"hit_seconds": [round(t, 5) for t in hits]}
        for title, (count, size) in SIZES.items():
            times = commit_seconds(folder, count, size, wanted.rounds)
            plain, artifact = median(times["plain"]), median(times["artifact"])
            ratios = sorted(a / p for a, p in zip(times["artifact"], times["plain"], strict=True))
            rows.append([title, f"{plain:.3f} s", f"{artifact:.3f} s", f"{artifact / plain:.2f} x"])
            value[title] = {name: [round(t, 4) for t in each] for name, each in times.items()} | {
                "ratios": [round(r, 3) for r in ratios]
            }
    columns = ["", "written and flushed, one by one", "as an artifact", "ratio of medians"]
    report("the store's cost", columns, rows, value, wanted.output)


if __name__ == "__main__":
    main()
