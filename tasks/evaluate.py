"""Stages `reference` and `evaluation`: the original's outputs on a text, and a checkpoint's scores against them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from covercal.errors import EvaluationError
from storage.arrays import read_array, write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, ByDigest, cached
from tasks.identities import ModelIdentity
from tasks.model import checkpoint_decoder, original_decoder
from tasks.pool import sample_columns, sample_tokens

if TYPE_CHECKING:
    from covercal.evaluation import SequenceScores
    from covercal.quantization_settings import Dtype

LOSSES = "losses.zarr"
HIDDEN = "hidden.zarr"
SCORES = "scores.json"
SEQUENCES = "sequences.parquet"
PER_TOKEN = ("loss", "divergence", "agreement")
FLOAT_BYTES = 4
MOST_NATS = 709.0  # the largest loss that has a perplexity in float64
SHOWN = 5  # sequences that an error names


@cached("reference", version=2, ignored=("imported", "device"), names={"dtype": "model.dtype"})
def reference_text(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    texts: ByDigest,
    keep_hidden: bool,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Run the original model over an evaluation text once; keep its losses, and what enters its head."""
    from covercal.evaluation import SequenceScores, reference_outputs

    decoder = original_decoder(build.store, model, imported, dtype, device)
    sequences = sample_tokens(build.store, texts.ref)
    width = decoder.sites[0].channels if keep_hidden else 0
    wanted = FLOAT_BYTES * (width + 1) * sum(s.size for s in sequences)
    build.store.require_space(wanted, "What the original gives on an evaluation text")
    found = reference_outputs(
        decoder, sequences, keep_hidden=keep_hidden, advance=build.progress(len(sequences), "sequences")
    )
    _check_numbers(
        [abs(row.mean(dtype=np.float64)) < MOST_NATS for row in found.losses], f"The original model {model.name}"
    )
    write_array(build.folder / LOSSES, found.losses)
    if found.hidden is not None:
        write_array(build.folder / HIDDEN, found.hidden)
    scores = [
        SequenceScores(row.size, float(row.mean(dtype=np.float64)), *((0.0, 1.0) if keep_hidden else ()))
        for row in found.losses
    ]
    _write_scores(build, texts.ref, scores)
    return {"tokens": int(found.losses.size)}


@cached("evaluation", version=3, ignored=("imported", "device"), names={"dtype": "model.dtype"})
def evaluate_text(
    build: Build,
    *,
    checkpoint: ByDigest,
    model: ModelIdentity,
    imported: Ref | None,
    texts: ByDigest,
    reference: Ref | None,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Load a checkpoint the way its users will, and score it on one text."""
    from covercal.evaluation import score

    original = hidden = None
    if reference is not None:
        original = original_decoder(build.store, model, imported, dtype, device)
        hidden = _hidden(build.store.path(reference))
    quantized = checkpoint_decoder(build.store, checkpoint.ref, model, dtype, device)
    sequences = sample_tokens(build.store, texts.ref)
    scores = score(quantized, original, sequences, hidden, advance=build.progress(len(sequences), "sequences"))
    asked = ("loss", "divergence") if hidden is not None else ("loss",)
    numbers = [all(abs(getattr(each, name)) < MOST_NATS for name in asked) for each in scores]
    _check_numbers(numbers, f"The quantised model {checkpoint.ref.short}")
    _write_scores(build, texts.ref, scores)
    return {"tokens": sum(s.tokens for s in scores)}


def _check_numbers(sound: Sequence[Any], model: str) -> None:
    """Raise unless a model gave numbers that can be worked with on every sequence; `sound` says it of each."""
    wrong = [str(sequence) for sequence, each in enumerate(sound) if not each]
    if wrong:
        named = ", ".join(wrong[:SHOWN]) + (", …" if len(wrong) > SHOWN else "")
        raise EvaluationError(
            f"{model} gives NaN, infinity or a loss of over {MOST_NATS:.0f} nats a token on {len(wrong)} of "
            f"{len(sound)} sequences of a text ({named}); "
            "a wider dtype (model.dtype: bfloat16 or float32) usually cures an overflow, not a damaged weight."
        )


def _hidden(folder: Path) -> npt.NDArray[np.float32]:
    return np.asarray(read_array(folder / HIDDEN), dtype=np.float32)


def read_scores(store: ArtifactStore, ref: Ref) -> dict[str, Any]:
    """Return the scores of a `reference` or `evaluation` artifact: over all sequences (`all`) and by domain."""
    value: dict[str, Any] = json.loads((store.path(ref) / SCORES).read_bytes())
    return value


def sequence_scores(store: ArtifactStore, ref: Ref) -> dict[str, npt.NDArray[np.float64]]:
    """Return what each sequence of the text scored, float64 (sequences,): its tokens, and every measure there is."""
    table = read_table(store.path(ref) / SEQUENCES)
    columns = {name: table[name].to_numpy().astype(np.float64) for name in ("tokens", *PER_TOKEN)}
    return {name: values for name, values in columns.items() if not np.isnan(values).any()}


def compare_texts(store: ArtifactStore, run: Ref, others: Sequence[Ref]) -> dict[str, Any]:
    """Return, for each measure, how far a run lies above the mean of some others on the same sequences.

    Each is the mean over sequences of the paired differences, its 95% interval and its p-value.
    """
    from covercal.comparison import paired_difference

    mine, theirs = sequence_scores(store, run), [sequence_scores(store, each) for each in others]
    return {
        name: paired_difference(mine[name], np.mean([each[name] for each in theirs], axis=0)).plain()
        for name in PER_TOKEN
        if name in mine
    }


def mean_scores(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the scores of several models on one text; errors over sequences are averaged, too."""
    return {
        "all": _mean([each["all"] for each in found]),
        "domains": {name: _mean([each["domains"][name] for each in found]) for name in found[0]["domains"]},
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None
        if any(row[name] is None for row in rows)
        else type(value)(sum(row[name] for row in rows) / len(rows))
        for name, value in rows[0].items()
    }


def _write_scores(build: Build, texts: Ref, scores: "list[SequenceScores]") -> None:
    domains = sample_columns(build.store, texts, "domain")["domain"]
    groups = {name: [s for s, d in zip(scores, domains, strict=True) if d == name] for name in sorted(set(domains))}
    value = {"all": _summary(scores), "domains": {name: _summary(group) for name, group in groups.items()}}
    (build.folder / SCORES).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    columns = {name: pa.array([getattr(each, name) for each in scores]) for name in ("tokens", *PER_TOKEN)}
    write_table(build.folder / SEQUENCES, {"domain": pa.array(domains), **columns})


def _summary(scores: "list[SequenceScores]") -> dict[str, Any]:
    from covercal.evaluation import mean_and_error, perplexity

    summary: dict[str, Any] = {
        "sequences": len(scores),
        "tokens": sum(s.tokens for s in scores),
        "perplexity": perplexity(scores),
    }
    for name in PER_TOKEN:
        values = [getattr(each, name) for each in scores]
        if not math.isnan(values[0]):
            mean, error = mean_and_error(values)
            summary[name] = mean
            summary[f"{name}_error"] = None if math.isnan(error) else error
    return summary
