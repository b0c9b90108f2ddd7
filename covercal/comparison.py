"""Two models on the same items: the mean difference, how far chance alone could carry it, and how likely that is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

from covercal.errors import InputError

CONFIDENCE = 0.95
RESAMPLES = 9999
DRAWS_AT_ONCE = 1_000_000  # drawn items held in memory: 16 MB of numbers and values
MCNEMAR = "exact McNemar test, Tango score interval"
BOOTSTRAP = "paired bootstrap, BCa interval"
FEWEST = 6  # items below which no fair test reaches 5%: signs alone fall one way in 2 of 2^5
FEW_ITEMS = f"none: fewer than {FEWEST} items"

Floats = npt.NDArray[np.float64]
Numbers = Sequence[float] | Floats


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """What two models differ by on the same items.

    Attributes
    ----------
    mean
        Mean of `values - others`, weighted where weights were given.
    low, high
        95% confidence interval of the mean; NaN for fewer than `FEWEST` items whose values are not all 0 or 1, unless
        no item differs.
    p_value
        Two-sided probability of a difference at least as large when the models are equal; NaN where the interval is.
    test
        How interval and probability were found.
    """

    mean: float
    low: float
    high: float
    p_value: float
    test: str

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON has them: None for what is not a number."""
        value = asdict(self)
        return {name: None if each != each else each for name, each in value.items()}


