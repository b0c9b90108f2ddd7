"""Scales of input channels against their papers' formulas, and the search against trying every candidate by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.quantizers.scaling import (
    SMALLEST,
    awq_scale,
    candidate_scales,
    centered,
    drift_weights,
    duo_scale,
    search_scale,
    smooth_scale,
    unit_range,
)
from tests.covercal.layers import Floats, layer

seeds = st.integers(0, 2**32 - 1)
powers = st.floats(0, 1)
ONES = torch.ones(12, dtype=torch.float64)


def positive(seed: int, count: int = 12, spread: float = 1.0) -> Tensor:
    return torch.from_numpy(np.exp(spread * np.random.default_rng(seed).normal(size=count)))


def centered_by_hand(scale: Floats) -> Floats:
    return scale / np.sqrt(scale.max() * scale.min())


def rounded_under(weight: Floats, scale: Floats, bits: int = 3) -> Floats:
    """Return Q(W diag(s)) diag(s)^-1 for one min-max scale a row."""
    scaled = weight * scale
    low, high = np.minimum(scaled.min(1, keepdims=True), 0), np.maximum(scaled.max(1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(scaled / step + zero), 0, 2**bits - 1) - zero) * step / scale


class Layer:
    """A weight and its inputs, with the losses that a search looks at, by their definition."""

    def __init__(self, seed: int) -> None:
        weight, gram = layer(seed, 8, 12)
        self.weight, self.gram = weight.numpy(), gram.numpy()
        self.magnitude = gram.diagonal().sqrt() * 0.8
        self.weight_magnitude = weight.abs().mean(dim=0)

    def loss(self, scale: Tensor) -> float:
        error = rounded_under(self.weight, scale.numpy()) - self.weight
        return float(np.einsum("ri,ij,rj->", error, self.gram, error))

    def drift(self, scale: Tensor) -> float:
        error = rounded_under(self.weight, scale.numpy()) - self.weight
        saliency = self.magnitude.numpy() / self.weight_magnitude.numpy()
        return float(np.square(error * saliency).sum())

    def candidates(self, *, duo: bool, guard: bool = False) -> list[tuple[float, Tensor]]:
        return candidate_scales(self.magnitude, self.weight_magnitude, 20, duo=duo, guard=guard)


# --- formulas ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seeds, powers)
def test_awqs_scale_is_its_formula(seed: int, power: float) -> None:
    magnitude = positive(seed)
    expected = centered_by_hand(magnitude.numpy() ** power)
    np.testing.assert_allclose(awq_scale(magnitude, power).numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seeds, powers)
def test_the_duo_scale_is_its_formula(seed: int, power: float) -> None:
    magnitude, weights = positive(seed), positive(seed + 1)
    expected = centered_by_hand(magnitude.numpy() ** power / (weights.numpy() ** (1 - power) + 1e-4))
    np.testing.assert_allclose(duo_scale(magnitude, weights, power).numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seeds, powers)
def test_smoothquants_scale_is_its_formula(seed: int, power: float) -> None:
    peak, weight_peak = positive(seed), positive(seed + 1)
    expected = peak.numpy() ** power / weight_peak.numpy() ** (1 - power)
    np.testing.assert_allclose(smooth_scale(peak, weight_peak, power).numpy(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.0, 3.0))
def test_the_ends_of_a_centered_scale_multiply_to_1(seed: int, spread: float) -> None:
    found = centered(positive(seed, spread=spread))
    assert float(found.max() * found.min()) == pytest.approx(1.0)


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_a_channel_that_is_never_used_gets_awqs_smallest_scale(power: float) -> None:
    magnitude = positive(0)
    magnitude[4] = 0
    expected = centered_by_hand(np.maximum(magnitude.numpy() ** power, SMALLEST))
    np.testing.assert_allclose(awq_scale(magnitude, power).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_no_scale_is_ever_zero_or_infinite(power: float) -> None:
    magnitude, weights = positive(0), positive(1)
    magnitude[[2, 5]], weights[[3, 5]] = 0, 0
    for scale in (
        awq_scale(magnitude, power),
        awq_scale(magnitude * 0, power),
        duo_scale(magnitude, weights, power),
        duo_scale(magnitude * 0, weights * 0, power),
        smooth_scale(magnitude, weights, power),
    ):
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


def test_smoothquant_leaves_channels_alone_that_are_never_used_or_never_read() -> None:
    peak, weight_peak = positive(0), positive(1)
    peak[2], weight_peak[3] = 0, 0
    found = smooth_scale(peak, weight_peak, 0.5)
    assert (float(found[2]), float(found[3])) == (1.0, 1.0)


def test_drift_is_weighted_by_squared_saliency() -> None:
    magnitude, weights = positive(0), positive(1)
    expected = (magnitude.numpy() / weights.numpy()) ** 2
    np.testing.assert_allclose(drift_weights(magnitude, weights, "saliency").numpy(), expected, rtol=1e-12)


def test_plain_drift_weighs_all_columns_alike() -> None:
    assert torch.equal(drift_weights(positive(0), positive(1), "identity"), ONES)


def test_drift_of_a_column_of_zero_weights_counts_as_that_of_the_smallest() -> None:
    magnitude, weights = positive(0), positive(1)
    smallest = weights.clone()
    weights[3], smallest[3] = 0, weights[torch.arange(12) != 3].min()
    assert torch.equal(drift_weights(magnitude, weights, "saliency"), drift_weights(magnitude, smallest, "saliency"))


# --- candidates ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 25))
def test_awq_tries_no_scaling_first_and_then_rising_powers_below_1(seed: int, steps: int) -> None:
    magnitude = positive(seed)
    found = candidate_scales(magnitude, positive(seed + 1), steps, duo=False, guard=False)
    assert [power for power, _ in found] == [k / steps for k in range(steps)]
    assert torch.equal(found[0][1], ONES)


def test_awq_tries_no_scaling_also_when_a_channel_is_never_used() -> None:
    magnitude = positive(0)
    magnitude[4] = 0
    assert torch.equal(candidate_scales(magnitude, positive(1), 20, duo=False, guard=False)[0][1], ONES)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 25))
def test_duo_tries_powers_from_0_to_1_of_which_none_is_no_scaling(seed: int, steps: int) -> None:
    found = candidate_scales(positive(seed), positive(seed + 1), steps, duo=True, guard=False)
    assert [power for power, _ in found] == [k / steps for k in range(steps + 1)]
    assert not any(torch.equal(scale, ONES) for _, scale in found)


def test_the_guard_is_no_scaling_tried_first() -> None:
    plain = candidate_scales(positive(0), positive(1), 20, duo=True, guard=False)
    (power, guard), *rest = candidate_scales(positive(0), positive(1), 20, duo=True, guard=True)
    assert power == 0.0
    assert torch.equal(guard, ONES)
    assert [power for power, _ in rest] == [power for power, _ in plain]


# --- search --------------------------------------------------------------------------------------------------------


def numbered(losses: list[float]) -> tuple[list[tuple[float, Tensor]], dict[float, float]]:
    """Return candidates that a loss tells apart by their scale, 2, 3, …, and the loss of each scale."""
    return [(float(i), torch.full((1,), i + 2.0)) for i in range(len(losses))], dict(enumerate(losses, start=2))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_first_of_the_candidates_with_the_least_loss_is_taken(losses: list[int]) -> None:
    candidates, known = numbered([float(each) for each in losses])
    found = search_scale(candidates, lambda scale: known[float(scale)])
    assert found == candidates[losses.index(min(losses))]


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_scale_that_loses_least_is_found(seed: int, duo: bool) -> None:
    case = Layer(seed)
    candidates = case.candidates(duo=duo, guard=duo)
    _, scale = search_scale(candidates, case.loss)
    assert case.loss(scale) == min(case.loss(each) for _, each in candidates)


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_tries_no_scaling_is_never_worse_than_none(seed: int, duo: bool) -> None:
    case = Layer(seed)
    _, scale = search_scale(case.candidates(duo=duo, guard=True), case.loss)
    assert case.loss(scale) <= case.loss(ONES)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_drift_are_weighed_on_the_unit_range(seed: int, strength: float) -> None:
    case = Layer(seed)
    candidates = case.candidates(duo=True)
    losses, drifts = (np.array([measure(s) for _, s in candidates]) for measure in (case.loss, case.drift))
    judged = (losses - losses.min()) / np.ptp(losses) + strength * (drifts - drifts.min()) / np.ptp(drifts)
    assert search_scale(candidates, case.loss, case.drift, strength) == candidates[int(judged.argmin())]


@pytest.mark.parametrize(("strength", "chosen"), [(0.5, 0.0), (2.0, 2.0)])
def test_the_strength_decides_between_loss_and_drift(strength: float, chosen: float) -> None:
    candidates, known = numbered([1.0, 2.0, 3.0])
    found, _ = search_scale(candidates, lambda x: known[float(x)], lambda x: -known[float(x)], strength)
    assert found == chosen


@pytest.mark.parametrize("seed", range(20))
def test_sarqc_gs_without_strength_chooses_as_duo_awq_without_its_guard(seed: int) -> None:
    case = Layer(seed)
    candidates = case.candidates(duo=True)
    assert search_scale(candidates, case.loss, case.drift, 0.0) is search_scale(candidates, case.loss)


def test_a_drift_that_is_the_same_for_all_candidates_does_not_count() -> None:
    candidates, known = numbered([3.0, 1.0, 2.0])
    found, _ = search_scale(candidates, lambda scale: known[float(scale)], lambda _: 7.0, 100.0)
    assert found == 1.0


def test_a_loss_that_is_the_same_for_all_candidates_leaves_the_choice_to_the_drift() -> None:
    candidates, known = numbered([3.0, 1.0, 2.0])
    found, _ = search_scale(candidates, lambda _: 7.0, lambda scale: known[float(scale)], 0.1)
    assert found == 1.0


def test_every_candidate_is_judged_once() -> None:
    candidates, known = numbered([3.0, 1.0, 2.0])
    judged: list[float] = []
    search_scale(candidates, lambda scale: judged.append(float(scale)) or known[float(scale)])
    assert judged == list(known)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10).filter(lambda values: max(values) > min(values)))
def test_values_are_mapped_to_the_unit_range_in_their_order(values: list[float]) -> None:
    found = unit_range(values)
    assert (found[values.index(min(values))], found[values.index(max(values))]) == (0.0, 1.0)
    ordered = [each for _, each in sorted(zip(values, found, strict=True))]
    assert ordered == sorted(found)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-2.0] * 3])
def test_equal_values_are_all_mapped_to_0(values: list[float]) -> None:
    assert unit_range(values) == [0.0] * len(values)
