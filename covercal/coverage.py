"""Weighted coverage of outlier channels, maximised greedily (COVERCAL, arXiv 2604.24008, eq. 4 and algorithm 1)."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BoolMatrix = npt.NDArray[np.bool_]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
FIXED_POINT_BITS = 62  # the whole weight fills 62 bits of an int64: nine bits finer than a float64 sum
RESOLUTION_BITS = 54  # when what is uncovered falls below this, the grid is made finer
STRIP_ROWS = 1024
SPARSE_SHARE = 0.25  # of the bytes may be filled for lists of all channels at once to be faster than one by one
LISTED_BYTES = 2**24  # at most so many, for their memory: 400 MB while they are made
LISTS_AT_ONCE = 4096
KEPT_SAMPLES = 2**24  # in the lists of single channels, for their memory: 130 MB
TABLE_SHARE = 0.8  # where eight channels fire more often than this, a table of their sums is faster than lists
LISTING_SHARE = 0.7  # finding what fires a channel takes as long as subtracting from this share of all samples
BYTE_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int64)  # (256, 8)


@dataclass(frozen=True, slots=True)
class PackedBits:
    """A coverage matrix of one bit an entry, as numpy.packbits packs rows.

    Attributes
    ----------
    bits
        uint8 (samples, ceil(channels / 8)).
    channels
        Columns of the matrix.
    """

    bits: npt.NDArray[np.uint8]
    channels: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return (samples, channels)."""
        return len(self.bits), self.channels

    def __getitem__(self, sample: int) -> Bools:
        return np.unpackbits(self.bits[sample], count=self.channels).view(bool)

    @classmethod
    def packing(cls, matrix: BoolMatrix) -> "PackedBits":
        """Return a bool matrix (samples, channels), packed."""
        return cls(np.packbits(matrix, axis=1), matrix.shape[1])

    def unpacked(self) -> BoolMatrix:
        """Return the bool matrix, eight times as large."""
        return np.unpackbits(self.bits, axis=1, count=self.channels).view(bool)


@dataclass(frozen=True, slots=True)
class Cover:
    """A greedy order of samples.

    Attributes
    ----------
    order
        int64 (budget,), sample indices as chosen.
    gains
        float64 (budget,), weight that each sample newly covered in its round.
    rounds
        int64 (budget,), 0 for the first round of coverage, 1 for the second …
    """

    order: Int64
    gains: Floats
    rounds: Int64


