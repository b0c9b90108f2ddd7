"""What a run found, as one JSON object and as the table that people read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from covercal.recipe import Recipe
from flows.chain import Chain
from flows.execution import WORST_FIRST, Event
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.evaluate import read_scores
from tasks.measures import read_measures
from tasks.quantize import LINEARS
from tasks.select import chosen_samples


def stage_rows(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return one row per stage: its worst decision, why, the counts of every decision, and the time."""
    rows = []
    for label in dict.fromkeys(event.label for event in events):
        mine = [event for event in events if event.label == label]
        worst = min(mine, key=lambda event: WORST_FIRST.index(str(event.decision)))
        rows.append(
            {
                "stage": label,
                "key": worst.key,
                "decision": str(worst.decision),
                "reason": worst.reason,
                "seconds": round(sum(event.seconds for event in mine), 3),
                "artifacts": len(mine),
                "counts": {
                    name: count for name in WORST_FIRST if (count := sum(str(event.decision) == name for event in mine))
                },
            }
        )
    return rows


def selection_summary(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return who was chosen and what the choice covers, beside what random choice of that size covers on average."""
    chosen = chosen_samples(store, chain.selection, recipe.selection.budget)
    return {
        "selector": recipe.selection.selector,
        "budget": recipe.selection.budget,
        "samples": chosen.tolist(),
        **read_measures(store, chain.measures),
    }


def quantization_summary(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return how the checkpoint was made and what it weighs."""
    manifest = store.manifest(chain.checkpoint)
    table = read_table(store.path(chain.checkpoint) / LINEARS).to_pylist()
    errors = [row["output_error"] for row in table if row["output_error"] is not None]
    worst = max(table, key=lambda row: row["output_error"] or row["weight_error"])
    bytes_now = _weight_bytes(store, chain.checkpoint)
    settings = recipe.quantization
    return {
        "method": settings.method,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        "linears": len(table),
        "mean_output_error": float(np.mean(errors)) if errors else None,
        "worst_linear": worst["name"],
        "worst_error": worst["output_error"] or worst["weight_error"],
        "average_bits": manifest.info["average_bits"],
        "format": manifest.info["format"],
        "why_dense": manifest.info["why_dense"],
        "notes": manifest.info["notes"],
        "grown_damping": manifest.info["grown_damping"],
        "parameters": manifest.info["parameters"],
        "quantized_parameters": manifest.info["quantized_parameters"],
        "bytes": bytes_now,
        "original_bytes_16_bit": 2 * int(manifest.info["parameters"]),
    }


def _weight_bytes(store: ArtifactStore, checkpoint: Ref) -> int:
    files = store.manifest(checkpoint).files
    return sum(int(each["size"]) for name, each in files.items() if name.endswith(".safetensors"))


def evaluation_summary(chain: Chain, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return the scores of original, round-to-nearest and this run on every text."""
    return [
        {
            "text": Path(text.name).name,
            "kind": text.kind,
            "original": read_scores(store, text.reference),
            "nearest": read_scores(store, text.nearest),
            "run": read_scores(store, text.run),
        }
        for text in chain.texts
    ]


def summarize(recipe: Recipe, chain: Chain, store: ArtifactStore) -> dict[str, Any]:
    """Return everything that `run --json` prints but the stages."""
    value: dict[str, Any] = {"selection": selection_summary(recipe, chain, store)}
    if chain.checkpoint is not None:
        value["quantization"] = quantization_summary(recipe, chain, store)
        value["evaluation"] = evaluation_summary(chain, store)
        value["checkpoint"] = str(store.path(chain.checkpoint))
    return value


def run_name(recipe: Recipe) -> str:
    """Return what the dashboard calls a run, such as `smollm2-135m · gptq w3 g64 · coverage@32`."""
    model = Path(recipe.model.source).stem.lower()
    selection = recipe.selection
    return f"{model} · {grid_name(recipe)} · {selection.selector}@{selection.budget}"


def grid_name(recipe: Recipe, method: str | None = None) -> str:
    """Return method and grid, such as `gptq w3 g64`."""
    settings = recipe.quantization
    group = f"g{settings.group_size}" if settings.group_size else "per channel"
    return f"{method or settings.method} w{settings.bits} {group}" + (" symmetric" if settings.symmetric else "")


def result_table(recipe: Recipe, summary: dict[str, Any]) -> Table:
    """Return the verdict: one column per model, one row per measure."""
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    for name in ("", "original", "round to nearest", f"this run, {recipe.quantization.method}"):
        table.add_column(name, justify="left" if not name else "right")
    for text in summary["evaluation"]:
        columns = [text[name]["all"] for name in ("original", "nearest", "run")]
        if text["kind"] == "divergence":
            table.add_row("KL, nats per token", *(_measured(c, "divergence") for c in columns))
            table.add_row("same top token", *(f"{c['agreement']:.1%}" for c in columns))
        table.add_row(f"perplexity, {text['text']}", *(f"{c['perplexity']:.2f}" for c in columns))
    sizes = summary["quantization"]
    now = f"{sizes['bytes'] / 1e6:.0f} MB"
    table.add_row("size on disk", f"{sizes['original_bytes_16_bit'] / 1e6:.0f} MB (16 bits)", now, now)
    return table


def _measured(scores: dict[str, Any], name: str) -> str:
    error = scores.get(f"{name}_error")
    return f"{scores[name]:.4f}" if not error else f"{scores[name]:.4f} ± {error:.4f}"


def selection_lines(summary: dict[str, Any]) -> list[str]:
    """Return the sentences about the chosen samples."""
    chosen = summary["selection"]
    listed = ", ".join(map(str, chosen["samples"][:12])) + (" …" if len(chosen["samples"]) > 12 else "")
    mix = ", ".join(f"{count} {name}" for name, count in sorted(chosen["domains"].items(), key=lambda d: (-d[1], d[0])))
    return [
        f"Chosen       {chosen['budget']} samples by {chosen['selector']}: {mix} (numbers {listed})",
        f"Coverage     {chosen['coverage']:.1%} of {chosen['outlier_channels']:,} outlier channels; "
        f"random choice of that size: {chosen['random_coverage']:.1%} on average",
        f"             {chosen['weighted_coverage']:.1%} of their weight; "
        f"random choice: {chosen['random_weighted_coverage']:.1%}",
        f"Likeness     two samples share {chosen['jaccard']:.1%} of the channels that either fires; "
        f"Gram diagonals {chosen['gram_distance']:.1%} off the pool's",
    ]
