"""Quantise again at other bits, from the cached Gram matrices, beside the sequential quantisation of the same model.

`python -m benchmarks.requantise [--rounds 3] [--output FILE]`

SmolLM2-135M, groups of 64. The pool's Gram matrices (128 sequences of 256 tokens) are summed beforehand; how long that
takes is told. From them a model is quantised block by block, in one process on both cores and in two with a core each:
by plain GPTQ, and by `cached`. Beside each is the same rounding behind the quantised prefix, on 64 of the sequences:
`gptq`, and `covercal`. All sides take turns, each in a process of its own that does not count loading the libraries.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.real_model import in_a_process, real_model_folder, report
from storage.artifacts import ArtifactStore
from tasks.cached import open_store

PAIRS: dict[str, dict[str, Any]] = {  # what is computed behind the prefix, and the same rounding from the cache
    "gptq": {"method": "gptq", "gram": "pool"},
    "covercal": {"method": "cached"},
}
SEQUENCES, CALIBRATED, LENGTH, BITS, GROUP = 128, 64, 256, 3, 64


def recipe(store: ArtifactStore) -> Any:
    from covercal.recipe import parse_recipe

    value = {
        "model": {"source": str(store.root / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"), "dtype": "float32"},
        "pool": {
            "sources": [{"path": "pool.jsonl", "domain": "domain"}],
            "sequence_length": LENGTH,
            "samples": SEQUENCES,
        },
        "selection": {"selector": "random", "budget": CALIBRATED},
        "quantization": {"method": "cached", "bits": BITS, "group_size": GROUP},
    }
    return parse_recipe(value, store.root / "demo")


def gram_inputs(store: ArtifactStore) -> tuple[Any, float]:
    """Run `cached` once, which sums the pool's Gram matrices; returns them, and the seconds that summing took."""
    from flows.chain import run_chain
    from flows.execution import Direct, Recorder
    from flows.inputs import identify
    from storage.manifest import Ref

    wanted, recorder = recipe(store), Recorder()
    run_chain(wanted, identify(wanted, store), Direct(store, recorder))
    event = next(event for event in recorder.events if event.stage == "gram")
    manifest = store.look_up(event.stage, event.key).manifest
    if manifest is None:
        raise RuntimeError("the Gram matrices that were just summed are gone")
    found: Ref = manifest.ref
    return found, manifest.seconds


def quantise(job: dict[str, Any]) -> None:
    """Quantise some blocks by `cached`, or the whole model behind its prefix; print the seconds."""
    import numpy as np
    import torch

    from covercal.decoder import load_decoder
    from covercal.quantization import quantize_blocks, quantize_one_block
    from covercal.quantization_settings import Quantization
    from storage.manifest import Ref
    from tasks.gram import CachedPool

    torch.set_num_threads(job["threads"])
    store = open_store()
    settings = Quantization(bits=BITS, group_size=GROUP, **job["settings"])
    decoder = load_decoder(Path(job["model"]), "float32", torch.device("cpu"), streamed=not settings.calibrated)
    if not settings.calibrated:
        pool = CachedPool(store, Ref(*job["gram"]), None, (), settings, torch.device("cpu"))
        started = time.perf_counter()
        for index in range(job["first"], len(decoder.blocks), job["step"]):
            quantize_one_block(decoder, index, settings, "bfloat16", pool)
    else:
        sequences = list(np.load(job["tokens"]))
        started = time.perf_counter()
        for _ in quantize_blocks(decoder, sequences, settings, "bfloat16"):
            pass
    sys.stdout.write(json.dumps(time.perf_counter() - started) + "\n")


def child(job: dict[str, Any]) -> float:
    return float(in_a_process("requantise", "--job", json.dumps(job), OMP_NUM_THREADS=str(job["threads"])))


def note(times: dict[str, list[float]], name: str, seconds: float) -> None:
    times.setdefault(name, []).append(seconds)
    sys.stderr.write(f"  {name}: {seconds:.1f} s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        quantise(json.loads(given.job))
        return
    import numpy as np

    from benchmarks.capture import real_sequences

    store = open_store()
    folder = real_model_folder(store)
    gram, summed_in = gram_inputs(store)
    tokens = store.root / "benchmarks" / "requantise.npy"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    np.save(tokens, np.stack(real_sequences(folder, CALIBRATED * LENGTH)))
    base = {"model": str(folder), "tokens": str(tokens), "gram": [gram.stage, gram.key, gram.digest]}
    times: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for rival, settings in PAIRS.items():
            note(times, rival, child(base | {"settings": {"method": rival}, "threads": 2}))
            job = base | {"settings": settings, "threads": 2, "first": 0, "step": 1}
            note(times, f"{rival} from the cache, one worker on two cores", child(job))
            halves = [job | {"threads": 1, "first": first, "step": 2} for first in (0, 1)]
            with ThreadPoolExecutor(2) as both:
                note(times, f"{rival} from the cache, two workers", max(both.map(child, halves)))
    rows = []
    for name, found in times.items():
        ratio = median(found) / median(times[name.split()[0]])
        rows.append([name, f"{median(found):.1f} s ({min(found):.1f} to {max(found):.1f})", f"{ratio:.2f}"])
    title = f"SmolLM2-135M, W{BITS} g{GROUP}; its Gram matrices were summed in {summed_in:.0f} s"
    value = {"seconds": times, "gram_seconds": summed_in}
    report(title, ["", "median (least to most)", "of the sequential"], rows, value, given.output)


if __name__ == "__main__":
    main()
