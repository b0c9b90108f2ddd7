"""The factorisation that sequential rounding works with, and what is done to a Gram matrix before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.errors import QuantizationError

DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 10.0  # growth ends with the first attempt at or above it
DAMPING_START = 1e-4  # where growth starts when the recipe asks for no damping


@dataclass(frozen=True, slots=True)
class Factor:
    """The upper triangular R of a damped Gram matrix, H = R R^T, columns in the order of rounding.

    Attributes
    ----------
    feedback
        (columns, columns): R with each column divided by its diagonal; above the diagonal, entry (j, k) is the share of
        column j's error that column k makes good.
    diagonal
        (columns,): R's diagonal. The loss of column k is diagonal[k]**2 times the square of its rounding error.
    order
        int64 (columns,): the column that is rounded at each step.
    damping
        Relative damping that was used, after any growth.
    attempts
        Factorisations tried; more than 1 means that damping had to grow.
    dead
        Channels that no calibration token ever used.
    """

    feedback: Tensor
    diagonal: Tensor
    order: Tensor
    damping: float
    attempts: int
    dead: int


def shrunk(gram: Tensor, share: float) -> Tensor:
    """Return (1 - share) H + share diag(H): few calibration tokens know the diagonal far better than the rest."""
    smaller = (1.0 - share) * gram
    smaller.diagonal().copy_(gram.diagonal())
    return smaller


def factorize(gram: Tensor, damping: float, *, activation_order: bool) -> Factor:
    """Return the factor of H + damping * mean(diag H) I.

    Parameters
    ----------
    gram
        (columns, columns), X X^T up to a factor. A channel that no token used, zero on the diagonal, is given the mean
        of the others: it stays apart from them, and out of the mean that damping is relative to.
    damping
        It grows tenfold until the factorisation succeeds.
    activation_order
        Whether columns are rounded in the order of falling diagonal (the lowest index first among equals).

    Raises
    ------
    QuantizationError
        When the matrix is not finite, or cannot be factorised with any damping up to 10 times its mean diagonal.

    Notes
    -----
    With columns reversed, R is the lower Cholesky factor, so that nothing is inverted. Rounding with R is GPTQ: GPTQ's
    factor of the inverse is R's inverse (arXiv 2507.18553; CoreQ's successive rounding, arXiv 2602.05902).
    """
    if not torch.isfinite(gram).all():
        raise QuantizationError("its Gram matrix holds NaN or infinity")
    diagonal = gram.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    diagonal[dead] = mean
    columns = torch.arange(len(diagonal), device=gram.device)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if activation_order else columns
    backwards = order.flip(0)
    attempts = 0
    while True:
        attempts += 1
        damped = gram[backwards][:, backwards]
        damped.diagonal().copy_(diagonal[backwards] + damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(
            damped, out=(damped, torch.empty((), dtype=torch.int32).to(gram.device))
        )
        if not failed:
            upper = lower.flip(0, 1)
            steps = upper.diagonal().clone()
            return Factor(upper.div_(steps), steps, order, damping, attempts, int(dead.sum()))
        if damping >= DAMPING_LIMIT:
            raise QuantizationError(f"its Gram matrix cannot be factorised, not even with damping {damping:g}")
        damping = max(damping * DAMPING_GROWTH, DAMPING_START)
