"""Beam search, level by level, against a textbook beam and a search over all roundings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.quantizers.beam import round_by_beam
from covercal.quantizers.sequential import round_sequentially
from tests.covercal.layers import Floats, Problem, is_level, problem, row_losses

WIDTHS = [1, 2, 4, 8]
seeds = st.integers(0, 2**32 - 1)


def textbook_beam(chosen: Problem, row: int, width: int) -> Floats:
    """Return what K-CoreQ (2602.05902) rounds a row to, its beams kept as MonoBeam keeps them.

    A sweep from the largest diagonal of H, all levels expanded; of a salient weight only the nearest level is.
    """
    gram = chosen.gram.numpy()
    order = np.argsort(np.diag(gram))
    lower = np.linalg.cholesky(gram[order][:, order])
    wanted = chosen.target[:, row].numpy()[order]
    beams = [(0.0, np.zeros_like(wanted))]
    for j in reversed(range(len(order))):
        children: list[list[tuple[float, Floats]]] = []
        for loss, partial in beams:
            value = wanted[j] + (wanted[j + 1 :] - partial[j + 1 :]) @ lower[j + 1 :, j] / lower[j, j]
            levels = chosen.values[order[j]][row]
            if chosen.mask[order[j], row]:
                levels = levels[[np.abs(levels - value).argmin()]]
            children.append([])
            for level in levels:
                child = partial.copy()
                child[j] = level
                children[-1].append((loss + lower[j, j] ** 2 * (value - level) ** 2, child))
        beams = slot_by_slot(children, width)
    rounded = np.empty_like(wanted)
    rounded[order] = min(beams, key=lambda beam: beam[0])[1]
    return rounded


def slot_by_slot(children: list[list[tuple[float, Floats]]], width: int) -> list[tuple[float, Floats]]:
    """Return for each beam k the cheapest child of parents 0 to k that no earlier beam took."""
    left, kept = [list(each) for each in children], []
    for beam in range(width):
        offered = [
            (child[0], parent, i) for parent, each in enumerate(left[: beam + 1]) for i, child in enumerate(each)
        ]
        if offered:
            _, parent, i = min(offered)
            kept.append(left[parent].pop(i))
    return kept


@pytest.mark.parametrize("share", [0.0, 0.1], ids=["plain", "salient"])
@pytest.mark.parametrize("columns", [1, 20, 64, 65, 140])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_width_of_one_is_sequential_rounding(bits: int, columns: int, share: float) -> None:
    chosen = problem(columns, 6, columns, bits, share=share)
    alone = round_by_beam(chosen.target, chosen.factor, chosen.levels, 1)
    assert torch.equal(alone, round_sequentially(chosen.target, chosen.factor, chosen.levels))


@pytest.mark.parametrize("share", [0.0, 0.1], ids=["plain", "salient"])
@pytest.mark.parametrize(("columns", "group_size"), [(24, 6), (70, None), (130, 26)])
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("bits", [2, 3])
def test_every_level_is_the_textbook_beams(
    bits: int, width: int, columns: int, group_size: int | None, share: float
) -> None:
    chosen = problem(width, 2, columns, bits, group_size, share=share)
    found = round_by_beam(chosen.target, chosen.factor, chosen.levels, width)
    expected = np.stack([textbook_beam(chosen, row, width) for row in range(2)], axis=1)
    np.testing.assert_array_equal(found.numpy(), expected)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 4), st.sampled_from([0.0, 0.1]))
def test_no_row_loses_more_in_a_wider_beam(seed: int, bits: int, share: float) -> None:
    chosen = problem(seed, 8, 24, bits, share=share)
    found = [round_by_beam(chosen.target, chosen.factor, chosen.levels, width) for width in (1, 2, 3, 4, 8)]
    losses = np.stack([row_losses(chosen.target, each, chosen.gram) for each in found])
    assert (losses[1:] <= losses[:-1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wider_beams_lose_less_over_many_rows(bits: int) -> None:
    losses = []
    for width in WIDTHS:
        loss = 0.0
        for seed in range(4):
            chosen = problem(seed, 32, 24, bits)
            rounded = round_by_beam(chosen.target, chosen.factor, chosen.levels, width)
            loss += row_losses(chosen.target, rounded, chosen.gram).sum()
        losses.append(loss)
    assert np.all(np.diff(losses) < 0)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_beam_as_wide_as_there_are_roundings_finds_the_best_of_all(seed: int) -> None:
    chosen = problem(seed, 4, 3, 2)
    found = round_by_beam(chosen.target, chosen.factor, chosen.levels, 4**3).numpy()
    np.testing.assert_array_equal(found, np.stack([chosen.best(row) for row in range(4)], axis=1))


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_beam_that_holds_all_roundings_of_all_but_the_last_column_finds_the_best_of_all(seed: int) -> None:
    chosen = problem(seed, 4, 4, 2)
    found = round_by_beam(chosen.target, chosen.factor, chosen.levels, 4**3).numpy()
    np.testing.assert_array_equal(found, np.stack([chosen.best(row) for row in range(4)], axis=1))


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_do_not_influence_each_other(width: int) -> None:
    chosen = problem(3, 12, 70, 3)
    rows = torch.tensor([7, 2, 11])
    whole = round_by_beam(chosen.target, chosen.factor, chosen.levels, width)
    scale, zero = chosen.levels.scale[:, rows], chosen.levels.zero[:, rows]
    levels = type(chosen.levels)(scale, zero, chosen.levels.top, chosen.levels.width)
    alone = round_by_beam(chosen.target[:, rows].contiguous(), chosen.factor, levels, width)
    assert torch.equal(alone, whole[:, rows])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_every_weight_stays_on_its_own_grid_when_some_are_salient(share: float, width: int) -> None:
    chosen = problem(5, 4, 70, 2, 14, share=share)
    assert chosen.mask.any()
    assert is_level(round_by_beam(chosen.target, chosen.factor, chosen.levels, width), chosen.values)


@pytest.mark.parametrize("width", WIDTHS)
def test_representable_weights_are_kept(width: int) -> None:
    chosen = problem(1, 3, 70, 3)
    target = chosen.levels.all_nearest(chosen.target)
    assert torch.equal(round_by_beam(target, chosen.factor, chosen.levels, width), target)


def test_the_target_is_not_changed() -> None:
    chosen = problem(1, 3, 70, 3)
    kept = chosen.target.clone()
    round_by_beam(chosen.target, chosen.factor, chosen.levels, 3)
    assert torch.equal(chosen.target, kept)
