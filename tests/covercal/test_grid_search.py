"""The search for where each group's grid ends, against trying every factor of every group by hand."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.quantizers.grid import (
    GridSettings,
    GroupError,
    dequantize,
    min_max_grid,
    output_error,
    quantize,
    searched_grid,
    squared_error,
    weighted_error,
)
from tests.covercal.layers import Floats, layer

COLUMNS, SIZE = 24, 8
FACTORS = [1.0 - step / 20 for step in range(11)]
ERRORS = ["squared", "weighted", "output"]
seeds = st.integers(0, 2**32 - 1)
chosen_grids = st.builds(
    GridSettings,
    st.integers(2, 5),
    st.sampled_from([None, SIZE]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)


def error_of(name: str, gram: Tensor, group_size: int | None) -> GroupError:
    return {
        "squared": lambda: squared_error,
        "weighted": lambda: weighted_error(gram.diagonal(), group_size),
        "output": lambda: output_error(gram, group_size),
    }[name]()


def by_definition(name: str, gram: Floats) -> Callable[[Floats, slice], Floats]:
    """Return what some rows' differences in one group cost, in float64."""
    metric = {"squared": np.eye(len(gram)), "weighted": np.diag(np.diag(gram)), "output": gram}[name]
    return lambda error, group: np.einsum("ri,ij,rj->r", error, metric[group, group], error)


def groups_of(group_size: int | None) -> list[slice]:
    size = group_size or COLUMNS
    return [slice(start, start + size) for start in range(0, COLUMNS, size)]


def rounding_error(weight: Tensor, factor: float, chosen: GridSettings) -> Floats:
    """Return Q - W on the min-max grid of weights that are a factor as large."""
    grid = min_max_grid(weight * factor, chosen)
    columns = grid.columns(weight.shape[1])
    return (dequantize(quantize(weight, *columns, chosen.bits), *columns) - weight).numpy()


def is_clear(weight: Tensor, chosen: GridSettings) -> npt.NDArray[np.bool_]:
    """Return where no weight of a group is half way between two codes for any factor, (rows, groups).

    The search counts in float32, in which such a weight may go the other way than in float64. On a symmetric grid the
    smallest weight of a group is half way between its codes 0 and 1 whenever it is the largest by magnitude.
    """
    clear = np.ones((len(weight), len(groups_of(chosen.group_size))), bool)
    for factor in FACTORS:
        scale, zero = min_max_grid(weight * factor, chosen).columns(COLUMNS)
        places = (weight / scale + zero).numpy()
        apart = np.abs(places - np.floor(places) - 0.5) > 1e-5
        inside = (places > 0) & (places < 2**chosen.bits - 1)
        clear &= (apart | ~inside).reshape(*clear.shape, -1).all(axis=2)
    return clear


@settings(deadline=None, max_examples=40)
@given(seeds, chosen_grids, st.sampled_from(ERRORS))
def test_every_group_gets_the_grid_of_its_best_factor(seed: int, chosen: GridSettings, name: str) -> None:
    weight, gram = layer(seed, 5, COLUMNS)
    found = searched_grid(weight, chosen, FACTORS, error_of(name, gram, chosen.group_size))
    cost = by_definition(name, gram.numpy())
    grids = [min_max_grid(weight * factor, chosen) for factor in FACTORS]
    errors = [rounding_error(weight, factor, chosen) for factor in FACTORS]
    clear = is_clear(weight, chosen)
    for number, group in enumerate(groups_of(chosen.group_size)):
        costs = np.stack([cost(error[:, group], group) for error in errors])
        for row in np.flatnonzero(clear[:, number]):
            got = float(found.scale[row, number]), float(found.zero[row, number])
            same = [(float(g.scale[row, number]), float(g.zero[row, number])) == got for g in grids]
            assert costs[same, row].min() <= costs[:, row].min() * (1 + 1e-4)


@settings(deadline=None, max_examples=40)
@given(seeds, chosen_grids, st.sampled_from(ERRORS))
def test_no_group_costs_more_than_on_the_min_max_grid(seed: int, chosen: GridSettings, name: str) -> None:
    weight, gram = layer(seed, 5, COLUMNS)
    grid = searched_grid(weight, chosen, FACTORS, error_of(name, gram, chosen.group_size))
    columns = grid.columns(COLUMNS)
    error = (dequantize(quantize(weight, *columns, chosen.bits), *columns) - weight).numpy()
    plain = rounding_error(weight, 1.0, chosen)
    cost, clear = by_definition(name, gram.numpy()), is_clear(weight, chosen)
    for number, group in enumerate(groups_of(chosen.group_size)):
        searched, spanned = (cost(each[:, group], group)[clear[:, number]] for each in (error, plain))
        assert (searched <= spanned * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ERRORS)
def test_at_2_bits_the_search_costs_less_than_the_min_max_grid(name: str) -> None:
    weight, gram = layer(0, 16, COLUMNS)
    chosen = GridSettings(2, SIZE, False, torch.float32)
    columns = searched_grid(weight, chosen, FACTORS, error_of(name, gram, SIZE)).columns(COLUMNS)
    error = (dequantize(quantize(weight, *columns, 2), *columns) - weight).numpy()
    cost, plain = by_definition(name, gram.numpy()), rounding_error(weight, 1.0, chosen)
    searched, spanned = (sum(cost(each[:, group], group).sum() for group in groups_of(SIZE)) for each in (error, plain))
    assert searched < 0.9 * spanned


