"""GPTQ of one linear, from the same weight and Gram matrix, beside llm-compressor's and GPTQModel's own functions.

`python -m benchmarks.solver [--shapes 4096x4096 11008x4096 4096x11008] [--rounds 3] [--threads 2] [--output FILE]`

Four bits, groups of 128, asymmetric, 1% damping, activation order with static groups. Weights are random; the Gram
matrix is that of correlated inputs whose channels differ in size by a factor of 100 and more. The sides take turns,
each in a process of its own; the loss is tr(E H E^T) in float64, E what rounding changes. The first of a process's two
runs is not counted.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.environments import SCRIPTS, ask, interpreter
from benchmarks.real_model import in_a_process, report

PEERS = ("llmcompressor", "gptqmodel")
OWN = "covercal"
TOKENS, FACTORS, BITS, GROUP = 8192, 256, 4, 128


def write_inputs(path: Path, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gram = torch.zeros(columns, columns)
    loadings = torch.randn(FACTORS, columns, generator=generator) / FACTORS**0.5
    size = torch.randn(columns, generator=generator).exp()
    for _ in range(TOKENS // 1024):
        x = torch.randn(1024, FACTORS, generator=generator) @ loadings
        x += torch.randn(1024, columns, generator=generator)
        x *= size
        gram += x.T @ x
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    save_file({"weight": weight, "gram": (gram + gram.T) / (2 * TOKENS)}, path)


def own(job: dict[str, Any]) -> None:
    """Do as the scripts in `benchmarks/peers` do, with this project's solver."""
    sys.path.insert(0, str(SCRIPTS))
    from linear import run

    from covercal.gram import SiteStatistics
    from covercal.quantization_settings import Quantization
    from covercal.quantizers.solver import solve_site

    settings = Quantization(method="gptq", bits=job["bits"], group_size=job["group_size"])

    def prepared(weight: Tensor, gram: Tensor) -> Any:
        def quantise() -> Tensor:
            (found,) = solve_site([weight], SiteStatistics(gram=gram), settings, torch.float32).weights
            groups = found.codes.reshape(*found.scale.shape, -1) - found.zero.float()[..., None]
            return groups.mul_(found.scale[..., None]).reshape(found.codes.shape)

        return quantise

    run(job, prepared)


def round_of(side: str, job: dict[str, Any], pythons: dict[str, Path]) -> list[float]:
    if side != OWN:
        return list(ask(pythons[side], f"linear_{side}.py", job)["seconds"][1:])
    return list(in_a_process("solver", "--own", json.dumps(job))["seconds"][1:])


def loss(inputs: Path, output: Path) -> float:
    given, found = load_file(inputs), load_file(output)["weight"]
    error, gram, total = (given["weight"] - found).double(), given["gram"].double(), 0.0
    for some in error.split(512):
        total += float(((some @ gram) * some).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--own", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own:
        own(json.loads(given.own))
        return
    pythons = {peer: interpreter(peer, Console(stderr=True)) for peer in PEERS}
    value: dict[str, Any] = {}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in given.shapes:
            inputs = folder / f"{shape}.safetensors"
            write_inputs(inputs, *map(int, shape.split("x")))
            times: dict[str, list[float]] = {side: [] for side in (OWN, *PEERS)}
            losses = {}
            for _ in range(given.rounds):
                for side, found in times.items():
                    output = folder / f"{side}.safetensors"
                    job = {"input": str(inputs), "output": str(output), "bits": BITS, "group_size": GROUP}
                    found += round_of(side, {**job, "threads": given.threads, "rounds": 2}, pythons)
                    losses[side] = loss(inputs, output)
            value[shape] = {side: {"seconds": times[side], "loss": losses[side]} for side in times}
            fastest = min(median(times[peer]) for peer in PEERS)
            for side, found in times.items():
                spread = f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"
                ratio = f"{median(found) / fastest:.2f}" if side == OWN else ""
                lines.append([shape, side, spread, ratio, f"{losses[side] / losses[OWN]:.6f}"])
            inputs.unlink()
    columns = ["weight", "", "median (least to most)", "of the fastest peer", "loss / covercal's"]
    title = f"GPTQ of one linear, W{BITS} g{GROUP}, {given.threads} threads"
    report(title, columns, lines, {"threads": given.threads, "shapes": value}, given.output)


if __name__ == "__main__":
    main()
