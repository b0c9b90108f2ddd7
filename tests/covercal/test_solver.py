"""All choices of one site put together, against their parts put together by hand.

The parts are tested by themselves (GPTQ in test_gptq.py, targets in test_targets.py, …); here, which of them are used,
with what, and what is reported.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.errors import QuantizationError
from covercal.gram import SiteStatistics
from covercal.quantization_settings import Quantization
from covercal.quantizers import pieces, solver
from covercal.quantizers.grid import (
    GridSettings,
    dequantize,
    output_error,
    quantize,
    searched_grid,
    squared_error,
)
from covercal.quantizers.pieces import Solved, row_pieces
from covercal.quantizers.regularization import DAMPINGS, GAMMAS, SALIENCY_DAMPINGS, SHRINKAGES, Regularization
from covercal.quantizers.salient import salient_mask
from covercal.quantizers.solver import NOTHING_HELD_OUT, regularizations, solve_site
from tests.covercal.layers import Floats, by_column, damped, dense, grid_of
from tests.covercal.rounding import RoundingSettings, gptq, round_to_nearest

COLUMNS, GROUP = 48, 16
DTYPE = torch.bfloat16
seeds = st.integers(0, 2**32 - 1)


def chosen(method: str = "gptq", **fields: Any) -> Quantization:
    return Quantization(method=method, **{"bits": 3, "group_size": GROUP, **fields})


def weights(seed: int, *rows: int, columns: int = COLUMNS) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.normal(size=(count, columns))) for count in rows]


def measured(seed: int, columns: int = COLUMNS, sequences: int = 12, tokens: int = 60) -> SiteStatistics:
    """Return everything that can be known of inputs that depend on each other a little differently in each sequence."""
    generator = np.random.default_rng(seed)
    size = np.exp(0.7 * generator.normal(size=(columns, 1)))
    mixing = generator.normal(size=(columns, columns)) + 0.5 * generator.normal(size=(sequences, columns, columns))
    noise = generator.normal(size=(sequences, columns, tokens))
    x = size * (mixing @ generator.normal(size=(sequences, columns, tokens)) / columns**0.5 + noise)
    dx = 0.2 * (generator.normal(size=(columns, columns)) @ x / columns**0.5 + generator.normal(size=x.shape))
    held_out = np.arange(sequences) % 4 == 3
    own, off = x @ x.transpose(0, 2, 1) / tokens, ~np.eye(columns, dtype=bool)

    def mean(values: Floats) -> Tensor:
        return torch.from_numpy(values.mean(axis=0))

    return SiteStatistics(
        gram=mean(own),
        validation=mean(own[held_out]),
        training=mean(own[~held_out]),
        magnitude=torch.from_numpy(np.abs(x).mean(axis=(0, 2))),
        drift=mean(dx @ x.transpose(0, 2, 1) / tokens),
        drift_energy=mean(dx @ dx.transpose(0, 2, 1) / tokens),
        pool_energy=torch.from_numpy(np.square(x).mean(axis=(0, 2)) * np.exp(0.2 * generator.normal(size=columns))),
        ledoit_wolf=float(own.var(axis=0, ddof=1)[off].sum() / sequences / np.square(own.mean(axis=0)[off]).sum()),
        sequences=sequences,
        tokens=sequences * tokens,
    )


def gram_of(statistics: SiteStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram


def same(one: Solved, other: Solved) -> bool:
    parts = [(one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero)]
    if one.salient is not None and other.salient is not None:
        parts += zip(one.salient, other.salient, strict=True)
    return (one.salient is None) == (other.salient is None) and all(torch.equal(a, b) for a, b in parts)


def only(weight: Tensor, statistics: SiteStatistics, preset: Quantization) -> Solved:
    (found,) = solve_site([weight], statistics, preset, DTYPE).weights
    return found


def codes(weight: Tensor, statistics: SiteStatistics, preset: Quantization) -> Tensor:
    return only(weight, statistics, preset).codes


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    error = (weight - rounded).numpy()
    return float(np.einsum("ri,ij,rj->", error, gram.numpy(), error))


# --- rounding to nearest and GPTQ ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(2, 8), st.sampled_from([None, GROUP]), st.booleans(), st.booleans())
def test_the_gptq_preset_is_gptq_code_by_code(
    seed: int, bits: int, group_size: int | None, symmetric: bool, ordered: bool
) -> None:
    (weight,), known = weights(seed, 6), measured(seed)
    grid = grid_of(weight, bits, group_size, symmetric=symmetric, dtype=DTYPE)
    expected = gptq(weight, gram_of(known), grid, RoundingSettings(0.01, ordered)).codes
    preset = chosen(bits=bits, group_size=group_size, symmetric=symmetric, activation_order=ordered)
    found = only(weight, SiteStatistics(gram=known.gram), preset)
    assert torch.equal(found.codes, expected.to(torch.uint8))
    assert torch.equal(found.scale, grid.scale.to(DTYPE))
    assert torch.equal(found.zero, grid.zero.to(torch.uint8))


def test_the_rtn_preset_rounds_to_nearest_and_knows_nothing_of_the_inputs() -> None:
    (weight,) = weights(0, 6)
    found = solve_site([weight], SiteStatistics(), chosen("rtn"), DTYPE)
    expected = round_to_nearest(weight, None, grid_of(weight, 3, GROUP, dtype=DTYPE), RoundingSettings()).codes
    assert torch.equal(found.weights[0].codes, expected.to(torch.uint8))
    assert (found.regularization, found.attempts, found.factor_damping, found.dead) == (None, 0, 0.0, 0)
    assert math.isnan(found.weights[0].output_error)
    assert math.isnan(found.weights[0].alpha)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([0.01, 0.1, 0.25, 0.5]), st.booleans())
def test_sarqc_gbs_that_damps_all_channels_alike_is_gptq_with_that_damping(
    seed: int, damping: float, ordered: bool
) -> None:
    (weight,), known = weights(seed, 6), measured(seed)
    alike = {"strength": damping, "weights": "uniform"}
    regularized = only(weight, known, chosen("sarqc_gbs", damping=alike, activation_order=ordered))
    assert same(regularized, only(weight, known, chosen(damping=damping, activation_order=ordered)))


def test_damping_by_saliency_is_gptq_on_a_gram_matrix_with_the_formulas_diagonal() -> None:
    both, known = weights(1, 6, 10), measured(1)
    gram, magnitude = gram_of(known), known.magnitude.numpy()
    s = magnitude**0.35 / np.abs(torch.cat(both).numpy()).mean(axis=0) ** 0.65
    added = 0.5 * np.diag(gram.numpy()).mean() * s**2 / np.mean(s**2)
    preset = chosen("sarqc_gbs", damping={"strength": 0.5, "weights": "saliency", "gamma": 0.35})
    found = solve_site(both, known, preset, DTYPE)
    for weight, each in zip(both, found.weights, strict=True):
        grid = grid_of(weight, 3, GROUP, dtype=DTYPE)
        undamped = RoundingSettings(damping=0.0, activation_order=False)
        expected = gptq(weight, gram + torch.diag(torch.from_numpy(added)), grid, undamped).codes
        assert torch.equal(each.codes, expected.to(torch.uint8))


REGULARIZED = {
    "gptq": chosen(),
    "shrunk": chosen(shrinkage=0.3),
    "ledoit_wolf": chosen(shrinkage="ledoit_wolf"),
    "validated": chosen(shrinkage="validated", damping="validated"),
    "saliency": chosen("sarqc_gbs", damping={"strength": 0.5, "weights": "saliency", "gamma": 0.35}),
    "saliency_validated": chosen("sarqc_gbs"),
    "saliency_polished_refitted": chosen(
        "sarqc_gbs", damping={"strength": 0.5, "gamma": 0.35}, rounding={"polish": 1}, ranges={"refit": 1}
    ),
    "polished": chosen(rounding={"polish": 2}),
    "beam": chosen(rounding={"kind": "beam", "width": 3}),
    "weighted_ranges": chosen(ranges="weighted"),
    "output_ranges": chosen(ranges="output"),
    "coreq": chosen("coreq"),
    "gptaq": chosen("gptaq"),
    "refitted": chosen(ranges={"refit": 2}),
}


@pytest.mark.parametrize("exponent", [-20, 3, 20])
@pytest.mark.parametrize("name", REGULARIZED)
def test_the_size_of_the_inputs_products_does_not_matter(name: str, exponent: int) -> None:
    (weight,), known = weights(2, 8), measured(2)
    factor = 2.0**exponent
    larger = replace(
        known,
        **{
            part: getattr(known, part) * factor
            for part in ("gram", "validation", "training", "drift", "drift_energy", "pool_energy")
        },
    )
    assert same(only(weight, larger, REGULARIZED[name]), only(weight, known, REGULARIZED[name]))


# --- rows are independent ------------------------------------------------------------------------------------------

COMBINED = {
    "rtn": chosen("rtn"),
    "gptq": chosen(),
    "gptaq": chosen("gptaq"),
    "coreq": chosen("coreq"),
    "k_coreq_polished": chosen("k_coreq", rounding={"polish": 1}),
    "precal": chosen("precal"),
    "salient_gptq": chosen(salient=0.1),
    "salient_coreq_by_group": chosen("coreq", salient={"share": 0.1, "scope": "group", "bits": 16}),
    "output_ranges": chosen(ranges="output"),
    "refitted": chosen(ranges={"refit": 2}),
    "refitted_salient": chosen(ranges={"search": "mse", "refit": 1}, salient=0.1, rounding={"polish": 1}),
    "refitted_coreq_nearest": chosen("coreq", ranges={"refit": 2}, rounding="nearest"),
}


@pytest.mark.parametrize("name", COMBINED)
def test_several_weights_are_quantised_together_as_alone(name: str) -> None:
    parts, known = weights(3, 5, 1, 12), measured(3)
    together = solve_site(parts, known, COMBINED[name], DTYPE).weights
    for part, found in zip(parts, together, strict=True):
        alone = only(part, known, COMBINED[name])
        assert same(found, alone)
        for number in ("output_error", "weight_error", "alpha"):
            assert getattr(found, number) == pytest.approx(getattr(alone, number), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("name", COMBINED)
def test_how_many_rows_are_worked_on_at_once_does_not_matter(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, known = weights(4, 9, 2, 6), measured(4)
    at_once = solve_site(parts, known, COMBINED[name], DTYPE).weights
    monkeypatch.setattr(pieces, "SLAB_WEIGHTS", COLUMNS * rows)
    for one, other in zip(solve_site(parts, known, COMBINED[name], DTYPE).weights, at_once, strict=True):
        assert same(one, other)
        for number in ("output_error", "weight_error", "alpha"):
            assert getattr(one, number) == pytest.approx(getattr(other, number), rel=1e-5, nan_ok=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_pieces_hold_every_row_once_in_order_and_no_more_than_fit(rows: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SLAB_WEIGHTS", 3 * limit)
        yielded = list(row_pieces(rows, 3))
    found = [(index, row) for piece in yielded for index, part in piece for row in range(part.start, part.stop)]
    assert found == [(index, row) for index, count in enumerate(rows) for row in range(count)]
    assert all(1 <= sum(part.stop - part.start for _, part in piece) <= limit for piece in yielded)


def test_fewer_rows_of_a_wide_weight_are_worked_on_at_once() -> None:
    ((_, narrow),), ((_, wide),) = next(row_pieces([10**6], 8192)), next(row_pieces([10**6], 8193))
    assert narrow.stop * 8192 == pieces.SLAB_WEIGHTS
    assert 0 <= pieces.SLAB_WEIGHTS // 2 - wide.stop * 8193 < 8193


# --- regularisation that is found ----------------------------------------------------------------------------------


def held_out_loss(both: list[Tensor], known: SiteStatistics, candidate: Regularization, ordered: bool) -> float:
    """Return the output error on held-out sequences of what GPTQ makes of the others."""
    assert known.training is not None
    assert known.validation is not None
    weight = torch.cat(both)
    own = known.training.diagonal()
    moved = (1 - candidate.shrinkage) * known.training + candidate.shrinkage * torch.diag(own)
    added = torch.full_like(own, candidate.damping * float(own.mean()))
    if candidate.gamma is not None:
        assert known.magnitude is not None
        s = known.magnitude**candidate.gamma / weight.abs().mean(dim=0) ** (1 - candidate.gamma)
        added *= s**2 / (s**2).mean()
    grid = grid_of(weight, 3, GROUP, dtype=DTYPE)
    order = RoundingSettings(damping=0.0, activation_order=ordered)
    found = gptq(weight, moved + torch.diag(added), grid, order).codes
    return loss(weight, dequantize(found, *grid.columns(COLUMNS)), known.validation)


SEARCHES: dict[str, tuple[Quantization, list[Regularization]]] = {
    "shrinkage": (
        chosen(shrinkage="validated", activation_order=False),
        [Regularization(share, 0.01) for share in SHRINKAGES],
    ),
    "damping": (
        chosen(damping="validated", activation_order=False),
        [Regularization(0.0, strength) for strength in DAMPINGS],
    ),
    "both": (
        chosen(shrinkage="validated", damping="validated", activation_order=False),
        [Regularization(share, strength) for share in SHRINKAGES for strength in DAMPINGS],
    ),
    "sarqc_gbs": (
        chosen("sarqc_gbs"),
        [Regularization(0.0, strength, gamma) for strength in SALIENCY_DAMPINGS for gamma in GAMMAS],
    ),
    "gamma": (
        chosen("sarqc_gbs", damping={"strength": 0.5, "weights": "saliency"}),
        [Regularization(0.0, 0.5, gamma) for gamma in GAMMAS],
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_all_combinations_are_tried_when_a_regularisation_is_validated(name: str) -> None:
    preset, candidates = SEARCHES[name]
    assert list(regularizations(preset, measured(0))) == candidates


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SEARCHES)
def test_what_rounds_held_out_sequences_best_is_taken(name: str, seed: int) -> None:
    both, known = weights(seed, 7, 12), measured(seed, tokens=12)
    preset, candidates = SEARCHES[name]
    losses = [held_out_loss(both, known, candidate, ordered=False) for candidate in candidates]
    found = solve_site(both, known, preset, DTYPE).regularization
    assert found == candidates[int(np.argmin(losses))]


def test_what_is_taken_is_not_always_the_first() -> None:
    found = {
        solve_site(weights(s, 9), measured(s, tokens=12), REGULARIZED["validated"], DTYPE).regularization
        for s in range(3)
    }
    assert len(found - {Regularization(SHRINKAGES[0], DAMPINGS[0])}) > 0


def test_a_validated_regularisation_then_works_on_all_sequences() -> None:
    both, known = weights(1, 7, 12), measured(1, tokens=12)
    found = solve_site(both, known, REGULARIZED["validated"], DTYPE)
    assert found.regularization is not None
    fixed = chosen(shrinkage=found.regularization.shrinkage, damping=found.regularization.damping)
    for one, other in zip(found.weights, solve_site(both, known, fixed, DTYPE).weights, strict=True):
        assert same(one, other)


def test_evenly_spaced_rows_validate_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "VALIDATED_ROWS", 4)
    both, known = weights(5, 7, 6), measured(5, tokens=12)
    some = torch.cat(both)[[0, 4, 8, 12]]
    preset, candidates = SEARCHES["both"]
    losses = [held_out_loss([some], known, candidate, ordered=False) for candidate in candidates]
    assert solve_site(both, known, preset, DTYPE).regularization == candidates[int(np.argmin(losses))]


def test_rows_that_validate_are_taken_without_a_copy_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    both, together, join = weights(5, 600, 7, 300), [], torch.cat
    expected = join(both)[torch.linspace(0, 906, solver.VALIDATED_ROWS).round().long()]
    monkeypatch.setattr(torch, "cat", lambda parts: together.append(sum(map(len, parts))) or join(parts))
    assert torch.equal(solver._some_rows(both), expected)
    assert together == [solver.VALIDATED_ROWS]


def with_outliers(seed: int, *rows: int) -> list[Tensor]:
    """Return weights of which three a row are twelve times as large as the rest."""
    generator = torch.Generator().manual_seed(seed)
    found = weights(seed, *rows)
    for weight in found:
        places = torch.rand(weight.shape, generator=generator).topk(3, dim=1).indices
        weight.scatter_(1, places, weight.gather(1, places) * 12)
    return found


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_a_regularisation_is_judged_by_the_rounding_that_it_is_for_salient_weights_apart(seed: int, bits: int) -> None:
    both, known = with_outliers(seed, 7, 12), measured(seed, tokens=12)
    salient = {"share": 0.0625, "bits": bits}
    losses = []
    for share in SHRINKAGES:
        preset, trained = chosen(shrinkage=share, salient=salient), SiteStatistics(gram=known.training)
        found = solve_site(both, trained, preset, DTYPE).weights
        losses.append(sum(loss(w, dense(each), known.validation) for w, each in zip(both, found, strict=True)))
    searched = solve_site(both, known, chosen(shrinkage="validated", salient=salient), DTYPE).regularization
    assert searched == Regularization(SHRINKAGES[int(np.argmin(losses))], 0.01)


@pytest.mark.parametrize("missing", ["validation", "training"])
def test_without_held_out_sequences_the_first_candidate_is_taken_and_that_is_noted(missing: str) -> None:
    known = replace(measured(1), **{missing: None})
    found = solve_site(weights(1, 9), known, REGULARIZED["validated"], DTYPE)
    assert found.regularization == Regularization(SHRINKAGES[0], DAMPINGS[0])
    assert found.note == NOTHING_HELD_OUT


@pytest.mark.parametrize("name", SEARCHES)
def test_with_held_out_sequences_nothing_is_noted(name: str) -> None:
    assert solve_site(weights(1, 9), measured(1), SEARCHES[name][0], DTYPE).note == ""


@pytest.mark.parametrize("name", ["gptq", "shrunk", "saliency"])
def test_what_is_not_validated_needs_no_held_out_sequences(name: str) -> None:
    known = replace(measured(1), validation=None, training=None)
    assert solve_site(weights(1, 9), known, REGULARIZED[name], DTYPE).note == ""


def test_the_ledoit_wolf_share_is_used_and_reported() -> None:
    (weight,), known = weights(1, 9), measured(1)
    assert 0 < known.ledoit_wolf < 1
    found = solve_site([weight], known, REGULARIZED["ledoit_wolf"], DTYPE)
    assert found.regularization == Regularization(known.ledoit_wolf, 0.01)
    assert same(found.weights[0], only(weight, known, chosen(shrinkage=known.ledoit_wolf)))


def test_a_ledoit_wolf_share_that_was_not_measured_is_an_error() -> None:
    known = replace(measured(1), ledoit_wolf=math.nan)
    with pytest.raises(ValueError, match="how sequences differ, which was not measured"):
        solve_site(weights(1, 9), known, REGULARIZED["ledoit_wolf"], DTYPE)


def test_shrinkage_towards_the_pool_takes_the_pools_diagonal() -> None:
    (weight,), known = weights(1, 9), measured(1)
    moved = 0.6 * gram_of(known) + 0.4 * torch.diag(known.pool_energy)
    found = codes(weight, known, chosen(shrinkage={"strength": 0.4, "towards": "pool"}))
    assert torch.equal(found, codes(weight, SiteStatistics(gram=moved), chosen()))


def test_no_shrinkage_towards_the_pool_is_gptq_and_needs_no_energy() -> None:
    (weight,), known = weights(1, 9), replace(measured(1), pool_energy=None)
    preset = chosen(shrinkage={"strength": 0.0, "towards": "pool"})
    assert same(only(weight, known, preset), only(weight, known, chosen()))


def test_what_was_done_to_the_gram_matrix_is_reported() -> None:
    found = solve_site(weights(1, 3), measured(1), chosen(shrinkage=0.2, damping=0.05), DTYPE)
    assert found.regularization == Regularization(0.2, 0.05)
    assert (found.factor_damping, found.attempts, found.dead) == (0.05, 1, 0)


# --- targets, beams and polishing ----------------------------------------------------------------------------------


def coreq_target(weight: Tensor, known: SiteStatistics, alpha: float | None = None) -> tuple[Tensor, float]:
    """Return CoreQ's target for a damping of 0.01 with an inverse, and its alpha, in closed form unless given."""
    inverse = np.linalg.inv(damped(gram_of(known), 0.01).numpy())
    w, drift, drift_energy = (np.asarray(each) for each in (weight, known.drift, known.drift_energy))
    turned = w @ drift
    whole = np.einsum("ri,ij,rj->", w, drift_energy, w)
    share = float((turned @ inverse * turned).sum() / whole) if alpha is None else alpha
    return torch.from_numpy(w + share * turned @ inverse), share


