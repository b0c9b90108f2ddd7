"""Stage `checkpoint`: the model quantised on chosen samples, as a folder that transformers loads."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import covercal
from covercal.model_files import PROCESSOR, left_out, loader_of
from covercal.pool import sequences_digest
from covercal.quantization_settings import Quantization
from storage.artifacts import CONTINUED, ArtifactStore
from storage.durable import share_file
from storage.manifest import Ref, library_versions
from storage.tables import write_table
from storage.work import WorkFolder
from tasks.cached import Build, cached
from tasks.gram import CachedPool
from tasks.identities import ModelIdentity, TokenizerIdentity, model_folder
from tasks.memory import activation_memory
from tasks.model import load_tokenizer, streamed_decoder
from tasks.pool import sample_columns, sample_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from covercal.checkpoint import CheckpointWriter
    from covercal.decoder import Decoder
    from covercal.hidden_states import HiddenStates
    from covercal.quantization import LinearReport, QuantizedBlock, Resumed
    from covercal.quantization_settings import Dtype

LINEARS = "linears.parquet"
REPORTS = "reports.json"
LEAVING = "leaving"
HIDDEN = "hidden"
MAYBE_MISSING = ("output_error", "shrinkage", "gamma", "alpha", "scaling")


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


@dataclass(frozen=True, slots=True)
class PoolInputs:
    """What is cached of a pool that quantisation reads; nothing where it reads nothing of the kind.

    Attributes
    ----------
    gram, held_out
        Gram matrices over all shards, and over those that validate.
    statistics
        The statistics of every shard.
    """

    gram: Ref | None = None
    held_out: Ref | None = None
    statistics: tuple[Ref, ...] = ()


NO_POOL = PoolInputs()


@cached("block", version=9, ignored=("imported", "device"), names={"dtype": "model.dtype"})
def quantize_block(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    cached_pool: PoolInputs,
    index: int,
    quantization: Quantization,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Quantise one block from the pool's Gram matrices alone: nothing depends on the blocks before it.

    Loads the weights of this block and the Gram matrix of one site at a time.
    """
    from covercal.checkpoint import CheckpointWriter
    from covercal.quantization import quantize_one_block

    decoder = streamed_decoder(build.store, model, imported, dtype, device)
    storage_dtype: Any = quantization.storage_dtype
    pool = _cached_pool(build.store, cached_pool, quantization, decoder)
    block = quantize_one_block(decoder, index, quantization, storage_dtype, pool)
    _write_part(build.folder, CheckpointWriter(decoder, quantization, storage_dtype), block)
    return {"linears": len(block.linears)}


def _with_tokenizer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with the tokenizer, which is written into the checkpoint."""
    return {**inputs, "tokenizer": TokenizerIdentity(inputs["model"])}


@cached(
    "checkpoint",
    version=13,
    ignored=("imported", "pool", "device"),
    names={"dtype": "model.dtype"},
    keyed=_with_tokenizer,
)
def quantize_model(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref | None,
    calibration: Calibration | None,
    cached_pool: PoolInputs,
    blocks: tuple[Ref, ...],
    quantization: Quantization,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Quantise block by block and write the checkpoint, its tokenizer and the report of its linears.

    `quantization.storage_dtype` is a dtype, not `auto`. Blocks that were quantised by themselves are put together.
    """
    from covercal.checkpoint import CheckpointWriter, checkpoint_bytes

    decoder = streamed_decoder(build.store, model, imported, dtype, device)
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
    if blocks:
        reports, resumed = _assemble(build, writer, blocks), 0
    else:
        known = _cached_pool(build.store, cached_pool, quantization, decoder)
        reports, resumed = _quantize_blocks(build, writer, sequences, known)
    source = model_folder(build.store, model, imported)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    missing = left_out(config, type(decoder.model).__name__)
    not_quantized = " ".join(filter(None, (missing or _unknown(decoder), _unread(decoder))))
    record = {
        "covercal": covercal.__version__,
        "model": {"name": model.name, "weights_sha256": model.weights, "dtype": dtype},
        "quantization": quantization.model_dump(mode="json"),
        "calibration": {"pool": pool.key if pool is not None else None, "samples": chosen},
        "libraries": library_versions(),
        "left_out": not_quantized,
    }
    writer.finish(build.folder, [r.name for r in reports], record)
    load_tokenizer(build.store, model, imported).save_pretrained(build.folder)
    for name in PROCESSOR:
        if not missing and (source / name).is_file():
            shutil.copyfile(source / name, build.folder / name)
    _write_linears(build, reports)
    quantized = sum(r.outputs * r.inputs for r in reports)
    return {
        "linear_seconds": {r.name: round(r.seconds, 4) for r in reports},
        "grown_damping": [r.name for r in reports if r.attempts > 1],
        "notes": {r.name: r.note for r in reports if r.note},
        "parameters": sum(p.numel() for p in decoder.model.parameters()),
        "quantized_parameters": quantized,
        "average_bits": average_bits(quantization, {r.name: (r.outputs, r.inputs) for r in reports}),
        "format": writer.format,
        "why_dense": writer.why_dense,
        "left_out": not_quantized,
        "own_code": decoder.model.is_remote_code(),
        "loader": loader_of(json.loads((build.folder / "config.json").read_bytes())),
        **({CONTINUED: _where(resumed, len(decoder.blocks))} if resumed else {}),
    }


