"""Round column by column, each error made good by the columns still to come (GPTQ, arXiv 2210.17323)."""

import torch
from torch import Tensor

from covercal.quantizers.factor import Factor
from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 64


def round_sequentially(target: Tensor, factor: Factor, levels: Levels, drift: Tensor | None = None) -> Tensor:
    """Return the levels that keep the layer's output on the calibration inputs, column by column.

    Step k rounds t_k = w_k + sum over j < k of (w_j - q_j) feedback[j, k], and with a drift also + t_j drift[j, k].

    Parameters
    ----------
    target
        float64 (columns, rows): the weight, turned, so that a column lies in one piece of memory. Rows do not influence
        each other.
    factor
        Of the Gram matrix.
    levels
        Static: made from the original weight, so that activation order keeps groups contiguous.
    drift
        (columns, columns) above the diagonal, in the order of rounding: GPTAQ's correction, see `targets`.

    Returns
    -------
    rounded
        float64 (columns, rows).
    """
    feedback, order = factor.feedback, factor.order.tolist()
    errors = torch.empty_like(target)  # in the order of rounding, as are the next two
    values = torch.empty_like(target) if drift is not None else None
    ordered = target[factor.order]
    rounded = torch.empty_like(target)
    for start in range(0, len(order), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(order))
        wanted = torch.addmm(ordered[start:end], feedback[:start, start:end].T, errors[:start])
        if drift is not None and values is not None:
            wanted.addmm_(drift[:start, start:end].T, values[:start])
        for step in range(start, end):
            value, later = wanted[step - start], wanted[step - start + 1 :]
            found = levels.nearest(value, order[step])
            error = torch.sub(ordered[step], found, out=errors[step])
            later.addr_(feedback[step, step + 1 : end], error)
            if drift is not None and values is not None:
                values[step] = value
                later.addr_(drift[step, step + 1 : end], value)
            rounded[order[step]] = found
    return rounded
