"""Arithmetic on sketches whose result for a sample depends on nothing but its numbers.

Matrix products of a BLAS round by position and thread count, so that two equal samples may differ in the last bit.
Here every sample goes through the same additions in the same order: equal samples tie exactly, and a permuted pool
gives the permuted result.
"""

import math

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import of_every_sample
from covercal.selectors.registry import Evidence

Floats = npt.NDArray[np.float64]


def sketch_columns(evidence: Evidence) -> Floats:
    """Return the sketch turned, float64 (width, samples)."""
    return np.ascontiguousarray(of_every_sample(evidence.sketch, evidence, "the sketches (statistics)").T)


def unit_columns(columns: Floats) -> Floats:
    """Return every sample at length 1, (width, samples); a sample of length 0 stays so."""
    largest = np.abs(columns).max(axis=0, initial=0.0)  # taken out first, so that no square overflows or vanishes
    scaled = np.divide(columns, largest, out=np.zeros_like(columns), where=largest > 0)
    lengths = np.sqrt((scaled * scaled).sum(axis=0))
    return np.asarray(np.divide(scaled, lengths, out=np.zeros_like(columns), where=lengths > 0))


def exact_mean(columns: Floats) -> Floats:
    """Return the mean over samples, (width,), from correctly rounded sums."""
    return np.asarray(np.array([math.fsum(row) for row in columns.tolist()]) / columns.shape[1])


def inner(columns: Floats, vector: Floats) -> Floats:
    """Return every sample's inner product with a vector, (samples,)."""
    return np.asarray((columns * vector[:, None]).sum(axis=0))


def squared_distances(columns: Floats, point: Floats) -> Floats:
    """Return every sample's squared Euclidean distance from a point, (samples,)."""
    apart = columns - point[:, None]
    return np.asarray((apart * apart).sum(axis=0))
