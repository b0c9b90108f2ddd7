"""The factorisation that sequential rounding works with."""

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

    def solve(self, matrix: Tensor) -> Tensor:
        """Return matrix @ H^-1, (rows, columns), columns in their natural order."""
        upper = self.feedback * self.diagonal
        turned = matrix[:, self.order].T
        half = torch.linalg.solve_triangular(upper, turned, upper=True)
        found = torch.empty_like(matrix)
        found[:, self.order] = torch.linalg.solve_triangular(upper.T, half, upper=False).T
        return found


def factorize(gram: Tensor, damping: float, *, activation_order: bool, weights: Tensor | None = None) -> Factor:
    """Return the factor of H + damping * mean(diag H) * diag(weights).

    Parameters
    ----------
    gram
        (columns, columns), X X^T up to a factor. A channel that no token used, zero on the diagonal, is given the mean
        of the others: it stays apart from them, and out of the mean that damping is relative to.
    damping
        It grows tenfold until the factorisation succeeds.
    activation_order
        Whether columns are rounded in the order of falling diagonal of H (the lowest index first among equals).
    weights
        (columns,), 1 on average; without them all channels are damped alike.

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
    diagonal, dead = live_diagonal(gram)
    mean = diagonal.mean()
    steps = torch.arange(len(diagonal), device=gram.device)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if activation_order else steps
    backwards = order.flip(0)
    attempts = 0
    while True:
        attempts += 1
        added = damping * mean if weights is None else damping * mean * weights
        damped = gram[backwards][:, backwards]
        damped.diagonal().copy_((diagonal + added)[backwards])
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, failed))  # in place
        if not failed:
            upper = lower.flip(0, 1)
            roots = upper.diagonal().clone()
            return Factor(upper.div_(roots), roots, order, damping, attempts, int(dead.sum()))
        if damping >= DAMPING_LIMIT:
            raise QuantizationError(f"its Gram matrix cannot be factorised, not even with damping {damping:g}")
        damping = max(damping * DAMPING_GROWTH, DAMPING_START)


def live_diagonal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal with the mean of the others (or 1) where no token used a channel, and where that is."""
    diagonal = gram.diagonal().clone()
    dead = diagonal <= 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    return diagonal, dead
