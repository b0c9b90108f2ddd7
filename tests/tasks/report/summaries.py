"""Summaries as a run and a sweep hand them to the report: of a real model's size, with hostile words in them."""

import math
from typing import Any

import numpy as np

BLOCKS, BUDGET, SAMPLES = 30, 32, 512
SCRIPT = "<script>alert(1)</script>"
ENDING = '</script><img src=x onerror=alert(2)> $x_1$ & "quoted"'
ARABIC = "مرحبا بالعالم، هذا نص من اليمين إلى اليسار"
CHINESE = "你好，世界。这是一段中文文本。"
DOMAINS = ("code", "wiki", "chat", "maths", f"law {SCRIPT}", "عربي", "中文")
SELECTORS = (
    "coverage", "coverage_soft", "gram_matching", "facility_location", "k_center", "herding",
    "log_det", "max_variance", "stratified_domain", "zipcal", "perplexity", "longest",
)  # fmt: skip
KINDS = {
    "self_attn.q_proj": 576, "self_attn.k_proj": 576, "self_attn.v_proj": 576, "self_attn.o_proj": 576,
    "mlp.gate_proj": 576, "mlp.up_proj": 576, "mlp.down_proj": 1536,
}  # fmt: skip
SITES = (
    ("self_attn.q_proj, k_proj, v_proj", 576),
    ("self_attn.o_proj", 576),
    ("mlp.gate_proj, up_proj", 576),
    ("mlp.down_proj", 1536),
)
LOSSES = {"original": 2.811, "nearest": 3.402, "random": 3.041, "run": 2.984}
DIVERGENCES = {"nearest": 0.5127, "random": 0.2214, "run": 0.1732}


def run_summary(**changes: Any) -> dict[str, Any]:
    """Return the summary of a run of a 30-block model, with top-level fields replaced."""
    generator = np.random.default_rng(7)
    value = {
        "name": "smollm2-135m-instruct.q4_1 · covercal w3 g64 · coverage@32",
        "verdict": "The chosen 32 texts lower the divergence to the original by 66% against round to nearest and by "
        "22% against 32 random texts; both differences are larger than the noise of the held-out texts.",
        "command": "covercal run recipes/smollm2.yaml --set selection.budget=32 --set 'quantization.bits=3'",
        "finished": "2026-11-24T17:03:12+00:00",
        "seconds": 437.4,
        "versions": {"covercal": "0.1.0", "torch": "2.9.0", "transformers": "5.20.1", "python": "3.13.5"},
        "device": "cpu, 2 threads",
        "recipe": {
            "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16"},
            "pool": {"sources": [{"path": f"pool {ENDING}.jsonl.gz"}], "sequence_length": 256, "samples": SAMPLES},
            "selection": {"selector": "coverage", "budget": BUDGET},
            "quantization": {"method": "covercal", "bits": 3, "group_size": 64},
        },
        "stages": _stages(),
        "selection": _selection(generator),
        "outlier_map": {"sites": [_site(name, channels, generator) for name, channels in SITES]},
        "quantization": _quantization(),
        "models": [
            {"id": "original", "name": "original"},
            {"id": "nearest", "name": "round to nearest"},
            {"id": "random", "name": "32 random samples"},
            {"id": "run", "name": "this run"},
        ],
        "evaluation": [divergence_text(generator), perplexity_text()],
        "tasks": _tasks(),
        "layers": _layers(generator),
        "checkpoint": "/home/someone/.cache/covercal/objects/checkpoint/3f/3f9a2b71c0d4",
    }
    return {**value, **changes}


def _stages() -> list[dict[str, Any]]:
    rows = [
        ("pool", "hit", 0.0, 1, {"hit": 1}, 12.2),
        ("statistics", "built", 41.3, 8, {"built": 2, "hit": 6}, 164.0),
        ("outliers", "built", 0.8, 1, {"built": 1}, 0.8),
        ("selection", "built", 0.3, 1, {"built": 1}, 0.3),
        ("gram", "hit", 0.0, 1, {"hit": 1}, 382.0),
        ("checkpoint", "built", 248.6, 1, {"built": 1}, 248.6),
        ("evaluation", "rebuilt", 140.2, 3, {"rebuilt": 1, "built": 2}, 140.2),
    ]
    reasons = {"hit": "", "built": "selection changed", "rebuilt": f"scores.json has 12 bytes instead of 411 {SCRIPT}"}
    return [
        {
            "stage": stage,
            "key": f"{index:x}9c3e17ab04d{index:x}" * 4,
            "decision": decision,
            "reason": reasons[decision],
            "seconds": seconds,
            "artifacts": artifacts,
            "counts": counts,
            "made_in": made,
        }
        for index, (stage, decision, seconds, artifacts, counts, made) in enumerate(rows, start=3)
    ]


