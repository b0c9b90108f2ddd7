"""GPTQ: round column by column, each error made good by the columns still to come (arXiv 2210.17323)."""

import torch
from torch import Tensor

from covercal.quantizers.factor import factorize, shrunk
from covercal.quantizers.grid import Grid, dequantize, quantize
from covercal.quantizers.rounding import Rounded, RoundingSettings

BLOCK_COLUMNS = 64


def gptq(weight: Tensor, gram: Tensor | None, grid: Grid, settings: RoundingSettings) -> Rounded:
    """Return codes that keep the layer's output on the calibration inputs, column by column.

    Parameters
    ----------
    weight
        float64 (rows, columns). Rows do not influence each other, so layers that share an input can be stacked.
    gram
        float64 (columns, columns), X X^T up to a factor.
    grid
        Static: made from the original weight, so that activation order keeps groups contiguous.
    settings
        Damping, order and shrinkage.

    Raises
    ------
    QuantizationError
        When the Gram matrix is not finite, or cannot be factorised with any damping up to 10 times its mean diagonal.

    Notes
    -----
    A channel that no token used (zero on the diagonal) has no column to make its error good and is rounded to nearest;
    the reference sets such weights to zero, which costs output as soon as any later text uses the channel.
    """
    if gram is None:
        raise ValueError("GPTQ reads a Gram matrix")
    factor = factorize(shrunk(gram, settings.shrinkage), settings.damping, activation_order=settings.activation_order)
    scale, zero = (part[:, factor.order].T for part in grid.columns(weight.shape[1]))
    turned = round_columns(weight[:, factor.order].T.contiguous(), factor.feedback, scale, zero, grid.settings.bits)
    return Rounded(turned[torch.argsort(factor.order)].T, factor.damping, factor.attempts, factor.dead)


def round_columns(weight: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round the transposed weight row by row, where a column lies in one piece of memory.

    Step k rounds w_k + sum over j < k of (w_j - q_j) feedback[j, k].
    """
    columns = weight.shape[0]
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        wanted = torch.addmm(weight[start:end], feedback[:start, start:end].T, errors[:start])
        for column in range(start, end):
            step = column - start
            code = quantize(wanted[step], scale[column], zero[column], bits)
            error = weight[column] - dequantize(code, scale[column], zero[column])
            wanted[step + 1 :].addr_(feedback[column, column + 1 : end], error)
            codes[column], errors[column] = code, error
    return codes
