"""Thresholds above which a peak makes a channel an outlier channel, from all peaks of one site."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

MAD_TO_SIGMA = 1.4826  # of a normal distribution
STRIP_VALUES = 2**18
DRAWN = 2**17  # values whose order tells between which two a quantile of all lies

Peaks = npt.NDArray[np.float32]


def median_deviation(peaks: Peaks, k: float) -> float:
    """Return median + k * 1.4826 * median absolute deviation: mean + k sigma that a few huge peaks do not move."""
    middle = quantile(peaks, 0.5)
    spread = _quantile_of(peaks, 0.5, lambda some: _distance(some, np.float32(middle)))
    return middle + k * MAD_TO_SIGMA * spread


def _distance(values: Peaks, middle: np.float32) -> Peaks:
    found: Peaks = values - middle
    return np.abs(found, out=found)


def median_multiple(peaks: Peaks, k: float) -> float:
    """Return k times the median."""
    return k * quantile(peaks, 0.5)


def absolute(peaks: Peaks, k: float) -> float:
    """Return k itself, as LLM.int8() does with 6 (arXiv 2208.07339, section 3.2)."""
    return k


def quantile(values: npt.NDArray[np.float32], share: float) -> float:
    """Return a quantile by linear interpolation between the two nearest values, as SQL's `quantile_cont`.

    Parameters
    ----------
    values
        Of any shape, not empty.
    share
        Between 0 and 1.
    """
    return _quantile_of(values, share, lambda some: some)


def _quantile_of(values: Peaks, share: float, of: Callable[[Peaks], Peaks]) -> float:
    """Return a quantile of `of(values)`, which is made of some values at a time.

    Only what lies between two values that enclose the place in a random draw is put in order; where they do not enclose
    it after all, everything is.
    """
    place = share * (values.size - 1)
    low = int(place)
    high = min(low + 1, values.size - 1)
    first, last = _enclosing(of(_drawn(values)), share)
    before, kept = 0, []
    for some in _strips(values):
        made = of(some).reshape(-1)
        under = made < first
        before += int(np.count_nonzero(under))
        kept.append(made[np.flatnonzero(under != (made <= last))])
    between = np.concatenate(kept)
    if not before <= low <= high < before + between.size:
        before, between = 0, np.concatenate([of(some).reshape(-1) for some in _strips(values)])
    parted = np.partition(between, (low - before, high - before))
    below, over = float(parted[low - before]), float(parted[high - before])
    return below + (place - low) * (over - below)


def _strips(values: Peaks) -> Iterator[Peaks]:
    """Yield all values, some of the first axis at a time, few enough for the processor's cache."""
    step = max(1, STRIP_VALUES * len(values) // values.size)
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _drawn(values: Peaks) -> Peaks:
    """Return values at random places, all of them when there are few."""
    if values.size <= DRAWN:
        return values.reshape(-1)
    places = np.random.default_rng(0).integers(values.size, size=DRAWN)
    drawn: Peaks = values[np.unravel_index(places, values.shape)]
    return drawn


def _enclosing(drawn: Peaks, share: float) -> tuple[float, float]:
    """Return two values of a random draw between which the quantile of all lies, six standard deviations off."""
    drawn = np.sort(drawn)
    place, spread = share * drawn.size, 6 * np.sqrt(drawn.size * share * (1 - share)) + 6
    low, high = int(place - spread), int(place + spread)
    return (float(drawn[low]) if low > 0 else -np.inf), (float(drawn[high]) if high < drawn.size else np.inf)


def above(peaks: Peaks, limit: float) -> npt.NDArray[np.bool_]:
    """Return where peaks lie above a limit of higher precision, exactly as in float64, without a copy in float64."""
    with np.errstate(over="ignore"):
        nearest = np.float32(limit)
    below = np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > limit else nearest
    return peaks > below


def packed_above(peaks: Peaks, limit: float) -> npt.NDArray[np.uint8]:
    """Return `numpy.packbits(above(peaks, limit), axis=1)`, made strip by strip."""
    return np.concatenate([np.packbits(above(some, limit), axis=1) for some in _strips(peaks)])


def poorly_reconstructed(errors: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the indices of errors above median + 2 standard deviations (COVERCAL, algorithm 2)."""
    if not errors.size:
        return np.zeros(0, dtype=np.int64)
    scaled = np.ldexp(errors, -np.frexp(errors.max())[1])  # exact, and no square of a small error is lost
    return np.flatnonzero(scaled > np.median(scaled) + 2 * scaled.std())


PEAK_RULES: Mapping[str, Callable[[Peaks, float], float]] = MappingProxyType(
    {
        "mad": median_deviation,
        "quantile": quantile,
        "median": median_multiple,
        "absolute": absolute,
    }
)
SIGMA = "sigma"  # mean + k sigma needs sums over all tokens, not peaks
RULES = (SIGMA, *PEAK_RULES)
WEIGHTINGS: Mapping[str, str] = MappingProxyType(
    {
        "full": "(peak / threshold)^2 * norm of the weight column (COVERCAL, eq. 4)",
        "squared_norm": "(peak / threshold)^2 * squared norm: the scale of a squared error",
        "magnitude": "(peak / threshold)^2",
        "column_norm": "norm of the weight column",
        "unweighted": "1",
    }
)
