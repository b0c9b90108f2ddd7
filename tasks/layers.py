"""Stage `layer_errors`: how far every quantised linear is from the original's, on held-out inputs."""

import json
import math
from typing import TYPE_CHECKING, Any

from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import Build, ByDigest, cached
from tasks.identities import ModelIdentity
from tasks.model import checkpoint_decoder, original_decoder
from tasks.pool import sample_tokens
from tasks.thresholds import outlier_columns

if TYPE_CHECKING:
    from covercal.quantization_settings import Dtype

ERRORS = "errors.json"


@cached(
    "layer_errors",
    version=1,
    ignored=("imported", "device"),
    names={"dtype": "model.dtype", "limit": "evaluation.layers"},
)
def measure_layers(
    build: Build,
    *,
    checkpoint: ByDigest,
    model: ModelIdentity,
    imported: Ref | None,
    texts: ByDigest,
    limit: int,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Run the original over the first sequences of a text, and every linear of a checkpoint beside its own."""
    from covercal.layer_errors import linear_errors

    original = original_decoder(build.store, model, imported, dtype, device)
    quantized = checkpoint_decoder(build.store, checkpoint.ref, dtype, device)
    sequences = spread(sample_tokens(build.store, texts.ref), limit)
    found = linear_errors(original, quantized, sequences, build.progress(len(sequences), "sequences"))
    blocks = {original.full_name(site, name): site.block for site in original.sites for name in site.linears}
    rows = [
        {
            "name": name,
            "block": blocks[name],
            "kind": name.removeprefix(f"{original.blocks_path}.{blocks[name]}."),
            "error": None if math.isnan(error) else error,
        }
        for name, error in found.items()
    ]
    (build.folder / ERRORS).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return {"tokens": sum(len(each) for each in sequences)}


def spread(found: list[Any], limit: int) -> list[Any]:
    """Return `limit` entries spread evenly over a list: the sequences of a text lie domain by domain."""
    count = min(limit, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def read_layer_errors(store: ArtifactStore, ref: Ref) -> list[dict[str, Any]]:
    """Return name, block, kind and relative error of every linear, in order of execution."""
    value: list[dict[str, Any]] = json.loads((store.path(ref) / ERRORS).read_bytes())
    return value


def missed_at_linears(store: ArtifactStore, outliers: Ref, missed: Any) -> dict[tuple[int, str], dict[str, Any]]:
    """Return, by block and linear, how many outlier channels its input has, how many are missed, and their weight.

    Parameters
    ----------
    store, outliers
        Where the outlier channels are read.
    missed
        bool (outlier channels,): whether no chosen sample fires it.
    """
    columns = outlier_columns(store, outliers, "block", "linears", "weight")
    sums: dict[tuple[int, str], list[float]] = {}
    for block, linears, weight, lost in zip(*columns.values(), missed, strict=True):
        row = sums.setdefault((int(block), str(linears)), [0, 0, 0.0, 0.0])
        row[0] += 1
        row[1] += int(lost)
        row[2] += float(weight)
        row[3] += float(weight) * bool(lost)
    return {
        (block, name): {
            "outlier_channels": int(count),
            "uncovered": int(lost),
            "uncovered_weight": lost_weight / weight if weight else 0.0,
        }
        for (block, linears), (count, lost, weight, lost_weight) in sums.items()
        for name in linears.split(", ")
    }
