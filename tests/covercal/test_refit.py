"""Scales fitted to codes, against least squares in numpy on a square root of the Gram matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.gram import SiteStatistics
from covercal.quantization_settings import Quantization
from covercal.quantizers import refit
from covercal.quantizers.factor import factorize
from covercal.quantizers.grid import Grid
from covercal.quantizers.levels import Levels
from covercal.quantizers.pieces import Solved, slab_weights
from covercal.quantizers.polish import polish
from covercal.quantizers.refit import LARGEST_CHANGE, refitted
from covercal.quantizers.solver import solve_site
from tests.covercal.layers import Floats, by_column, damped, dense, grid_of, layer, plain_metric
from tests.covercal.rounding import RoundingSettings, gptq

seeds = st.integers(0, 2**32 - 1)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def rounded(
    seed: int, bits: int, group_size: int | None, *, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Return a weight, a damped Gram matrix, a grid, and GPTQ's codes less the zero point."""
    weight, gram = layer(seed, 6, 24)
    grid = grid_of(weight, bits, group_size, symmetric=symmetric, dtype=dtype)
    codes = gptq(weight, gram, grid, RoundingSettings()).codes
    return weight, damped(gram, 0.01), grid, codes - grid.columns(24)[1]


def best_steps(target: Tensor, steps: Tensor, gram: Tensor, groups: int) -> Floats:
    """Return the steps (rows, groups) of least squares on outputs: w L is the sum of s_g v_g L, with H = L L^T."""
    root = np.linalg.cholesky(gram.numpy())
    found = []
    for row, codes in zip(target.numpy(), steps.numpy(), strict=True):
        apart = np.zeros((groups, len(codes)))
        for group, columns in enumerate(np.split(np.arange(len(codes)), groups)):
            apart[group, columns] = codes[columns]
        found.append(np.linalg.lstsq((apart @ root).T, row @ root, rcond=None)[0])
    return np.stack(found)


def losses(target: Tensor, steps: Tensor, scale: Tensor, gram: Tensor) -> Floats:
    """Return (w - s v) H (w - s v)^T of every row."""
    error = target.numpy() - steps.numpy() * by_column(scale, steps.shape[1])
    return np.einsum("ri,ij,rj->r", error, gram.numpy(), error)


def within_bounds(wanted: Floats, old: Tensor) -> Floats:
    """Return the rows of which every step may become what is wanted."""
    change = wanted / old.numpy()
    return np.flatnonzero(((change > 1 / LARGEST_CHANGE) & (change < LARGEST_CHANGE)).all(axis=1))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [None, 8, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_steps_are_those_of_least_squares_on_the_outputs(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    target, gram, grid, steps = rounded(bits, bits, group_size, symmetric=symmetric)
    found = refitted(target, steps, grid, plain_metric(gram)).scale.numpy()
    expected = best_steps(target, steps, gram, grid.scale.shape[1])
    rows = within_bounds(expected, grid.scale)
    assert len(rows) >= 3
    np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 4), st.sampled_from([None, 8, 4]), st.booleans())
def test_no_rows_loss_rises(seed: int, bits: int, group_size: int | None, any_codes: bool) -> None:
    target, gram, grid, steps = rounded(seed, bits, group_size, dtype=torch.bfloat16)
    if any_codes:
        codes = np.random.default_rng(seed).integers(0, 2**bits, size=steps.shape)
        steps = torch.from_numpy(codes) - grid.columns(24)[1]
    found = refitted(target, steps, grid, plain_metric(gram))
    before, after = (losses(target, steps, each.scale, gram) for each in (grid, found))
    assert (after <= before * (1 + 1e-9)).all()


@pytest.mark.parametrize("group_size", [None, 8])
def test_most_rows_losses_fall(group_size: int | None) -> None:
    target, gram, grid, steps = rounded(0, 2, group_size, dtype=torch.bfloat16)
    found = refitted(target, steps, grid, plain_metric(gram))
    before, after = (losses(target, steps, each.scale, gram) for each in (grid, found))
    assert np.mean(after < 0.99 * before) > 0.5


