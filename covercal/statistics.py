"""Activation statistics: hooks that reduce each site's input to per-sample, per-channel numbers as it passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from covercal.block_pass import expert_of
from covercal.decoder import Decoder, Site, batches, token_tensor
from covercal.errors import ActivationError
from covercal.experts import Expert

BATCH_TOKENS = 1024  # keeps a batch's activations near the processor's caches; a GPU takes more at once
GPU_BATCH_TOKENS = 16384
SKETCH_WIDTH = 64  # as COLA's random projection
SKETCH_SEED = 0  # one projection for all pools: sketches of two pools compare


@dataclass(frozen=True, slots=True)
class ActivationStatistics:
    """What a set of samples does to every channel of every site, columns in the order of the sites.

    Attributes
    ----------
    peak
        float32 (samples, channels of all sites): max over tokens of |x|.
    energy
        float32 (samples, channels of all sites): mean over tokens of x**2, the sample's Gram diagonal.
    variance, magnitude
        float32 (samples, sites): variance of x, and mean of |x|, over all tokens and channels.
    sketch
        float32 (samples, 64): the mean token of each block (its first site), scaled to length 1, all blocks joined
        and projected at random. Cosines of blocks
        are kept up to about one part in seven (Johnson-Lindenstrauss).
    absolute_sum, square_sum
        float64 (channels of all sites,): sums of |x| and x**2 over all samples and tokens.
    tokens
        Tokens that were counted.
    site_tokens
        int64 (sites,): tokens that each site read; an expert reads only those that are routed to it.
    """

    peak: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float32]
    variance: npt.NDArray[np.float32]
    magnitude: npt.NDArray[np.float32]
    sketch: npt.NDArray[np.float32]
    absolute_sum: npt.NDArray[np.float64]
    square_sum: npt.NDArray[np.float64]
    tokens: int
    site_tokens: npt.NDArray[np.int64]


def measured_sites(decoder: Decoder, sites: str) -> tuple[Site, ...]:
    """Return the sites to measure: all (`linear_inputs`), or the first of each block (`block_inputs`, the paper's)."""
    return tuple(s for s in decoder.sites if sites == "linear_inputs" or s.order == 0)


@torch.inference_mode()
def capture(
    decoder: Decoder,
    sequences: Sequence[npt.NDArray[np.int32]],
    names: Sequence[str],
    *,
    sites: str = "linear_inputs",
    skip_tokens: int = 1,
    advance: Callable[[int], None] = lambda samples: None,
) -> ActivationStatistics:
    """Run the samples through the body of the model once and reduce every site's input.

    Parameters
    ----------
    decoder
        The model; its language-model head does not run.
    sequences
        Token ids, one int32 array a sample.
    names
        What to call each sample in an error.
    sites
        `linear_inputs` or `block_inputs`.
    skip_tokens
        First tokens of each sample that do not count (attention sinks fire in every sample).
    advance
        Called with the number of samples of each finished batch.

    Raises
    ------
    ActivationError
        When an activation is NaN or infinite; names site and sample.
    """
    measured = measured_sites(decoder, sites)
    ends = np.cumsum([site.channels for site in measured])
    width = int(ends[-1])
    peak = np.empty((len(sequences), width), dtype=np.float32)
    energy = np.empty((len(sequences), width), dtype=np.float32)
    variance = np.empty((len(sequences), len(measured)), dtype=np.float32)
    magnitude = np.empty_like(variance)
    sketch = np.zeros((len(sequences), SKETCH_WIDTH), dtype=np.float32)
    absolute = np.zeros(width, dtype=np.float64)
    square = np.zeros(width, dtype=np.float64)
    tokens = 0
    site_tokens = np.zeros(len(measured), dtype=np.int64)
    limit = BATCH_TOKENS if decoder.device.type == "cpu" else GPU_BATCH_TOKENS
    for members in batches(sequences, limit):
        batch = token_tensor([sequences[m] for m in members], decoder.device)
        counted = batch.shape[1] - skip_tokens
        reduced, read = _reduce_batch(decoder, measured, batch, skip_tokens)
        site_tokens += read
        peak[members], absolute_batch, square_batch, signed = (part.cpu().numpy() for part in reduced)
        _check_finite(square_batch, measured, ends, [names[m] for m in members])
        energy[members] = square_batch / counted
        for position, (site, end) in enumerate(zip(measured, ends, strict=True)):
            columns = slice(end - site.channels, end)
            mean, power = (part[:, columns].mean(axis=1, dtype=np.float64) / counted for part in (signed, square_batch))
            variance[members, position] = np.maximum(power - mean**2, 0.0)
            magnitude[members, position] = absolute_batch[:, columns].mean(axis=1, dtype=np.float64) / counted
            if site.order == 0:
                sketch[members] += _projected(signed[:, columns], site.block)
        absolute += absolute_batch.sum(axis=0, dtype=np.float64)
        square += square_batch.sum(axis=0, dtype=np.float64)
        tokens += counted * len(members)
        advance(len(members))
    return ActivationStatistics(peak, energy, variance, magnitude, sketch, absolute, square, tokens, site_tokens)


def _projected(sums: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.float32]:
    """Return the directions of (samples, channels) projected by a Gaussian matrix of this block, (samples, 64)."""
    generator = np.random.default_rng([SKETCH_SEED, block])
    gaussian = generator.standard_normal((sums.shape[1], SKETCH_WIDTH), dtype=np.float32) / np.sqrt(SKETCH_WIDTH)
    lengths = np.linalg.norm(sums.astype(np.float64), axis=1, keepdims=True)
    directions = np.divide(sums, lengths, out=np.zeros(sums.shape), where=lengths > 0)
    projected: npt.NDArray[np.float32] = (directions @ gaussian).astype(np.float32)
    return projected


def column_norms(decoder: Decoder, sites: str = "linear_inputs") -> npt.NDArray[np.float32]:
    """Return the L2 norm of every weight column over all linears that read the channel, (channels of all sites,)."""
    norms = []
    for site in measured_sites(decoder, sites):
        squares = sum(decoder.linear(site, name).weight.double().square().sum(dim=0) for name in site.linears)
        norms.append(torch.as_tensor(squares).sqrt().float().cpu().numpy())
    return np.concatenate(norms)


@dataclass(frozen=True, slots=True)
class _Reduced:
    """What is known of a batch, or of one site's inputs in it: float32 (samples, channels) each.

    It is made before the batch runs: small tensors that stay, between large ones that come and go, would keep the
    memory of those from being used again.
    """

    peak: Tensor
    absolute: Tensor
    square: Tensor
    signed: Tensor

    @classmethod
    def of(cls, samples: int, channels: int, device: torch.device) -> Self:
        """Return what an input gives that no token reached."""
        return cls(*(torch.zeros((samples, channels), device=device) for _ in range(4)))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Return the numbers of every sample and channel."""
        return self.peak, self.absolute, self.square, self.signed

    def columns(self, columns: slice) -> "_Reduced":
        """Return those of some channels, in the same memory."""
        return _Reduced(*(part[:, columns] for part in self.parts))


def _reduce_batch(
    decoder: Decoder, sites: Sequence[Site], batch: Tensor, skip_tokens: int
) -> tuple[tuple[Tensor, ...], npt.NDArray[np.int64]]:
    """Return peak and sums of |x|, x**2 and x, float32 (samples, channels of all sites), and each site's tokens."""
    whole = _Reduced.of(len(batch), sum(site.channels for site in sites), batch.device)
    read = np.zeros(len(sites), dtype=np.int64)
    hooks = []
    start = 0
    for position, site in enumerate(sites):
        found = whole.columns(slice(start, start + site.channels))
        start += site.channels
        expert = expert_of(decoder.blocks[site.block], site)
        hook = _reducer(found, read[position : position + 1], skip_tokens, batch.shape, expert)
        hooks.append(decoder.linear(site, site.linears[0]).register_forward_pre_hook(hook))
    try:
        decoder.body(input_ids=batch, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    return whole.parts, read


def _reducer(
    found: _Reduced, read: npt.NDArray[np.int64], skip_tokens: int, shape: torch.Size, expert: Expert | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that reduces what a site reads into `found`, and counts its tokens in `read` (1,)."""
    samples, length = shape

    def reduce(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(samples, length, -1)[:, skip_tokens:]
        magnitude = x.abs().float()
        torch.amax(magnitude, dim=1, out=found.peak)
        torch.sum(magnitude, dim=1, out=found.absolute)
        torch.sum(x, dim=1, dtype=torch.float32, out=found.signed)
        torch.sum(magnitude.square_(), dim=1, out=found.square)  # in place: five times faster than a norm
        read[0] = x.shape[0] * x.shape[1]

    def reduce_some(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if expert is not None and expert.tokens is not None:
            read[0] = _reduce_rows(found, inputs[0], expert.tokens, length, skip_tokens)

    return reduce if expert is None else reduce_some


def _reduce_rows(found: _Reduced, x: Tensor, rows: Tensor, length: int, skip_tokens: int) -> int:
    """Reduce the tokens that an expert reads, (tokens, channels); `rows` says where each stands in the batch."""
    counted = rows % length >= skip_tokens
    owner, kept = (rows // length)[counted], x[counted].float()
    magnitude = kept.abs()
    found.peak.scatter_reduce_(0, owner[:, None].expand_as(magnitude), magnitude, "amax")
    found.absolute.index_add_(0, owner, magnitude)
    found.square.index_add_(0, owner, magnitude.square())
    found.signed.index_add_(0, owner, kept)
    return len(kept)


def _check_finite(
    square: npt.NDArray[np.float32], sites: Sequence[Site], ends: npt.NDArray[np.int64], names: Sequence[str]
) -> None:
    bad = ~np.isfinite(square)
    if bad.any():
        sample, column = (int(i) for i in np.argwhere(bad)[0])
        position = int(np.searchsorted(ends, column, side="right"))
        channel = column - int(ends[position] - sites[position].channels)
        raise ActivationError(
            f"Activation at {sites[position].name}, channel {channel}, is NaN or infinite for sample {names[sample]}; "
            "a wider dtype (model.dtype: bfloat16 or float32) usually cures an overflow, not a damaged weight."
        )
