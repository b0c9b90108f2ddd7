"""Cover by the logarithm against plain recomputation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.coverage import greedy_soft_cover
from covercal.selectors.registry import Evidence, selector


def objective(coverage: np.ndarray, weights: np.ndarray, chosen: list[int]) -> float:
    times = coverage[chosen].sum(axis=0)
    return math.fsum(w * math.log1p(n) for w, n in zip(weights.tolist(), times.tolist(), strict=True))


def case(seed: int, samples: int, channels: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.random((samples, channels)) < density, generator.lognormal(0, 2, channels)


cases = st.builds(
    case, st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(0, 30), st.sampled_from([0.03, 0.15, 0.5, 0.9])
)


@settings(deadline=None, max_examples=200)
@given(cases)
def test_every_choice_gains_the_most_at_its_step(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    coverage, weights = drawn
    order, gains = greedy_soft_cover(coverage, weights, len(coverage))
    slack = 1e-12 * float(weights.sum())
    for step, sample in enumerate(order.tolist()):
        chosen = order[:step].tolist()
        before = objective(coverage, weights, chosen)
        gain = [objective(coverage, weights, [*chosen, s]) - before for s in range(len(coverage)) if s not in chosen]
        assert gains[step] == pytest.approx(max(gain), rel=1e-9, abs=slack)
        assert objective(coverage, weights, [*chosen, sample]) - before >= max(gain) - slack


@settings(deadline=None)
@given(cases)
def test_gains_sum_to_the_objective_of_the_choice(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    coverage, weights = drawn
    for budget in range(len(coverage) + 1):
        order, gains = greedy_soft_cover(coverage, weights, budget)
        assert math.fsum(gains) == pytest.approx(objective(coverage, weights, order.tolist()), rel=1e-12)


@settings(deadline=None)
@given(cases)
def test_gains_never_grow(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    gains = greedy_soft_cover(*drawn, len(drawn[0]))[1]
    assert (np.diff(gains) <= 1e-12 * gains.max(initial=0)).all()


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_within_its_bound_of_the_best_choice(seed: int) -> None:
    coverage, weights = case(seed, 10, 12, 0.3)
    best = max(objective(coverage, weights, list(c)) for c in itertools.combinations(range(10), 4))
    assert greedy_soft_cover(coverage, weights, 4)[1].sum() >= (1 - 1 / math.e) * best


def test_dense_and_sparse_channels_together_give_plain_greedys_order() -> None:
    generator = np.random.default_rng(5)
    coverage = generator.random((300, 40)) < np.linspace(0.001, 0.9, 40)
    weights = generator.lognormal(0, 1, 40)
    times, left, order = np.zeros(40), np.ones(300, dtype=bool), []
    for _ in range(50):
        gain = np.where(left, coverage @ (weights * np.log1p(1 / (times + 1))), -1)
        order.append(int(gain.argmax()))
        left[order[-1]] = False
        times += coverage[order[-1]]
    assert greedy_soft_cover(coverage, weights, 50)[0].tolist() == order


def test_a_channel_that_fired_already_still_counts_a_little() -> None:
    coverage = np.array([[1, 0], [1, 0], [0, 0]], dtype=bool)
    order, gains = greedy_soft_cover(coverage, np.array([2.0, 1.0]), 3)
    assert order.tolist() == [0, 1, 2]
    np.testing.assert_allclose(gains, [2 * math.log(2), 2 * math.log(3 / 2), 0.0])


def test_a_new_light_channel_beats_a_heavy_one_that_fired_often() -> None:
    coverage = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=bool)
    assert greedy_soft_cover(coverage, np.array([2.0, 1.0]), 4)[0].tolist() == [0, 1, 3, 2]  # 2 log(4/3) < log 2


def test_a_channel_without_weight_does_not_count() -> None:
    coverage = np.array([[1, 0], [0, 1]], dtype=bool)
    assert greedy_soft_cover(coverage, np.array([0.0, 1.0]), 2)[0].tolist() == [1, 0]


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_the_order_does_not_depend_on_the_scale_of_the_weights(scale: float) -> None:
    coverage, weights = case(1, 30, 40, 0.2)
    expected = greedy_soft_cover(coverage, weights, 30)[0]
    np.testing.assert_array_equal(greedy_soft_cover(coverage, weights * scale, 30)[0], expected)


@pytest.mark.parametrize(
    ("weights", "budget", "said"),
    [
        ([1.0], 1, "must be"),
        ([1.0, -1.0], 1, "not negative"),
        ([1.0, np.inf], 1, "finite"),
        ([1.0, 1.0], 4, "budget 4"),
    ],
)
def test_what_cannot_be_covered_is_refused(weights: list[float], budget: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        greedy_soft_cover(np.ones((3, 2), dtype=bool), np.array(weights), budget)


def test_the_selector_gives_the_greedy_order_and_its_gains() -> None:
    coverage, weights = case(2, 20, 30, 0.2)
    found = selector("coverage_soft").order(Evidence(20, coverage=coverage, weights=weights), 12, seed=0)
    order, gains = greedy_soft_cover(coverage, weights, 12)
    np.testing.assert_array_equal(found.samples, order)
    np.testing.assert_array_equal(found.gains, gains)
    assert found.rounds is None