def average_bits(quantization: Quantization, shapes: dict[str, tuple[int, int]]) -> float:
    """Return the bits of a quantised weight on average, with scales and zero points, as its method would store it."""
    from covercal.quantizers import salient

    share, salient_bits = quantization.salient.share, quantization.salient.bits
    number = 32 if quantization.storage_dtype == "float32" else 16  # a scale, or a weight that is kept as it is
    group_bits = number + (0 if quantization.symmetric else quantization.bits)
    if salient_bits == salient.KEPT_BITS:
        salient_bits = number
    elif share:
        group_bits += 2 * number  # the step and the smallest value of the salient weights' own grid
    bits = weights = 0.0
    for outputs, inputs in shapes.values():
        each = salient.average_bits(
            quantization.bits,
            quantization.group_size or inputs,
            share=share,
            salient_bits=salient_bits,
            group_bits=group_bits,
        )
        bits, weights = bits + each * outputs * inputs, weights + outputs * inputs
    return round(bits / weights, 4)


def _cached_pool(
    store: ArtifactStore, given: PoolInputs, quantization: Quantization, decoder: "Decoder"
) -> CachedPool | None:
    if given == NO_POOL:
        return None
    return CachedPool(store, given.gram, given.held_out, given.statistics, quantization, decoder.device)


def _where(finished: int, blocks: int) -> str:
    return f"block {finished + 1} of {blocks}" if finished < blocks else "the end: all blocks were finished"


def _hidden_bytes(decoder: "Decoder", sequences: Sequence[npt.NDArray[np.int32]]) -> int:
    return sum(s.size for s in sequences) * decoder.probed().most * int(decoder.model.dtype.itemsize)


def _write_part(folder: Path, writer: "CheckpointWriter", block: "QuantizedBlock") -> None:
    """Write the shard of a block and the reports of its linears."""
    writer.write_block(block, folder)
    rows = [asdict(report) for report in block.reports]
    (folder / REPORTS).write_text(json.dumps(rows), encoding="utf-8")


def _assemble(build: Build, writer: "CheckpointWriter", blocks: Sequence[Ref]) -> "list[LinearReport]":
    """Put the shards of blocks that were quantised by themselves into the artifact; returns the reports of all."""
    reports = []
    for index, ref in enumerate(blocks):
        folder = build.store.path(ref)
        build.store.check_whole(ref, "was not put into the checkpoint")  # the two share their files from now on
        reports += _reports(folder)
        share_file(folder / writer.shard_name(index), build.folder / writer.shard_name(index))
    return reports


