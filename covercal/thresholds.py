"""Thresholds above which a peak makes a channel an outlier channel, from all peaks of one site."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

MAD_TO_SIGMA = 1.4826  # of a normal distribution

Peaks = npt.NDArray[np.float32]


def median_deviation(peaks: Peaks, k: float) -> float:
    """Return median + k * 1.4826 * median absolute deviation: mean + k sigma that a few huge peaks do not move."""
    middle = quantile(peaks, 0.5)
    spread = quantile(np.abs(peaks - np.float32(middle)), 0.5)
    return middle + k * MAD_TO_SIGMA * spread


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
    flat = values.reshape(-1)
    place = share * (flat.size - 1)
    low = int(place)
    high = min(low + 1, flat.size - 1)
    parted = np.partition(flat, (low, high))
    return float(parted[low]) + (place - low) * (float(parted[high]) - float(parted[low]))


def above(peaks: Peaks, limit: float) -> npt.NDArray[np.bool_]:
    """Return where peaks lie above a limit of higher precision, exactly as in float64, without a copy in float64."""
    with np.errstate(over="ignore"):
        nearest = np.float32(limit)
    below = np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > limit else nearest
    return peaks > below


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
