"""GPTQ: round column by column, each error made good by the columns still to come (arXiv 2210.17323)."""

import torch
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.quantizers.grid import Grid, dequantize, quantize
from covercal.quantizers.rounding import Rounded, RoundingSettings

BLOCK_COLUMNS = 64
DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 10.0  # growth ends with the first attempt at or above it
DAMPING_START = 1e-4  # where growth starts when the recipe asks for no damping


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
    Algorithm 1 of the paper with the upper Cholesky factor U of the inverse: after column j is rounded, its error over
    U_jj times row j of U is taken from the columns that follow. A channel that no token used (zero on the diagonal)
    has no column to make its error good and is rounded to nearest; the reference sets such weights to zero,
    which costs output as soon as any later text uses the channel.
    """
    if gram is None:
        raise ValueError("GPTQ reads a Gram matrix")
    if not torch.isfinite(gram).all():
        raise QuantizationError("its Gram matrix holds NaN or infinity")
    columns = weight.shape[1]
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if settings.activation_order else None
    scale, zero = grid.columns(columns)
    gram = shrunk(gram, settings.shrinkage)
    gram.diagonal()[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    if order is not None:
        weight, scale, zero, gram = weight[:, order], scale[:, order], zero[:, order], gram[order][:, order]
    factor, damping, attempts = inverse_factor(gram, settings.damping)
    turned = _round_rows(
        weight.T.clone(memory_format=torch.contiguous_format), factor, scale.T, zero.T, grid.settings.bits
    )
    codes = turned.T if order is None else turned[torch.argsort(order)].T
    return Rounded(codes, damping, attempts, int(dead.sum()))


def shrunk(gram: Tensor, share: float) -> Tensor:
    """Return (1 - share) H + share diag(H): few calibration tokens know the diagonal far better than the rest."""
    smaller = (1.0 - share) * gram
    smaller.diagonal().copy_(gram.diagonal())
    return smaller


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Return the upper Cholesky factor U of the damped inverse, H^-1 = U^T U, the damping used and the attempts.

    Damping (relative to the mean diagonal) grows tenfold until the factorisation succeeds.

    Raises
    ------
    QuantizationError
        When it does not succeed with any.
    """
    mean = gram.diagonal().mean()
    attempts = 0
    while True:
        attempts += 1
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper, damping, attempts
        if damping >= DAMPING_LIMIT:
            raise QuantizationError(f"its Gram matrix cannot be factorised, not even with damping {damping:g}")
        damping = max(damping * DAMPING_GROWTH, DAMPING_START)


def _round_rows(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round the transposed weight row by row, where a column lies in one piece of memory; `weight` is changed."""
    columns = weight.shape[0]
    codes = torch.empty_like(weight)
    errors = torch.empty_like(weight[:BLOCK_COLUMNS])
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        for column in range(start, end):
            code = quantize(weight[column], scale[column], zero[column], bits)
            rounded = dequantize(code, scale[column], zero[column])
            error = (weight[column] - rounded) / factor[column, column]
            weight[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            codes[column], errors[column - start] = code, error
        weight[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return codes