@dtypes
def test_steps_are_representable_in_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    target, gram, grid, steps = rounded(1, 3, 8, dtype=dtype)
    found = refitted(target, steps, grid, plain_metric(gram)).scale
    assert not torch.equal(found, grid.scale)
    assert torch.equal(found.to(dtype).double(), found)


def test_zero_points_and_settings_are_kept() -> None:
    target, gram, grid, steps = rounded(1, 3, 8)
    found = refitted(target, steps, grid, plain_metric(gram))
    assert torch.equal(found.zero, grid.zero)
    assert found.settings == grid.settings


def test_a_group_whose_codes_are_all_at_the_zero_point_keeps_its_step() -> None:
    target, gram, grid, steps = rounded(2, 3, 8)
    steps[:, 8:16] = 0
    found = refitted(target, steps, grid, plain_metric(gram)).scale
    assert torch.equal(found[:, 1], grid.scale[:, 1])
    assert not torch.equal(found[:, [0, 2]], grid.scale[:, [0, 2]])


def test_a_group_at_its_zero_point_does_not_disturb_the_others() -> None:
    target, gram, grid, steps = rounded(2, 3, 8)
    steps[:, 8:16] = 0
    found = refitted(target, steps, grid, plain_metric(gram)).scale.numpy()[:, [0, 2]]
    others = torch.cat([steps[:, :8], steps[:, 16:]], dim=1)
    live = torch.tensor([*range(8), *range(16, 24)])
    # what the outputs lose with the middle group, the other two make good: the best weights of theirs alone
    whole = np.linalg.solve(gram[live][:, live].numpy(), gram[live].numpy()) @ target.numpy().T
    expected = best_steps(torch.from_numpy(whole.T), others, gram[live][:, live], 2)
    rows = within_bounds(expected, grid.scale[:, [0, 2]])
    assert len(rows) >= 3
    np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-5)


def test_a_row_of_zeros_keeps_its_steps() -> None:
    target, gram, grid, steps = rounded(2, 3, 8)
    target[3], steps[3] = 0, 0
    found = refitted(target, steps, grid, plain_metric(gram))
    assert torch.equal(found.scale[3], grid.scale[3])


def test_steps_that_are_the_best_already_are_kept() -> None:
    _, gram, grid, steps = rounded(3, 3, 8, dtype=torch.bfloat16)
    target = steps * torch.from_numpy(by_column(grid.scale, 24))
    assert torch.equal(refitted(target, steps, grid, plain_metric(gram)).scale, grid.scale)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_a_weight_on_a_grid_of_other_steps_is_found_again(factor: float) -> None:
    _, gram, grid, steps = rounded(3, 3, 8)
    target = steps * torch.from_numpy(by_column(grid.scale, 24)) * factor
    np.testing.assert_allclose(refitted(target, steps, grid, plain_metric(gram)).scale, factor * grid.scale, rtol=1e-6)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.3, 3.1])
def test_a_step_that_would_change_too_much_or_turn_round_stays(factor: float) -> None:
    _, gram, grid, steps = rounded(3, 3, 8)
    target = steps * torch.from_numpy(by_column(grid.scale, 24)) * factor
    assert torch.equal(refitted(target, steps, grid, plain_metric(gram)).scale, grid.scale)


