"""Coordinate descent over a finished rounding: each weight moves to its best level, all others as they are."""

from torch import Tensor

from covercal.quantizers.levels import Levels

BLOCK_COLUMNS = 64


def polish(target: Tensor, rounded: Tensor, gram: Tensor, levels: Levels, order: Tensor, passes: int) -> Tensor:
    """Return a rounding whose loss ||W - Q||**2 in the metric of `gram` is at most that of `rounded`.

    In each pass, column j moves to the level nearest to q_j - ((Q - W) H)_j / H_jj (CoreQ's optional passes, arXiv
    2602.05902; also QuIP's "greedy updates", 2307.13304).

    Parameters
    ----------
    target, rounded
        (columns, rows).
    gram
        (columns, columns), positive on the diagonal.
    levels
        What each weight may become.
    order
        int64 (columns,): in which order columns move.
    passes
        How often all of them do.
    """
    current = rounded.clone()
    for _ in range(passes):
        for start in range(0, len(order), BLOCK_COLUMNS):
            block = order[start : start + BLOCK_COLUMNS]
            slope = gram[block] @ (current - target)  # of half the loss, (block, rows)
            for here, column in enumerate(block.tolist()):
                wanted = current[column] - slope[here] / gram[column, column]
                found = levels.nearest(wanted, column)
                change = found - current[column]
                slope.addr_(gram[block, column], change)
                current[column] = found
    return current
