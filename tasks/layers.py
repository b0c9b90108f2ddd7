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

if TYPE_CHECKING:
    from covercal.quantization_settings import Dtype

ERRORS = "errors.json"


@cached(
    "layer_errors",
    version=2,
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
    """Run the original over the first sequences of a text, and every linear of a checkpoint beside its own.

    The sequences of a text with several domains lie in turns, so that the first are of all of them.
    """
    from covercal.layer_errors import linear_errors

    original = original_decoder(build.store, model, imported, dtype, device)
    quantized = checkpoint_decoder(build.store, checkpoint.ref, model, dtype, device)
    sequences = sample_tokens(build.store, texts.ref)[:limit]
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


def read_layer_errors(store: ArtifactStore, ref: Ref) -> list[dict[str, Any]]:
    """Return name, block, kind and relative error of every linear, in order of execution."""
    value: list[dict[str, Any]] = json.loads((store.path(ref) / ERRORS).read_bytes())
    return value
