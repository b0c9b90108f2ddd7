"""From weights and what is known of their inputs to rounded weights: all choices of one site put together."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.gram import SiteStatistics
from covercal.quantization_settings import Quantization
from covercal.quantizers.beam import round_by_beam
from covercal.quantizers.factor import Factor, factorize, is_finite
from covercal.quantizers.grid import (
    Grid,
    GridSettings,
    GroupError,
    grouped,
    min_max_grid,
    output_error,
    searched_grid,
    squared_error,
    weighted_error,
)
from covercal.quantizers.levels import Levels
from covercal.quantizers.pieces import Pieces, Solved, reported_rows, row_pieces, slab_weights
from covercal.quantizers.polish import polish
from covercal.quantizers.refit import refitted
from covercal.quantizers.regularization import (
    DAMPINGS,
    GAMMAS,
    SALIENCY_DAMPINGS,
    SHRINKAGES,
    Metric,
    Regularization,
    damping_weights,
    regularized,
)
from covercal.quantizers.salient import SalientGrid, salient_grid, salient_mask
from covercal.quantizers.sequential import round_sequentially
from covercal.quantizers.targets import carried_drift, corrected_target, reachable, reachable_share

NOTHING_HELD_OUT = "nothing was validated: too few sequences to hold some out, so that the first candidate was taken"
VALIDATED_ROWS = 128  # rows on which regularisation is validated


@dataclass(frozen=True, slots=True)
class SolvedSite:
    """The quantised weights of linears that share an input, and how their Gram matrix was regularised.

    Attributes
    ----------
    weights
        In the order of the linears.
    regularization
        What was used; None when nothing was rounded by a Gram matrix.
    factor_damping, attempts, dead
        See `Factor`; 0 without one.
    note
        What was done otherwise than asked, and why.
    """

    weights: tuple[Solved, ...]
    regularization: Regularization | None = None
    factor_damping: float = 0.0
    attempts: int = 0
    dead: int = 0
    note: str = ""


def solve_site(
    weights: Sequence[Tensor], statistics: SiteStatistics, settings: Quantization, scale_dtype: torch.dtype
) -> SolvedSite:
    """Quantise the weights of linears that read one input; they share one factorisation.

    Parameters
    ----------
    weights
        (rows, columns) of each linear.
    statistics
        Of the inputs; holds what `settings` read.
    settings
        All choices but scaling and activations, which are made before.
    scale_dtype
        In which a checkpoint keeps scales.

    Raises
    ------
    QuantizationError
        When a weight or the Gram matrix is not finite, a group size does not divide the columns, or a scale overflows.
    """
    grid_settings = GridSettings(settings.bits, settings.group_size, settings.symmetric, scale_dtype)
    check_inputs(weights, statistics, settings)
    masks = [_mask(weight, settings) for weight in weights]
    found = _regularization(weights, masks, statistics, settings, grid_settings) if settings.rounds else None
    solver = _solver(weights, statistics, settings, found) if found is not None else None
    job = _Job(statistics, settings, grid_settings, solver)
    joined = tuple(weight.joined(statistics.gram) for weight in _solve_pieces(weights, masks, job))
    if solver is None:
        return SolvedSite(joined)
    factor = solver.factor
    note = NOTHING_HELD_OUT if settings.validates and not _holds_out(statistics) else ""
    return SolvedSite(joined, found, factor.damping, factor.attempts, factor.dead, note)


def check_inputs(weights: Sequence[Tensor], statistics: SiteStatistics, settings: Quantization) -> None:
    """Raise when a weight or a matrix is not finite, or the group size does not divide the columns.

    Raises
    ------
    QuantizationError
        Saying which.
    """
    for weight in weights:
        grouped(weight, settings.group_size)
    named = {
        "Gram matrix": statistics.gram,
        "held-out Gram matrix": statistics.validation,
        "drift": statistics.drift,
        "drift's Gram matrix": statistics.drift_energy,
    }
    for number, drift in enumerate(statistics.outputs_drift or ()):
        named[f"drift of output {number}"] = drift
    for name, matrix in named.items():
        if matrix is not None and not is_finite(matrix):
            raise QuantizationError(f"its {name} holds NaN or infinity")


@dataclass(frozen=True, slots=True)
class _Job:
    """What all rows of a site are rounded with."""

    statistics: SiteStatistics
    settings: Quantization
    grid: GridSettings
    solver: "_Solver | None"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that everything is computed in: that of the Gram matrix, float64 without one."""
        return torch.float64 if self.statistics.gram is None else self.statistics.gram.dtype


