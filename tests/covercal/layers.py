"""Layers to try quantisers on: weights, inputs, what a weight may become, and losses by their definition."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from covercal.quantizers.factor import Factor, factorize
from covercal.quantizers.grid import Grid, GridSettings, dequantize, min_max_grid
from covercal.quantizers.levels import Levels
from covercal.quantizers.pieces import Solved
from covercal.quantizers.regularization import Metric
from covercal.quantizers.salient import SalientGrid, salient_grid, salient_mask

Floats = npt.NDArray[np.float64]


def layer(seed: int, rows: int, columns: int, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram matrix of correlated inputs whose channels differ in size."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(tokens, columns)) @ generator.normal(size=(columns, columns)) / columns**0.5
    inputs = (mixed + generator.normal(size=(tokens, columns))) * np.exp(generator.normal(size=columns))
    weight = generator.normal(size=(rows, columns)) * np.exp(0.3 * generator.normal(size=(rows, 1)))
    return torch.from_numpy(weight), torch.from_numpy(inputs.T @ inputs * (2 / tokens))


def grid_of(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    return min_max_grid(weight, GridSettings(bits, group_size, symmetric, dtype))


def by_column(values: Tensor, columns: int) -> Floats:
    """Return what every group has (rows, groups) for every weight, (rows, columns)."""
    return np.repeat(values.numpy(), columns // values.shape[1], axis=1)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I."""
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def row_losses(target: Tensor, rounded: Tensor, gram: Tensor) -> Floats:
    """Return (w - q) H (w - q)^T of every row of turned weights, (columns, rows)."""
    error = (target - rounded).numpy()
    return np.einsum("ir,ij,jr->r", error, gram.numpy(), error)


def dense(solved: Solved) -> Tensor:
    """Return the weights of a checkpoint: codes on their grid, salient ones in their places."""
    columns = solved.codes.shape[1]
    scale, zero = (torch.from_numpy(by_column(part.double(), columns)) for part in (solved.scale, solved.zero))
    plain = dequantize(solved.codes.double(), scale, zero)
    return plain if solved.salient is None else plain.masked_scatter(solved.salient[0], solved.salient[1].double())


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight to round.

    Attributes
    ----------
    target
        The weight, turned: (columns, rows).
    gram
        Damped.
    values
        What each weight may become, ascending, by column and row.
    mask
        Which weights are salient, (columns, rows).
    """

    target: Tensor
    gram: Tensor
    factor: Factor
    levels: Levels
    values: list[list[Floats]]
    mask: Tensor

    def best(self, row: int) -> Floats:
        """Return the rounding of a row with the least loss of all there are, (columns,)."""
        every = np.array(list(product(*(column[row] for column in self.values))))
        error = every - self.target[:, row].numpy()
        return every[np.einsum("qi,ij,qj->q", error, self.gram.numpy(), error).argmin()]


def problem(
    seed: int, rows: int, columns: int, bits: int, group_size: int | None = None, *, share: float = 0.0
) -> Problem:
    """Return a weight of which a share is salient (3 bits), with the factor of its Gram matrix in activation order."""
    weight, gram = layer(seed, rows, columns, tokens=4 * columns + 100)
    mask = salient_mask(weight, share, "tensor", group_size)
    grid = grid_of(torch.where(mask, 0.0, weight), bits, group_size)
    apart = salient_grid(weight, mask, 3, grid.settings) if share else None
    factor = factorize(gram, 0.01, activation_order=True)
    values = allowed_values(grid, columns, apart)
    target, gram = weight.T.contiguous(), damped(gram, 0.01)
    return Problem(target, gram, factor, Levels.of(grid, columns, apart), values, mask.T)


def allowed_values(grid: Grid, columns: int, salient: SalientGrid | None = None) -> list[list[Floats]]:
    """Return what each weight may become, by column and row."""
    scale, zero = by_column(grid.scale, columns), by_column(grid.zero, columns)
    rows = range(len(scale))
    found = [[(np.arange(grid.settings.top + 1) - zero[r, c]) * scale[r, c] for r in rows] for c in range(columns)]
    if salient is not None:
        step, low = by_column(salient.scale, columns), by_column(salient.low, columns)
        for row, column in salient.mask.nonzero().tolist():
            values = torch.from_numpy(np.arange(2**salient.bits) * step[row, column] + low[row, column])
            found[column][row] = values.to(salient.dtype).double().numpy()  # as a checkpoint keeps them
    return found


def is_level(rounded: Tensor, values: list[list[Floats]]) -> bool:
    """Return whether every weight of a turned rounding is one of the values that it may take, to the bit."""
    return all(
        float(rounded[column, row]) in values[column][row]
        for column in range(rounded.shape[0])
        for row in range(rounded.shape[1])
    )


def plain_metric(gram: Tensor) -> Metric:
    """Return a Gram matrix as it is."""
    return Metric(gram, 0.0, gram.diagonal())


def matrix_of(metric: Metric) -> Tensor:
    """Return a regularised Gram matrix as a whole."""
    return metric.rows(torch.arange(len(metric.diagonal)))
