"""Round column by column, each error made good by the columns still to come (GPTQ, arXiv 2210.17323)."""

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor
from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 512  # whose sums over the columns before them are made at once
PANEL_COLUMNS = 32  # and within a block


def round_sequentially(
    target: Tensor, factor: Factor, levels: Levels, drift: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """Return the levels that keep the layer's output on the calibration inputs, column by column.

    Column j is rounded from w_j + the sum over the columns k before it of (w_k - q_k) lower[k, j], and with a drift
    also of t_k drift[k, j], where t_k is what column k was rounded from.

    Parameters
    ----------
    target
        (columns, rows): the weight, turned, so that a column lies in one piece of memory. Rows do not influence each
        other.
    factor
        Of the Gram matrix.
    levels
        Static: made from the original weight, so that activation order keeps groups contiguous.
    drift
        (columns, columns) below the diagonal, at the factor's places: GPTAQ's correction, see `targets`.
    scratch
        To be written over, of as many entries as the target or more; memory that is used again costs less than new.

    Returns
    -------
    rounded
        (columns, rows).
    """
    lower, columns = factor.lower, factor.columns.tolist()
    errors = torch.empty_like(target) if scratch is None else scratch[: target.numel()].view(target.shape)
    values = None if drift is None else torch.empty_like(target)  # as are errors, at the factor's places
    made_good = [(lower, errors)] if drift is None or values is None else [(lower, errors), (drift, values)]
    rounded = torch.empty_like(target)
    for end in range(len(columns), 0, -BLOCK_COLUMNS):
        start = max(end - BLOCK_COLUMNS, 0)
        wanted = ordered = target[factor.columns[start:end]]
        for shares, those in made_good:
            wanted = torch.addmm(wanted, shares[end:, start:end].T, those[end:])
        found = torch.empty_like(ordered)
        for stop in range(end, start, -PANEL_COLUMNS):
            first = max(stop - PANEL_COLUMNS, start)
            panel = wanted[first - start : stop - start]
            for shares, those in made_good:
                panel.addmm_(shares[stop:end, first:stop].T, those[stop:end])
            for place in range(stop - 1, first - 1, -1):
                value, later = panel[place - first], panel[: place - first]
                nearest = levels.nearest(value, columns[place], out=found[place - start])
                torch.sub(ordered[place - start], nearest, out=errors[place])
                if values is not None:
                    values[place] = value
                for shares, those in made_good:
                    later.addr_(shares[place, first:place], those[place])
        rounded[factor.columns[start:end]] = found
    return rounded
