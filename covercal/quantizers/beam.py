"""Bounded search: several partial roundings of each row are kept, and the best whole one wins (K-CoreQ, 2602.05902)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor
from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 64


@dataclass(slots=True)
class _Beams:
    """Partial roundings of every row, at the factor's places.

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

    The loss of a row is the sum over columns of roots[j]**2 (t_j - q_j)**2, which is ||W - Q||**2 in the metric of
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
    count, rows = target.shape
    columns = factor.columns.tolist()
    squares = factor.roots.square()
    loss = torch.full((width, rows), torch.inf, dtype=target.dtype, device=target.device)
    loss[0] = 0.0
    rounded, errors = (target.new_empty((count, width, rows)) for _ in range(2))
    beams = _Beams(loss, rounded, errors)
    for end in range(count, 0, -BLOCK_COLUMNS):
        start = max(end - BLOCK_COLUMNS, 0)
        ordered = target[factor.columns[start:end]]
        pulled = torch.mm(factor.lower[end:, start:end].T, beams.errors[end:].reshape(count - end, width * rows))
        wanted = ordered[:, None, :] + pulled.reshape(end - start, width, rows)
        origin = torch.arange(width, device=target.device)[:, None].expand(width, rows)
        for place in range(end - 1, start - 1, -1):
            here = place - start
            later = factor.lower[place + 1 : end, place]
            value = wanted[here] + torch.tensordot(later, beams.errors[place + 1 : end], dims=1)
            tried, allowed = levels.around(value, columns[place], width)
            cost = beams.loss[..., None] + squares[place] * (tried - value[..., None]).square()
            best, parents, found = _best(torch.where(allowed, cost, torch.inf), tried, width)
            for kept in (beams.rounded[place + 1 : end], beams.errors[place + 1 : end], wanted[:here]):
                kept.copy_(_picked(kept, parents))
            origin = origin.gather(0, parents)
            beams.loss, beams.rounded[place] = best, found
            beams.errors[place] = ordered[here] - found
        for kept in (beams.rounded[end:], beams.errors[end:]):
            kept.copy_(_picked(kept, origin))
    winner = beams.loss.argmin(dim=0)
    chosen = torch.empty_like(target)
    chosen[factor.columns] = beams.rounded.gather(1, winner.expand(count, 1, rows)).squeeze(1)
    return chosen


def _best(cost: Tensor, tried: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, parent and level of the `width` continuations that are kept, (width, rows) each.

    Beam k is the cheapest continuation of beams 0 to k that no earlier beam has taken. The first k beams are thus those
    of a search of width k, and a wider search never ends with a larger loss (MonoBeam: Lemons et al., "Beam Search:
    Faster and Monotonic", ICAPS 2022); the plain rule, the cheapest of all, does not promise that. Among equals the
    earlier parent and the lower level come first.

    `cost` and `tried` are (width, rows, candidates).
    """
    rows, candidates = cost.shape[1:]
    flat = cost.transpose(0, 1).reshape(rows, width * candidates)
    losses = cost.new_empty((width, rows))
    chosen = torch.empty((width, rows), dtype=torch.int64, device=cost.device)
    for beam in range(width):
        losses[beam], chosen[beam] = flat[:, : (beam + 1) * candidates].min(dim=1)
        flat.scatter_(1, chosen[beam, :, None], torch.inf)
    found = tried.transpose(0, 1).reshape(rows, width * candidates).gather(1, chosen.T)
    return losses, chosen // candidates, found.T.contiguous()


def _picked(values: Tensor, parents: Tensor) -> Tensor:
    """Return (columns, width, rows) values with each beam's replaced by its parent's."""
    return values.gather(1, parents.expand(values.shape[0], *parents.shape))
