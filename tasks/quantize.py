"""Stage `checkpoint`: the model quantised on chosen samples, as a folder that transformers loads."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import covercal
from covercal.pool import sequences_digest
from covercal.recipe import Quantization
from storage.artifacts import CONTINUED, ArtifactStore
from storage.durable import share_file
from storage.manifest import Ref, library_versions
from storage.tables import write_table
from storage.work import WorkFolder
from tasks.cached import Build, cached
from tasks.identities import ModelIdentity
from tasks.model import load_tokenizer, original_decoder
from tasks.pool import sample_columns, sample_tokens

if TYPE_CHECKING:
    from covercal.checkpoint import CheckpointWriter
    from covercal.decoder import Decoder
    from covercal.quantization import LinearReport, Resumed
    from covercal.recipe import Dtype

LINEARS = "linears.parquet"
REPORTS = "reports.json"
LEAVING = "leaving.safetensors"


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


@cached(
    "checkpoint",
    version=2,
    ignored=("imported", "pool", "device"),
    names={"dtype": "model.dtype"},
)
def quantize_model(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref | None,
    calibration: Calibration | None,
    quantization: Quantization,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Quantise block by block and write the checkpoint, its tokenizer and the report of its linears.

    `quantization.storage_dtype` is a dtype, not `auto`.
    """
    from covercal.checkpoint import CheckpointWriter, checkpoint_bytes

    decoder = original_decoder(build.store, model, imported, dtype, device)
    storage_dtype: Any = quantization.storage_dtype
    sequences, chosen = [], []
    if pool is not None and calibration is not None:
        tokens = sample_tokens(build.store, pool)
        sequences = [tokens[s] for s in calibration.samples]
        chosen = _chosen_record(build.store, pool, calibration)
    writer = CheckpointWriter(decoder, quantization, storage_dtype)
    build.store.require_space(
        checkpoint_bytes(decoder, quantization, storage_dtype) + 2 * _hidden_bytes(decoder, sequences),
        f"The checkpoint of {model.name}, with the activations kept to resume from,",
    )
    reports, resumed = _quantize_blocks(build, writer, sequences)
    record = {
        "covercal": covercal.__version__,
        "model": {"name": model.name, "weights_sha256": model.weights, "dtype": dtype},
        "quantization": quantization.model_dump(mode="json"),
        "calibration": {"pool": pool.key if pool is not None else None, "samples": chosen},
        "libraries": library_versions(),
    }
    writer.finish(build.folder, [r.name for r in reports], record)
    load_tokenizer(build.store, model, imported).save_pretrained(build.folder)
    _write_linears(build, reports)
    parameters = sum(p.numel() for p in decoder.model.parameters())
    return {
        "linear_seconds": {r.name: round(r.seconds, 4) for r in reports},
        "grown_damping": [r.name for r in reports if r.attempts > 1],
        "parameters": parameters,
        "quantized_parameters": sum(r.outputs * r.inputs for r in reports),
        **({CONTINUED: _where(resumed, len(decoder.blocks))} if resumed else {}),
    }


def _where(finished: int, blocks: int) -> str:
    return f"block {finished + 1} of {blocks}" if finished < blocks else "the end: all blocks were finished"


def _hidden_bytes(decoder: "Decoder", sequences: Sequence[npt.NDArray[np.int32]]) -> int:
    tokens = sum(s.size for s in sequences)
    return tokens * decoder.sites[0].channels * int(decoder.model.dtype.itemsize)


def _quantize_blocks(
    build: Build, writer: "CheckpointWriter", sequences: Sequence[npt.NDArray[np.int32]]
) -> "tuple[list[LinearReport], int]":
    """Quantise every block that an earlier build has not finished, and put all shards into the artifact.

    Returns the reports of all linears and the first block that was quantised here.
    """
    from safetensors.torch import save_file

    from covercal.quantization import quantize_blocks

    decoder = writer.decoder
    count = len(decoder.blocks)
    work = WorkFolder(build.work, {"libraries": library_versions(), "device": str(decoder.device)})
    first, resumed = _finished_blocks(work, writer)
    advance = build.progress(count, "blocks")
    advance(first)
    for block in quantize_blocks(decoder, sequences, writer.settings, writer.storage_dtype, resumed):
        with work.part(_part(block.index)) as folder:
            writer.write_block(block, folder)
            rows = [asdict(report) for report in block.reports]
            (folder / REPORTS).write_text(json.dumps(rows), encoding="utf-8")
            save_file({str(i): hidden.cpu().contiguous() for i, hidden in enumerate(block.leaving)}, folder / LEAVING)
        if block.index:  # only the newest are needed, and they are large
            (build.work / _part(block.index - 1) / LEAVING).unlink(missing_ok=True)
        advance(1)
    reports = []
    for index in range(count):
        reports += _reports(build.work / _part(index))
        name = writer.shard_name(index)
        share_file(build.work / _part(index) / name, build.folder / name)
    return reports, first


def _finished_blocks(work: WorkFolder, writer: "CheckpointWriter") -> "tuple[int, Resumed | None]":
    """Return how many blocks an earlier build has finished, and what enters the next one."""
    from safetensors.torch import load_file

    from covercal.quantization import Resumed

    finished = 0
    while work.whole(_part(finished), [writer.shard_name(finished), REPORTS]) is not None:
        finished += 1
    last = work.whole(_part(finished - 1), [LEAVING]) if finished else None
    if last is None:
        return 0, None
    leaving = load_file(last / LEAVING, device=str(writer.decoder.device))
    return finished, Resumed(finished, tuple(leaving[str(i)] for i in range(len(leaving))))


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _reports(part: Path) -> "list[LinearReport]":
    from covercal.quantization import LinearReport

    return [LinearReport(**row) for row in json.loads((part / REPORTS).read_bytes())]


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