def _selection(generator: np.random.Generator) -> dict[str, Any]:
    budgets = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    samples = generator.permutation(SAMPLES)[:BUDGET].tolist()
    pool = dict(zip(DOMAINS, (120, 104, 96, 72, 58, 34, 28), strict=True))
    chosen = dict(zip(DOMAINS, (9, 3, 4, 6, 5, 3, 2), strict=True))
    return {
        "selector": "coverage",
        "budget": BUDGET,
        "samples": samples,
        "coverage": 0.8712,
        "weighted_coverage": 0.9127,
        "random_coverage": 0.7033,
        "random_weighted_coverage": 0.7881,
        "coverage_by_block": {str(b): 0.8 + 0.005 * b for b in range(BLOCKS)},
        "outlier_channels": 2411,
        "surrogate_bound": 12.3,
        "always_fired": 301,
        "jaccard": 0.311,
        "gram_distance": 0.127,
        "domains": chosen,
        "pool_domains": pool,
        "texts": [_text(rank, sample) for rank, sample in enumerate(samples)],
        "curves": {
            "budgets": budgets,
            "selectors": {name: _curve(budgets, 0.42 - 0.018 * i, 0.9127) for i, name in enumerate(SELECTORS)},
            "random": {
                part: [min(1.0, v + shift * (1 - v)) for v in _curve(budgets, 0.29, 0.7881)]
                for part, shift in (("mean", 0.0), ("low", -0.18), ("high", 0.18))
            },
        },
    }


def _curve(budgets: list[int], first: float, at_budget: float) -> list[float]:
    """Return a saturating curve from `first`, through about `at_budget` at 32 samples for the best, to 1 at the end."""
    speed = math.log((1 - first) / (1 - at_budget)) / math.log(BUDGET + 1)
    return [1.0 if b == SAMPLES else round(1 - (1 - first) * b ** (-speed * (0.6 + first)), 6) for b in budgets]


def _text(rank: int, sample: int) -> dict[str, Any]:
    domain = DOMAINS[rank % len(DOMAINS)]
    beginnings = {
        "code": f"def flatten(tree):\n    for leaf in tree:\n        yield from flatten(leaf)  # {ENDING}",
        "عربي": ARABIC + "\n" + ARABIC,
        "中文": CHINESE * 6,
        "wiki": f"The river rises in the hills north of the town {SCRIPT} and flows south for 143 km.",
    }
    body = beginnings.get(domain, f"Text number {rank} of the domain, about penguins and their second winter at sea. ")
    return {
        "rank": rank,
        "sample": sample,
        "domain": domain,
        "gain": None if rank == 5 else 0.42 / (rank + 1),
        "tokens": 256,
        "text": (body * 5)[:400],
    }


def _site(name: str, channels: int, generator: np.random.Generator) -> dict[str, Any]:
    columns = min(channels, 512)
    hot = generator.random(columns) < 0.02
    cells = np.zeros((BLOCKS, columns), dtype=int)
    outlier = (generator.random((BLOCKS, columns)) < 0.012) | (
        hot[None, :] & (generator.random((BLOCKS, columns)) < 0.6)
    )
    cells[outlier] = np.where(generator.random(int(outlier.sum())) < 0.12, 2, 1)
    return {"name": name, "channels": channels, "blocks": list(range(BLOCKS)), "cells": cells.tolist()}


def _quantization() -> dict[str, Any]:
    return {
        "method": "covercal",
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "linears": 210,
        "mean_output_error": 0.0412,
        "worst_linear": "model.layers.29.mlp.down_proj",
        "worst_error": 0.1903,
        "worst_measure": "output_error",
        "average_bits": 3.5391,
        "format": "pack-quantized",
        "why_dense": None,
        "notes": {"model.layers.0.mlp.down_proj": f"a note with {SCRIPT}"},
        "grown_damping": [],
        "parameters": 134_515_008,
        "quantized_parameters": 106_168_320,
        "bytes": 103_681_024,
        "nearest_bytes": 99_999_999,
        "original_bytes_16_bit": 269_030_016,
    }