@dataclass(frozen=True, slots=True)
class _Solver:
    """What all weights of a site are rounded with.

    Attributes
    ----------
    factor
        Of the regularised, damped Gram matrix.
    metric
        That matrix, for polishing and for fitting scales.
    drift
        GPTAQ's; None for other targets.
    scratch
        For `round_sequentially`, of one piece of rows.
    """

    factor: Factor
    metric: Metric
    drift: Tensor | None
    scratch: Tensor


def _solver(
    weights: Sequence[Tensor], statistics: SiteStatistics, settings: Quantization, chosen: Regularization
) -> _Solver:
    gram = _needed(statistics.gram, "a Gram matrix")
    towards, weighting = _diagonals(weights, statistics, settings, chosen)
    factor = _factor(gram, chosen, settings, towards, weighting)
    drift = None
    if settings.target.kind == "gptaq" and isinstance(settings.target.alpha, float):
        drift = carried_drift(_needed(statistics.drift, "the drift"), factor, settings.target.alpha)
    metric = regularized(gram, chosen.shrinkage, towards, factor.damping, weighting)
    total = sum(weight.numel() for weight in weights)
    return _Solver(factor, metric, drift, gram.new_empty(min(slab_weights(len(gram)), total)))


def _diagonals(
    weights: Sequence[Tensor], statistics: SiteStatistics, settings: Quantization, chosen: Regularization
) -> tuple[Tensor | None, Tensor | None]:
    """Return what shrinkage goes towards (None: its own diagonal), and what each channel's damping weighs."""
    towards = None
    if settings.shrinkage.towards == "pool" and chosen.shrinkage:
        towards = _needed(statistics.pool_energy, "the pool's energy")
    if chosen.gamma is None:
        return towards, None
    magnitude = _needed(statistics.magnitude, "mean |x|")
    found = damping_weights(magnitude, weight_magnitude(weights), chosen.gamma)
    return towards, found.to(_needed(statistics.gram, "a Gram matrix").dtype)


def _factor(
    gram: Tensor,
    chosen: Regularization,
    settings: Quantization,
    towards: Tensor | None,
    weighting: Tensor | None,
) -> Factor:
    return factorize(
        gram,
        chosen.damping,
        activation_order=settings.activation_order,
        weights=weighting,
        shrinkage=chosen.shrinkage,
        towards=towards,
    )


def _regularization(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    statistics: SiteStatistics,
    settings: Quantization,
    grid_settings: GridSettings,
) -> Regularization:
    """Return the regularisation that the settings fix, estimate, or find best on held-out sequences."""
    candidates = list(regularizations(settings, statistics))
    if len(candidates) == 1:
        return candidates[0]
    training, held_out = statistics.training, statistics.validation
    if training is None or held_out is None:
        return candidates[0]  # told in the site's note
    rows = _some_rows(weights).to(training.dtype)
    salient = [mask for mask in masks if mask is not None]
    grid, apart = _grids(rows, _some_rows(salient) if salient else None, statistics, settings, grid_settings)
    levels = Levels.of(grid, rows.shape[1], apart)
    turned = rows.T.contiguous()
    losses = []
    for candidate in candidates:
        towards, weighting = _diagonals(weights, statistics, settings, candidate)
        factor = _factor(training, candidate, settings, towards, weighting)
        losses.append(float(energy(rows - round_sequentially(turned, factor, levels).T, held_out)))
    return candidates[min(range(len(candidates)), key=losses.__getitem__)]


def _holds_out(statistics: SiteStatistics) -> bool:
    return statistics.training is not None and statistics.validation is not None


def regularizations(settings: Quantization, statistics: SiteStatistics) -> Iterator[Regularization]:
    """Yield the regularisations to choose among; one when nothing is validated."""
    shrinkage, damping = settings.shrinkage.strength, settings.damping
    by_saliency = damping.weights == "saliency"
    shares: Sequence[float]
    if shrinkage == "ledoit_wolf":
        if math.isnan(statistics.ledoit_wolf):
            raise ValueError("Ledoit-Wolf shrinkage reads how sequences differ, which was not measured")
        shares = (statistics.ledoit_wolf,)
    else:
        shares = SHRINKAGES if shrinkage == "validated" else (float(shrinkage),)
    strengths: Sequence[float] = (
        (SALIENCY_DAMPINGS if by_saliency else DAMPINGS) if damping.strength == "validated" else (damping.strength,)
    )
    gammas: Sequence[float | None] = (None,)
    if by_saliency:
        gammas = GAMMAS if damping.gamma == "validated" else (float(damping.gamma),)
    for share in shares:
        for strength in strengths:
            for gamma in gammas:
                yield Regularization(share, strength, gamma)


