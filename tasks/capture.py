"""Stage `statistics`: the activations of one shard of samples, reduced to numbers per sample and channel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from covercal.pool import sequences_digest
from storage.arrays import write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import write_table
from tasks.cached import Build, cached
from tasks.identities import ModelIdentity
from tasks.model import original_decoder
from tasks.pool import sample_columns, sample_tokens

if TYPE_CHECKING:
    from covercal.decoder import Site
    from covercal.quantization_settings import Dtype

CHANNELS = "channels.parquet"
PEAK = "peak.zarr"
ENERGY = "energy.zarr"
VARIANCE = "variance.zarr"
MAGNITUDE = "magnitude.zarr"
SKETCH = "sketch.zarr"
FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """Some consecutive samples of a pool.

    Attributes
    ----------
    start, stop
        Their place in the pool.
    tokens
        Digest of their tokens, which alone counts in a key.
    """

    start: int
    stop: int
    tokens: str

    def key_material(self) -> dict[str, str]:
        """Return the tokens' digest."""
        return {"tokens": self.tokens}


def pool_shards(store: ArtifactStore, pool: Ref, size: int) -> tuple[Shard, ...]:
    """Return the shards of a pool, `size` samples each, the last one shorter if need be."""
    digests = sample_columns(store, pool, "digest")["digest"]
    starts = range(0, len(digests), size)
    return tuple(
        Shard(start, min(start + size, len(digests)), sequences_digest(digests[start : start + size]))
        for start in starts
    )


@cached(
    "statistics",
    version=3,
    ignored=("imported", "pool", "device"),
    names={"sites": "statistics.sites", "skip_tokens": "statistics.skip_tokens", "dtype": "model.dtype"},
)
def capture_shard(
    build: Build,
    *,
    model: ModelIdentity,
    imported: Ref | None,
    pool: Ref,
    shard: Shard,
    sites: str,
    skip_tokens: int,
    dtype: "Dtype",
    device: str,
) -> dict[str, Any]:
    """Run a shard through the model once and write `peak`, `energy` and the sums per channel."""
    from covercal.statistics import capture, column_norms, measured_sites

    decoder = original_decoder(build.store, model, imported, dtype, device)
    tokens = sample_tokens(build.store, pool)[shard.start : shard.stop]
    measured = measured_sites(decoder, sites)
    numbers = 2 * len(tokens) * sum(site.channels for site in measured)
    build.store.require_space(FLOAT_BYTES * numbers, f"A statistics shard of {len(tokens)} samples")
    advance = build.progress(len(tokens), "samples")
    names = [str(index) for index in range(shard.start, shard.stop)]
    found = capture(decoder, tokens, names, sites=sites, skip_tokens=skip_tokens, advance=advance)
    write_array(build.folder / PEAK, found.peak)
    write_array(build.folder / ENERGY, found.energy)
    write_array(build.folder / VARIANCE, found.variance)
    write_array(build.folder / MAGNITUDE, found.magnitude)
    write_array(build.folder / SKETCH, found.sketch)
    columns = _site_columns(measured)
    width = found.absolute_sum.size
    columns |= {
        "absolute_sum": pa.array(found.absolute_sum),
        "square_sum": pa.array(found.square_sum),
        "tokens": pa.array(np.repeat(found.site_tokens, [site.channels for site in measured])),
        "peak": pa.array(found.peak.max(axis=0)),
        "column_norm": pa.array(column_norms(decoder, sites)),
    }
    write_table(build.folder / CHANNELS, columns)
    return {"samples": len(tokens), "tokens": found.tokens, "channels": width}


def _site_columns(sites: "tuple[Site, ...]") -> dict[str, pa.Array]:
    """Return the columns that say where each channel is; `position` counts channels over all sites."""
    widths = [site.channels for site in sites]
    return {
        "position": pa.array(np.arange(sum(widths), dtype=np.int32)),
        "site": pa.array(np.repeat(np.arange(len(sites), dtype=np.int32), widths)),
        "block": pa.array(np.repeat(np.array([s.block for s in sites], dtype=np.int32), widths)),
        "channel": pa.array(np.concatenate([np.arange(w, dtype=np.int32) for w in widths])),
        "linears": pa.array(np.repeat(np.array([", ".join(s.linears) for s in sites], dtype=object), widths)),
    }