@settings(deadline=None, max_examples=30)
@given(seeds, chosen_grids)
def test_scales_are_representable_and_zero_points_are_codes(seed: int, chosen: GridSettings) -> None:
    weight, _ = layer(seed, 5, COLUMNS)
    grid = searched_grid(weight, chosen, FACTORS, squared_error)
    assert torch.equal(grid.scale.to(chosen.scale_dtype).double(), grid.scale)
    assert torch.equal(grid.zero, grid.zero.round().clamp(0, 2**chosen.bits - 1))


@pytest.mark.parametrize("first", [1.0, 0.7])
def test_among_factors_that_cost_the_same_the_first_is_taken(first: float) -> None:
    weight, _ = layer(0, 5, COLUMNS)
    chosen = GridSettings(3, SIZE, False, torch.float32)
    found = searched_grid(weight, chosen, [first, 0.9, 0.5], lambda differences: differences.new_ones(5, 3))
    expected = min_max_grid(weight * first, chosen)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)


def test_a_single_factor_shrinks_every_grid() -> None:
    weight, _ = layer(0, 5, COLUMNS)
    chosen = GridSettings(3, SIZE, False, torch.float64)
    found = searched_grid(weight, chosen, [0.9], squared_error)
    torch.testing.assert_close(found.scale, 0.9 * min_max_grid(weight, chosen).scale)


@pytest.mark.parametrize("group_size", [None, SIZE])
def test_costs_are_asked_for_with_float32_differences_by_group(group_size: int | None) -> None:
    weight, _ = layer(0, 5, COLUMNS)
    asked: list[Tensor] = []

    def note(differences: Tensor) -> Tensor:
        asked.append(differences)
        return squared_error(differences)

    chosen = GridSettings(3, group_size, False, torch.float32)
    searched_grid(weight, chosen, FACTORS[:3], note)
    shape = (5, 1, COLUMNS) if group_size is None else (5, COLUMNS // SIZE, SIZE)
    assert [(each.dtype, each.shape) for each in asked] == [(torch.float32, shape)] * 3
    for factor, differences in zip(FACTORS, asked, strict=False):
        expected = rounding_error(weight, factor, chosen)
        np.testing.assert_allclose(differences.numpy().reshape(5, COLUMNS), expected, atol=1e-5)


def test_the_weight_is_not_changed() -> None:
    weight, gram = layer(0, 5, COLUMNS)
    kept = weight.clone(), gram.clone()
    searched_grid(weight, GridSettings(3, SIZE, False, torch.float32), FACTORS, output_error(gram, SIZE))
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])


# --- what a difference costs ---------------------------------------------------------------------------------------


def differences_and_inputs(seed: int) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(5, COLUMNS)), generator.normal(size=(COLUMNS, 50)) * np.arange(1, 25)[:, None]


@pytest.mark.parametrize("group_size", [None, SIZE])
def test_the_output_error_of_a_group_is_what_its_inputs_make_of_it(group_size: int | None) -> None:
    differences, x = differences_and_inputs(0)
    found = output_error(torch.from_numpy(x @ x.T), group_size)(_grouped(differences, group_size))
    expected = [np.square(differences[:, g] @ x[g]).sum(axis=1) for g in groups_of(group_size)]
    np.testing.assert_allclose(found.double().numpy(), np.stack(expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("group_size", [None, COLUMNS])
def test_the_gram_matrix_of_a_single_group_is_not_copied(group_size: int | None) -> None:
    gram, differences = torch.eye(COLUMNS), torch.ones(5, 1, COLUMNS)
    error = output_error(gram, group_size)
    gram.mul_(3.0)
    assert error(differences).tolist() == [[3.0 * COLUMNS]] * 5


@pytest.mark.parametrize("group_size", [None, SIZE])
def test_the_weighted_error_of_a_group_is_what_inputs_of_one_channel_at_a_time_make_of_it(
    group_size: int | None,
) -> None:
    differences, x = differences_and_inputs(1)
    found = weighted_error(torch.from_numpy(np.square(x).sum(axis=1)), group_size)(_grouped(differences, group_size))
    alone = np.square(differences[:, :, None] * x).sum(axis=2)
    expected = [alone[:, g].sum(axis=1) for g in groups_of(group_size)]
    np.testing.assert_allclose(found.double().numpy(), np.stack(expected, axis=1), rtol=1e-5)


def test_the_squared_error_of_a_group_is_the_sum_of_its_squares() -> None:
    differences, _ = differences_and_inputs(2)
    found = squared_error(_grouped(differences, SIZE)).double().numpy()
    expected = np.stack([np.square(differences[:, g]).sum(axis=1) for g in groups_of(SIZE)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _grouped(differences: Floats, group_size: int | None) -> Tensor:
    """Return differences in the dtype that errors are computed in, (rows, groups, group size)."""
    return torch.from_numpy(differences).float().reshape(5, -1, group_size or COLUMNS)
