"""The demonstration from nothing, beside the forward passes it cannot do without; then the same with another budget.

`python -m benchmarks.chain [--method covercal] [--budget 48] [--output FILE]`

The command runs as a user runs it, a temporary Prefect server and the report included, in an empty cache; what it
downloads is there already. The limit is the time of the forward passes alone: the pool once, every calibration set
once (twice where the original runs beside), the evaluation text once for each model with its head, and the sequences
on which linears are compared, once for each of two models. How fast a pass is, is measured before the run and after it.
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
import torch

from benchmarks.capture import real_sequences
from benchmarks.real_model import real_model_folder, report
from covercal.decoder import Decoder, batches, final_hidden, load_decoder, token_tensor
from covercal.evaluation import Tokens
from covercal.recipe import Recipe, load_recipe
from tasks.cached import open_store

COMMAND = [sys.executable, "-m", "flows.cli", "run"]
MEASURED_TOKENS = 8192
BATCH_TOKENS = 1024
EVALUATED_MODELS = 4  # original, nearest, random, run


@torch.inference_mode()
def pass_seconds(decoder: Decoder, sequences: list[Tokens], *, head: bool) -> float:
    """Return the seconds a token takes."""
    started = time.perf_counter()
    for members in batches(sequences, BATCH_TOKENS):
        tokens = token_tensor([sequences[m] for m in members], decoder.device)
        hidden = final_hidden(decoder, tokens)
        if head:
            decoder.model.get_output_embeddings()(hidden)
    return (time.perf_counter() - started) / sum(map(len, sequences))


def wanted_tokens(recipe: Recipe) -> dict[str, int]:
    """Return the tokens of every kind of pass, without head and with it."""
    (text,) = recipe.evaluation.divergence
    length, calibrated = recipe.pool.lengths[0], recipe.quantization.calibrated
    sets = (1 + recipe.evaluation.random) * calibrated
    streams = 2 if recipe.quantization.target.kind != "weights" else 1
    evaluated = text.window * int(text.limit or 0)
    return {
        "pool": recipe.pool.samples * length,
        "calibration": sets * streams * recipe.selection.budget * length,
        "linears": 2 * recipe.evaluation.layers * text.window,
        "evaluation": EVALUATED_MODELS * evaluated,
    }


def run(recipe: Path, cache: Path) -> dict[str, Any]:
    """Run the command; returns its seconds, and those of every stage."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"COVERCAL_CACHE": str(cache), "PREFECT_HOME": str(cache / "prefect"), "COVERCAL_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [*COMMAND, str(recipe), "--json"], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    stages = json.loads(done.stdout)["stages"]
    return {
        "seconds": seconds,
        "stages": [{name: s[name] for name in ("stage", "decision", "seconds")} for s in stages],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="covercal")
    parser.add_argument("--budget", type=int, default=48, help="of the second run")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    decoder = load_decoder(real_model_folder(), "float32", torch.device("cpu"))
    some = real_sequences(real_model_folder(), MEASURED_TOKENS)
    pass_seconds(decoder, some[:4], head=True)
    speeds = [[pass_seconds(decoder, some, head=head) for head in (False, True)]]
    with tempfile.TemporaryDirectory(prefix="covercal-chain-") as name:
        cache, demo = Path(name), open_store().root / "demo"
        shutil.copytree(demo, cache / "demo")
        recipe = cache / "demo" / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8").replace("method: covercal", f"method: {given.method}")
        recipe.write_text(text, encoding="utf-8")
        tokens = wanted_tokens(load_recipe(recipe))
        cold = run(recipe, cache)
        speeds.append([pass_seconds(decoder, some, head=head) for head in (False, True)])
        recipe.write_text(text.replace("budget: 32", f"budget: {given.budget}"), encoding="utf-8")
        again = run(recipe, cache)
    plain, with_head = (float(each) for each in np.mean(speeds, axis=0))
    limits = {what: count * (with_head if what == "evaluation" else plain) for what, count in tokens.items()}
    show(given.method, given.budget, limits, cold, again, given.output)


def show(
    method: str,
    budget: int,
    limits: dict[str, float],
    cold: dict[str, Any],
    again: dict[str, Any],
    output: Path | None,
) -> None:
    limit = sum(limits.values())
    rows = [[f"passes: {what}", f"{seconds:.1f} s", ""] for what, seconds in limits.items()]
    rows += [["all passes: the limit", f"{limit:.1f} s", ""]]
    rows += [["cold, 32 samples", f"{cold['seconds']:.1f} s", f"{cold['seconds'] / limit:.2f} x the limit"]]
    early = ("statistics", "outliers", "selection", "pool")
    for title, found in (("cold", cold), (f"again with {budget} samples", again)):
        for stage in found["stages"]:
            if stage["seconds"] >= 0.5 or (found is again and stage["stage"].split()[0] in early):
                rows.append([f"{title}: {stage['stage']}", f"{stage['seconds']:.2f} s", stage["decision"]])
    rows.append([f"again with {budget} samples", f"{again['seconds']:.1f} s", f"{again['seconds'] / limit:.2f} x"])
    choosing = sum(s["seconds"] for s in again["stages"] if s["stage"].split()[0] in early)
    rows.append(["· pool, statistics, outliers and selection", f"{choosing:.2f} s", "to reach: 1 s"])
    value = {"method": method, "limits": limits, "limit": limit, "cold": cold, "again": again, "choosing": choosing}
    report(f"The demonstration with {method}", ["", "time", ""], rows, value, output)


if __name__ == "__main__":
    main()
