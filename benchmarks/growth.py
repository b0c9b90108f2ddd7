"""How time and memory grow: with samples, with channels, with blocks.

`python -m benchmarks.growth [--only samples channels blocks] [--output FILE]`

* samples: pool, activation statistics, thresholds and choice for 128 to 2,048 sequences of 64 tokens, through the
  store, on a small random model.
* channels: thresholds, coverage matrix and choice for 98,304 to 983,040 channels of synthetic statistics, 256 samples.
* blocks: quantising a checkpoint of 2 to 32 blocks by `covercal`, streamed, 16 sequences of 256 tokens.

Each measurement is a process of its own. Growth is the exponent of a power law through the smallest and the largest
size, fixed costs (imports, loading) taken off by measuring the work alone: 1 is a straight line.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.memory import quantise, write_checkpoint
from benchmarks.real_model import in_a_process, peak_memory, report
from benchmarks.thresholds import make_statistics
from storage.artifacts import ArtifactStore

SIZES = {"samples": (128, 512, 2048), "channels": (24, 80, 240), "blocks": (2, 8, 32)}
WIDTH, SAMPLES, BUDGET = 4096, 256, 64
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
CALIBRATED_TOKENS = 4096


def grow_samples(count: int, folder: Path) -> float:
    from covercal.recipe import parse_recipe
    from flows.chain import run_chain
    from flows.execution import Direct, Recorder
    from flows.inputs import identify
    from tests import tiny

    model = tiny.save_model(folder / "model")
    documents = [json.dumps({"text": tiny.text(seed, "animals", 400)}) for seed in range(1 + 40 * count // 128)]
    (folder / "pool.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
    value = {
        "model": {"source": str(model), "dtype": "float32"},
        "pool": {"sources": [{"path": "pool.jsonl"}], "sequence_length": 64, "samples": count},
        "statistics": {"shard_samples": 128},
        "selection": {"selector": "coverage", "budget": BUDGET},
    }
    recipe = parse_recipe(value, folder)
    store = ArtifactStore(folder / "cache").prepare()
    started = time.perf_counter()
    run_chain(recipe, identify(recipe, store), Direct(store, Recorder()), until="selection")
    return time.perf_counter() - started


def grow_channels(sites: int, folder: Path) -> float:
    from covercal.coverage import greedy_cover
    from flows.execution import Direct, Recorder
    from tasks.thresholds import coverage_matrix, find_outliers

    store = ArtifactStore(folder)
    refs = tuple(make_statistics(store, SAMPLES, sites, WIDTH))
    direct = Direct(store, Recorder())
    started = time.perf_counter()
    inputs = {"statistics": refs, "rule": "sigma", "k": 6.0, "weighting": "full"}
    outliers = direct.run("outliers", find_outliers, **inputs, lowered=(), lowered_k=None)
    greedy_cover(*coverage_matrix(store, outliers), BUDGET)
    return time.perf_counter() - started


def grow_blocks(blocks: int, folder: Path) -> float:
    write_checkpoint(folder, blocks, SHAPE)
    return quantise(folder, blocks, CALIBRATED_TOKENS, "float32", "covercal")["seconds"] * blocks


WORK: dict[str, Callable[[int, Path], float]] = {
    "samples": grow_samples,
    "channels": grow_channels,
    "blocks": grow_blocks,
}


def measured(what: str, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="covercal-growth-") as folder:
        return dict(in_a_process("growth", "--measure", what, str(size), folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(SIZES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        what, size, folder = given.measure
        seconds = WORK[what](int(size), Path(folder))
        sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak_memory()}) + "\n")
        return
    value: dict[str, Any] = {}
    rows = []
    for what in given.only:
        value[what] = {size: measured(what, size) for size in SIZES[what]}
        found = value[what]
        small, large = (found[size] for size in (SIZES[what][0], SIZES[what][-1]))
        ratio = SIZES[what][-1] / SIZES[what][0]
        exponent = math.log(large["seconds"] / small["seconds"]) / math.log(ratio)
        for size, each in found.items():
            count = size * WIDTH if what == "channels" else size
            rows.append([what, f"{count:,}", f"{each['seconds']:.2f} s", f"{each['peak_bytes'] / 1e9:.2f} GB", ""])
        rows[-1][-1] = f"{exponent:.2f}"
    report("Growth", ["", "size", "time", "peak memory", "exponent of time"], rows, value, given.output)


if __name__ == "__main__":
    main()