def output_lost(weight: Tensor, rounded: Tensor, known: SiteStatistics, alpha: float = 1.0) -> float:
    """Return ||W (X_q + alpha dX) - Q X_q||^2 a token; for an alpha of 1, what is lost of the original's output."""
    assert known.drift is not None
    assert known.drift_energy is not None
    cross = float(((weight - rounded) @ known.drift.T * weight).sum())
    whole = float((weight @ known.drift_energy * weight).sum())
    return loss(weight, rounded, gram_of(known)) + 2 * alpha * cross + alpha**2 * whole


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_coreq_is_gptq_on_the_corrected_target_each_weight_with_its_own_alpha(alpha: float | None) -> None:
    both, known = weights(6, 8, 5), measured(6)
    both[1] = both[1] * torch.linspace(0.1, 3.0, COLUMNS)
    target = {"kind": "coreq", "alpha": "closed_form" if alpha is None else alpha}
    for weight, found in zip(both, solve_site(both, known, chosen(target=target), DTYPE).weights, strict=True):
        corrected, share = coreq_target(weight, known, alpha)
        assert found.alpha == pytest.approx(share)
        assert same(found, only(corrected, SiteStatistics(gram=known.gram), chosen()))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_coreq_that_rounds_to_nearest_rounds_the_corrected_target(alpha: float | None) -> None:
    (weight,), known = weights(6, 8), measured(6)
    target = {"kind": "coreq", "alpha": "closed_form" if alpha is None else alpha}
    found = only(weight, known, chosen("rtn", target=target))
    corrected, share = coreq_target(weight, known, alpha)
    assert found.alpha == pytest.approx(share)
    assert same(found, only(corrected, SiteStatistics(), chosen("rtn")))
    assert not torch.equal(found.codes, codes(weight, known, chosen("rtn")))