def greedy_cover(coverage: BoolMatrix | PackedBits, weights: Floats, budget: int) -> Cover:
    """Choose samples one by one, each time the one that newly covers the most weight.

    Ties go to the lowest index. When no sample is left that gains anything, all channels count as uncovered
    again and the next round begins (multi-cover); samples that fire nothing come last, by index.

    Parameters
    ----------
    coverage
        bool (samples, channels): sample fires channel; packed bits where that would not fit into memory.
    weights
        (channels,), finite and not negative.
    budget
        Samples to choose, at most all of them.

    Returns
    -------
    Cover
        The same order as plain greedy, which recomputes every gain at every step.

    Raises
    ------
    ValueError
        When shapes do not match, a weight is negative or not finite, or the budget does not fit.

    Notes
    -----
    Gains are kept as integers: a weight is rounded to a grid of 2**-62 of the total (at most 2**-54 of what is still
    uncovered), finer than what a float64 sum resolves, and integer sums do not depend on their order. So gains can be
    *updated* (each channel is subtracted once when it becomes covered) instead of recomputed, and still compare
    exactly; ties are true ties. The cost of a round is one pass over the matrix, whatever the budget. It does what
    lazy greedy is for, without its worst case.
    """
    coverage, weights = _checked(coverage, weights, budget)
    channels = _Channels(coverage)
    left = np.ones(coverage.shape[0], dtype=bool)
    uncovered = np.ones(coverage.shape[1], dtype=bool)
    firing = channels.fires.copy()  # samples left that fire each channel
    whole = firing > 0
    fixed, gain = _first_gains(channels, weights, whole, left)
    whole_fixed, whole_gain = fixed, gain.copy()  # every round begins with these, while each channel has a sample left
    uncovered_total = int(fixed.sum())
    order: list[int] = []
    gains: list[float] = []
    rounds: list[int] = []
    current = 0
    while len(order) < budget:
        if uncovered_total < 2**RESOLUTION_BITS:  # little is left: weigh it on a finer grid
            weighed = uncovered & (firing > 0)
            if np.array_equal(weighed, whole):
                fixed, gain = whole_fixed, np.where(left, whole_gain, -1)
            else:
                fixed, gain = _first_gains(channels, weights, weighed, left)
            uncovered_total = int(fixed.sum())
        best = int(np.argmax(gain))
        if gain[best] <= 0:
            if uncovered.all():
                break  # no sample left fires anything that weighs
            uncovered[:] = True
            current += 1
            uncovered_total = 0
            continue
        new = np.flatnonzero(coverage[best] & uncovered)
        order.append(best)
        gains.append(math.fsum(weights[new]))
        rounds.append(current)
        uncovered[new] = left[best] = False
        uncovered_total -= int(fixed[new].sum())
        firing -= coverage[best]
        channels.subtract(gain, fixed, new)
        gain[best] = -1
    idle = np.flatnonzero(left)[: budget - len(order)]
    return Cover(
        np.concatenate([np.asarray(order, dtype=np.int64), idle]),
        np.concatenate([np.asarray(gains, dtype=np.float64), np.zeros(idle.size)]),
        np.concatenate([np.asarray(rounds, dtype=np.int64), np.full(idle.size, current)]),
    )


def greedy_soft_cover(coverage: BoolMatrix | PackedBits, weights: Floats, budget: int) -> tuple[Int64, Floats]:
    """Choose samples one by one to maximise the sum over channels of w * log(1 + chosen samples that fire it).

    A channel's n-th sample adds w * log((n + 1) / n): the objective is monotone and submodular, greedy comes within
    1 - 1/e of the best choice, and there are no rounds. Ties go to the lowest index.

    Parameters
    ----------
    coverage
        bool (samples, channels): sample fires channel.
    weights
        (channels,), finite and not negative.
    budget
        Samples to choose, at most all of them.

    Returns
    -------
    order
        int64 (budget,), sample indices as chosen.
    gains
        float64 (budget,), what each added to the objective.

    Raises
    ------
    ValueError
        When shapes do not match, a weight is negative or not finite, or the budget does not fit.

    Notes
    -----
    Integers as in `greedy_cover`, on a grid of 2**-62 of what all channels' first samples are worth together: what a
    chosen sample's channels lose is subtracted from every sample that fires them. A sample whose channels are all
    lighter than that grid counts as one that fires nothing.
    """
    coverage, weights = _checked(coverage, weights, budget)
    channels = _Channels(coverage)
    worth = weights * math.log(2)  # what one more sample adds, by channel
    chosen = np.zeros(coverage.shape[1], dtype=np.int64)
    exponent = FIXED_POINT_BITS - math.frexp(math.fsum(worth))[1]
    fixed = np.rint(np.ldexp(worth, exponent)).astype(np.int64)
    lost = -fixed
    gain = np.zeros(coverage.shape[0], dtype=np.int64)
    channels.subtract(gain, lost, np.flatnonzero(fixed))
    order = np.empty(budget, dtype=np.int64)
    gains = np.empty(budget, dtype=np.float64)
    for rank in range(budget):
        best = int(np.argmax(gain))
        fired = np.flatnonzero(coverage[best])
        order[rank], gains[rank] = best, math.fsum(worth[fired])
        chosen[fired] += 1
        worth[fired] = weights[fired] * np.log1p(1 / (chosen[fired] + 1))
        now = np.rint(np.ldexp(worth[fired], exponent)).astype(np.int64)
        lost[fired] = fixed[fired] - now
        fixed[fired] = now
        channels.subtract(gain, lost, fired[lost[fired] > 0])
        gain[best] = -1
    return order, gains