def test_rows_do_not_influence_each_other() -> None:
    target, gram, grid, steps = rounded(4, 3, 8)
    rows = torch.tensor([4, 1])
    some = replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
    alone = refitted(target[rows], steps[rows], some, plain_metric(gram)).scale
    torch.testing.assert_close(alone, refitted(target, steps, grid, plain_metric(gram)).scale[rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("at_once", [1, 2, 4, 6, 7])
def test_no_more_systems_are_solved_at_once_than_fit_into_memory(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, gram, grid, steps = rounded(4, 3, 8)
    expected = refitted(target, steps, grid, plain_metric(gram)).scale
    solve, sizes = torch.linalg.solve_ex, []
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda a, b: sizes.append(len(a)) or solve(a, b))
    monkeypatch.setattr(refit, "SYSTEM_NUMBERS", at_once * 3**2)
    torch.testing.assert_close(refitted(target, steps, grid, plain_metric(gram)).scale, expected, rtol=1e-6, atol=0)
    assert sum(sizes) == 6
    assert max(sizes) == min(at_once, 6)


@pytest.mark.parametrize(("columns", "group_size"), [(8192, 32), (16384, 32), (8192, 64), (28672, 64)])
def test_rows_that_are_rounded_together_have_their_usual_scales_fitted_together(columns: int, group_size: int) -> None:
    assert slab_weights(columns) // columns * (columns // group_size) ** 2 <= refit.SYSTEM_NUMBERS


def test_the_systems_are_given_back_as_they_were() -> None:
    systems = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 4)))
    systems[1, 2, 2] = 0
    kept = systems.clone()
    refit._solved(systems, torch.ones(3, 4).double())
    assert torch.equal(systems, kept)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([2.0**-30, 2.0**20]))
def test_the_size_of_the_gram_matrix_does_not_matter(seed: int, factor: float) -> None:
    target, gram, grid, steps = rounded(seed, 3, 8)
    found = refitted(target, steps, grid, plain_metric(gram * factor)).scale
    assert torch.equal(found, refitted(target, steps, grid, plain_metric(gram)).scale)


def test_nothing_that_is_given_is_changed() -> None:
    target, gram, grid, steps = rounded(5, 3, 8)
    given_tensors = (target, gram, grid.scale, grid.zero, steps)
    kept = [each.clone() for each in given_tensors]
    refitted(target, steps, grid, plain_metric(gram))
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, kept, strict=True))


# --- as a choice of a site -----------------------------------------------------------------------------------------

SITE_GROUP, SITE_COLUMNS = 8, 48
ROUNDINGS = ["nearest", "sequential", "beam"]


def site(seed: int, rows: int = 12) -> tuple[Tensor, SiteStatistics]:
    weight, gram = layer(seed, rows, SITE_COLUMNS)
    return weight, SiteStatistics(gram=gram, tokens=300)


def solved(
    weight: Tensor, known: SiteStatistics, passes: int, dtype: torch.dtype = torch.bfloat16, **fields: object
) -> Solved:
    chosen = Quantization(
        **{"method": "gptq", "bits": 3, "group_size": SITE_GROUP, "ranges": {"refit": passes}, **fields}
    )
    return solve_site([weight], known, chosen, dtype).weights[0]


def site_loss(weight: Tensor, known: SiteStatistics, found: Solved) -> float:
    assert known.gram is not None
    error = (weight - dense(found)).numpy()
    return float(np.einsum("ri,ij,rj->", error, damped(known.gram, 0.01).numpy(), error))


def by_hand(weight: Tensor, known: SiteStatistics, passes: int, polished: int = 0) -> tuple[Tensor, Tensor]:
    """Return codes and steps of GPTQ, with scales fitted after each rounding of the weight."""
    assert known.gram is not None
    grid, metric = grid_of(weight, 3, SITE_GROUP, dtype=torch.bfloat16), plain_metric(damped(known.gram, 0.01))
    order = factorize(known.gram, 0.01, activation_order=True).order
    codes = weight
    for number in range(passes):
        codes = gptq(weight, known.gram, grid, RoundingSettings()).codes
        if polished and number + 1 == passes:
            levels = Levels.of(grid, SITE_COLUMNS)
            codes = grid.codes(polish(weight.T, grid.values(codes).T, metric, levels, order, polished).T)
        grid = refitted(weight, codes - grid.columns(SITE_COLUMNS)[1], grid, metric)
    return codes.to(torch.uint8), grid.scale


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_rounding_and_fitting_take_turns_and_fitting_is_last(passes: int) -> None:
    weight, known = site(0)
    found = solved(weight, known, passes)
    codes, scale = by_hand(weight, known, passes)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale.double(), scale)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_pass_changes_steps_alone(rounding: str) -> None:
    weight, known = site(1)
    plain, found = (solved(weight, known, passes, rounding=rounding) for passes in (0, 1))
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.zero, plain.zero)
    assert not torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_one_pass_lowers_the_loss_of_every_weight(seed: int, rounding: str) -> None:
    weight, known = site(seed)
    plain, found = (site_loss(weight, known, solved(weight, known, n, rounding=rounding)) for n in (0, 1))
    assert found < plain


