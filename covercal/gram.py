"""What quantisation needs to know of a site's inputs, summed over calibration sequences as they pass.

The Gram matrix is H = mean over tokens of x x^T, every token weighing 1, or every sequence the same. Any positive
multiple gives the same rounding: all regularisation is relative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covercal.quantizers.regularization import ledoit_wolf_share, off_diagonal_square

WIDE_CHANNELS = 8192  # above it, sums are kept in float32: a float64 matrix alone would take more than half a gigabyte
PANEL_COLUMNS = 2048  # of a product that is made before it is added
PANEL_ROWS = 1024  # of a weight that is widened for a product
SYMMETRIC_COLUMNS = 256  # of one that is symmetric, of which only what is at and below these columns' diagonal is made
VALIDATION_EVERY = 4  # every fourth sequence validates
BINS_PER_OCTAVE = 32
LOWEST_OCTAVE, HIGHEST_OCTAVE = -40, 24  # of |x|, for static activation ranges


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sums are kept beside the Gram matrix.

    Attributes
    ----------
    validation
        A second Gram matrix, of every fourth sample.
    spread
        How much the samples' own Gram matrices differ (Ledoit-Wolf).
    nested
        Whether sequences that follow each other may be prefixes of one sample, whose Gram matrix is that of all of
        them; it is held until the next sample comes.
    magnitude, peak
        Mean, and largest, |x| of each channel.
    drift
        Cross products with the original model's inputs.
    drift_energy
        The Gram matrix of the differences from them.
    histogram
        How often |x| is how large.
    gram
        The Gram matrix itself.
    """

    gram: bool = True
    validation: bool = False
    spread: bool = False
    nested: bool = False
    magnitude: bool = False
    peak: bool = False
    drift: bool = False
    drift_energy: bool = False
    histogram: bool = False


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """The inputs of one site as quantisation sees them; what was not asked for is None.

    Attributes
    ----------
    gram
        (channels, channels): weighted mean over tokens of x x^T.
    validation
        The same over held-out sequences alone; `training` is then the same over the others.
    training
        See `validation`.
    magnitude, peak
        (channels,): mean (weighted) and largest |x|.
    drift, drift_energy
        (channels, channels): weighted means of dX X^T and dX dX^T, dX what the original model's inputs have more.
    outputs_drift, outputs_drift_energy
        In their place, where weights W of the site were given: W dX X^T, (rows, channels), and ||W dX||^2 of each.
    pool_energy
        (channels,): mean over the pool's tokens of x**2 at full precision.
    mean_square, concentration
        See `ledoit_wolf_share`.
    ledoit_wolf
        The share of shrinkage that they ask for; NaN when they were not measured.
    sequences, tokens, weight
        What the sums are over, and the sum of the tokens' weights.
    histogram
        int64 (bins,): how many |x| lie in each of the bins of `bin_values`; zeros are not counted.
    largest
        Largest |x|; NaN where an input is, or where no histogram was asked for.
    note
        What they are otherwise than asked, and why.
    """

    gram: Tensor | None = None
    validation: Tensor | None = None
    training: Tensor | None = None
    magnitude: Tensor | None = None
    peak: Tensor | None = None
    drift: Tensor | None = None
    drift_energy: Tensor | None = None
    outputs_drift: tuple[Tensor, ...] | None = None
    outputs_drift_energy: tuple[float, ...] | None = None
    pool_energy: Tensor | None = None
    mean_square: float = math.nan
    concentration: float = math.nan
    ledoit_wolf: float = math.nan
    sequences: int = 0
    tokens: int = 0
    weight: float = 0.0
    histogram: Tensor | None = None
    largest: float = math.nan
    note: str = ""

    def single(self) -> "SiteStatistics":
        """Return the statistics with all matrices in float32, which is what rounding computes in."""

        def narrowed(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.float()

        return replace(
            self,
            gram=narrowed(self.gram),
            validation=narrowed(self.validation),
            training=narrowed(self.training),
            drift=narrowed(self.drift),
            drift_energy=narrowed(self.drift_energy),
            outputs_drift=None if self.outputs_drift is None else tuple(each.float() for each in self.outputs_drift),
        )

    def scaled(self, scale: Tensor) -> "SiteStatistics":
        """Return the statistics of inputs that are divided by a scale (channels,).

        The histogram and the spread of the sequences are not kept, since they do not follow from what is known, nor is
        what is known of the outputs, which nothing reads there.
        """
        outer = torch.outer(scale, scale)

        def over(value: Tensor | None, by: Tensor) -> Tensor | None:
            return None if value is None else value / by.to(value.dtype)

        return replace(
            self,
            gram=over(self.gram, outer),
            validation=over(self.validation, outer),
            training=over(self.training, outer),
            drift=over(self.drift, outer),
            drift_energy=over(self.drift_energy, outer),
            magnitude=over(self.magnitude, scale),
            peak=over(self.peak, scale),
            pool_energy=over(self.pool_energy, scale.square()),
            outputs_drift=None,
            outputs_drift_energy=None,
            mean_square=math.nan,
            concentration=math.nan,
            ledoit_wolf=math.nan,
            histogram=None,
            largest=math.nan,
        )


class SiteSums:
    """Running sums over one site's inputs.

    Parameters
    ----------
    channels
        Of the site.
    device
        Where the inputs are.
    wanted
        What to sum.
    weights
        (rows, channels) of the site's linears. Where they have fewer rows than channels together, what is wanted of the
        drift is summed as it appears in their outputs: in less memory, and in less time where they have less than three
        quarters of them.
    """

    def __init__(self, channels: int, device: torch.device, wanted: Wanted, weights: Sequence[Tensor] = ()) -> None:
        self._wanted = wanted
        self._dtype = torch.float32 if channels > WIDE_CHANNELS else torch.float64
        self._shape, self._device = (channels, channels), device
        self._total = self._matrix(wanted.gram)
        self._validation = self._matrix(wanted.validation)
        self._weights = weights if wanted.drift and 0 < sum(map(len, weights)) < channels else ()
        self._drift = self._matrix(wanted.drift and not self._weights)
        self._drift_energy = self._matrix(wanted.drift_energy and not self._weights)
        self._outputs_drift = tuple(torch.zeros(w.shape, dtype=self._dtype, device=device) for w in self._weights)
        self._outputs_drift_energy = torch.zeros(len(self._weights), dtype=torch.float64, device=device)
        self._absolute = torch.zeros(channels, dtype=torch.float64, device=device) if wanted.magnitude else None
        self._peak = torch.zeros(channels, dtype=torch.float32, device=device) if wanted.peak else None
        bins = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE
        self._histogram = torch.zeros(bins, dtype=torch.int64, device=device) if wanted.histogram else None
        self._largest = torch.zeros((), device=device)
        self._weight = self._validation_weight = 0.0
        self._square = self._weight_square = 0.0  # sums over samples, for their spread
        self._open: tuple[int, Tensor, float] | None = None  # a sample, its own Gram matrix and weight so far
        self.sequences = self.tokens = 0

    @property
    def by_sequence(self) -> bool:
        """Return whether sequences are told apart."""
        return self._total is not None and (self._wanted.validation or self._wanted.spread)

    def add(
        self,
        x: Tensor,
        *,
        weight: float = 1.0,
        original: Tensor | None = None,
        samples: Sequence[int] | None = None,
        sequences: int | None = None,
    ) -> None:
        """Add the inputs of some sequences: products in float32, sums in float64.

        Parameters
        ----------
        x
            (sequences, tokens, channels).
        weight
            Of each token: 1 for GPTQ, where a long sequence counts for more than a short one (arXiv 2210.17323); the
            inverse of the sequence's length, up to one factor for all, for MaCa (arXiv 2602.07465).
        original
            The original model's inputs at the same tokens.
        samples
            Number of the sample that each sequence is, or is a prefix of; it decides which ones validate. None: they
            are the first samples.
        sequences
            How many they are, where they lie in `x` as one, which only sums that are not `by_sequence` take. None: as
            many as `x` has.
        """
        by_sequence = x.float()
        flat = by_sequence.reshape(-1, x.shape[-1])
        self._add_ends(flat, weight)
        if self._total is not None:
            self._add_products(by_sequence, flat, weight, range(len(x)) if samples is None else samples)
        if original is not None and self._wanted.drift:
            self._add_drift(original.float().reshape(flat.shape) - flat, flat, weight)
        self._weight += weight * flat.shape[0]
        self.sequences += x.shape[0] if sequences is None else sequences
        self.tokens += flat.shape[0]

    def statistics(self) -> SiteStatistics:
        """Return the means of what was added; the sums become them, so that this is the end of adding."""
        self._end_sample()
        whole = self._weight or 1.0
        total, validation = self._total, self._validation
        for sums in (total, self._drift_energy):
            if sums is not None:
                mirror(sums)
        mean_square = concentration = share = math.nan
        if self._wanted.spread and total is not None and self._weight:
            mean_square, concentration = self._square / whole, self._weight_square / whole**2
            share = ledoit_wolf_share(total / whole, mean_square, concentration)
        held_out = self._validation_weight
        trained = self._weight - held_out
        return SiteStatistics(
            training=None if total is None or validation is None or not trained else (total - validation) / trained,
            gram=None if total is None else total.div_(whole),
            validation=None if validation is None or not held_out else validation.div_(held_out),
            magnitude=None if self._absolute is None else self._absolute / whole,
            peak=None if self._peak is None else self._peak.double(),
            drift=None if self._drift is None else self._drift.div_(whole),
            drift_energy=None if self._drift_energy is None else self._drift_energy.div_(whole),
            outputs_drift=tuple(each.div_(whole) for each in self._outputs_drift) or None,
            outputs_drift_energy=self._energies(whole),
            mean_square=mean_square,
            concentration=concentration,
            ledoit_wolf=share,
            sequences=self.sequences,
            tokens=self.tokens,
            weight=self._weight,
            histogram=self._histogram,
            largest=float(self._largest) if self._histogram is not None else math.nan,
        )

    def _matrix(self, wanted: bool) -> Tensor | None:
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device) if wanted else None

    def _add_ends(self, flat: Tensor, weight: float) -> None:
        if self._absolute is None and self._peak is None and self._histogram is None:
            return
        magnitude = flat.abs()
        if self._absolute is not None:
            self._absolute.add_(magnitude.sum(dim=0, dtype=torch.float64), alpha=weight)
        if self._peak is not None and len(flat):
            self._peak = torch.maximum(self._peak, magnitude.amax(dim=0))
        if self._histogram is not None and len(flat):
            self._largest = torch.maximum(self._largest, magnitude.max())
            positive = magnitude[magnitude > 0]
            bins = ((positive.log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor_().clamp_(0, len(self._histogram) - 1)
            self._histogram += torch.bincount(bins.long(), minlength=len(self._histogram))

    def _add_drift(self, difference: Tensor, flat: Tensor, weight: float) -> None:
        if self._drift is not None:
            add_product(self._drift, difference, flat, weight)
        if self._drift_energy is not None:
            add_square(self._drift_energy, difference, weight)
        for index, (matrix, total) in enumerate(zip(self._weights, self._outputs_drift, strict=True)):
            for start in range(0, len(matrix), PANEL_ROWS):
                rows = slice(start, start + PANEL_ROWS)
                outputs = difference @ matrix[rows].float().T
                total[rows].add_(outputs.T @ flat, alpha=weight)
                if self._wanted.drift_energy:
                    self._outputs_drift_energy[index] += weight * outputs.square_().sum(dtype=torch.float64)

    def _energies(self, whole: float) -> tuple[float, ...] | None:
        if not self._wanted.drift_energy or not self._weights:
            return None
        return tuple((self._outputs_drift_energy / whole).tolist())

    def _add_products(self, by_sequence: Tensor, flat: Tensor, weight: float, samples: Sequence[int]) -> None:
        """Add x x^T, one sequence at a time where sequences have to be told apart."""
        total = self._total
        if total is None:
            return
        if not self.by_sequence:
            add_square(total, flat, weight)
            return
        for sample, x in zip(samples, by_sequence, strict=True):
            product = x.T @ x
            total.add_(product, alpha=weight)
            if self._wanted.spread and len(x):
                self._add_own(sample, product.double() / len(x), weight * len(x))
            if self._validation is not None and sample % VALIDATION_EVERY == VALIDATION_EVERY - 1:
                self._validation.add_(product, alpha=weight)
                self._validation_weight += weight * len(x)

    def _add_own(self, sample: int, own: Tensor, weight: float) -> None:
        """Add a sequence's own Gram matrix to that of its sample."""
        if self._open is not None and self._open[0] == sample:
            _, before, earlier = self._open
            own, weight = (before * earlier + own * weight) / (earlier + weight), earlier + weight
        else:
            self._end_sample()
        self._open = sample, own, weight
        if not self._wanted.nested:
            self._end_sample()

    def _end_sample(self) -> None:
        """Let the sample that is whole by now count for the spread."""
        if self._open is None:
            return
        _, own, weight = self._open
        self._open = None
        self._square += weight * off_diagonal_square(own)
        self._weight_square += weight**2


def add_product(total: Tensor, a: Tensor, b: Tensor, weight: float) -> None:
    """Add weight * a^T b, (channels, channels), to a sum; float32 products, some columns at a time."""
    for start in range(0, b.shape[1], PANEL_COLUMNS):
        columns = slice(start, start + PANEL_COLUMNS)
        total[:, columns].add_(a.T @ b[:, columns], alpha=weight)


def add_square(total: Tensor, x: Tensor, weight: float) -> None:
    """Add weight * x^T x to the lower triangle of a sum (and to a part of the upper one); float32 products."""
    for start in range(0, x.shape[1], SYMMETRIC_COLUMNS):
        columns = slice(start, start + SYMMETRIC_COLUMNS)
        total[start:, columns].add_(x[:, start:].T @ x[:, columns], alpha=weight)


def mirror(matrix: Tensor) -> None:
    """Write the lower triangle of a matrix over its upper one."""
    for start in range(0, len(matrix), SYMMETRIC_COLUMNS):
        end = start + SYMMETRIC_COLUMNS
        block = matrix[start:end, start:end]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[start:end, end:] = matrix[end:, start:end].T


def bin_values(device: torch.device) -> Tensor:
    """Return the middle (geometric) of every bin of a histogram of |x|, float64 (bins,)."""
    count = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE
    return torch.exp2((torch.arange(count, device=device).double() + 0.5) / BINS_PER_OCTAVE + LOWEST_OCTAVE)