def covered_channels(coverage: BoolMatrix, chosen: Int64) -> Bools:
    """Return bool (channels,): which channels at least one chosen sample fires."""
    return np.asarray(coverage[chosen].any(axis=0))


def expected_random_coverage(coverage: BoolMatrix, weights: Floats, budget: int) -> tuple[float, float]:
    """Return the expected (channel share, weight share) that `budget` random samples cover, exactly.

    A channel that n of N samples fire is missed by K samples drawn without replacement with probability
    C(N-n, K) / C(N, K).
    """
    samples = coverage.shape[0]
    fires = coverage.sum(axis=0)
    log_missed = np.full(samples + 1, -np.inf)
    for count in range(samples - budget + 1):
        log_missed[count] = _log_choose(samples - count, budget) - _log_choose(samples, budget)
    hit = 1.0 - np.exp(log_missed[fires])
    total = float(weights.sum())
    return float(hit.mean()) if hit.size else 0.0, float(hit @ weights) / total if total else 0.0


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _checked(coverage: BoolMatrix | PackedBits, weights: Floats, budget: int) -> tuple[PackedBits, Floats]:
    if not isinstance(coverage, PackedBits):
        matrix = np.asarray(coverage, dtype=bool)
        if matrix.ndim != 2:
            raise ValueError(f"coverage {matrix.shape} must be (samples, channels)")
        coverage = PackedBits.packing(matrix)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != coverage.shape[1:]:
        raise ValueError(
            f"coverage {coverage.shape} and weights {weights.shape} must be (samples, channels) and (channels,)"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite and not negative")
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total):
        raise ValueError("the sum of the weights must be finite")
    if not 0 <= budget <= coverage.shape[0]:
        raise ValueError(f"budget {budget} must lie between 0 and the number of samples, {coverage.shape[0]}")
    return coverage, weights


class _Channels:
    """A coverage matrix made ready for taking whole channels from all samples' gains."""

    def __init__(self, coverage: PackedBits) -> None:
        self._bytes = _transposed(coverage.bits)
        sparse = np.count_nonzero(self._bytes) <= min(SPARSE_SHARE * self._bytes.size, LISTED_BYTES)
        self._lists = _Lists(self._bytes) if sparse else None
        self._samples: dict[int, Int64] = {}  # of a full matrix: that fire a channel; found when first needed
        self._room = KEPT_SAMPLES
        fires = self._counted() if self._lists is None else self._lists.counts
        self.fires = fires[: coverage.channels]
        listing = 0 if self._lists is not None else math.ceil(LISTING_SHARE * coverage.shape[0])
        self._cost = fires + listing  # of taking each channel by its list: samples touched, and to be looked through
        self._tables = bool((self._cost.reshape(-1, 8).sum(axis=1) > TABLE_SHARE * coverage.shape[0]).any())

    def _counted(self) -> Int64:
        counts = np.array([np.bincount(row, minlength=256) for row in self._bytes], dtype=np.int64).reshape(-1, 256)
        return (counts @ BYTE_BITS).reshape(-1)

    def subtract(self, gain: Int64, fixed: Int64, channels: Int64) -> None:
        """Take the weight of each channel (sorted) from the gain of every sample that fires it, in place.

        The channels of one byte go together where they fire often or their lists are still to be made, by a table of
        the 256 sums such a byte can make.
        """
        if not self._tables:
            self._subtract_lists(gain, fixed, channels)
            return
        places = channels >> 3
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        often = np.add.reduceat(self._cost[channels], starts) > TABLE_SHARE * gain.size if starts.size else starts > 0
        by_table = np.repeat(often, np.diff(starts, append=channels.size))
        self._subtract_lists(gain, fixed, channels[~by_table])
        weights = np.zeros((len(self._bytes), 8), dtype=np.int64)
        tabled = channels[by_table]
        weights.reshape(-1)[tabled] = fixed[tabled]
        if self._room > 0:  # asked for again, a list is worth making
            self._cost[tabled] -= (self._cost[tabled] - self.fires[tabled]) // 2
        together = places[starts[often]]
        for place, sums in zip(together, weights[together] @ BYTE_BITS.T, strict=True):
            gain -= sums.take(self._bytes[place])

    def _subtract_lists(self, gain: Int64, fixed: Int64, channels: Int64) -> None:
        if self._lists is not None:
            for start in range(0, channels.size, LISTS_AT_ONCE):
                some = channels[start : start + LISTS_AT_ONCE]
                np.subtract.at(gain, self._lists.samples(some), np.repeat(fixed[some], self._lists.counts[some]))
            return
        for channel in channels:
            np.subtract.at(gain, self._fired_by(int(channel)), fixed[channel])

    def _fired_by(self, channel: int) -> Int64:
        found = self._samples.get(channel)
        if found is None:
            found = np.flatnonzero(self._bytes[channel >> 3] & (128 >> (channel & 7)) != 0)
            if self._room > 0:
                self._room -= found.size
                self._samples[channel] = found
                self._cost[channel] = self.fires[channel]
        return found