def _quantize_blocks(
    build: Build, writer: "CheckpointWriter", sequences: Sequence[npt.NDArray[np.int32]], pool: CachedPool | None
) -> "tuple[list[LinearReport], int]":
    """Quantise every block that an earlier build has not finished, and put all shards into the artifact.

    Returns the reports of all linears and the first block that was quantised here.
    """
    from covercal.quantization import quantize_blocks

    decoder = writer.decoder
    count = len(decoder.blocks)
    work = WorkFolder(build.work, {"libraries": library_versions(), "device": str(decoder.device)}, build.check)
    first, resumed = _finished_blocks(work, writer)
    advance = build.progress(count, "blocks")
    advance(first)
    memory = activation_memory(build.work, decoder.device)
    for block in quantize_blocks(decoder, sequences, writer.settings, writer.storage_dtype, resumed, pool, memory):
        with work.part(_part(block.index)) as folder:
            _write_part(folder, writer, block)
            _write_leaving(folder, block.leaving)
        if block.index:  # only the newest are needed, and they are large
            shutil.rmtree(build.work / _part(block.index - 1) / LEAVING, ignore_errors=True)
        del block  # or it is held while the next one is made
        advance(1)
    reports = []
    for index in range(count):
        reports += _reports(build.work / _part(index))
        name = writer.shard_name(index)
        share_file(build.work / _part(index) / name, build.folder / name)
    return reports, first


def _write_leaving(folder: Path, leaving: "Sequence[HiddenStates]") -> None:
    """Write what leaves a block, a file for each batch of each stream."""
    from safetensors.torch import save_file

    (folder / LEAVING).mkdir()
    for stream, hidden in enumerate(leaving):
        for number in range(len(hidden)):
            save_file(
                {HIDDEN: hidden[number].cpu().contiguous()}, folder / LEAVING / f"{stream}-{number:06d}.safetensors"
            )


def _finished_blocks(work: WorkFolder, writer: "CheckpointWriter") -> "tuple[int, Resumed | None]":
    """Return how many blocks an earlier build has finished, and what enters the next one."""
    from covercal.quantization import Resumed

    finished = 0
    while work.whole(_part(finished), [writer.shard_name(finished), REPORTS]) is not None:
        finished += 1
    if finished == len(writer.decoder.blocks):
        return finished, Resumed(finished, ())
    for index in range(finished, 0, -1):
        entering = _entering(work, _part(index - 1), str(writer.decoder.device))
        if entering is not None:
            return index, Resumed(index, entering)
    return 0, None


def _entering(work: WorkFolder, part: str, device: str) -> "tuple[Sequence[Tensor], ...] | None":
    """Return what left a block, stream by stream, read when it is asked for; None when it is not all there."""
    folder = work.whole(part, [REPORTS])
    if folder is None or not (folder / LEAVING).is_dir():
        return None
    names = sorted(path.name for path in (folder / LEAVING).iterdir())
    if work.whole(part, [f"{LEAVING}/{name}" for name in names]) is None:
        return None
    streams: dict[str, list[Path]] = {}
    for name in names:
        streams.setdefault(name.partition("-")[0], []).append(folder / LEAVING / name)
    return tuple(KeptHidden(streams[stream], device) for stream in sorted(streams))


class KeptHidden(Sequence[Any]):
    """Hidden states in files, one for each batch, read one at a time."""

    def __init__(self, paths: Sequence[Path], device: str) -> None:
        self._paths, self._device = tuple(paths), device

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        from safetensors.torch import load_file

        return load_file(self._paths[index], device=self._device)[HIDDEN]


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


def _unknown(decoder: "Decoder") -> str:
    """Return which tensors of the model's files transformers does not read, in a sentence; empty when it reads all."""
    names = decoder.weights.unknown if decoder.weights is not None else ()
    if not names:
        return ""
    kind = type(decoder.model).__name__
    return f"{len(names)} tensors of its files are left out since {kind} does not have them, {names[0]} among them."


def _unread(decoder: "Decoder") -> str:
    """Return which linears stay as they are since no text reads them, in a sentence; empty when all are read."""
    names = decoder.unread
    if not names:
        return ""
    return f"{len(names)} linears of the blocks that no text reads stay as they are, {names[0]} among them."


def _write_linears(build: Build, reports: "list[LinearReport]") -> None:
    """Write the reports without times, which differ from run to run and stand in the manifest."""
    rows = [{name: value for name, value in asdict(r).items() if name != "seconds"} for r in reports]
    for row in rows:
        row.update({name: None for name in MAYBE_MISSING if math.isnan(row[name])})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    types = {name: pa.float64() for name in MAYBE_MISSING}
    write_table(build.folder / LINEARS, {name: pa.array(values, types.get(name)) for name, values in columns.items()})
