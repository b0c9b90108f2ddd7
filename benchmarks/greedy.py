"""The greedy cover beside plain greedy and beside apricot-select's lazy greedy, and on a large matrix.

`python -m benchmarks.greedy [--large] [--output FILE]`

10,000 samples x 5,000 channels at budget 256. `--large` adds 100,000 x 50,000 with 1% ones at budget 1,024 in a process
of its own whose greatest resident memory is reported, the test data (bits and weights) included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.real_model import peak_memory, report
from covercal.coverage import PackedBits, greedy_cover

SAMPLES, CHANNELS, BUDGET, ROUNDS = 10_000, 5_000, 256, 5
LARGE_SAMPLES, LARGE_CHANNELS, LARGE_BUDGET, LARGE_SHARE = 100_000, 50_000, 1_024, 0.01
STRIP = 1_000


def heavy_tailed(generator: np.random.Generator) -> np.ndarray:
    """Return a matrix like the measured ones: most channels rare, some fired by nearly every sample."""
    share = generator.beta(0.3, 3.0, CHANNELS)
    return generator.random((SAMPLES, CHANNELS)) < share


def plain_greedy(coverage: np.ndarray, weights: np.ndarray, budget: int) -> list[int]:
    """Recompute every gain at every step; ends when nothing is left to gain."""
    uncovered = weights.astype(np.float32)
    matrix = coverage.astype(np.float32)
    order: list[int] = []
    for _ in range(budget):
        gains = matrix @ uncovered
        gains[order] = -1
        order.append(int(gains.argmax()))
        uncovered[coverage[order[-1]]] = 0
    return order


def apricot_seconds(coverage: np.ndarray, budget: int) -> float:
    """Time apricot-select's lazy MaxCoverage (every channel weighs the same), compiled beforehand."""
    from apricot import MaxCoverageSelection

    def select(matrix: np.ndarray, count: int) -> float:
        chooser = MaxCoverageSelection(count, threshold=1.0, optimizer="lazy", verbose=False)
        started = time.perf_counter()
        chooser.fit(matrix)
        return time.perf_counter() - started

    select(coverage[:100].astype(np.float64), 4)
    return select(coverage.astype(np.float64), budget)


def large() -> dict[str, Any]:
    """Make the large matrix strip by strip, choose from it, and return seconds and memory."""
    generator = np.random.default_rng(0)
    bits = np.empty((LARGE_SAMPLES, -(-LARGE_CHANNELS // 8)), dtype=np.uint8)
    for start in range(0, LARGE_SAMPLES, STRIP):
        strip = generator.random((STRIP, LARGE_CHANNELS), dtype=np.float32) < LARGE_SHARE
        bits[start : start + STRIP] = np.packbits(strip, axis=1)
    weights = generator.gamma(1.0, 1.0, LARGE_CHANNELS)
    started = time.perf_counter()
    cover = greedy_cover(PackedBits(bits, LARGE_CHANNELS), weights, LARGE_BUDGET)
    seconds = time.perf_counter() - started
    memory = peak_memory()
    return {"seconds": round(seconds, 2), "resident_bytes": memory, "rounds": int(cover.rounds[-1]) + 1}


def compared(generator: np.random.Generator, apricot: bool) -> tuple[list[list[Any]], dict[str, Any]]:
    rows, value = [], {}
    weights = generator.gamma(1.0, 1.0, CHANNELS)
    for name, coverage in (
        ("1% ones", generator.random((SAMPLES, CHANNELS)) < 0.01),
        ("10% ones", generator.random((SAMPLES, CHANNELS)) < 0.1),
        ("heavy-tailed", heavy_tailed(generator)),
        ("50% ones", generator.random((SAMPLES, CHANNELS)) < 0.5),
    ):
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            cover = greedy_cover(coverage, weights, BUDGET)
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        plain_greedy(coverage, weights, BUDGET)
        plain = time.perf_counter() - started
        lazy = apricot_seconds(coverage, BUDGET) if apricot else float("nan")
        mine = median(times)
        row = [name, f"{mine:.3f}", f"{plain:.2f}", f"{plain / mine:.0f} x", f"{lazy:.1f}", f"{lazy / mine:.0f} x"]
        rows.append([*row, cover.rounds[-1] + 1])
        value[name] = {
            "seconds": [round(t, 4) for t in times],
            "plain_seconds": round(plain, 3),
            "apricot_seconds": round(lazy, 3) if apricot else None,
        }
    return rows, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no-apricot", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-large", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.only_large:
        sys.stdout.write(json.dumps(large()) + "\n")
        return
    rows, value = compared(np.random.default_rng(0), not wanted.no_apricot)
    if wanted.large:
        command = [sys.executable, "-m", "benchmarks.greedy", "--only-large"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        value["large"] = found
        memory = f"{found['resident_bytes'] / 1e9:.2f} GB"
        size = f"{LARGE_SAMPLES:,} x {LARGE_CHANNELS:,}, budget {LARGE_BUDGET:,}, {memory}"
        rows.append([size, f"{found['seconds']:.1f}", "", "", "", "", found["rounds"]])
    title = f"greedy cover, {SAMPLES:,} x {CHANNELS:,}, budget {BUDGET}"
    columns = ["matrix", "greedy_cover, s", "plain greedy (BLAS), s", "faster", "apricot lazy, s", "faster", "rounds"]
    report(title, columns, rows, value, wanted.output)


if __name__ == "__main__":
    main()
