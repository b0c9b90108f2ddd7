"""The numbers of `docs/results.md`: SmolLM2-135M at 3 and 4 bits, and coverage against random choice.

`python -m benchmarks.smollm2 POOL.jsonl.gz [--samples 256] [--output FILE]`

POOL has the fields `text` and `domain`. Texts are split by their hash: one in ten is held out for the evaluation, so no
text is both in the pool and in the evaluation. Domains named `noise` stay in the pool as decoys and are not evaluated.
"""

import argparse
import gzip
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_model import real_model_folder, report
from covercal.coverage import covered_channels, expected_random_coverage, greedy_cover
from covercal.recipe import Recipe, parse_recipe
from flows.chain import Chain, run_chain
from flows.execution import Direct, Event, Recorder
from flows.inputs import identify
from flows.summary import summarize
from storage.artifacts import ArtifactStore
from storage.durable import build_lock, write_durably
from tasks.cached import open_store
from tasks.thresholds import coverage_matrix

BUDGETS = (8, 16, 32, 64, 128)
RANDOM_SEEDS = 20
HELD_OUT_EVERY = 10


def split(pool: Path, folder: Path) -> None:
    """Write `pool.jsonl` and `heldout.jsonl`; equal files stay as they are, for other processes may read them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"pool": [], "heldout": []}
    with gzip.open(pool, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            held = int(hashlib.sha256(row["text"].strip().encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0
            if held and row["domain"] == "noise":
                continue
            kept = {name: row[name] for name in ("text", "domain")}
            parts["heldout" if held else "pool"].append(json.dumps(kept, ensure_ascii=False))
    with build_lock(folder / "split.lock"):  # another process may read the files by now
        for name, lines in parts.items():
            path, data = folder / f"{name}.jsonl", ("\n".join(lines) + "\n").encode()
            if not path.is_file() or path.read_bytes() != data:
                write_durably(path, data)


def recipe(
    folder: Path,
    model: Path,
    samples: int,
    bits: int,
    selector: str = "coverage",
    seed: int = 0,
    shrinkage: float = 0.0,
) -> Recipe:
    value: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32"},
        "pool": {"sources": [{"path": "pool.jsonl", "domain": "domain"}], "sequence_length": 256, "samples": samples},
        "selection": {"selector": selector, "budget": 32, "seed": seed},
        "quantization": {"method": "gptq", "bits": bits, "group_size": 64, "shrinkage": shrinkage},
        "evaluation": {"divergence": [{"path": "heldout.jsonl", "domain": "domain", "window": 512, "limit": 30}]},
    }
    return parse_recipe(value, folder)


def run(wanted: Recipe, store: ArtifactStore) -> tuple[Chain, dict[str, Any], float]:
    def say(event: Event) -> None:
        print(f"  {event.label} {event.decision} {event.seconds:.1f} s ({event.reason})", flush=True)

    started = time.monotonic()
    chain = run_chain(wanted, identify(wanted, store), Direct(store, Recorder(on_event=say)))
    return chain, summarize(wanted, chain, store), time.monotonic() - started


def quality(summary: dict[str, Any]) -> dict[str, Any]:
    text = summary["evaluation"][0]
    return {name: text[name] for name in ("original", "nearest", "run")} | {"sizes": summary["quantization"]}


def selection_rows(chain: Chain, store: ArtifactStore) -> list[dict[str, Any]]:
    coverage, weights = coverage_matrix(store, chain.outliers)
    order = greedy_cover(coverage, weights, max(BUDGETS)).order
    rows = []
    for budget in BUDGETS:
        draws = [np.random.default_rng(seed).permutation(len(coverage))[:budget] for seed in range(RANDOM_SEEDS)]
        drawn = [float(weights[covered_channels(coverage, d)].sum() / weights.sum()) for d in draws]
        rows.append(
            {
                "budget": budget,
                "coverage": float(weights[covered_channels(coverage, order[:budget])].sum() / weights.sum()),
                "random_mean": float(np.mean(drawn)),
                "random_best": max(drawn),
                "random_expected": expected_random_coverage(coverage, weights, budget)[1],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--random-seeds", type=int, default=3, help="random calibration sets that are quantised too")
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    store = open_store()
    model = real_model_folder(store)
    folder = store.root / "benchmarks" / "smollm2"
    split(wanted.pool, folder)
    value: dict[str, Any] = {"samples": wanted.samples, "runs": {}}
    rows = []
    plans = [(3, "coverage", 0, 0.0), (4, "coverage", 0, 0.0), (4, "coverage", 0, 0.3)]
    plans += [(3, "random", seed, 0.0) for seed in range(wanted.random_seeds)]
    for bits, selector, seed, shrinkage in plans:
        name = f"w{bits} g64 {selector}@32" + (f" seed {seed}" if selector == "random" else "")
        name += f" shrinkage {shrinkage}" if shrinkage else ""
        chain, summary, seconds = run(recipe(folder, model, wanted.samples, bits, selector, seed, shrinkage), store)
        found = quality(summary)
        value["runs"][name] = found | {"seconds": round(seconds, 1), "selection": summary["selection"]}
        nearest, mine, original = (found[k]["all"] for k in ("nearest", "run", "original"))
        rows.append(
            [
                name,
                f"{nearest['divergence']:.4f}",
                f"{mine['divergence']:.4f} ± {mine['divergence_error']:.4f}",
                f"{mine['divergence'] / nearest['divergence']:.3f}",
                f"{mine['agreement']:.1%}",
                f"{original['perplexity']:.2f} / {nearest['perplexity']:.2f} / {mine['perplexity']:.2f}",
                f"{mine['perplexity'] / original['perplexity']:.3f}",
                f"{seconds:.0f}",
            ]
        )
    value["selection"] = selection_rows(chain, store)
    columns = ["run", "KL nearest", "KL run", "ratio", "agreement", "ppl original / nearest / run", "ppl ratio", "s"]
    report("SmolLM2-135M, dequantised Q4_1, held-out text", columns, rows, value, wanted.output)
    names = ["budget", "coverage", "random_mean", "random_best", "random_expected"]
    shares = [[r["budget"], *(f"{r[n]:.4f}" for n in names[1:])] for r in value["selection"]]
    report(f"weighted coverage; random: {RANDOM_SEEDS} seeds", names, shares, value, wanted.output)


if __name__ == "__main__":
    main()
