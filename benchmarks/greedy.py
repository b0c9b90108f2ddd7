"""The greedy cover: time for 10,000 samples x 5,000 channels at budget 256, beside plain greedy on the same matrix.

`python -m benchmarks.greedy [--output FILE]`
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.real_model import report
from covercal.coverage import greedy_cover

SAMPLES, CHANNELS, BUDGET, ROUNDS = 10_000, 5_000, 256, 5


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    rows, value = [], {}
    generator = np.random.default_rng(0)
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
        rows.append(
            [name, f"{median(times):.3f}", f"{plain:.2f}", f"{plain / median(times):.0f} x", cover.rounds[-1] + 1]
        )
        value[name] = {"seconds": [round(t, 4) for t in times], "plain_seconds": round(plain, 3)}
    title = f"greedy cover, {SAMPLES:,} x {CHANNELS:,}, budget {BUDGET}"
    report(
        title, ["matrix", "greedy_cover, s", "plain greedy (BLAS), s", "faster", "rounds"], rows, value, wanted.output
    )


if __name__ == "__main__":
    main()
