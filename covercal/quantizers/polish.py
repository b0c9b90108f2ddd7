"""Coordinate descent over a finished rounding: each weight moves to its best level, all others as they are."""

import torch
from torch import Tensor

from covercal.quantizers.levels import Levels
from covercal.quantizers.regularization import Metric

BLOCK_COLUMNS = 64


def polish(target: Tensor, rounded: Tensor, metric: Metric, levels: Levels, order: Tensor, passes: int) -> Tensor:
    """Return a rounding whose loss ||W - Q||**2 in the metric of `metric` is at most that of `rounded`.

    In each pass, column j moves to the level nearest to q_j - ((Q - W) H)_j / H_jj (CoreQ's optional passes, arXiv
    2602.05902; also QuIP's "greedy updates", 2307.13304).

    Parameters
    ----------
    target, rounded
        (columns, rows).
    metric
        Positive on the diagonal.
    levels
        What each weight may become.
    order
        int64 (columns,): in which order columns move.
    passes
        How often all of them do.
    """
    current, difference = rounded.clone(), rounded - target
    inverse = metric.diagonal.reciprocal().tolist()
    for _ in range(passes):
        for start in range(0, len(order), BLOCK_COLUMNS):
            block = order[start : start + BLOCK_COLUMNS]
            rows = metric.rows(block)
            slope = rows @ difference  # of half the loss, (block, rows)
            shares, before = rows[:, block], current[block]
            found, change = torch.empty_like(before), torch.empty_like(before)
            for here, column in enumerate(block.tolist()):
                wanted = torch.add(before[here], slope[here], alpha=-inverse[column])
                levels.nearest(wanted, column, out=found[here])
                torch.sub(found[here], before[here], out=change[here])
                slope[here + 1 :].addr_(shares[here + 1 :, here], change[here])
            current[block] = found
            difference[block] += change
    return current