def scores(loss: float, divergence: float | None = None, sequences: int = 24) -> dict[str, Any]:
    """Return the scores of one model over some sequences."""
    value: dict[str, Any] = {
        "sequences": sequences,
        "tokens": sequences * 511,
        "perplexity": math.exp(loss),
        "loss": loss,
        "loss_error": 0.061 * math.sqrt(24 / sequences),
    }
    if divergence is not None:
        value |= {
            "divergence": divergence,
            "divergence_error": 0.06 * divergence * math.sqrt(24 / sequences),
            "agreement": 1 - 0.6 * divergence,
            "agreement_error": 0.0082,
        }
    return value


def divergence_text(generator: np.random.Generator) -> dict[str, Any]:
    """Return the scores on a text by divergence, with seven domains, random choice and paired differences."""
    value: dict[str, Any] = {"text": "heldout.jsonl.gz", "kind": "divergence"}
    for model, loss in LOSSES.items():
        overall = DIVERGENCES.get(model, 0.0)
        factors = 0.6 + generator.random(len(DOMAINS))
        value[model] = {
            "all": scores(loss, overall),
            "domains": {d: scores(loss * 0.9, overall * f, 4) for d, f in zip(DOMAINS, factors, strict=True)},
        }
    value["random"] |= {"seeds": [0, 1, 2], "values": [0.2099, 0.2214, 0.2329]}
    value["differences"] = {
        "nearest": {
            "divergence": {"mean": -0.3395, "low": -0.3801, "high": -0.2989, "p_value": 0.0002},
            "agreement": {"mean": 0.2037, "low": 0.1761, "high": 0.2313, "p_value": 0.0002},
            "loss": {"mean": -0.418, "low": -0.471, "high": -0.365, "p_value": 0.0002},
        },
        "random": {
            "divergence": {"mean": -0.0482, "low": -0.0631, "high": -0.0333, "p_value": 0.0012},
            "agreement": {"mean": 0.0289, "low": -0.0012, "high": 0.059, "p_value": 0.061},
            "loss": {"mean": -0.057, "low": None, "high": None, "p_value": None},
        },
    }
    return value


def perplexity_text() -> dict[str, Any]:
    """Return the scores on a text by perplexity alone."""
    value: dict[str, Any] = {"text": f"wikitext2 {SCRIPT}.txt", "kind": "perplexity", "differences": {}}
    for model, loss in LOSSES.items():
        value[model] = {"all": scores(loss + 0.2, sequences=20), "domains": {}}
    return value


def _tasks() -> list[dict[str, Any]]:
    def task(name: str, metric: str, values: tuple[float, ...], differences: dict[str, Any]) -> dict[str, Any]:
        return {
            "task": name,
            "metric": metric,
            "shots": 0,
            "limit": 200,
            "items": 200,
            "higher_is_better": True,
            "scores": {
                model: {"value": v, "error": math.sqrt(v * (1 - v) / 200)}
                for model, v in zip(("original", "nearest", "random", "run"), values, strict=True)
            },
            "differences": differences,
            "error": "",
        }

    noise = {"mean": -0.015, "low": -0.06, "high": 0.03, "p_value": 0.62, "test": "McNemar, exact"}
    sure = {"mean": 0.085, "low": 0.025, "high": 0.145, "p_value": 0.0061, "test": "McNemar, exact"}
    failed = {
        "task": "piqa",
        "metric": "acc",
        "shots": 0,
        "limit": 200,
        "items": 0,
        "higher_is_better": True,
        "scores": {},
        "differences": {},
        "error": f"the data set could not be read {ENDING}",
    }
    return [
        task("arc_challenge", "acc_norm", (0.315, 0.215, 0.285, 0.3), {"original": noise, "nearest": sure}),
        task("hellaswag", "acc_norm", (0.43, 0.335, 0.4, 0.42), {"original": noise, "nearest": sure}),
        failed,
    ]


