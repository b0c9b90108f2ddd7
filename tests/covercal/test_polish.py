"""Coordinate descent against a loop that tries every level of every weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.quantizers.polish import polish
from covercal.quantizers.sequential import round_sequentially
from tests.covercal.layers import Floats, Problem, is_level, plain_metric, problem, row_losses

seeds = st.integers(0, 2**32 - 1)


def polished(chosen: Problem, rounded: Tensor, passes: int = 1) -> Tensor:
    return polish(chosen.target, rounded, plain_metric(chosen.gram), chosen.levels, chosen.factor.order, passes)


def nearest(chosen: Problem) -> Tensor:
    return chosen.levels.all_nearest(chosen.target)


def anywhere(chosen: Problem, seed: int) -> Tensor:
    """Return a random level for every weight."""
    generator = np.random.default_rng(seed)
    return torch.tensor([[generator.choice(each) for each in column] for column in chosen.values])


def losses_of_moves(chosen: Problem, rounded: Floats, column: int, row: int) -> Floats:
    """Return the loss of a row for each level of one of its weights, all others as they are."""
    every = np.repeat(rounded[:, row][None], len(chosen.values[column][row]), axis=0)
    every[:, column] = chosen.values[column][row]
    error = every - chosen.target[:, row].numpy()
    return np.einsum("qi,ij,qj->q", error, chosen.gram.numpy(), error)


def try_every_level(chosen: Problem, rounded: Tensor, passes: int) -> Floats:
    """Return what coordinate descent gives when each weight tries all of its levels."""
    current = rounded.numpy().copy()
    for _ in range(passes):
        for column in chosen.factor.order.tolist():
            for row in range(current.shape[1]):
                best = losses_of_moves(chosen, current, column, row).argmin()
                current[column, row] = chosen.values[column][row][best]
    return current


@pytest.mark.parametrize("share", [0.0, 0.1], ids=["plain", "salient"])
@pytest.mark.parametrize("columns", [1, 24, 64, 65, 130])
@pytest.mark.parametrize("passes", [1, 2])
def test_every_weight_moves_to_the_best_of_all_its_levels(passes: int, columns: int, share: float) -> None:
    chosen = problem(columns, 2, columns, 2, share=share)
    start = nearest(chosen)
    np.testing.assert_array_equal(polished(chosen, start, passes).numpy(), try_every_level(chosen, start, passes))


@pytest.mark.parametrize("bits", [3, 4])
def test_every_weight_moves_to_the_best_of_all_its_levels_from_any_start(bits: int) -> None:
    chosen = problem(bits, 2, 40, bits, 8)
    start = anywhere(chosen, bits)
    np.testing.assert_array_equal(polished(chosen, start).numpy(), try_every_level(chosen, start, 1))


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 4), st.sampled_from(["nearest", "sequential", "anywhere"]), st.sampled_from([0.0, 0.1]))
def test_no_rows_loss_rises_in_any_pass(seed: int, bits: int, start: str, share: float) -> None:
    chosen = problem(seed, 4, 70, bits, 14, share=share)
    starts = {
        "nearest": nearest,
        "sequential": lambda chosen: round_sequentially(chosen.target, chosen.factor, chosen.levels),
        "anywhere": lambda chosen: anywhere(chosen, seed),
    }
    before = starts[start](chosen)
    for _ in range(3):
        after = polished(chosen, before)
        limit = row_losses(chosen.target, before, chosen.gram) * (1 + 1e-9)
        assert (row_losses(chosen.target, after, chosen.gram) <= limit).all()
        before = after


@pytest.mark.parametrize("seed", range(5))
def test_it_improves_on_sequential_rounding(seed: int) -> None:
    chosen = problem(seed, 16, 70, 3)
    rounded = round_sequentially(chosen.target, chosen.factor, chosen.levels)
    before, after = (
        row_losses(chosen.target, each, chosen.gram).sum() for each in (rounded, polished(chosen, rounded))
    )
    assert after < before


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_the_best_rounding_of_all_is_kept(seed: int) -> None:
    chosen = problem(seed, 4, 4, 2)
    best = torch.from_numpy(np.stack([chosen.best(row) for row in range(4)], axis=1))
    assert torch.equal(polished(chosen, best, passes=2), best)


def test_where_it_ends_no_single_move_is_better() -> None:
    chosen = problem(2, 3, 70, 2)
    ended = polished(chosen, nearest(chosen), passes=50)
    losses = row_losses(chosen.target, ended, chosen.gram)
    for column in range(70):
        for row in range(3):
            assert losses_of_moves(chosen, ended.numpy(), column, row).min() >= losses[row] * (1 - 1e-9)


def test_several_passes_are_single_passes_one_after_the_other() -> None:
    chosen = problem(4, 4, 70, 3)
    start = nearest(chosen)
    assert torch.equal(polished(chosen, start, passes=2), polished(chosen, polished(chosen, start)))


def test_no_pass_changes_nothing() -> None:
    chosen = problem(4, 4, 70, 3)
    assert torch.equal(polished(chosen, nearest(chosen), passes=0), nearest(chosen))


def test_every_weight_stays_on_its_own_grid_when_some_are_salient() -> None:
    chosen = problem(6, 4, 70, 2, 14, share=0.3)
    assert is_level(polished(chosen, nearest(chosen), passes=2), chosen.values)


def test_what_it_starts_from_is_not_changed() -> None:
    chosen = problem(4, 4, 70, 3)
    start = nearest(chosen)
    kept = start.clone()
    assert not torch.equal(polished(chosen, start), kept)
    assert torch.equal(start, kept)
