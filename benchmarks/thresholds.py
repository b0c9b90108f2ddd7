"""Thresholds, outlier channels and coverage matrix from statistics on disk, beside reading those statistics once.

`python -m benchmarks.thresholds [--rounds 3] [--samples 10000] [--sites 32] [--width 4096] [--folder FOLDER]
[--output FILE]`

Each measurement is a process of its own, after the kernel was asked to forget the files. Bytes are what the process
read (`rchar` of /proc/self/io), memory is its greatest resident size. Seconds are medians, with the least and the most
of the rounds; a ratio is that to the reading of the same round.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_model import peak_memory, report
from storage.arrays import write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref, Request
from storage.tables import write_table
from tasks.capture import CHANNELS, PEAK

SHARD = 500
TOKENS = 2048
RULES = {"sigma": 6.0, "mad": 12.0, "quantile": 0.999}
BUFFER = 1 << 24


def write_shard(folder: Path, number: int, samples: int, sites: int, width: int) -> None:
    """Write peaks such as those of a model: heavy-tailed, each channel with a scale of its own."""
    generator = np.random.default_rng(number)
    scale = np.random.default_rng(10**6).lognormal(0, 0.5, sites * width).astype(np.float32)
    peak = generator.standard_exponential((samples, sites * width), dtype=np.float32)
    peak *= scale
    write_array(folder / PEAK, peak)
    mean = scale * np.float32(0.1)
    columns = {
        "position": np.arange(sites * width, dtype=np.int32),
        "site": np.repeat(np.arange(sites, dtype=np.int32), width),
        "block": np.repeat(np.arange(sites, dtype=np.int32), width),
        "channel": np.tile(np.arange(width, dtype=np.int32), sites),
        "linears": np.full(sites * width, "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
        "absolute_sum": (mean * samples * TOKENS).astype(np.float64),
        "square_sum": (2 * mean.astype(np.float64) ** 2 * samples * TOKENS),
        "tokens": np.full(sites * width, samples * TOKENS, dtype=np.int64),
        "peak": peak.max(axis=0),
        "column_norm": scale,
    }
    write_table(folder / CHANNELS, columns)


def make_statistics(store: ArtifactStore, samples: int, sites: int, width: int) -> list[Ref]:
    """Build the statistics that are not there yet."""
    found = []
    for start in range(0, samples, SHARD):
        count = min(SHARD, samples - start)
        wanted = Request("statistics", 1, {"start": start, "count": count, "sites": sites, "width": width})
        number = start // SHARD
        build = lambda folder, n=number, c=count: write_shard(folder, n, c, sites, width)  # noqa: E731
        found.append(store.build_once(wanted, build).ref)
    return found


def forget(files: list[Path]) -> None:
    """Ask the kernel to drop the files from its cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_of(store: ArtifactStore, refs: list[Ref]) -> list[Path]:
    return [path for ref in refs for path in sorted(store.path(ref).rglob("*")) if path.is_file()]


def measured(what: str, root: Path, refs: list[Ref]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    shutil.rmtree(root / "objects" / "outliers", ignore_errors=True)  # of the round before
    forget(files_of(ArtifactStore(root), refs))
    text = json.dumps([[ref.stage, ref.key, ref.digest] for ref in refs])
    command = [sys.executable, "-m", "benchmarks.thresholds", "--measure", what, "--folder", str(root)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(what: str, root: Path) -> None:
    """Do it: read all files once, or make thresholds by a rule; print what that took."""
    refs = tuple(Ref(*each) for each in json.load(sys.stdin))
    store = ArtifactStore(root)
    found: dict[str, Any] = {}
    if what == "reading":
        started, before = time.perf_counter(), bytes_read()
        for path in files_of(store, list(refs)):
            with path.open("rb", buffering=0) as stream:
                buffer = bytearray(BUFFER)
                while stream.readinto(buffer):
                    pass
    else:
        from flows.execution import Direct, Recorder
        from tasks.thresholds import find_outliers

        rule, weighting = what, "full"
        inputs = {"statistics": refs, "rule": rule, "k": RULES[rule], "weighting": weighting}
        started, before = time.perf_counter(), bytes_read()
        direct = Direct(store, Recorder())
        ref = direct.run("outliers", find_outliers, **inputs, lowered=(), lowered_k=None)
        found = {"outliers": store.manifest(ref).info["outliers"]}
    found |= {
        "seconds": round(time.perf_counter() - started, 3),
        "bytes_read": bytes_read() - before,
        "resident_bytes": peak_memory(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def bytes_read() -> int:
    """Return how much this process has read so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sites", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.measure:
        measure(wanted.measure, wanted.folder)
        return
    with tempfile.TemporaryDirectory(prefix="covercal-thresholds-", dir=wanted.folder) as folder:
        store = ArtifactStore(Path(folder))
        refs = make_statistics(store, wanted.samples, wanted.sites, wanted.width)
        size = sum(path.stat().st_size for path in files_of(store, refs))
        turns = [
            {what: measured(what, Path(folder), refs) for what in ("reading", *RULES)} for _ in range(wanted.rounds)
        ]
    rows = []
    for name, last in turns[-1].items():
        ratios = [turn[name]["seconds"] / turn["reading"]["seconds"] for turn in turns]
        rows.append(
            [
                name,
                spread([turn[name]["seconds"] for turn in turns], 1),
                spread(ratios, 2),
                f"{last['bytes_read'] / size:.3f} x",
                f"{last['resident_bytes'] / 1e9:.2f} GB",
                last.get("outliers", ""),
            ]
        )
    title = f"{wanted.samples:,} samples x {wanted.sites * wanted.width:,} channels, {size / 1e9:.1f} GB of statistics"
    columns = ["what", "s", "of reading once", "bytes read", "memory", "outlier channels"]
    report(title, columns, rows, {"bytes": size, "rounds": turns}, wanted.output)


def spread(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
