"""Selectors by name; adding one is one new file and one line here."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from covercal.coverage import BoolMatrix, PackedBits

SELECTORS: Mapping[str, str] = MappingProxyType(
    {
        "coverage": "covercal.selectors.coverage:CoverageSelector",
        "coverage_soft": "covercal.selectors.coverage_soft:SoftCoverageSelector",
        "random": "covercal.selectors.random:RandomSelector",
        "first": "covercal.selectors.first:FirstSelector",
        "longest": "covercal.selectors.longest:LongestSelector",
        "max_perplexity": "covercal.selectors.perplexity:MaxPerplexitySelector",
        "min_perplexity": "covercal.selectors.perplexity:MinPerplexitySelector",
        "max_variance": "covercal.selectors.max_variance:MaxVarianceSelector",
        "stratified_magnitude": "covercal.selectors.stratified_magnitude:StratifiedMagnitudeSelector",
        "stratified_domain": "covercal.selectors.stratified_domain:StratifiedDomainSelector",
        "zipcal": "covercal.selectors.zipcal:ZipCalSelector",
        "cola": "covercal.selectors.cola:ColaSelector",
        "k_center": "covercal.selectors.k_center:KCenterSelector",
        "facility_location": "covercal.selectors.facility_location:FacilityLocationSelector",
        "herding": "covercal.selectors.herding:HerdingSelector",
        "gram_matching": "covercal.selectors.gram_matching:GramMatchingSelector",
        "log_det": "covercal.selectors.log_det:LogDetSelector",
        "given": "covercal.selectors.given:GivenSelector",
    }
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a selector may read of the pool; what it does not ask for by `reads` is None.

    Attributes
    ----------
    samples
        Size of the pool.
    domains, texts
        Of every sample.
    lengths
        int64 (samples,), tokens of every sample.
    coverage
        (samples, outlier channels), bool or packed: which sample fires which channel (`outliers`).
    weights
        float64 (outlier channels,) (`outliers`).
    variance, magnitude
        float32 (samples, sites): variance of the activations, and mean of their absolute values (`statistics`).
    sketch
        float32 (samples, 64): random projection of the mean token of every block (`statistics`).
    energies
        Returns, site after site, float32 (samples, channels of the site): mean over tokens of x**2, the diagonal of
        each sample's Gram matrix per token (`statistics`); read from disk anew by each call.
    losses
        float64 (samples,): mean negative log-likelihood per token, in nats (`losses`).
    given
        A list of samples in the recipe, for the selector `given`.
    """

    samples: int
    domains: Sequence[str] = ()
    texts: Sequence[str] = ()
    lengths: npt.NDArray[np.int64] | None = None
    coverage: BoolMatrix | PackedBits | None = None
    weights: npt.NDArray[np.float64] | None = None
    variance: npt.NDArray[np.float32] | None = None
    magnitude: npt.NDArray[np.float32] | None = None
    sketch: npt.NDArray[np.float32] | None = None
    energies: Callable[[], Iterator[npt.NDArray[np.float32]]] | None = None
    losses: npt.NDArray[np.float64] | None = None
    given: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """Samples in the order of choice; the first `k` are the choice for a budget of `k`.

    Attributes
    ----------
    samples
        int64 (extent,), indices into the pool, without repeats.
    gains
        float64 (extent,), what each added to the selector's objective; None when it has none.
    rounds
        int64 (extent,), the round of coverage each belongs to; None when there are no rounds.
    """

    samples: npt.NDArray[np.int64]
    gains: npt.NDArray[np.float64] | None = None
    rounds: npt.NDArray[np.int64] | None = None


class Selector(Protocol):
    """A way to order the pool's samples."""

    reads: frozenset[str]
    """Stages whose artifacts it reads besides the pool."""
    seeded: bool
    """Whether its order depends on the seed."""
    nested: bool
    """Whether budgets are prefixes of one order; else each budget is a choice of its own."""

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the first `extent` samples of the order; a selector that is not nested chooses for that budget."""
        ...


def selector(name: str) -> Selector:
    """Return the selector called `name`."""
    module, _, attribute = SELECTORS[name].partition(":")
    made: Selector = getattr(importlib.import_module(module), attribute)()
    return made