def _some_rows(weights: Sequence[Tensor]) -> Tensor:
    """Return evenly spaced rows of all weights (or masks) together."""
    total = sum(len(weight) for weight in weights)
    wanted = torch.linspace(0, total - 1, min(VALIDATED_ROWS, total)).round().long()
    found, first = [], 0
    for weight in weights:
        own = wanted[(wanted >= first) & (wanted < first + len(weight))] - first
        found.append(weight[own.to(weight.device)])
        first += len(weight)
    return torch.cat(found)


def _mask(weight: Tensor, settings: Quantization) -> Tensor | None:
    salient = settings.salient
    return salient_mask(weight, salient.share, salient.scope, settings.group_size) if salient.share else None


def _stacked(parts: Iterable[Sequence[Any]]) -> Tensor | None:
    """Return the rows of some masks together; None when there are none."""
    kept = [mask[rows] for mask, rows in parts if mask is not None]
    return torch.cat(kept) if kept else None


def _target(weight: Tensor, index: int, rows: slice, alpha: float, job: _Job) -> Tensor:
    if job.solver is None or job.settings.target.kind != "coreq":
        return weight
    return corrected_target(weight, _outputs_drift(weight, index, rows, job), job.solver.factor, alpha)


def _aim(target: Tensor, job: _Job) -> Tensor:
    """Return what polishing and fitted scales go towards, (rows, columns): the target, and with GPTAQ that of CoreQ.

    GPTAQ rounds the weights themselves, and corrects as it goes so that Q X_q comes near W (X_q + alpha dX). CoreQ's
    target is where that distance is least; towards the weights, the correction would be undone.
    """
    rounding, kind, alpha = job.settings.rounding, job.settings.target.kind, job.settings.target.alpha
    refines = rounding.polish > 0 or job.settings.ranges.refit > 0
    if job.solver is None or kind != "gptaq" or not isinstance(alpha, float) or not refines:
        return target
    drift = _needed(job.statistics.drift, "the drift")
    return corrected_target(target, target @ drift, job.solver.factor, alpha)


def _outputs_drift(weight: Tensor, index: int, rows: slice, job: _Job) -> Tensor:
    """Return W D of rows `rows` of linear `index`, whose weights are `weight`."""
    known = job.statistics.outputs_drift
    return weight @ _needed(job.statistics.drift, "the drift") if known is None else known[index][rows]


def _solve_pieces(weights: Sequence[Tensor], masks: Sequence[Tensor | None], job: _Job) -> list[Pieces]:
    """Round some rows after others."""
    found = [Pieces(_alpha(weight, index, job)) for index, weight in enumerate(weights)]
    width = job.settings.rounding.width if job.settings.rounding.kind == "beam" else 1
    for pieces in row_pieces([len(weight) for weight in weights], weights[0].shape[1], width):
        plain = [weights[index][rows].to(job.dtype) for index, rows in pieces]
        targets = [
            _target(weight, index, rows, found[index].alpha, job)
            for weight, (index, rows) in zip(plain, pieces, strict=True)
        ]
        target = targets[0] if len(targets) == 1 else torch.cat(targets)
        mask = _stacked([masks[index], rows] for index, rows in pieces)
        start = 0
        solved, rounded = _solve_rows(target, mask, job)
        for weight, aim, (index, place) in zip(plain, targets, pieces, strict=True):
            rows = slice(start, start + len(weight))
            start = rows.stop
            told = reported_rows(place, len(weights[index]))
            found[index].add(solved.some(rows), weight, aim, rounded[rows], told)
    return found


def _solve_rows(target: Tensor, mask: Tensor | None, job: _Job) -> tuple[Solved, Tensor]:
    """Round some rows; returns them as a checkpoint keeps them, and their values.

    Where scales are fitted, all is rounded again before every fit but the first, and polished before the last.
    """
    aim = _aim(target, job)
    grid, apart = _grids(target, mask, job.statistics, job.settings, job.grid)
    turned = target.T.contiguous()
    turned_aim = turned if aim is target else aim.T.contiguous()
    fits = job.settings.ranges.refit if job.solver is not None else 0
    for left in reversed(range(max(fits, 1))):
        levels = Levels.of(grid, target.shape[1], apart)
        rounded = _rounded(turned, levels, job.solver, job.settings)
        if not left:
            rounded = _polished(turned_aim, rounded, levels, job.solver, job.settings)
        rounded = rounded.T.contiguous()
        codes = grid.codes(rounded)
        if fits:
            grid = _refitted(aim, rounded, codes, mask, grid, job.solver)
    if fits:
        values = grid.values(codes)
        rounded = values if mask is None else torch.where(mask, rounded, values)
    kept = None
    if mask is not None:
        kept = mask, rounded[mask].to(job.grid.scale_dtype)
        rounded = rounded.masked_scatter(mask, kept[1].to(rounded.dtype))
    return Solved(codes, grid.scale.to(job.grid.scale_dtype), grid.zero.to(torch.uint8), kept, 0.0, 0.0), rounded


