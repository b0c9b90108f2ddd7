"""What selectors ask of their evidence: it is there, and it fits the pool."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from covercal.selectors.registry import Evidence


def fitting(extent: int, evidence: Evidence) -> int:
    """Return `extent`, which must not exceed the pool.

    Raises
    ------
    ValueError
        When it is negative or exceeds the pool.
    """
    if not 0 <= extent <= evidence.samples:
        raise ValueError(f"extent {extent} must lie between 0 and the number of samples, {evidence.samples}")
    return extent


def of_every_sample(values: npt.ArrayLike | None, evidence: Evidence, what: str) -> npt.NDArray[np.float64]:
    """Return numbers of every sample, (samples, …), in float64.

    Raises
    ------
    ValueError
        When they are missing, of another number of samples, or not finite.
    """
    if values is None:
        raise ValueError(f"the selector reads {what}, and the evidence has none")
    found = np.asarray(values, dtype=np.float64)
    if found.shape[:1] != (evidence.samples,):
        raise ValueError(f"{what} {found.shape} must begin with the number of samples, {evidence.samples}")
    if not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found.reshape(evidence.samples, -1)).all(axis=1))[0])
        raise ValueError(f"{what} of sample {first} must be finite")
    return found


def words_of_every_sample(values: Sequence[str], evidence: Evidence, what: str) -> Sequence[str]:
    """Return texts or domains of every sample.

    Raises
    ------
    ValueError
        When they are missing or of another number of samples.
    """
    if len(values) != evidence.samples:
        raise ValueError(f"the selector reads {what} of {evidence.samples} samples, and the evidence has {len(values)}")
    return values


def highest_first(scores: npt.NDArray[np.float64], extent: int) -> npt.NDArray[np.int64]:
    """Return the samples of the highest scores, int64 (extent,); ties go to the lowest index."""
    return np.argsort(-scores, kind="stable")[:extent].astype(np.int64)
