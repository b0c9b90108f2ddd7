"""The pool's own Gram matrices at full precision: one pass of the original model, block by block."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from covercal.calibration import Calibration, Memory, Tokens, block_sums, start_calibration
from covercal.decoder import Decoder, Site
from covercal.gram import SiteStatistics, Wanted, mirror
from covercal.hidden_states import HiddenStates, aligned
from covercal.memory import release_freed
from covercal.quantization_settings import Dtype


@dataclass(frozen=True, slots=True)
class PoolSite:
    """What is kept of one site's inputs over a pool.

    Attributes
    ----------
    gram
        float32 (channels * (channels + 1) / 2,): the upper triangle, row by row, of the weighted mean over tokens of
        x x^T.
    magnitude, peak
        float64 (channels,): weighted mean, and largest, |x|.
    weight
        Sum of the tokens' weights.
    mean_square, concentration
        As in `SiteStatistics`; 0 when they were not asked for.
    sequences, tokens
        What went into it.
    """

    gram: npt.NDArray[np.float32]
    magnitude: npt.NDArray[np.float64]
    peak: npt.NDArray[np.float64]
    weight: float
    mean_square: float
    concentration: float
    sequences: int
    tokens: int


def upper_triangle(matrix: Tensor) -> npt.NDArray[np.float32]:
    """Return the upper triangle of a symmetric matrix row by row, float32."""
    values = matrix.float().cpu().numpy()
    return np.concatenate([values[row, row:] for row in range(len(values))])


def symmetric(triangle: npt.NDArray[np.float32], channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (channels, channels) of an upper triangle."""
    values = np.empty((channels, channels), dtype=np.float32)
    start = 0
    for row in range(channels):
        values[row, row:] = triangle[start : start + channels - row]
        start += channels - row
    matrix = torch.from_numpy(values).to(device, dtype)
    mirror(matrix.T)
    return matrix


def merged(kept: PoolSite, added: PoolSite) -> PoolSite:
    """Return the site over both sets of sequences; rounded to float32 again, so that the order of merging matters."""
    whole = kept.weight + added.weight
    share = added.weight / whole if whole else 0.0
    gram = (1.0 - share) * kept.gram.astype(np.float64) + share * added.gram
    return PoolSite(
        gram.astype(np.float32),
        (1.0 - share) * kept.magnitude + share * added.magnitude,
        np.maximum(kept.peak, added.peak),
        whole,
        (1.0 - share) * kept.mean_square + share * added.mean_square,
        (1.0 - share) ** 2 * kept.concentration + share**2 * added.concentration,
        kept.sequences + added.sequences,
        kept.tokens + added.tokens,
    )


@dataclass(frozen=True, slots=True)
class PoolBlock:
    """What one block adds.

    Attributes
    ----------
    index
        Its place.
    sites
        By order.
    leaving
        For every shard, what enters the next block; empty after the last.
    """

    index: int
    sites: Mapping[int, PoolSite]
    leaving: tuple[HiddenStates, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a pass that was cut short goes on: the first block to do, and `PoolBlock.leaving` of the one before."""

    index: int
    entering: tuple[Sequence[Tensor], ...]


def sum_pool(
    decoder: Decoder,
    shards: Sequence[Sequence[Tokens]],
    kept: Callable[[Site], PoolSite | None],
    *,
    by_sequence: bool,
    spread: bool,
    memory: Memory,
    resumed: Resumed | None = None,
) -> Iterator[PoolBlock]:
    """Run shards through the original model once, and add what each site reads to what is kept of earlier shards.

    Shard after shard is added, and the sum rounded to float32 after each: a pool that grew has the same bytes as one
    that was summed at once.

    Parameters
    ----------
    kept
        Returns what is kept of earlier shards for a site; None when there are none.
    by_sequence
        Every sequence weighs the same, not every token.
    spread
        Whether to measure how much the sequences differ, for Ledoit-Wolf shrinkage; the pass is slower with it.
    memory
        Where hidden states go, in equal parts for the shards.
    """
    running = _start(decoder, shards, memory, by_sequence=by_sequence)
    if resumed is not None:
        for calibration, entering in zip(running, resumed.entering, strict=True):
            for number, hidden in enumerate(entering):
                calibration.hidden[number] = aligned(hidden)
    wanted = Wanted(gram=True, magnitude=True, peak=True, spread=spread)
    for index in range(0 if resumed is None else resumed.index, len(decoder.blocks)):
        yield _sum_block(decoder, index, running, kept, wanted)
        release_freed()


@torch.inference_mode()
def _start(
    decoder: Decoder, shards: Sequence[Sequence[Tokens]], memory: Memory, *, by_sequence: bool
) -> list[Calibration]:
    dtype: Dtype = str(decoder.model.dtype).removeprefix("torch.")  # type: ignore[assignment]  # one of the three
    share = None if memory.limit is None else memory.limit // max(len(shards), 1)
    return [
        start_calibration(
            decoder,
            shard,
            by_sequence=by_sequence,
            compares=False,
            storage_dtype=dtype,
            longest=1,  # one weight for the sequences of all shards
            memory=Memory(share, None if memory.folder is None else memory.folder / str(number)),
        )
        for number, shard in enumerate(shards)
    ]


@torch.inference_mode()  # not around the generator: that would hold each block while the next one is made
def _sum_block(
    decoder: Decoder,
    index: int,
    running: Sequence[Calibration],
    kept: Callable[[Site], PoolSite | None],
    wanted: Wanted,
) -> PoolBlock:
    block, last = decoder.block(index), index + 1 == len(decoder.blocks)
    sites = decoder.block_sites(index)
    found = {site.order: kept(site) for site in sites}
    for calibration in running:
        sums = block_sums(block, sites, calibration, wanted, advance=not last)
        for order in list(sums):
            added = _pool_site(sums.pop(order).statistics())
            before = found[order]
            found[order] = added if before is None else merged(before, added)
    leaving = () if last else tuple(calibration.hidden.snapshot() for calibration in running)
    return PoolBlock(index, {order: site for order, site in found.items() if site is not None}, leaving)


def _pool_site(found: SiteStatistics) -> PoolSite:
    if found.gram is None or found.magnitude is None or found.peak is None:
        raise ValueError("a site of the pool needs its Gram matrix and the sizes of its inputs")
    return PoolSite(
        upper_triangle(found.gram),
        found.magnitude.cpu().numpy(),
        found.peak.cpu().numpy(),
        found.weight,
        0.0 if math.isnan(found.mean_square) else found.mean_square,
        0.0 if math.isnan(found.concentration) else found.concentration,
        found.sequences,
        found.tokens,
    )