def _refitted(
    target: Tensor, rounded: Tensor, codes: Tensor, mask: Tensor | None, grid: Grid, solver: _Solver | None
) -> Grid:
    """Return the grid fitted to the codes of the weights that are on it."""
    if solver is None:
        raise ValueError("scales are fitted in the metric of a Gram matrix")
    metric = solver.metric
    steps = codes.to(target.dtype) - grid.columns(codes.shape[1])[1]
    if mask is None:
        return refitted(target, steps, grid, metric)
    return refitted(torch.where(mask, target - rounded, target), steps.masked_fill(mask, 0.0), grid, metric)


def _rounded(turned: Tensor, levels: Levels, solver: _Solver | None, settings: Quantization) -> Tensor:
    rounding = settings.rounding
    if solver is None:
        return levels.all_nearest(turned)
    if rounding.kind == "beam":
        return round_by_beam(turned, solver.factor, levels, rounding.width)
    if rounding.kind == "sequential":
        return round_sequentially(turned, solver.factor, levels, solver.drift, solver.scratch)
    return levels.all_nearest(turned)


def _polished(
    turned: Tensor, rounded: Tensor, levels: Levels, solver: _Solver | None, settings: Quantization
) -> Tensor:
    passes = settings.rounding.polish
    if solver is None or not passes:
        return rounded
    return polish(turned, rounded, solver.metric, levels, solver.factor.order, passes)


def _grids(
    weight: Tensor, mask: Tensor | None, statistics: SiteStatistics, settings: Quantization, grid_settings: GridSettings
) -> tuple[Grid, SalientGrid | None]:
    """Return the grid of weights (rows, columns) less the salient ones, and that of those."""
    if mask is None:
        return _grid(weight, statistics, settings, grid_settings), None
    plain = torch.where(mask, 0.0, weight)
    apart = salient_grid(weight, mask, settings.salient.bits, grid_settings)
    return _grid(plain, statistics, settings, grid_settings), apart


def _grid(weight: Tensor, statistics: SiteStatistics, settings: Quantization, grid_settings: GridSettings) -> Grid:
    """Return the grid of weights (rows, columns), in their dtype."""
    ranges, clip = settings.ranges, settings.salient.clip if settings.salient.share else 1.0
    if ranges.search == "min_max":
        if clip == 1.0:
            return min_max_grid(weight, grid_settings).to(weight.dtype)
        return searched_grid(weight, grid_settings, [clip], squared_error).to(weight.dtype)
    factors = [clip * (1.0 - (1.0 - ranges.shrink) * step / ranges.steps) for step in range(ranges.steps + 1)]
    error: GroupError = squared_error
    if ranges.search == "weighted":
        error = weighted_error(_needed(statistics.gram, "a Gram matrix").diagonal(), settings.group_size)
    elif ranges.search == "output":
        error = output_error(_needed(statistics.gram, "a Gram matrix"), settings.group_size)
    return searched_grid(weight, grid_settings, factors, error).to(weight.dtype)


def _alpha(weight: Tensor, index: int, job: _Job) -> float:
    """Return the target's alpha for a whole weight; NaN without a corrected target."""
    target, solver = job.settings.target, job.solver
    if solver is None or target.kind == "weights":
        return math.nan
    if target.alpha != "closed_form":
        return target.alpha
    known = job.statistics.outputs_drift_energy
    reached = whole = 0.0
    for ((_, rows),) in row_pieces([len(weight)], weight.shape[1]):
        plain = weight[rows].to(job.dtype)
        reached += reachable(_outputs_drift(plain, index, rows, job), solver.factor)
        if known is None:
            whole += float(energy(plain, _needed(job.statistics.drift_energy, "the drift's Gram matrix")))
    return reachable_share(reached, whole if known is None else known[index])


def weight_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """Return mean |w| of every column over the rows of all weights, float64 (columns,)."""
    total = sum(weight.abs().sum(dim=0, dtype=torch.float64) for weight in weights)
    return torch.as_tensor(total) / sum(len(weight) for weight in weights)


def energy(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return tr(M H M^T), the squared output of M on the inputs of H."""
    return ((matrix @ gram.to(matrix.dtype)) * matrix).sum(dtype=torch.float64)


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"these settings read {name}, which was not measured")
    return value
