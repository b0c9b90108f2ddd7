"""Stage `checkpoint`: the model quantised on chosen samples, as a folder that transformers loads."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import covercal
from covercal.pool import sequences_digest
from covercal.recipe import Quantization
from storage.artifacts import ArtifactStore, Ref, library_versions
from storage.tables import write_table
from tasks.cached import Build, cached
from tasks.identities import ModelIdentity
from tasks.model import load_tokenizer, original_decoder
from tasks.pool import sample_columns, sample_tokens

if TYPE_CHECKING:
    from covercal.quantization import LinearReport
    from covercal.recipe import Dtype

LINEARS = "linears.parquet"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The samples that calibrate, in the order of the pool, so that equal sets share one checkpoint.

    Attributes
    ----------
    samples
        Their indices in the pool, rising.
    tokens
        Digest of their tokens, which alone counts in a key.
    """

    samples: tuple[int, ...]
    tokens: str

    def key_material(self) -> dict[str, str]:
        """Return the tokens' digest."""
        return {"tokens": self.tokens}


def calibration(store: ArtifactStore, pool: Ref, chosen: list[int]) -> Calibration:
    """Return the calibration set of some samples of a pool."""
    digests = sample_columns(store, pool, "digest")["digest"]
    samples = tuple(sorted(chosen))
    return Calibration(samples, sequences_digest(digests[s] for s in samples))


@cached("checkpoint", version=1, ignored=("imported", "pool", "device"))
def quantize_model(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref | None,
    calibration: Calibration | None,
    quantization: Quantization,
    storage_dtype: "Dtype",
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Quantise block by block and write the checkpoint, its tokenizer and the report of its linears."""
    from covercal.checkpoint import CheckpointWriter
    from covercal.quantization import quantize_blocks

    decoder = original_decoder(build.store, model, imported, dtype, device)
    sequences, chosen = [], []
    if pool is not None and calibration is not None:
        tokens = sample_tokens(build.store, pool)
        sequences = [tokens[s] for s in calibration.samples]
        chosen = _chosen_record(build.store, pool, calibration)
    advance = build.progress(len(decoder.blocks), "blocks")
    writer = CheckpointWriter(build.folder, decoder, quantization, storage_dtype)
    record = {
        "covercal": covercal.__version__,
        "model": {"name": model.name, "weights_sha256": model.weights, "dtype": dtype},
        "quantization": quantization.model_dump(mode="json") | {"storage_dtype": storage_dtype},
        "calibration": {"pool": pool.key if pool is not None else None, "samples": chosen},
        "libraries": library_versions(),
    }

    def counted() -> Any:
        for block in quantize_blocks(decoder, sequences, quantization, storage_dtype):
            yield block
            advance(1)

    reports = writer.write(counted(), record)
    load_tokenizer(build.store, model, imported).save_pretrained(build.folder)
    _write_linears(build, reports)
    parameters = sum(p.numel() for p in decoder.model.parameters())
    return {
        "linear_seconds": {r.name: round(r.seconds, 4) for r in reports},
        "grown_damping": [r.name for r in reports if r.attempts > 1],
        "parameters": parameters,
        "quantized_parameters": sum(r.outputs * r.inputs for r in reports),
    }


def _chosen_record(store: ArtifactStore, pool: Ref, calibration: Calibration) -> list[dict[str, Any]]:
    columns = sample_columns(store, pool, "digest", "domain", "origins")
    return [
        {
            "sample": s,
            "tokens_sha256": columns["digest"][s],
            "domain": columns["domain"][s],
            "origins": columns["origins"][s],
        }
        for s in calibration.samples
    ]


def _write_linears(build: Build, reports: "list[LinearReport]") -> None:
    """Write the reports without times, which differ from run to run and stand in the manifest."""
    rows = [{name: value for name, value in asdict(r).items() if name != "seconds"} for r in reports]
    for row in rows:
        row["output_error"] = None if math.isnan(row["output_error"]) else row["output_error"]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    types = {"output_error": pa.float64()}
    write_table(build.folder / LINEARS, {name: pa.array(values, types.get(name)) for name, values in columns.items()})
