"""The factorisation that sequential rounding works with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.errors import QuantizationError

CHECKED_ROWS = 512
DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 10.0  # growth ends with the first attempt at or above it
DAMPING_START = 1e-4  # where growth starts when the recipe asks for no damping


@dataclass(frozen=True, slots=True)
class Factor:
    """The Cholesky factor L of a regularised Gram matrix, H = L L^T, columns in the reverse order of rounding.

    Attributes
    ----------
    lower
        (columns, columns): L with each column divided by its diagonal; below the diagonal, entry (k, j) is the share of
        column k's error that column j, which is rounded later, makes good.
    roots
        (columns,): L's diagonal. The loss of column j is roots[j]**2 times the square of its rounding error.
    columns
        int64 (columns,): the column at each place of the above; the last is rounded first.
    damping
        Relative damping that was used, after any growth.
    attempts
        Factorisations tried; more than 1 means that damping had to grow.
    dead
        Channels that no calibration token ever used.
    """

    lower: Tensor
    roots: Tensor
    columns: Tensor
    damping: float
    attempts: int
    dead: int

    @property
    def order(self) -> Tensor:
        """Return the columns in the order of rounding."""
        return self.columns.flip(0)

    def solve(self, matrix: Tensor) -> Tensor:
        """Return matrix @ H^-1, (rows, columns), columns in their natural order."""
        ordered = matrix[:, self.columns].T
        inner = torch.linalg.solve_triangular(self.lower, ordered, upper=False, unitriangular=True)
        inner = inner.div_(self.roots.square()[:, None])
        found = torch.empty_like(matrix)
        found[:, self.columns] = torch.linalg.solve_triangular(self.lower.mT, inner, upper=True, unitriangular=True).T
        return found


def factorize(
    gram: Tensor,
    damping: float,
    *,
    activation_order: bool,
    weights: Tensor | None = None,
    shrinkage: float = 0.0,
    towards: Tensor | None = None,
) -> Factor:
    """Return the factor of a shrunk Gram matrix H + damping * mean(diag H) * diag(weights).

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
    shrinkage, towards
        See `regularization.regularized`.

    Raises
    ------
    QuantizationError
        When the matrix is not finite, or cannot be factorised with any damping up to 10 times its mean diagonal.

    Notes
    -----
    Nothing is inverted, and beside the Gram matrix one more of its size is held. Rounding with L, the last column
    first, is GPTQ: in that order, GPTQ's factor of the inverse is the inverse of this factor (arXiv 2507.18553;
    CoreQ's successive rounding, arXiv 2602.05902).
    """
    if not is_finite(gram):
        raise QuantizationError("its Gram matrix holds NaN or infinity")
    plain = shrunk_diagonal(gram, shrinkage, towards)
    diagonal, dead = live_diagonal(plain)
    mean = diagonal.mean()
    places = torch.arange(len(diagonal), device=gram.device)
    columns = (torch.argsort(plain, descending=True, stable=True) if activation_order else places).flip(0)
    attempts = 0
    while True:
        attempts += 1
        added = damping * mean if weights is None else damping * mean * weights
        damped = gram[columns[:, None], columns]
        if shrinkage:
            damped.mul_(1.0 - shrinkage)
        damped.diagonal().copy_((diagonal + added)[columns])
        if _in_place_cholesky(damped):
            roots = damped.diagonal().clone()
            return Factor(damped.div_(roots), roots, columns, damping, attempts, int(dead.sum()))
        if damping >= DAMPING_LIMIT:
            raise QuantizationError(f"its Gram matrix cannot be factorised, not even with damping {damping:g}")
        damping = max(damping * DAMPING_GROWTH, DAMPING_START)


def _in_place_cholesky(matrix: Tensor) -> bool:
    """Replace a symmetric matrix by its lower Cholesky factor; returns whether it has one.

    The upper factor of a matrix stored by columns, which is what LAPACK works on, is the lower factor stored by rows.
    """
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, failed))
    return not failed


def is_finite(matrix: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: such an entry makes the sum so, which is looked at first."""
    if bool(torch.isfinite(matrix.sum())):
        return True
    starts = range(0, len(matrix), CHECKED_ROWS)  # some rows at a time, for the check copies what it looks at
    return all(bool(torch.isfinite(matrix[start : start + CHECKED_ROWS]).all()) for start in starts)


def shrunk_diagonal(gram: Tensor, share: float, towards: Tensor | None) -> Tensor:
    """Return the diagonal of a shrunk Gram matrix: its own, or its own and a share of another."""
    own = gram.diagonal()
    return own.clone() if towards is None else (1.0 - share) * own + share * towards.to(own.dtype)


def live_diagonal(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return a diagonal with the mean of the others (or 1) where no token used a channel, and where that is."""
    live = diagonal.clone()
    dead = live <= 0
    live[dead] = live[~dead].mean() if not dead.all() else 1.0
    return live, dead
