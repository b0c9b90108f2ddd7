"""Bounded search: several partial roundings of each row are kept, and the best whole one wins (K-CoreQ, 2602.05902)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor
from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 64


@dataclass(slots=True)
class _Beams:
    """Partial roundings of every row, in the order of rounding.

    Attributes
    ----------
    loss
        float64 (width, rows): of the columns rounded so far; infinite for a beam that is not there yet.
    rounded, errors
        float64 (columns, width, rows): levels, and what the target lost to them.
    """

    loss: Tensor
    rounded: Tensor
    errors: Tensor


def round_by_beam(target: Tensor, factor: Factor, levels: Levels, width: int) -> Tensor:
    """Return the levels of the best of `width` partial roundings that every row keeps.

    The loss of a row is the sum over columns of diagonal[k]**2 (t_k - q_k)**2, which is ||W - Q||**2 in the metric of
    the factor's Gram matrix. A width of 1 is `round_sequentially`.

    Parameters
    ----------
    target
        float64 (columns, rows).
    factor, levels
        As for `round_sequentially`.
    width
        Partial roundings kept.

    Returns
    -------
    rounded
        float64 (columns, rows).
    """
    columns, rows = target.shape
    order = factor.order.tolist()
    ordered = target[factor.order]
    squares = factor.diagonal.square()
    shape = (columns, width, rows)
    loss = torch.full((width, rows), torch.inf, dtype=target.dtype, device=target.device)
    loss[0] = 0.0
    beams = _Beams(
        loss, torch.empty(shape, dtype=target.dtype, device=target.device), torch.empty_like(target)[:, None]
    )
    beams.errors = torch.empty_like(beams.rounded)
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        pulled = torch.mm(factor.feedback[:start, start:end].T, beams.errors[:start].reshape(start, width * rows))
        wanted = ordered[start:end, None, :] + pulled.reshape(end - start, width, rows)
        origin = torch.arange(width, device=target.device)[:, None].expand(width, rows).clone()
        for step in range(start, end):
            here = step - start
            value = wanted[here]
            if here:
                block = factor.feedback[start:step, step]
                value = value + torch.tensordot(block, beams.errors[start:step], dims=1)
            tried, allowed = levels.around(value, order[step], width)
            cost = beams.loss[..., None] + squares[step] * (tried - value[..., None]).square()
            cost = torch.where(allowed, cost, torch.inf)
            best, parents, found = _best(cost, tried, width)
            _continue(beams, start, step, parents)
            wanted[here + 1 :] = _picked(wanted[here + 1 :], parents)
            origin = origin.gather(0, parents)
            beams.loss, beams.rounded[step] = best, found
            beams.errors[step] = ordered[step] - found
        if start:
            beams.rounded[:start] = _picked(beams.rounded[:start], origin)
            beams.errors[:start] = _picked(beams.errors[:start], origin)
    winner = beams.loss.argmin(dim=0)
    chosen = beams.rounded.gather(1, winner.expand(columns, 1, rows)).squeeze(1)
    rounded = torch.empty_like(target)
    rounded[factor.order] = chosen
    return rounded


def _best(cost: Tensor, tried: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, parent and level of the `width` cheapest of all continuations, (width, rows) each.

    `cost` and `tried` are (width, rows, candidates). Among equals the earlier parent and the lower level come first.
    """
    beams, rows, candidates = cost.shape
    flat = cost.transpose(0, 1).reshape(rows, beams * candidates)
    order = torch.argsort(flat, dim=1, stable=True)[:, :width]
    found = tried.transpose(0, 1).reshape(rows, beams * candidates).gather(1, order)
    return flat.gather(1, order).T.contiguous(), (order // candidates).T.contiguous(), found.T.contiguous()


def _continue(beams: _Beams, start: int, step: int, parents: Tensor) -> None:
    """Let every beam take over what its parent has rounded since `start`."""
    if step > start:
        beams.rounded[start:step] = _picked(beams.rounded[start:step], parents)
        beams.errors[start:step] = _picked(beams.errors[start:step], parents)


def _picked(values: Tensor, parents: Tensor) -> Tensor:
    """Return (columns, width, rows) values with each beam's replaced by its parent's."""
    return values.gather(1, parents.expand(values.shape[0], *parents.shape))
