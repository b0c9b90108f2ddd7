"""Whole models: GPTQ and AWQ of SmolLM2-135M beside llm-compressor, GPTQModel and auto-round.

`python -m benchmarks.whole POOL.jsonl.gz [--sides NAME ...] [--rounds 3] [--slow-rounds 1] [--output FILE]`

The same 64 random samples of 256 tokens for all sides, other ones in every round, 4 bits, groups of 64, asymmetric, and
where a method has them 1% damping and activation order with static groups. The sides take turns, each round in a
process of its own; seconds are those of quantising a loaded model in memory, nothing written. What each side's weights
stand for is then scored by one evaluation: KL(original || quantised) and perplexity over 18 held-out sequences of 512
tokens, three of each of six domains. Peers whose round takes minutes have `--slow-rounds`, and are compared over those.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.environments import ask, interpreter
from benchmarks.paper_tables import prepared
from benchmarks.real_model import in_a_process, peak_memory, real_model_folder, report
from covercal.decoder import load_decoder
from covercal.evaluation import Tokens, mean_and_error, perplexity, reference_outputs, score
from covercal.quantization_settings import Quantization
from covercal.recipe import Recipe, parse_recipe, with_fields
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.judging import text_samples
from storage.artifacts import ArtifactStore
from tasks.cached import open_store
from tasks.identities import TokenizerIdentity
from tasks.pool import sample_columns, sample_tokens
from tasks.select import chosen_samples

SAMPLES, BITS, GROUP = 64, 4, 64
STORED = "float16"  # scales and all that is not quantised, as in most of the peers' checkpoints


Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to quantise: a method of a peer, or our own settings; `slow` sides run less often."""

    name: str
    peer: str
    method: str
    slow: bool = False


SIDES = (
    Side("covercal: gptq", "", "gptq"),
    Side("llm-compressor: GPTQ", "llmcompressor", "gptq"),
    Side("GPTQModel: GPTQ", "gptqmodel", "gptq", slow=True),
    Side("covercal: awq", "", "awq"),
    Side("llm-compressor: AWQ", "llmcompressor", "awq", slow=True),
    Side("auto-round: AWQ", "autoround", "awq", slow=True),
    Side("covercal: rtn", "", "rtn"),
    Side("auto-round: 0 iterations", "autoround", "autoround-0"),
    Side("auto-round: 0 iterations, searched ranges", "autoround", "autoround-0-neuqi"),
    Side("covercal: covercal", "", "covercal"),
    Side("auto-round: 200 iterations", "autoround", "autoround", slow=True),
)


def quantise_here(job: dict[str, Any]) -> None:
    """Do as the scripts in `benchmarks/peers` do, with this project's own methods."""
    from covercal.quantization import dequantized, quantize_blocks

    torch.set_num_threads(job["threads"])
    decoder = load_decoder(Path(job["model"]), "float32", torch.device("cpu"))
    settings = Quantization(method=job["method"], bits=job["bits"], group_size=job["group_size"])
    sequences = list(np.load(job["tokens"]))
    started = time.perf_counter()
    blocks = list(quantize_blocks(decoder, sequences, settings, STORED))
    seconds, peak = time.perf_counter() - started, peak_memory()
    dense = {name: value.clone() for name, value in decoder.model.state_dict().items() if name != "lm_head.weight"}
    for block in blocks:
        dense |= {name: value.clone() for name, value in block.others.items()}
        dense |= {f"{each.name}.weight": dequantized(each, torch.float32) for each in block.linears}
    save_file(dense, job["output"])
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak}) + "\n")


def run_side(side: Side, job: dict[str, Any], pythons: dict[str, Path]) -> dict[str, Any]:
    if side.peer:
        return ask(pythons[side.peer], f"in_{side.peer}.py", job)
    return dict(in_a_process("whole", "--here", json.dumps(job)))


class Judge:
    """Scores weights that a side wrote.

    Parameters
    ----------
    sequences, domains
        The held-out text.
    folder
        Of the original model.
    """

    def __init__(self, sequences: Sequence[Tokens], domains: Sequence[str], folder: Path) -> None:
        self._sequences, self._domains, self._folder = sequences, domains, folder
        self._original = load_decoder(folder, "float32", torch.device("cpu"))
        self._reference = reference_outputs(self._original, sequences, keep_hidden=True)

    def scores(self, weights: Path) -> Scores:
        """Return KL and perplexity over all sequences (`all`), and by domain."""
        quantised = load_decoder(self._folder, "float32", torch.device("cpu"))
        missing, unknown = quantised.model.load_state_dict(load_file(weights), strict=False)
        if unknown or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"{weights} holds {unknown} and lacks {missing}")
        found = score(quantised, self._original, self._sequences, self._reference.hidden)
        groups = {"all": found}
        for name in sorted(set(self._domains)):
            groups[name] = [each for each, domain in zip(found, self._domains, strict=True) if domain == name]
        return {
            name: {"kl": mean_and_error([s.divergence for s in some])[0], "perplexity": perplexity(some)}
            for name, some in groups.items()
        }


