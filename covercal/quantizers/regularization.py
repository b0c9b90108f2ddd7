"""What is done to a Gram matrix before it is factorised: shrinkage towards a diagonal, and damping."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.quantizers.factor import live_diagonal, shrunk_diagonal

SHRINKAGES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)  # tried when shrinkage is validated
DAMPINGS = (0.01, 0.05, 0.1, 0.25, 0.5)  # tried when uniform damping is validated
SALIENCY_DAMPINGS = (0.25, 0.5, 0.75)  # SARQC-GBS's own grid, as is the next
GAMMAS = (0.1, 0.15, 0.35, 0.5)


@dataclass(frozen=True, slots=True)
class Regularization:
    """How one Gram matrix is regularised.

    Attributes
    ----------
    shrinkage
        Share of the matrix that is replaced by a diagonal; 1 is round-to-nearest.
    damping
        Added to the diagonal, relative to its mean.
    gamma
        Power of mean |x| in the saliency that damping is weighted by; None: all channels are damped alike.
    """

    shrinkage: float
    damping: float
    gamma: float | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A regularised Gram matrix, of which only the diagonal is held beside the Gram matrix itself.

    Attributes
    ----------
    gram
        (columns, columns).
    share
        By which what is off its diagonal is made smaller.
    diagonal
        (columns,), in place of its own.
    """

    gram: Tensor
    share: float
    diagonal: Tensor

    def rows(self, columns: Tensor) -> Tensor:
        """Return some rows of the regularised matrix, (columns asked for, columns)."""
        found = self.gram[columns].mul_(1.0 - self.share)
        found[torch.arange(len(columns), device=found.device), columns] = self.diagonal[columns]
        return found

    def product(self, matrix: Tensor, columns: slice) -> Tensor:
        """Return a matrix (rows, columns of the slice) times these rows of the regularised one, (rows, columns)."""
        found = (matrix @ self.gram[columns]).mul_(1.0 - self.share)
        own = (1.0 - self.share) * self.gram.diagonal()[columns]
        found[:, columns].addcmul_(matrix, self.diagonal[columns] - own)
        return found


def regularized(gram: Tensor, share: float, towards: Tensor | None, damping: float, weights: Tensor | None) -> Metric:
    """Return the matrix that `factorize` factorises, columns in their natural order.

    That is (1 - share) H + share diag(H), or + share times another diagonal `towards` (columns,), for few calibration
    tokens know the diagonal far better than the rest; then damping, relative to the mean of the diagonal and as
    `weights` (columns,) has it.
    """
    diagonal, _ = live_diagonal(shrunk_diagonal(gram, share, towards))
    return Metric(gram, share, diagonal + damping * diagonal.mean() * (1.0 if weights is None else weights))


def ledoit_wolf_share(gram: Tensor, mean_square: float, concentration: float) -> float:
    """Return the share of shrinkage towards its own diagonal that has the least expected squared error.

    Ledoit and Wolf's estimator for the off-diagonal part (Journal of Multivariate Analysis 88, 2004; Schäfer and
    Strimmer 2005, target D), with sequences as the independent units: tokens of one text are not.

    Parameters
    ----------
    gram
        (columns, columns): weighted mean of the sequences' Gram matrices.
    mean_square
        Weighted mean over sequences of the sum of squares off the diagonal of each one's own Gram matrix.
    concentration
        Sum of the squares of the sequences' weights, which sum to 1: one over their number when all weigh the same.

    Returns
    -------
    share
        Between 0 and 1; 1 for fewer than two sequences, which say nothing of how sequences differ.
    """
    if not concentration < 1:
        return 1.0
    whole = off_diagonal_square(gram)
    if whole <= 0:
        return 0.0
    variance = max(mean_square - whole, 0.0) * concentration / (1.0 - concentration)
    return min(variance / whole, 1.0)


def off_diagonal_square(gram: Tensor) -> float:
    """Return the sum of squares off the diagonal."""
    return max(float(gram.square().sum() - gram.diagonal().square().sum()), 0.0)


def saliency(magnitude: Tensor, weight_magnitude: Tensor, gamma: float) -> Tensor:
    """Return SARQC's s_j = mean|x_j|**gamma / mean|w_j|**(1 - gamma), (columns,) (arXiv 2605.05693, section 3)."""
    return magnitude.pow(gamma) / floored(weight_magnitude).pow(1 - gamma)


def floored(weight_magnitude: Tensor) -> Tensor:
    """Return mean|w_j| with the smallest positive one in place of zeros (1 if there is none), to divide by."""
    positive = weight_magnitude[weight_magnitude > 0]
    return weight_magnitude.clamp(min=float(positive.min())) if positive.numel() else torch.ones_like(weight_magnitude)


def damping_weights(magnitude: Tensor, weight_magnitude: Tensor, gamma: float) -> Tensor:
    """Return what SARQC-GBS damps each channel by, s**2 / mean(s**2), (columns,); all alike when every s is 0."""
    squares = saliency(magnitude, weight_magnitude, gamma).square()
    mean = squares.mean()
    return squares / mean if float(mean) > 0 else torch.ones_like(squares)