class _Lists:
    """The samples that fire each channel of a matrix with few ones, found for all channels at once.

    Parameters
    ----------
    turned
        uint8 (bytes of a row, samples): the packed matrix, transposed.

    Attributes
    ----------
    counts
        int64 (channels, filled up to whole bytes): samples that fire each.
    """

    def __init__(self, turned: npt.NDArray[np.uint8]) -> None:
        filled = np.flatnonzero(turned != 0)
        values = turned.reshape(-1)[filled]
        rows, places = np.divmod(filled, max(1, turned.shape[1]))
        ends = np.arange(len(turned) + 1)
        samples, bounds = [], []
        for bit in range(8):  # one bit's channels after the other's: what is found comes in their order
            mine = np.flatnonzero((values & (128 >> bit)) != 0)
            samples.append(places[mine])
            bounds.append(np.searchsorted(rows[mine], ends))
        self._samples: Int64 = np.concatenate(samples)
        before = np.cumsum([0, *(each.size for each in samples[:-1])])
        self._starts = (np.stack([each[:-1] for each in bounds], axis=1) + before).reshape(-1)
        self.counts: Int64 = np.stack([np.diff(each) for each in bounds], axis=1).reshape(-1)

    def samples(self, channels: Int64) -> Int64:
        """Return the samples that fire each of some channels, one channel's after the other's."""
        counts = self.counts[channels]
        ends = counts.cumsum()
        shifts = np.repeat(self._starts[channels] - ends + counts, counts)
        found: Int64 = self._samples[np.arange(counts.sum()) + shifts]
        return found


def _transposed(matrix: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a contiguous transpose, made in strips of rows that fit the processor's cache."""
    turned = np.empty(matrix.shape[::-1], dtype=np.uint8)
    for start in range(0, len(matrix), STRIP_ROWS):
        turned[:, start : start + STRIP_ROWS] = matrix[start : start + STRIP_ROWS].T
    return turned


def _first_gains(channels: _Channels, weights: Floats, uncovered: Bools, left: Bools) -> tuple[Int64, Int64]:
    """Return the weights in fixed point and the gain of every sample, -1 for those chosen already."""
    open_channels = np.flatnonzero(uncovered & (weights > 0))
    fixed = np.zeros(weights.size, dtype=np.int64)
    if open_channels.size:
        exponent = FIXED_POINT_BITS - math.frexp(math.fsum(weights[open_channels]))[1]
        fixed[open_channels] = np.rint(np.ldexp(weights[open_channels], exponent)).astype(np.int64)
    gain = np.zeros(left.size, dtype=np.int64)
    channels.subtract(gain, -fixed, open_channels)
    gain[~left] = -1
    return fixed, gain