def _layers(generator: np.random.Generator) -> dict[str, Any]:
    linears = []
    for block in range(BLOCKS):
        for kind in KINDS:
            nearest = 0.05 * (1 + block / 15) * math.exp(0.3 * generator.standard_normal())
            linears.append(
                {
                    "name": f"model.layers.{block}.{kind}",
                    "block": block,
                    "kind": kind,
                    "nearest": nearest,
                    "run": nearest * (0.25 + 0.3 * generator.random()),
                    "outlier_channels": int(generator.integers(4, 40)),
                    "uncovered": int(generator.integers(0, 4)),
                    "uncovered_weight": float(generator.random() * 0.1),
                }
            )
    return {
        "text": "heldout.jsonl.gz",
        "tokens": 4096,
        "linears": linears,
        "correlation": {"spearman": 0.1271, "p_value": 0.0655},
        "explanation": "Linears that miss more outlier weight are not visibly worse than the others.",
    }


def sweep_summary(**changes: Any) -> dict[str, Any]:
    """Return the summary of a sweep over selectors, budgets, bits and seeds, with one failed cell."""
    generator = np.random.default_rng(3)
    cells, rows = [], []
    for bits in (3, 4):
        for selector in ("random", "coverage", "gram_matching", "k_center", "zipcal"):
            for budget in (8, 16, 32, 64, 128):
                mine = _sweep_cells(selector, budget, bits, generator)
                cells += mine
                rows.append(_sweep_row(selector, budget, bits, mine))
    cells.append(
        {
            "fields": {"selection.selector": f"herding {SCRIPT}", "selection.budget": 8, "quantization.bits": 3},
            "measures": {},
            "quantization": {},
            "scores": [],
            "error": f'ValueError: the sketch is empty {ENDING}\nTraceback (most recent call last):\n  File "x.py"',
        }
    )
    value = {
        "name": "smollm2-135m-instruct · sweep of selector, budget, bits, seed",
        "verdict": "gram_matching is lower than random choice at every budget; coverage from 32 samples on.",
        "command": "covercal sweep recipes/smollm2.yaml",
        "finished": "2026-11-24T19:31:02+00:00",
        "seconds": 8821.0,
        "versions": {"covercal": "0.1.0", "torch": "2.9.0"},
        "recipe": {"sweep": {"selection.selector": ["coverage", "random"], "selection.budget": [8, 16]}},
        "rows": rows,
        "cells": cells,
        "measure": "KL(original || quantised), nats per token",
    }
    return {**value, **changes}


def _sweep_cells(selector: str, budget: int, bits: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    seeds = range(5) if selector == "random" else (0,)
    worth = {"random": 0.0, "coverage": 0.006, "gram_matching": 0.016, "k_center": -0.004, "zipcal": 0.002}[selector]
    found = []
    for seed in seeds:
        base = (0.3 if bits == 3 else 0.06) * (1 + 1.6 / math.sqrt(budget))
        main = base * (1 - 4 * worth + 0.02 * generator.standard_normal())
        covered = 1 - (0.6 - 8 * worth) * budget**-0.4 + 0.01 * generator.standard_normal()
        found.append(
            {
                "fields": {
                    "selection.selector": selector,
                    "selection.budget": budget,
                    "quantization.bits": bits,
                    "selection.seed": seed,
                },
                "measures": {"weighted_coverage": covered, "coverage": covered - 0.05, "budget": budget},
                "quantization": {"bytes": 103_681_024 if bits == 3 else 121_000_000},
                "scores": [
                    {
                        "text": "heldout.jsonl.gz",
                        "kind": "divergence",
                        "original": scores(2.8, 0.0),
                        "nearest": scores(3.4, 0.51),
                        "run": scores(2.9, main),
                    }
                ],
                "error": "",
            }
        )
    return found


def _sweep_row(selector: str, budget: int, bits: int, cells: list[dict[str, Any]]) -> dict[str, Any]:
    values = [cell["scores"][0]["run"]["divergence"] for cell in cells]
    random = selector == "random"
    base = (0.3 if bits == 3 else 0.06) * (1 + 1.6 / math.sqrt(budget))
    return {
        "fields": {"selection.selector": selector, "selection.budget": budget, "quantization.bits": bits},
        "values": values,
        "mean": float(np.mean(values)),
        "interval": float(np.std(values)) * 1.24 if random else None,
        "difference": None if random else float(np.mean(values)) - base,
        "difference_interval": None if random else 0.025 * base,
        "percentile": None if random else 0.8,
    }
