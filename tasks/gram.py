"""Stage `gram`: the Gram matrices of all sites over the pool at full precision; what is cached of a pool's sites."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.arrays import Columns, write_array
from storage.artifacts import CONTINUED, ArtifactStore
from storage.durable import share_file
from storage.manifest import Ref, library_versions
from storage.tables import query, read_table, write_table
from storage.work import WorkFolder
from tasks.cached import Build, cached
from tasks.capture import CHANNELS, PEAK, Shard
from tasks.identities import ModelIdentity
from tasks.memory import activation_memory
from tasks.model import streamed_decoder
from tasks.pool import sample_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from covercal.decoder import Decoder, Site
    from covercal.gram import SiteStatistics
    from covercal.pool_gram import PoolBlock, PoolSite
    from covercal.quantization_settings import Dtype, Quantization

SITES = "sites.parquet"
VECTORS = "vectors.parquet"
PART_SITES = "sites.json"
LEAVING = "leaving.safetensors"
LEAVING_SECONDS = 30.0  # hidden states are kept to resume from at most so often: they are large
NUMBERS = ("weight", "mean_square", "concentration", "sequences", "tokens")  # of a site, as `PoolSite` has them
FLOAT_BYTES = 4
ARRAY_FILES = ("zarr.json", "c/0/0")


@cached("gram", version=5, ignored=("imported", "pool", "device"), names={"dtype": "model.dtype"})
def sum_gram(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref,
    shards: tuple[Shard, ...],
    weight: str,
    spread: bool,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Sum x x^T of every site over some shards of a pool, one pass of the original model; goes on from earlier sums.

    When the store has the sum over the first of these shards, only the others are run: the bytes are the same.

    Notes
    -----
    On disk, 2 * channels * (channels + 1) bytes a site. In memory, for the sites of one block at a time, 8 bytes (4
    above 8,192 channels) for each entry of the Gram matrices, 4 for half of them; and the pool's hidden states up to
    the limit on activations.
    """
    from covercal.pool_gram import sum_pool

    decoder = streamed_decoder(build.store, model, imported, dtype, device)
    inputs = {
        "model": model, "imported": imported, "pool": pool, "weight": weight, "spread": spread,
        "dtype": dtype, "device": device,
    }  # fmt: skip
    done, earlier = _earlier_sum(build.store, inputs, shards)
    tokens = sample_tokens(build.store, pool)
    fresh = [tokens[shard.start : shard.stop] for shard in shards[done:]]
    halves = sum(site.channels * (site.channels + 1) // 2 for site in decoder.sites)
    build.store.require_space(FLOAT_BYTES * halves, "The pool's Gram matrices")
    conditions = {"libraries": library_versions(), "device": str(decoder.device), "after": done}
    work = WorkFolder(build.work, conditions, build.check)
    first, resumed = _finished_blocks(work, decoder, len(fresh))
    advance = build.progress(len(decoder.blocks), "blocks")
    advance(first)
    before = CachedGram(build.store, earlier) if earlier is not None else None
    kept_at = time.monotonic()
    for block in sum_pool(
        decoder,
        fresh,
        lambda site: None if before is None else before.pool_site(site),
        by_sequence=weight == "sequence",
        spread=spread,
        memory=activation_memory(build.work, decoder.device),
        resumed=resumed,
    ):
        keep = bool(block.leaving) and time.monotonic() - kept_at >= LEAVING_SECONDS
        kept_at = time.monotonic() if keep else kept_at
        with work.part(_part(block.index)) as folder:
            _write_block(folder, block, keep_leaving=keep)
        advance(1)
    rows = _collect(build, len(decoder.blocks))
    where = f"block {first + 1} of {len(decoder.blocks)}"
    return {
        "shards": len(shards),
        "added_to": done,
        "sites": len(rows),
        **({CONTINUED: where} if first else {}),
    }


def _earlier_sum(store: ArtifactStore, inputs: dict[str, Any], shards: tuple[Shard, ...]) -> tuple[int, Ref | None]:
    """Return how many of the first shards the store has a sum of, and that sum."""
    for count in range(len(shards) - 1, 0, -1):
        request = sum_gram.request({**inputs, "shards": shards[:count]})
        found = store.claim(request.stage, request.key).manifest
        if found is not None:
            return count, found.ref
    return 0, None


def _write_block(folder: Path, block: "PoolBlock", *, keep_leaving: bool) -> None:
    from safetensors.torch import save_file

    sites = [block.sites[order] for order in sorted(block.sites)]
    write_array(folder / _array(block.index), np.concatenate([site.gram for site in sites])[None])
    rows = [
        {
            "block": block.index,
            "order": order,
            "channels": len(site.magnitude),
            "weight": site.weight,
            "mean_square": site.mean_square,
            "concentration": site.concentration,
            "sequences": site.sequences,
            "tokens": site.tokens,
            "magnitude": site.magnitude.tolist(),
            "peak": site.peak.tolist(),
        }
        for order, site in sorted(block.sites.items())
    ]
    (folder / PART_SITES).write_text(json.dumps(rows), encoding="utf-8")
    if keep_leaving:
        tensors = {
            f"{shard}.{number}": hidden.cpu().contiguous()
            for shard, stream in enumerate(block.leaving)
            for number, hidden in enumerate(stream)
        }
        save_file(tensors, folder / LEAVING)


def _finished_blocks(work: WorkFolder, decoder: "Decoder", shards: int) -> tuple[int, Any]:
    """Return how many blocks an earlier pass has finished, up to the last whose hidden states were kept."""
    from safetensors.torch import load_file

    from covercal.pool_gram import Resumed

    finished = 0
    entering: Path | None = None
    for index in range(len(decoder.blocks)):
        files = [PART_SITES, *(f"{_array(index)}/{name}" for name in ARRAY_FILES)]
        if work.whole(_part(index), files) is None:
            break
        last = work.whole(_part(index), [LEAVING])
        if last is not None:
            finished, entering = index + 1, last
    if entering is None:
        return 0, None
    tensors = load_file(entering / LEAVING, device=str(decoder.device))
    streams: list[dict[int, Any]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        shard, number = name.split(".")
        streams[int(shard)][int(number)] = tensor
    return finished, Resumed(finished, tuple([stream[n] for n in sorted(stream)] for stream in streams))


def _collect(build: Build, blocks: int) -> list[dict[str, Any]]:
    """Put the parts of all blocks into the artifact; returns one row a site."""
    rows: list[dict[str, Any]] = []
    for index in range(blocks):
        part = build.work / _part(index)
        offset = 0
        for row in json.loads((part / PART_SITES).read_bytes()):
            rows.append({**row, "site": len(rows), "offset": offset})
            offset += row["channels"] * (row["channels"] + 1) // 2
        for name in ARRAY_FILES:
            target = build.folder / _array(index) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            share_file(part / _array(index) / name, target)
    plain = ("site", "block", "order", "channels", "offset", *NUMBERS)
    write_table(build.folder / SITES, {name: pa.array([row[name] for row in rows]) for name in plain})
    write_table(
        build.folder / VECTORS,
        {
            "site": pa.array(np.repeat(np.arange(len(rows), dtype=np.int32), [row["channels"] for row in rows])),
            "magnitude": pa.array([value for row in rows for value in row["magnitude"]]),
            "peak": pa.array([value for row in rows for value in row["peak"]]),
        },
    )
    return rows


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _array(index: int) -> str:
    return f"gram-{index:05d}.zarr"


class CachedGram:
    """A `gram` artifact, read one site at a time.

    Parameters
    ----------
    store, ref
        Where it is.
    """

    def __init__(self, store: ArtifactStore, ref: Ref) -> None:
        self._folder = store.path(ref)
        rows = read_table(self._folder / SITES).to_pylist()
        self._rows = {(row["block"], row["order"]): row for row in rows}
        vectors = read_table(self._folder / VECTORS)
        self._vectors = {name: vectors[name].to_numpy() for name in ("magnitude", "peak")}
        ends = np.cumsum([row["channels"] for row in rows])
        self._starts = {row["site"]: int(end) - row["channels"] for row, end in zip(rows, ends, strict=True)}

    def pool_site(self, site: "Site") -> "PoolSite":
        """Return what is kept of a site."""
        from covercal.pool_gram import PoolSite

        row = self._rows[site.block, site.order]
        start = self._starts[row["site"]]
        vectors = {name: values[start : start + row["channels"]] for name, values in self._vectors.items()}
        size = row["channels"] * (row["channels"] + 1) // 2
        found = Columns([self._folder / _array(site.block)]).read(row["offset"], row["offset"] + size)
        gram: npt.NDArray[np.float32] = np.asarray(found, dtype=np.float32)[0]
        return PoolSite(
            gram,
            vectors["magnitude"],
            vectors["peak"],
            *(row[name] for name in NUMBERS),
        )


@dataclass(frozen=True)
class CachedPool:
    """What is cached of a pool, as quantisation reads it (`covercal.quantization.PoolSource`).

    Attributes
    ----------
    store
        Where it is.
    gram, held_out
        Gram matrices of the whole pool, and of the shards that validate.
    statistics
        The pool's statistics, shard by shard, at all linear inputs.
    settings
        What is asked.
    device
        Where matrices are wanted.
    """

    store: ArtifactStore
    gram: Ref | None
    held_out: Ref | None
    statistics_refs: tuple[Ref, ...]
    settings: "Quantization"
    device: "torch.device"

    def statistics(self, site: "Site") -> "SiteStatistics":
        """Return what is cached of a site; see `PoolSource`."""
        from dataclasses import replace

        from covercal.gram import SiteStatistics

        found = SiteStatistics()
        if self._gram is not None:
            found = self._of_grams(site)
        if self.statistics_refs:
            found = replace(found, pool_energy=self._energy(site))
        return found

    def input_scale(self, site: "Site", scale: "Tensor | None") -> float:
        """Return the step of a static grid of a site's inputs; see `PoolSource`."""
        import torch

        from covercal.activations import scale_from_peaks

        columns = self._columns(site)
        folders = [self.store.path(ref) / PEAK for ref in self.statistics_refs]
        peak = torch.from_numpy(np.array(Columns(folders).read(columns.start, columns.stop))).double()
        energy = self._energy(site).cpu()
        if scale is not None:
            peak, energy = peak / scale.cpu(), energy / scale.cpu().square()
        tokens = max(1, self._channels["tokens"] // max(1, peak.shape[0]))
        return scale_from_peaks(peak, float(energy.mean()), tokens, self.settings.activations)

    @cached_property
    def _gram(self) -> CachedGram | None:
        return None if self.gram is None else CachedGram(self.store, self.gram)

    @cached_property
    def _held_out(self) -> CachedGram | None:
        return None if self.held_out is None else CachedGram(self.store, self.held_out)

    def _of_grams(self, site: "Site") -> "SiteStatistics":
        import torch

        from covercal.gram import WIDE_CHANNELS, SiteStatistics
        from covercal.pool_gram import symmetric
        from covercal.quantizers.regularization import ledoit_wolf_share

        if self._gram is None:
            raise ValueError("no Gram matrices of the pool were given")
        kept = self._gram.pool_site(site)
        channels = len(kept.magnitude)
        dtype = torch.float32 if channels > WIDE_CHANNELS else torch.float64
        whole = symmetric(kept.gram, channels, dtype, self.device)
        training = validation = None
        if self._held_out is not None:
            apart = self._held_out.pool_site(site)
            validation = symmetric(apart.gram, channels, dtype, self.device)
            rest = kept.weight - apart.weight
            training = (whole * kept.weight - validation * apart.weight) / rest if rest > 0 else None
        return SiteStatistics(
            gram=whole,
            validation=validation,
            training=training,
            magnitude=torch.from_numpy(kept.magnitude.copy()).to(self.device),
            peak=torch.from_numpy(kept.peak.copy()).to(self.device),
            mean_square=kept.mean_square,
            concentration=kept.concentration,
            ledoit_wolf=ledoit_wolf_share(whole, kept.mean_square, kept.concentration)
            if kept.concentration
            else math.nan,
            sequences=kept.sequences,
            tokens=kept.tokens,
            weight=kept.weight,
        )

    @cached_property
    def _channels(self) -> dict[str, Any]:
        """Return the pool's mean x**2 of all channels, where each site's begin, and the tokens counted."""
        files = [self.store.path(ref) / CHANNELS for ref in self.statistics_refs]
        table = query(
            "SELECT position, any_value(site) AS site, sum(square_sum) / sum(tokens) AS energy, sum(tokens) AS tokens "
            "FROM channels GROUP BY position ORDER BY position",
            {"channels": files},
        )
        sites = table["site"].to_numpy()
        return {"energy": table["energy"].to_numpy(), "sites": sites, "tokens": int(table["tokens"][0].as_py())}

    def _columns(self, site: "Site") -> slice:
        from covercal.errors import QuantizationError

        if not self.statistics_refs:
            raise QuantizationError("the pool's statistics were not given")
        number = self._numbers[site.block, site.order]
        first, stop = np.searchsorted(self._channels["sites"], [number, number + 1])
        return slice(int(first), int(stop))

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], int]:
        """Return the number of every site in the statistics, which count sites in the order of blocks."""
        table = query(
            "SELECT DISTINCT site, block FROM channels ORDER BY site",
            {"channels": [self.store.path(self.statistics_refs[0]) / CHANNELS]},
        ).to_pylist()
        numbers: dict[tuple[int, int], int] = {}
        orders: dict[int, int] = {}
        for row in table:
            order = orders[row["block"]] = orders.get(row["block"], -1) + 1
            numbers[row["block"], order] = row["site"]
        return numbers

    def _energy(self, site: "Site") -> "Tensor":
        import torch

        return torch.from_numpy(self._channels["energy"][self._columns(site)].copy()).to(self.device)


def held_out_shards(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the shards that validate: the last quarter, at least one; none of a single one."""
    count = math.ceil(len(shards) / 4)
    return tuple(shards[-count:]) if len(shards) > 1 else ()
