"""Round column by column, each error made good by the columns still to come (GPTQ, arXiv 2210.17323)."""

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor
from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 128


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
    values = torch.empty_like(target) if drift is not None else None  # as are errors, at the factor's places
    rounded = torch.empty_like(target)
    for end in range(len(columns), 0, -BLOCK_COLUMNS):
        start = max(end - BLOCK_COLUMNS, 0)
        ordered = target[factor.columns[start:end]]
        wanted = torch.addmm(ordered, lower[end:, start:end].T, errors[end:])
        if drift is not None and values is not None:
            wanted.addmm_(drift[end:, start:end].T, values[end:])
        for place in range(end - 1, start - 1, -1):
            value, later = wanted[place - start], wanted[: place - start]
            found = levels.nearest(value, columns[place], out=rounded[columns[place]])
            error = torch.sub(ordered[place - start], found, out=errors[place])
            later.addr_(lower[place, start:place], error)
            if drift is not None and values is not None:
                values[place] = value
                later.addr_(drift[place, start:place], value)
    return rounded