def test_the_alphas_of_two_weights_differ() -> None:
    both, known = weights(6, 8, 5), measured(6)
    first, second = (found.alpha for found in solve_site(both, known, chosen("coreq"), DTYPE).weights)
    assert 0 < first < 1
    assert first != second


@pytest.mark.parametrize("slab", [8, 1000])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_coreq_may_know_the_drift_of_the_outputs_instead_of_the_inputs(
    alpha: float | None, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, known = weights(6, 8, 5), measured(6)
    assert known.drift is not None
    energies = tuple(float(np.einsum("ri,ij,rj->", w, known.drift_energy, w)) for w in both)
    outputs = replace(
        known,
        drift=None,
        drift_energy=None,
        outputs_drift=tuple(weight @ known.drift for weight in both),
        outputs_drift_energy=energies,
    )
    preset = chosen(target={"kind": "coreq", "alpha": "closed_form" if alpha is None else alpha})
    expected = solve_site(both, known, preset, DTYPE).weights
    monkeypatch.setattr(pieces, "SLAB_WEIGHTS", slab * COLUMNS)
    for one, other in zip(solve_site(both, outputs, preset, DTYPE).weights, expected, strict=True):
        assert same(one, other)
        assert one.alpha == pytest.approx(other.alpha, rel=1e-12)


def test_a_drift_of_the_outputs_that_is_not_finite_is_named() -> None:
    both, known = weights(6, 8, 5), measured(6)
    drifts = [torch.zeros_like(weight) for weight in both]
    drifts[1][2, 3] = math.nan
    known = replace(known, drift=None, drift_energy=None, outputs_drift=tuple(drifts), outputs_drift_energy=(0.0, 0.0))
    with pytest.raises(QuantizationError, match=r"^its drift of output 1 holds NaN or infinity$"):
        solve_site(both, known, chosen("coreq"), DTYPE)


def test_coreq_without_a_mismatch_is_gptq_with_alpha_0() -> None:
    (weight,), known = weights(6, 8), measured(6)
    none = torch.zeros_like(gram_of(known))
    found = only(weight, replace(known, drift=none, drift_energy=none), chosen("coreq"))
    assert found.alpha == 0.0
    assert same(found, only(weight, known, chosen()))


def test_gptaq_with_alpha_0_is_gptq() -> None:
    (weight,), known = weights(6, 8), measured(6)
    assert same(only(weight, known, chosen("gptaq", target={"alpha": 0.0})), only(weight, known, chosen()))


def test_gptaq_keeps_more_of_the_original_output_than_gptq_and_coreq_keeps_most() -> None:
    (weight,), known = weights(6, 16), measured(6)

    def lost(preset: Quantization) -> float:
        return output_lost(weight, dense(only(weight, known, preset)), known)

    assert lost(chosen("coreq")) < lost(chosen("gptaq")) < lost(chosen())


REFINED: dict[str, dict[str, Any]] = {
    "polish": {"rounding": {"polish": 1}},
    "polish, 3 passes": {"rounding": {"polish": 3}},
    "refit": {"ranges": {"refit": 1}},
    "both": {"rounding": {"polish": 1}, "ranges": {"refit": 1}},
}


@pytest.mark.parametrize("salient", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("refined", REFINED)
def test_what_refines_gptaq_keeps_more_of_the_output_that_it_aims_at(
    refined: str, alpha: float, salient: float
) -> None:
    """With the damping, which is a part of what is made less: it keeps Q near W."""
    (weight,), known = weights(6, 16), measured(6)
    target = {"kind": "gptaq", "alpha": alpha}

    def lost(**fields: Any) -> float:
        rounded = dense(only(weight, known, chosen("gptaq", target=target, salient=salient, **fields)))
        strength = 0.01 * float(gram_of(known).diagonal().mean())
        return output_lost(weight, rounded, known, alpha) + strength * float((weight - rounded).square().sum())

    assert lost(**REFINED[refined]) < lost()


def test_k_coreq_is_a_beam_on_the_corrected_target() -> None:
    (weight,), known = weights(7, 8), measured(7)
    target, _ = coreq_target(weight, known)
    beam = chosen(rounding={"kind": "beam", "width": 4})
    found = only(weight, known, chosen("k_coreq"))
    assert same(found, only(target, SiteStatistics(gram=known.gram), beam))
    assert not same(found, only(weight, known, chosen("coreq")))


def test_a_beam_of_width_1_is_sequential_rounding() -> None:
    (weight,), known = weights(7, 8), measured(7)
    assert same(only(weight, known, chosen(rounding={"kind": "beam", "width": 1})), only(weight, known, chosen()))


@pytest.mark.parametrize(("method", "kind"), [("gptq", "nearest"), ("gptq", "sequential"), ("coreq", "sequential")])
def test_polishing_lowers_the_loss_in_the_damped_gram_matrix(method: str, kind: str) -> None:
    (weight,), known = weights(8, 16), measured(8)
    target = coreq_target(weight, known)[0] if method == "coreq" else weight
    gram, losses = damped(gram_of(known), 0.01), []
    for passes in (0, 1, 3):
        found = only(weight, known, chosen(method, rounding={"kind": kind, "polish": passes}))
        losses.append(loss(target, dense(found), gram))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("kind", ["nearest", "sequential"])
def test_polishing_goes_through_the_columns_in_the_order_of_rounding(kind: str) -> None:
    (weight,), known = weights(8, 16), measured(8)
    rounding = {"kind": kind, "polish": 1}
    order = gram_of(known).diagonal().argsort(descending=True)
    sorted_known = SiteStatistics(gram=gram_of(known)[order][:, order])
    natural = chosen(rounding=rounding, group_size=None, activation_order=False)
    found = codes(weight, known, chosen(rounding=rounding, group_size=None))
    assert torch.equal(found[:, order], codes(weight[:, order], sorted_known, natural))
    assert not torch.equal(found, codes(weight, known, natural))


def test_polishing_is_done_in_the_metric_of_the_regularised_gram_matrix() -> None:
    (weight,), known = weights(8, 16), measured(8)
    preset = chosen(shrinkage=1.0, rounding={"kind": "sequential", "polish": 3})
    assert torch.equal(codes(weight, known, preset), codes(weight, known, chosen("rtn")))


# --- salient weights -----------------------------------------------------------------------------------------------


def kept(found: Solved) -> tuple[Tensor, Tensor]:
    assert found.salient is not None
    return found.salient


@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
@pytest.mark.parametrize("rounding", ["nearest", "sequential", "beam"])
def test_the_largest_weights_of_each_matrix_are_kept_apart(rounding: str, scope: str) -> None:
    both, known = weights(9, 6, 4), measured(9)
    preset = chosen(salient={"share": 0.1, "scope": scope}, rounding=rounding)
    for weight, found in zip(both, solve_site(both, known, preset, DTYPE).weights, strict=True):
        mask, values = kept(found)
        assert torch.equal(mask, salient_mask(weight, 0.1, scope, GROUP))
        assert values.shape == (int(mask.sum()),)
        assert values.dtype == DTYPE


def test_without_a_share_nothing_is_kept_apart() -> None:
    assert only(weights(9, 6)[0], measured(9), chosen()).salient is None


def test_salient_weights_of_16_bits_are_the_weights_in_the_checkpoints_dtype() -> None:
    (weight,) = weights(9, 6)
    mask, values = kept(only(weight, SiteStatistics(), chosen("precal", salient={"share": 0.1, "bits": 16})))
    assert torch.equal(values, weight[mask].to(DTYPE))


@pytest.mark.parametrize("rounding", ["nearest", "sequential", "beam"])
def test_salient_weights_take_a_few_values_in_each_group(rounding: str) -> None:
    (weight,) = weights(9, 6)
    preset = chosen(salient={"share": 0.6, "bits": 2}, rounding={"kind": rounding, "polish": 1})
    found = only(weight, measured(9), preset)
    mask, _ = kept(found)
    rounded = dense(found)
    most = max(
        len(rounded[row, start : start + GROUP][mask[row, start : start + GROUP]].unique())
        for row in range(6)
        for start in range(0, COLUMNS, GROUP)
    )
    assert 2 <= most <= 4


@pytest.mark.parametrize("bits", [3, 16])
def test_what_a_salient_weight_loses_to_the_checkpoints_dtype_is_made_good_by_the_others(bits: int) -> None:
    (weight,), known = weights(9, 40), measured(9)
    preset = chosen(bits=6, salient={"share": 0.2, "bits": bits}, group_size=None, activation_order=False)
    found = only(weight, known, preset)
    rounded, (mask, _) = dense(found), kept(found)
    lower = np.linalg.cholesky(damped(gram_of(known), 0.01).numpy()[::-1, ::-1])
    feedback = torch.from_numpy((lower / np.diag(lower))[::-1, ::-1].copy())
    wanted = weight + (weight - rounded) @ feedback.triu(1)  # what each column was rounded from
    scale, zero = (part.double() for part in (found.scale, found.zero))
    expected = dequantize(quantize(wanted, scale, zero, 6), scale, zero)
    assert torch.equal(rounded[~mask], expected[~mask])


@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_the_grid_spans_what_is_not_salient_clipped(clip: float) -> None:
    (weight,) = weights(9, 6)
    found = only(weight, SiteStatistics(), chosen("precal", salient={"share": 0.1, "clip": clip}))
    mask, _ = kept(found)
    expected = grid_of(torch.where(mask, 0.0, weight) * clip, 3, GROUP, dtype=DTYPE)
    assert torch.equal(found.scale.double(), expected.scale)
    assert torch.equal(found.zero.double(), expected.zero)


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_ranges_beside_salient_weights_are_searched_from_the_clipped_range_down(clip: float) -> None:
    (weight,) = weights(9, 6)
    ranges = {"search": "mse", "shrink": 0.6, "steps": 4}
    found = only(weight, SiteStatistics(), chosen("precal", ranges=ranges, salient={"share": 0.1, "clip": clip}))
    mask, _ = kept(found)
    factors = [clip * factor for factor in (1.0, 0.9, 0.8, 0.7, 0.6)]
    grid = GridSettings(3, GROUP, False, DTYPE)
    expected = searched_grid(torch.where(mask, 0.0, weight), grid, factors, squared_error)
    assert torch.equal(found.scale.double(), expected.scale)
    assert torch.equal(found.zero.double(), expected.zero)


@pytest.mark.parametrize("search", ["min_max", "mse", "weighted", "output"])
def test_nothing_is_clipped_when_no_weight_is_salient(search: str) -> None:
    (weight,), known = weights(9, 6), measured(9)
    found = only(weight, known, chosen(ranges=search, salient={"share": 0.0, "clip": 0.5}))
    assert same(found, only(weight, known, chosen(ranges=search)))


def test_precal_rounds_the_other_weights_to_nearest() -> None:
    (weight,) = weights(9, 6)
    found = only(weight, SiteStatistics(), chosen("precal"))
    mask, _ = kept(found)
    grid = grid_of(torch.where(mask, 0.0, weight), 3, GROUP, dtype=DTYPE)
    nearest = dequantize(quantize(weight, *grid.columns(COLUMNS), 3), *grid.columns(COLUMNS))
    assert torch.equal(dense(found)[~mask], nearest[~mask])


def test_the_other_weights_make_good_what_salient_ones_lose() -> None:
    (weight,), known = weights(9, 16), measured(9)
    presets = [chosen(salient={"share": 0.1, "bits": 2}, rounding=each) for each in ("sequential", "nearest")]
    compensated, plain = (loss(weight, dense(only(weight, known, each)), gram_of(known)) for each in presets)
    assert compensated < 0.9 * plain


# --- ranges --------------------------------------------------------------------------------------------------------


def test_ranges_are_searched_from_the_whole_range_down_to_the_smallest_factor() -> None:
    (weight,), known = weights(10, 6), measured(10)
    found = only(weight, known, chosen("awq", ranges={"search": "output", "shrink": 0.6, "steps": 4}))
    grid = GridSettings(3, GROUP, False, DTYPE)
    expected = searched_grid(weight, grid, [1.0, 0.9, 0.8, 0.7, 0.6], output_error(gram_of(known), GROUP))
    assert torch.equal(found.scale.double(), expected.scale)
    assert torch.equal(found.zero.double(), expected.zero)


@pytest.mark.parametrize("search", ["mse", "weighted", "output"])
def test_each_search_costs_less_than_the_whole_range_by_what_it_looks_at(search: str) -> None:
    (weight,), known = weights(10, 16), measured(10)
    metric = {
        "mse": torch.eye(COLUMNS, dtype=torch.float64),
        "weighted": torch.diag(gram_of(known).diagonal()),
        "output": torch.block_diag(
            *[gram_of(known)[start : start + GROUP, start : start + GROUP] for start in range(0, COLUMNS, GROUP)]
        ),
    }[search]
    presets = [chosen("rtn", bits=2, ranges=each) for each in (search, "min_max")]
    searched, whole = (loss(weight, dense(only(weight, known, preset)), metric) for preset in presets)
    assert searched < 0.95 * whole


# --- what is reported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINED)
def test_the_errors_are_those_of_the_weights_that_a_checkpoint_holds(name: str) -> None:
    (weight,), known = weights(11, 8), measured(11)
    found, gram = only(weight, known, COMBINED[name]), gram_of(known)
    target = coreq_target(weight, known)[0] if COMBINED[name].target.kind == "coreq" else weight
    expected = math.sqrt(loss(target, dense(found), gram) / loss(target, torch.zeros_like(target), gram))
    assert found.output_error == pytest.approx(expected, rel=1e-4)
    difference = float((weight - dense(found)).norm() / weight.norm())
    assert found.weight_error == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_the_output_error_of_a_tall_weight_is_that_of_evenly_spaced_rows(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, known = weights(11, 9, 3), measured(11)
    monkeypatch.setattr(pieces, "REPORTED_ROWS", 4)
    monkeypatch.setattr(pieces, "SLAB_WEIGHTS", COLUMNS * rows_at_once)
    found = solve_site(both, known, chosen(), DTYPE).weights
    for weight, each, some in zip(both, found, ([0, 3, 6], [0, 1, 2]), strict=True):
        lost, whole = (
            loss(weight[some], other[some], gram_of(known)) for other in (dense(each), torch.zeros_like(weight))
        )
        assert each.output_error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_at_most_256_rows_tell_the_output_error_and_all_rows_the_weight_error(rows: int) -> None:
    (weight,), (others,) = weights(11, rows, columns=16), weights(12, rows, columns=16)
    every = math.ceil(rows / 256)
    told = torch.arange(rows) % every == 0
    assert int(told.sum()) <= 256
    known = SiteStatistics(gram=measured(11, columns=16).gram)
    plain = only(weight, known, chosen("rtn"))
    untold, some = (only(torch.where(kept[:, None], weight, others), known, chosen("rtn")) for kept in (told, ~told))
    assert untold.output_error == pytest.approx(plain.output_error, rel=1e-6)
    assert some.output_error != pytest.approx(plain.output_error, rel=1e-4)
    assert (untold.weight_error == plain.weight_error) == bool(told.all())


# --- odd inputs ----------------------------------------------------------------------------------------------------

ODD = {**REGULARIZED, **COMBINED}


def with_dead_channels(known: SiteStatistics, dead: list[int]) -> SiteStatistics:
    """Return what is known when no calibration token ever used some channels."""

    def without(value: Tensor | None, *, rows: bool) -> Tensor:
        assert value is not None
        value = value.clone()
        value[..., dead] = 0
        if rows:
            value[dead] = 0
        return value

    matrices = {name: without(getattr(known, name), rows=True) for name in ("gram", "validation", "training")}
    return replace(
        known, **matrices, magnitude=without(known.magnitude, rows=False), drift=without(known.drift, rows=False)
    )


@pytest.mark.parametrize("name", ODD)
def test_zero_weights_stay_zero(name: str) -> None:
    zeros = torch.zeros(5, COLUMNS, dtype=torch.float64)
    found = only(zeros, measured(12), ODD[name])
    assert torch.equal(dense(found), zeros)
    assert (found.weight_error, torch.isfinite(found.scale).all()) == (0.0, True)


@pytest.mark.parametrize("name", ODD)
def test_channels_that_no_token_used_are_rounded_to_something_near(name: str) -> None:
    (weight,), known = weights(12, 8), with_dead_channels(measured(12), [0, 17, 47])
    found = solve_site([weight], known, ODD[name], DTYPE)
    assert found.dead in (0, 3)
    step = torch.from_numpy(by_column(found.weights[0].scale.double(), COLUMNS))
    off = (dense(found.weights[0]) - weight).abs() / step
    assert off[:, [0, 17, 47]].max() < 2.5
    assert math.isfinite(found.weights[0].output_error)


def test_channels_that_no_token_used_are_counted() -> None:
    known = with_dead_channels(measured(12), [0, 17, 47])
    assert solve_site(weights(12, 8), known, chosen(), DTYPE).dead == 3


@pytest.mark.parametrize("name", ODD)
def test_a_gram_matrix_of_one_token_will_do(name: str) -> None:
    (weight,) = weights(13, 8)
    x, dx = (torch.from_numpy(each) for each in np.random.default_rng(13).normal(size=(2, COLUMNS)))
    gram, drift = torch.outer(x, x), torch.outer(0.1 * dx, x)
    known = replace(
        measured(13), gram=gram, drift=drift, drift_energy=0.01 * torch.outer(dx, dx), magnitude=x.abs(), sequences=1
    )
    found = only(weight, known, ODD[name])
    assert torch.isfinite(dense(found)).all()
    assert math.isfinite(found.output_error)


def test_rounding_compensates_a_single_token_almost_wholly() -> None:
    (weight,) = weights(13, 8)
    x = torch.from_numpy(np.random.default_rng(13).normal(size=COLUMNS))
    known = SiteStatistics(gram=torch.outer(x, x))
    assert only(weight, known, chosen()).output_error < 0.1 * only(weight, known, chosen("rtn")).output_error


def test_undamped_rounding_of_a_singular_gram_matrix_reports_the_damping_that_it_took() -> None:
    singular = SiteStatistics(gram=torch.ones(COLUMNS, COLUMNS, dtype=torch.float64))
    found = solve_site(weights(13, 8), singular, chosen(damping=0.0), DTYPE)
    assert found.regularization == Regularization(0.0, 0.0)
    assert found.attempts > 1
    assert found.factor_damping > 0


@pytest.mark.parametrize("name", COMBINED)
def test_a_group_size_that_does_not_divide_is_refused(name: str) -> None:
    preset = COMBINED[name].model_copy(update={"group_size": 20})
    with pytest.raises(QuantizationError, match=r"^a group size of 20 does not divide 48 input channels$"):
        solve_site(weights(14, 4), measured(14), preset, DTYPE)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scope", [None, "tensor", "row", "group"])
@pytest.mark.parametrize("search", ["min_max", "mse", "weighted", "output"])
def test_a_group_size_that_does_not_divide_is_refused_however_ranges_are_searched_and_whatever_is_salient(
    search: str, scope: str | None, method: str
) -> None:
    salient = 0.0 if scope is None else {"share": 0.1, "scope": scope, "clip": 0.9}
    preset = chosen(method, group_size=20, ranges=search, salient=salient)
    with pytest.raises(QuantizationError, match=r"^a group size of 20 does not divide 48 input channels$"):
        solve_site(weights(14, 4), measured(14), preset, DTYPE)


NAMED = {
    "gram": "Gram matrix",
    "validation": "held-out Gram matrix",
    "drift": "drift",
    "drift_energy": "drift's Gram matrix",
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", NAMED)
def test_a_matrix_that_is_not_finite_is_named(part: str, bad: float) -> None:
    known = measured(14)
    getattr(known, part)[COLUMNS - 1, 5] = bad
    preset = chosen("coreq", shrinkage="validated")
    with pytest.raises(QuantizationError, match=f"^its {NAMED[part]} holds NaN or infinity$"):
        solve_site(weights(14, 4), known, preset, DTYPE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in ODD if name not in ("rtn", "precal")])
def test_inputs_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    known = measured(14)
    for matrix in (known.gram, known.training):
        assert matrix is not None
        matrix[3, 7] = matrix[7, 3] = bad
    with pytest.raises(QuantizationError):
        solve_site(weights(14, 4), known, ODD[name], DTYPE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rtn", "gptq", "coreq", "precal", "output_ranges", "saliency", "validated"])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    (weight,) = weights(14, 4)
    weight[2, 5] = bad
    with pytest.raises(QuantizationError):
        solve_site([weight], measured(14), ODD[name], DTYPE)


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(QuantizationError, match="overflows"):
        solve_site([weights(14, 4)[0] * 1e7], measured(14), chosen(), torch.float16)


@pytest.mark.parametrize(
    ("preset", "missing"),
    [
        (chosen(), "gram"),
        (chosen(ranges="output"), "gram"),
        (chosen("coreq"), "drift"),
        (chosen("gptaq"), "drift"),
        (chosen("sarqc_gbs"), "magnitude"),
        (chosen(shrinkage={"strength": 0.3, "towards": "pool"}), "pool_energy"),
    ],
)
def test_what_presetread_and_was_not_measured_is_named(preset: Quantization, missing: str) -> None:
    with pytest.raises(ValueError, match="which was not measured"):
        solve_site(weights(14, 4), replace(measured(14), **{missing: None}), preset, DTYPE)


# --- dtypes --------------------------------------------------------------------------------------------------------


def in_float32(known: SiteStatistics) -> SiteStatistics:
    """Return matrices as they are kept of wide layers."""
    names = ("gram", "validation", "training", "drift", "drift_energy")
    return replace(known, **{name: getattr(known, name).float() for name in names})


@pytest.mark.parametrize("name", ODD)
def test_float32_sums_give_nearly_the_same_weights(name: str) -> None:
    (weight,), known = weights(15, 8), measured(15)
    one, other = only(weight, known, ODD[name]), only(weight, in_float32(known), ODD[name])
    assert (one.codes == other.codes).double().mean() > 0.99
    assert other.output_error == pytest.approx(one.output_error, rel=0.02)


@pytest.mark.parametrize("name", COMBINED)
def test_half_precision_weights_are_quantised_as_the_numbers_that_they_are(name: str) -> None:
    (weight,), known = weights(15, 8), measured(15)
    half = weight.to(torch.bfloat16)
    assert same(only(half, known, COMBINED[name]), only(half.double(), known, COMBINED[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_in_the_checkpoints_dtype_and_codes_in_bytes(dtype: torch.dtype) -> None:
    (found,) = solve_site(weights(15, 8), measured(15), chosen(), dtype).weights
    assert (found.scale.dtype, found.codes.dtype, found.zero.dtype) == (dtype, torch.uint8, torch.uint8)
    assert (found.codes.shape, found.scale.shape, found.zero.shape) == ((8, COLUMNS), (8, 3), (8, 3))


@pytest.mark.parametrize("name", ODD)
def test_neither_weights_nor_statistics_are_changed(name: str) -> None:
    (weight,), known = weights(16, 8), measured(16)
    only(weight, known, ODD[name])
    fresh = measured(16)
    assert torch.equal(weight, weights(16, 8)[0])
    for part in ("gram", "validation", "training", "magnitude", "drift", "drift_energy", "pool_energy"):
        assert torch.equal(getattr(known, part), getattr(fresh, part))


# --- float32 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "gptaq", "coreq", "sarqc_gbs", "cached", "covercal"])
def test_float32_rounds_nearly_all_weights_as_float64_and_as_well(method: str) -> None:
    (weight,), known = weights(21, 96, columns=128), measured(21, columns=128)
    double, single = (only(weight.float(), each, chosen(method, group_size=32)) for each in (known, known.single()))
    assert float((double.codes == single.codes).double().mean()) > 0.99
    assert single.output_error == pytest.approx(double.output_error, rel=0.01)