def inputs_of(start: Recipe, store: ArtifactStore, rounds: int) -> tuple[list[npt.NDArray[np.int32]], Judge]:
    """Return the calibration tokens (samples, length) of every round, and the judge."""
    tokens = []
    for seed in range(rounds):
        fields = {"selection.selector": "random", "selection.budget": SAMPLES, "selection.seed": seed}
        recipe = parse_recipe(with_fields(start, fields), Path("/"))
        inputs, execution = identify(recipe, store), Direct(store, Recorder())
        chain = run_chain(recipe, inputs, execution, until="selection")
        pool, chosen = sample_tokens(store, chain.pool), chosen_samples(store, chain.selection, SAMPLES)
        tokens.append(np.stack([pool[sample] for sample in chosen]).astype(np.int32))
    (text,) = text_samples(recipe, inputs, execution, TokenizerIdentity(inputs.model), chain.imported)
    domains = sample_columns(store, text, "domain")["domain"]
    return tokens, Judge(sample_tokens(store, text), domains, store.path(chain.imported))


def mean_score(found: Sequence[Scores], domain: str, measure: str) -> float:
    return float(np.mean([each[domain][measure] for each in found]))


def line_of(side: Side, found: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a side's line of the table; `ours` is the side above it that it is compared with, round by round."""
    seconds, scores = found["seconds"], found["scores"]
    both = min(len(scores), len(ours["scores"]))
    compared = [
        (name, mean_score(ours["scores"][:both], name, "kl") / mean_score(scores[:both], name, "kl"))
        for name in scores[0]
    ]
    alone = found is ours
    return [
        side.name,
        f"{median(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f}; n = {len(seconds)})",
        "" if alone else f"{median(ours['seconds'][:both]) / median(seconds):.2f}",
        f"{mean_score(scores, 'all', 'kl'):.4f}",
        f"{mean_score(scores, 'all', 'perplexity'):.2f}",
        "" if alone else ", ".join(f"{name} {ratio:.2f}" for name, ratio in compared),
        f"{found['peak_bytes'] / 1e9:.1f} GB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path, nargs="?")
    parser.add_argument("--sides", nargs="+", help="names; all when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        quantise_here(json.loads(given.here))
        return
    if given.pool is None:
        parser.error("the pool of texts is missing, such as my-texts.jsonl.gz")
    if wrong := set(given.sides or ()) - {side.name for side in SIDES}:
        parser.error(f"there is no side {', '.join(sorted(wrong))}; there are {', '.join(side.name for side in SIDES)}")
    console, store = Console(stderr=True), open_store()
    sides = [side for side in SIDES if given.sides is None or side.name in given.sides]
    pythons = {side.peer: interpreter(side.peer, console) for side in sides if side.peer}
    start = prepared(given.pool, None, store, console)
    rounds = max(given.rounds, given.slow_rounds)
    tokens, judge = inputs_of(start, store, rounds)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {"model": real_model_folder(store), "tokens": folder / "tokens.npy", "output": folder / "dense.st"}
        for number in range(rounds):
            np.save(folder / "tokens.npy", tokens[number])
            for side in sides:
                if number >= (given.slow_rounds if side.slow else given.rounds):
                    continue
                job = {"method": side.method, "bits": BITS, "group_size": GROUP, "threads": given.threads}
                said = run_side(side, job | {key: str(path) for key, path in paths.items()}, pythons)
                mine = found.setdefault(side.name, said | {"seconds": [], "scores": []})
                mine["seconds"].append(said["seconds"])
                mine["scores"].append(judge.scores(paths["output"]))
                words = f"  {side.name}: {said['seconds']:.1f} s, KL {mine['scores'][-1]['all']['kl']:.4f}"
                console.print(words, highlight=False, markup=False)
                if given.output is not None:
                    given.output.write_text(json.dumps({"sides": found}), encoding="utf-8")
    show(sides, found, given.output)


def show(sides: Sequence[Side], found: dict[str, dict[str, Any]], output: Path | None) -> None:
    """Print the table: each peer beside our side above it."""
    lines, ours = [], None
    for side in sides:
        if not side.peer:
            ours = found[side.name]
        lines.append(line_of(side, found[side.name], ours or found[side.name]))
    columns = [
        "",
        "median (least to most)",
        "covercal / it",
        "KL",
        "perplexity",
        "covercal's KL / its KL, by domain",
    ]
    title = f"SmolLM2-135M, W{BITS} g{GROUP}, {SAMPLES} samples x 256 tokens"
    report(title, [*columns, "peak memory"], lines, {"sides": found}, output)


if __name__ == "__main__":
    main()