@pytest.mark.parametrize("salient", [0.0, 0.05], ids=["plain", "salient"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_more_passes_lower_the_loss_on_average(rounding: str, salient: float) -> None:
    means = []
    for passes in (0, 1, 2, 3):
        weights = [site(seed) for seed in range(8)]
        found = [
            site_loss(w, known, solved(w, known, passes, rounding=rounding, salient=salient)) for w, known in weights
        ]
        means.append(np.mean(found))
    assert np.all(np.diff(means) < 0)


@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_salient_weights_stay_as_they_are_and_the_others_steps_fit_what_they_leave(rounding: str, bits: int) -> None:
    weight, known = site(2)
    fields = {"rounding": rounding, "salient": {"share": 0.1, "bits": bits}, "dtype": torch.float32}
    plain, found = (solved(weight, known, passes, **fields) for passes in (0, 1))
    assert plain.salient is not None
    assert found.salient is not None
    assert torch.equal(found.salient[0], plain.salient[0])
    assert torch.equal(found.salient[1], plain.salient[1])
    mask, values = found.salient
    left = weight.masked_scatter(mask, weight[mask] - values.double())
    steps = found.codes.double() - torch.from_numpy(by_column(found.zero.double(), SITE_COLUMNS))
    assert known.gram is not None
    expected = best_steps(left, steps.masked_fill(mask, 0.0), damped(known.gram, 0.01), SITE_COLUMNS // SITE_GROUP)
    rows = within_bounds(expected, plain.scale.double())
    assert len(rows) >= 6
    np.testing.assert_allclose(found.scale.double().numpy()[rows], expected[rows], rtol=1e-5)


def test_steps_are_fitted_to_a_corrected_target() -> None:
    weight, known = site(3)
    assert known.gram is not None
    drift = 0.1 * known.gram @ torch.diag(torch.linspace(-1, 1, SITE_COLUMNS).double())
    moved = weight + 0.5 * torch.linalg.solve(damped(known.gram, 0.01), (weight @ drift).T).T
    drifted = replace(known, drift=drift, drift_energy=torch.eye(SITE_COLUMNS).double())
    found = solved(weight, drifted, 2, target={"kind": "coreq", "alpha": 0.5})
    expected = solved(moved, known, 2)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fitting_in_the_metric_of_a_diagonal_reads_no_other_channel(rounding: str) -> None:
    weight, known = site(4)
    assert known.gram is not None
    diagonal = SiteStatistics(gram=torch.diag(known.gram.diagonal()), tokens=300)
    shrunk, plain = (
        solved(weight, each, 2, rounding=rounding, shrinkage=share) for each, share in ((known, 1.0), (diagonal, 0.0))
    )
    assert torch.equal(shrunk.codes, plain.codes)
    assert torch.equal(shrunk.scale, plain.scale)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_only_the_last_rounding_is_polished(passes: int) -> None:
    weight, known = site(5)
    found = solved(weight, known, passes, rounding={"kind": "sequential", "polish": 2})
    codes, scale = by_hand(weight, known, passes, polished=2)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale.double(), scale)
    assert not torch.equal(codes, by_hand(weight, known, passes)[0])


def test_polishing_goes_before_fitting() -> None:
    weight, known = site(5)
    rounding = {"kind": "sequential", "polish": 2}
    plain, found = (solved(weight, known, passes, rounding=rounding) for passes in (0, 1))
    assert torch.equal(found.codes, plain.codes)
    assert not torch.equal(plain.codes, solved(weight, known, 0).codes)