def paired_difference(
    values: Numbers, others: Numbers, *, weights: Numbers | None = None, seed: int = 0
) -> PairedDifference:
    """Compare two models item by item.

    Right-or-wrong items (all values 0 or 1, no weights) get the exact McNemar test and Tango's score interval;
    anything else the paired bootstrap, which resamples items, with its bias-corrected and accelerated interval
    (Efron 1987, equation 6.8) and the probability at which that interval would just touch 0. The interval is widened
    for few items as Student's t is, since a resampled mean spreads less than a drawn one (Hesterberg, "What teachers
    should know about the bootstrap", 2015, section 3.3).

    Parameters
    ----------
    values, others
        (items,): one number an item, of either model, in one order.
    weights
        (items,), above 0: the mean is `sum(weights * (values - others)) / sum(weights)`, a ratio whose denominator is
        resampled too. Words of a page, for losses per word.
    seed
        Of the resampling.

    Raises
    ------
    InputError
        When there are no items, lengths differ, or a number is not finite (naming the item).
    """
    ours, theirs = _checked(values, "the first model"), _checked(others, "the second model")
    if ours.size != theirs.size or ours.size == 0:
        raise InputError(
            f"A paired comparison needs the same items of both models; there are {ours.size} and {theirs.size}."
        )
    if weights is None and _right_or_wrong(ours) and _right_or_wrong(theirs):
        return _compare_shares(ours, theirs)
    weighing = np.ones_like(ours) if weights is None else _checked_weights(weights, ours.size)
    return _compare_means(ours - theirs, weighing, seed)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact probability of McNemar's test.

    Parameters
    ----------
    only_first, only_second
        Items that the first model alone, and the second alone, got right. Items on which both agree say nothing;
        without any other item the probability is 1.
    """
    discordant = only_first + only_second
    tail = float(bdtr(min(only_first, only_second), discordant, 0.5))
    return min(1.0, 2.0 * tail)


def tango_interval(only_first: int, only_second: int, items: int) -> tuple[float, float]:
    """Return the score interval of a difference of two paired shares.

    It holds every difference that a score test at 5% does not refuse, stays inside [-1, 1], and keeps a width when no
    item tells the models apart.

    Sources: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design" (1998), equations 5 and 6; recommended by Fagerland, Lydersen and Laake (2014).
    """
    from scipy.optimize import brentq

    bound = float(ndtri(0.5 + CONFIDENCE / 2))
    found = (only_first - only_second) / items

    def score(difference: float) -> float:
        return _tango_score(difference, only_first, only_second, items)

    low = brentq(lambda d: score(d) - bound, -1.0, found) if score(-1.0) > bound else -1.0
    high = brentq(lambda d: score(d) + bound, found, 1.0) if score(1.0) < -bound else 1.0
    return float(low), float(high)


def _tango_score(difference: float, only_first: int, only_second: int, items: int) -> float:
    """Return the standardised distance of the counts from what `difference` says."""
    a = 2.0 * items
    b = -only_first - only_second + (2.0 * items - only_first + only_second) * difference
    c = -only_second * difference * (1.0 - difference)
    share = max(0.0, (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a))  # of the second alone, if so
    variance = items * (2.0 * share + difference * (1.0 - difference))
    distance = only_first - only_second - items * difference
    if variance <= 0.0:
        return 0.0 if distance == 0.0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _compare_shares(ours: Floats, theirs: Floats) -> PairedDifference:
    first, second = int(np.sum(ours > theirs)), int(np.sum(theirs > ours))
    low, high = tango_interval(first, second, ours.size)
    return PairedDifference((first - second) / ours.size, low, high, mcnemar(first, second), MCNEMAR)


def _compare_means(differences: Floats, weights: Floats, seed: int) -> PairedDifference:
    total, weight, items = float(weights @ differences), float(weights.sum()), differences.size
    mean = total / weight
    floor = 2.0 ** (1 - items)  # no fair test says more: every item may have fallen either way by chance
    if not differences.any():
        return PairedDifference(0.0, 0.0, 0.0, 1.0, BOOTSTRAP)
    if items < FEWEST:
        return PairedDifference(mean, math.nan, math.nan, math.nan, FEW_ITEMS)
    if np.all(differences == differences[0]):
        return PairedDifference(mean, mean, mean, floor, BOOTSTRAP)
    drawn = np.sort(np.concatenate(list(_resampled(differences, weights, seed))))
    left_out = (total - weights * differences) / (weight - weights)
    curve = _BcaCurve(_normal_rank(drawn, mean), _acceleration(left_out))
    widening = math.sqrt(items / (items - 1))
    bound = widening * student_quantile((1 + CONFIDENCE) / 2, items - 1)
    low, high = (_quantile(drawn, curve.level(z)) for z in (-bound, bound))
    p_value = max(2.0 * float(stdtr(items - 1, -abs(curve.score(_normal_rank(drawn, 0.0))) / widening)), floor)
    agreeing = max if low <= 0.0 <= high else min  # beyond the few outermost means nothing finer can be read
    return PairedDifference(mean, low, high, agreeing(p_value, 1 - CONFIDENCE), BOOTSTRAP)


def _resampled(differences: Floats, weights: Floats, seed: int) -> Iterator[Floats]:
    """Yield the means of `RESAMPLES` drawings with replacement, piece by piece."""
    generator = np.random.default_rng(seed)
    weighted = weights * differences
    count = max(1, DRAWS_AT_ONCE // differences.size)
    for start in range(0, RESAMPLES, count):
        rows = min(count, RESAMPLES - start)
        items = generator.integers(differences.size, size=(rows, differences.size), dtype=np.int64)
        yield weighted[items].sum(axis=1) / weights[items].sum(axis=1)


@dataclass(frozen=True, slots=True)
class _BcaCurve:
    """From normal scores of the wanted probability to those of the drawn means, and back."""

    bias: float
    acceleration: float

    def level(self, score: float) -> float:
        moved = self.bias + score
        return float(ndtr(self.bias + moved / (1.0 - self.acceleration * moved)))

    def score(self, rank: float) -> float:
        moved = rank - self.bias
        return moved / (1.0 + self.acceleration * moved) - self.bias


def _normal_rank(drawn: Floats, value: float) -> float:
    """Return the normal score of the share of drawn means below `value`, of ties half; kept away from 0 and 1."""
    below = np.searchsorted(drawn, value, "left") + np.searchsorted(drawn, value, "right")
    share = np.clip(below / (2.0 * drawn.size), 0.5 / (drawn.size + 1), 1.0 - 0.5 / (drawn.size + 1))
    return float(ndtri(share))


def _acceleration(left_out: Floats) -> float:
    """Return how fast the spread changes with the mean, from the means without each item (Efron 1987, 6.6)."""
    spread = left_out.mean() - left_out
    squares = float(np.sum(spread**2))
    return float(np.sum(spread**3)) / (6.0 * squares**1.5) if squares > 0 else 0.0


def _quantile(ordered: Floats, level: float) -> float:
    return float(np.quantile(ordered, level))


def _right_or_wrong(values: Floats) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _checked(values: Numbers, whose: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    for item in np.flatnonzero(~np.isfinite(array)):
        raise InputError(f"Item {item} of {whose} is {array[item]}; only finite numbers can be compared.")
    return array


def _checked_weights(weights: Numbers, items: int) -> Floats:
    array = _checked(weights, "the weights")
    if array.size != items:
        raise InputError(f"A weighted comparison needs one weight an item; there are {array.size} for {items} items.")
    for item in np.flatnonzero(array <= 0):
        raise InputError(f"Item {item} has weight {array[item]:g}; weights are above 0.")
    return array


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Return Spearman's rank correlation and its two-sided p-value, by Student's t with two degrees less than pairs.

    Ties have the mean of their ranks. Not by scipy.stats, which takes half a second to load.
    None when either side has fewer than three different values.
    """
    if min(len(set(a)), len(set(b))) < 3:
        return None
    ours, theirs = _centred_ranks(a), _centred_ranks(b)
    correlation = float(ours @ theirs / math.sqrt((ours @ ours) * (theirs @ theirs)))
    correlation = min(1.0, max(-1.0, correlation))
    unexplained = (1.0 - correlation) * (1.0 + correlation)
    if unexplained == 0.0:
        return correlation, 0.0
    degrees = len(a) - 2
    return correlation, 2.0 * float(stdtr(degrees, -abs(correlation) * math.sqrt(degrees / unexplained)))


def _centred_ranks(values: Sequence[float]) -> Floats:
    """Return ranks about their mean, of ties the mean rank."""
    _, places, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts - 1) / 2.0
    return means[places] - (len(values) + 1) / 2.0


def student_quantile(level: float, degrees: float) -> float:
    """Return the point below which Student's t with `degrees` of freedom falls with probability `level`."""
    return float(stdtrit(degrees, level))
