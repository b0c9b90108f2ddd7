"""Scales fitted to codes: once a weight is rounded, least squares finds the steps that are best for its codes."""

import torch
from torch import Tensor

from covercal.quantizers.grid import Grid, representable
from covercal.quantizers.regularization import Metric

SYSTEM_NUMBERS = 2**26  # of the systems that are solved at once: half a gigabyte, and as much again while they are
RIDGE = 1e-8  # relative to the mean diagonal: keeps groups apart whose codes are alike
LARGEST_CHANGE = 3.0  # a step that would change by more stays as it is


def refitted(target: Tensor, codes: Tensor, grid: Grid, metric: Metric) -> Grid:
    """Return the grid whose steps bring the rounded weight closest to the target in the metric of a matrix H.

    With v_g the codes of group g less its zero point, a row is the sum over groups of s_g v_g, so that its loss
    (w - sum s_g v_g) H (w - sum s_g v_g)^T is quadratic in the steps s: they solve A s = b with A_gh = v_g H v_h^T and
    b_g = v_g H w^T. Steps are rounded to the checkpoint's dtype; a row keeps its old ones unless new ones are better.

    Parameters
    ----------
    target
        (rows, columns): what the weight is to be. Where a weight is not on the grid, what is left of it.
    codes
        (rows, columns), less the zero point; 0 where a weight is not on the grid.
    grid
        The grid that the codes are of.
    metric
        H.
    """
    rows, groups = grid.scale.shape
    at_once = max(1, SYSTEM_NUMBERS // groups**2)
    parts = [slice(start, start + at_once) for start in range(0, rows, at_once)]
    scale = torch.cat([_fitted(target[part], codes[part], grid.rows(part), metric) for part in parts])
    return Grid(scale, grid.zero, grid.settings)


def _fitted(target: Tensor, codes: Tensor, grid: Grid, metric: Metric) -> Tensor:
    """Return the steps of some rows, see `refitted`."""
    rows, groups = grid.scale.shape
    size = codes.shape[1] // groups
    quadratic = codes.new_empty((rows, groups, groups), dtype=torch.float64)  # systems of codes that are alike
    linear = codes.new_empty((rows, groups), dtype=torch.float64)
    for group in range(groups):
        columns = slice(group * size, (group + 1) * size)
        outputs = metric.product(codes[:, columns], columns)
        linear[:, group] = (outputs * target).sum(dim=1)
        quadratic[:, group] = outputs.mul_(codes).reshape(rows, groups, size).sum(dim=2)
    old = grid.scale.double()
    wanted = _solved(quadratic, linear)
    usable = torch.isfinite(wanted) & (wanted > old / LARGEST_CHANGE) & (wanted < old * LARGEST_CHANGE)
    new = representable(torch.where(usable, wanted, old), grid.settings.scale_dtype)
    better = _loss(new, quadratic, linear) < _loss(old, quadratic, linear)
    return torch.where(better[:, None], new, old).to(grid.scale.dtype)


def _solved(quadratic: Tensor, linear: Tensor) -> Tensor:
    """Return the steps of all rows; a group whose codes are all at the zero point has none that matters.

    Notes
    -----
    The systems are damped in place, and given back as they were: a copy would take as much memory again.
    """
    diagonal = quadratic.diagonal(dim1=1, dim2=2)
    ridge, kept = RIDGE * diagonal.mean(dim=1, keepdim=True), diagonal.clone()
    diagonal.copy_(torch.where(kept > 0, kept + ridge, torch.ones_like(kept)))
    found: Tensor = torch.linalg.solve_ex(quadratic, linear)[0]
    diagonal.copy_(kept)
    return found


def _loss(scale: Tensor, quadratic: Tensor, linear: Tensor) -> Tensor:
    """Return each row's loss up to a constant, (rows,)."""
    return torch.einsum("rg,rgh,rh->r", scale, quadratic, scale) - 2.0 * (linear * scale).sum(dim=1)
