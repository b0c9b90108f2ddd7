"""Round to nearest: the baseline that reads no calibration data."""

from torch import Tensor

from covercal.quantizers.grid import Grid, quantize
from covercal.quantizers.rounding import Rounded, RoundingSettings


def round_to_nearest(weight: Tensor, gram: Tensor | None, grid: Grid, settings: RoundingSettings) -> Rounded:
    """Return the nearest code of every weight; the Gram matrix and the settings have no effect.

    Parameters
    ----------
    weight
        float64 (rows, columns).
    """
    scale, zero = grid.columns(weight.shape[1])
    return Rounded(quantize(weight, scale, zero, grid.settings.bits))
