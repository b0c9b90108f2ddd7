"""What rounding aims at when the inputs behind the quantised prefix are no longer those of the original model.

With quantised-prefix inputs X_q and original inputs X_f, dX = X_f - X_q, H = X_q X_q^T, D = dX X_q^T and
E = dX dX^T (rows of X are channels):

* CoreQ (arXiv 2602.05902) rounds W' = W + alpha W D H^-1 instead of W. No Q can do better on W X_f than on this target,
  and alpha = 1 undoes all of the mismatch that a linear layer can undo.
* GPTAQ (arXiv 2504.02692) corrects within the rounding: each column's own mismatch is passed on to later columns only.
  What is polished or fitted afterwards goes towards CoreQ's target, for the weights do not know of the correction.
"""

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor


def corrected_target(weight: Tensor, outputs_drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """Return CoreQ's target W + alpha W D H^-1.

    Parameters
    ----------
    weight, outputs_drift
        (rows, columns): W, and W D in the scaling of the Gram matrix.
    factor
        Of the damped Gram matrix.
    """
    return weight + alpha * factor.solve(outputs_drift)


def reachable(outputs_drift: Tensor, factor: Factor) -> float:
    """Return <W D H^-1, W D>: how much of the mismatch ||W dX||^2 X_q can undo.

    It is a sum over rows, so that those of several parts of a weight may be added.
    """
    return float((factor.solve(outputs_drift) * outputs_drift).sum())


def reachable_share(reached: float, whole: float) -> float:
    """Return CoreQ's closed-form alpha for `reachable` and ||W dX||^2, within [0, 1]; 0 when there is no mismatch.

    With few tokens for many channels it is close to 1 whatever the mismatch is.
    """
    return min(max(reached / whole, 0.0), 1.0) if whole > 0 else 0.0


def carried_drift(drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """Return what `round_sequentially` takes as its drift so that it is GPTAQ: alpha tril(D L^-T, -1) / L_jj.

    GPTAQ updates W[:, j:] -= err U[j, j:] - w_j P[j, j:] with P = alpha triu(D U^T, 1) U, where U is the inverse of L
    in the order of rounding. Written for what each column is rounded from, the errors take L's feedback as in GPTQ, and
    w_j takes P L diag(L)^-1, which is this.

    Parameters
    ----------
    drift
        (columns, columns): D, columns in their natural order.
    """
    ordered = drift[factor.columns[:, None], factor.columns]
    inner: Tensor = torch.linalg.solve_triangular(factor.lower * factor.roots, ordered.T, upper=False).T
    return inner.tril_(-1).mul_(alpha).div_(factor.roots)
