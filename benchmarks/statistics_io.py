"""Statistics written and read back for thresholds, beside a raw NumPy memory map of the same bytes.

`python -m benchmarks.statistics_io [--samples 4000] [--sites 32] [--width 4096] [--rounds 3] [--folder FOLDER]
[--output FILE]`

Peaks (samples, channels) in shards of 500 samples. Written: each shard as an array of the store, and as a memory map,
both flushed to the disk. Read: site by site over all shards as thresholds do, the kernel's cache dropped before. Both
read every number once and take the greatest. The sides take turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.real_model import report
from benchmarks.thresholds import SHARD, forget
from storage.arrays import Columns, write_array
from storage.durable import fsync_path


def timed(work: Callable[[], Any]) -> float:
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


def write_store(path: Path, shard: np.ndarray) -> None:
    write_array(path, shard)
    for each in files(path):
        fsync_path(each)


def write_map(path: Path, shard: np.ndarray) -> None:
    target = np.memmap(path, dtype=np.float32, mode="w+", shape=shard.shape)
    target[:] = shard
    target.flush()
    fsync_path(path)


def read_store(paths: list[Path], width: int, sites: int) -> float:
    columns = Columns(paths)
    return max(float(columns.read(site * width, (site + 1) * width).max()) for site in range(sites))


def read_map(paths: list[Path], width: int, sites: int) -> float:
    maps = [np.memmap(path, dtype=np.float32, mode="r").reshape(-1, width * sites) for path in paths]
    return max(
        float(np.concatenate([m[:, site * width : (site + 1) * width] for m in maps]).max()) for site in range(sites)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--sites", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    shape = (SHARD, wanted.sites * wanted.width)
    shard = np.random.default_rng(0).standard_exponential(shape, dtype=np.float32)
    count = wanted.samples // SHARD
    size = count * shard.nbytes
    writers = {"store": write_store, "map": write_map}
    readers = {"store": read_store, "map": read_map}
    times: dict[str, list[float]] = {}
    for _ in range(wanted.rounds):
        with tempfile.TemporaryDirectory(prefix="covercal-io-", dir=wanted.folder) as name:
            paths = {side: [Path(name) / f"{side}-{number}" for number in range(count)] for side in writers}
            for side, write in writers.items():
                seconds = sum(timed(lambda p=path, w=write: w(p, shard)) for path in paths[side])
                times.setdefault(f"write, {side}", []).append(seconds)
            for side, read in readers.items():
                forget([each for path in paths[side] for each in files(path)])
                seconds = timed(lambda p=paths[side], r=read: r(p, wanted.width, wanted.sites))
                times.setdefault(f"read, {side}", []).append(seconds)
    rows = []
    for what in ("write", "read"):
        store, plain = median(times[f"{what}, store"]), median(times[f"{what}, map"])
        speeds = [f"{size / median(times[f'{what}, {side}']) / 1e6:.0f} MB/s" for side in ("store", "map")]
        rows.append([what, *speeds, f"{plain / store:.2f}", "0.6"])
    title = f"{wanted.samples:,} samples x {shape[1]:,} channels, {size / 1e9:.1f} GB"
    columns = ["", "store", "memory map", "of its throughput", "to reach"]
    report(title, columns, rows, {"bytes": size, "seconds": times}, wanted.output)


if __name__ == "__main__":
    main()
