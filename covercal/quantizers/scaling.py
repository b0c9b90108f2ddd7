"""Scales of input channels that make a weight easier to round: AWQ's search, SARQC-GS's, and SmoothQuant's formula.

A weight W is rounded as Q(W diag(s)), and its input divided by s, so that the function before rounding stays the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from covercal.quantizers.regularization import floored

SMALLEST = 1e-4  # AWQ's clamp on scales


def centered(scale: Tensor) -> Tensor:
    """Return a scale over the geometric mean of its ends, as AWQ does; ones where that is not finite or positive."""
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def awq_scale(magnitude: Tensor, power: float) -> Tensor:
    """Return AWQ's scale mean|x|**power (arXiv 2306.00978, eq. 5), (columns,)."""
    return centered(magnitude.pow(power).clamp(min=SMALLEST))


def duo_scale(magnitude: Tensor, weight_magnitude: Tensor, power: float) -> Tensor:
    """Return AutoAWQ's "duo" scale mean|x|**power / mean|w|**(1 - power), (columns,); also SARQC-GS's."""
    return centered((magnitude.pow(power) / (weight_magnitude.pow(1 - power) + SMALLEST)).clamp(min=SMALLEST))


def smooth_scale(peak: Tensor, weight_peak: Tensor, power: float) -> Tensor:
    """Return SmoothQuant's scale max|x|**power / max|w|**(1 - power), (columns,) (arXiv 2211.10438, eq. 4).

    Inputs are divided by it. 1 where a channel is never used or never read.
    """
    scale = peak.pow(power) / weight_peak.pow(1 - power)
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def candidate_scales(
    magnitude: Tensor, weight_magnitude: Tensor, steps: int, *, duo: bool, guard: bool
) -> list[tuple[float, Tensor]]:
    """Return the powers and scales that a search tries.

    AWQ tries k/steps for k below `steps`, of which 0 is no scaling. Its duo form, up to 1, has no such point, so that
    AutoAWQ adds one, the guard; SARQC-GS has none.
    """
    if not duo:
        return [(k / steps, awq_scale(magnitude, k / steps)) for k in range(steps)]
    found = [(k / steps, duo_scale(magnitude, weight_magnitude, k / steps)) for k in range(steps + 1)]
    return [(0.0, torch.ones_like(magnitude)), *found] if guard else found


def search_scale(
    candidates: list[tuple[float, Tensor]],
    loss: Callable[[Tensor], float],
    drift: Callable[[Tensor], float] | None = None,
    strength: float = 0.0,
) -> tuple[float, Tensor]:
    """Return the power and scale of the candidate with the least loss, the earliest among equals.

    Parameters
    ----------
    candidates
        See `candidate_scales`.
    loss
        Of the output, when the weight is rounded under a scale.
    drift
        Of the weight: with it, loss and drift are each mapped to [0, 1] over the candidates, and `strength` times the
        drift is added (SARQC-GS, arXiv 2605.05693, eq. 12). A loss or drift that is the same for all counts as 0.
    strength
        See `drift`.
    """
    judged = [loss(scale) for _, scale in candidates]
    if drift is not None:
        drifts = [drift(scale) for _, scale in candidates]
        judged = [a + strength * b for a, b in zip(unit_range(judged), unit_range(drifts), strict=True)]
    return candidates[min(range(len(candidates)), key=judged.__getitem__)]


def unit_range(values: list[float]) -> list[float]:
    """Return values mapped linearly to [0, 1]; all 0 when they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def drift_weights(magnitude: Tensor, weight_magnitude: Tensor, regularization: str) -> Tensor:
    """Return what SARQC-GS weighs each column's drift by: 1, or s**2 with s_j = mean|x_j| / mean|w_j|, (columns,)."""
    if regularization == "identity":
        return torch.ones_like(magnitude)
    return (magnitude / floored(weight_magnitude)).square()
