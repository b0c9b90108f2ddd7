"""Selectors on sketches against plain recomputation of what each maximises."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.selectors.facility_location import similarities
from covercal.selectors.registry import Evidence, Order, selector
from covercal.selectors.sketches import exact_mean, inner, squared_distances, unit_columns


def order_of(name: str, sketch: np.ndarray, extent: int | None = None, seed: int = 0) -> Order:
    evidence = Evidence(len(sketch), sketch=np.asarray(sketch, dtype=np.float32))
    return selector(name).order(evidence, len(sketch) if extent is None else extent, seed)


def random_sketch(seed: int, samples: int, width: int) -> np.ndarray:
    """Sketches around a common direction, with some copies and some zeros."""
    generator = np.random.default_rng(seed)
    sketch = generator.standard_normal((samples, width)) + generator.standard_normal(width)
    copies = generator.random(samples) < 0.2
    sketch[copies] = sketch[generator.integers(0, samples, int(copies.sum()))]
    sketch[generator.random(samples) < 0.05] = 0
    return sketch.astype(np.float32)


sketches = st.builds(random_sketch, st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 8))


def assert_best_at_each_step(order: Order, value: Callable[[list[int]], float], slack: float) -> None:
    """Assert that every choice reaches the largest value, and its gain what it adds; value([]) is 0."""
    chosen: list[int] = []
    for step, sample in enumerate(order.samples.tolist()):
        values = [value([*chosen, s]) for s in range(order.samples.size) if s not in chosen]
        chosen.append(sample)
        assert value(chosen) >= max(values) - slack
        if order.gains is not None:
            assert order.gains[step] == pytest.approx(value(chosen) - value(chosen[:-1]), abs=slack)


# --- k-center ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(sketches)
def test_k_center_takes_the_sample_farthest_from_those_chosen(sketch: np.ndarray) -> None:
    order = order_of("k_center", sketch).samples.tolist()
    exact = sketch.astype(np.float64)
    for step in range(1, len(order)):
        far = [min(math.dist(exact[s], exact[c]) for c in order[:step]) for s in range(len(sketch))]
        far_left = [far[s] for s in range(len(sketch)) if s not in order[:step]]
        assert far[order[step]] == pytest.approx(max(far_left), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(sketches)
def test_k_center_begins_nearest_the_mean(sketch: np.ndarray) -> None:
    away = np.linalg.norm(sketch.astype(np.float64) - sketch.mean(axis=0, dtype=np.float64), axis=1)
    assert away[order_of("k_center", sketch, 1).samples[0]] == pytest.approx(away.min(), abs=1e-12)


def test_k_center_takes_ties_by_index() -> None:
    corners = np.array([[1, 1], [-1, 1], [0, 0], [1, -1], [-1, -1]])
    assert order_of("k_center", corners).samples.tolist() == [2, 0, 1, 3, 4]


# --- facility location ------------------------------------------------------------------------------------------------


def served(sketch: np.ndarray) -> Callable[[list[int]], float]:
    exact = sketch.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = np.divide(exact, lengths, out=np.zeros_like(exact), where=lengths > 0)
    similarity = (1 + unit @ unit.T) / 2
    return lambda chosen: float(similarity[:, chosen].max(axis=1).sum()) if chosen else 0.0


@settings(deadline=None, max_examples=150)
@given(sketches)
def test_facility_location_takes_the_sample_that_serves_the_pool_best(sketch: np.ndarray) -> None:
    assert_best_at_each_step(order_of("facility_location", sketch), served(sketch), slack=1e-7)


@settings(deadline=None, max_examples=100)
@given(sketches)
def test_lazy_evaluation_gives_plain_greedys_order_to_the_last_tie(sketch: np.ndarray) -> None:
    similarity = similarities(unit_columns(sketch.astype(np.float64).T)).astype(np.int64)
    best, left, order = np.zeros(len(sketch), dtype=np.int64), np.ones(len(sketch), dtype=bool), []
    while left.any():
        value = np.where(left, np.maximum(similarity, best).sum(axis=1), -1)
        order.append(int(value.argmax()))
        left[order[-1]] = False
        best = np.maximum(best, similarity[order[-1]])
    assert order_of("facility_location", sketch).samples.tolist() == order


def test_similarities_over_several_blocks_are_shifted_cosines() -> None:
    sketch = random_sketch(3, 1100, 16)
    columns = unit_columns(sketch.astype(np.float64).T)
    found = similarities(columns)
    np.testing.assert_allclose(np.ldexp(found, -30), (1 + columns.T @ columns) / 2, atol=1e-7)
    np.testing.assert_array_equal(found, found.T)


def test_similarities_do_not_depend_on_the_order_of_the_pool() -> None:
    columns = unit_columns(random_sketch(3, 700, 64).astype(np.float64).T)
    places = np.random.default_rng(0).permutation(700)
    np.testing.assert_array_equal(similarities(columns[:, places]), similarities(columns)[np.ix_(places, places)])


def test_facility_location_takes_the_middle_of_each_cluster_the_largest_first() -> None:
    middle, own = np.eye(12)[[0, 1, 1, 1, 2, 2, 2, 2, 2]], 0.3 * np.eye(12)[3:]
    own[[0, 2, 6]] = 0  # the middles; every other sample leans a way of its own
    assert order_of("facility_location", middle + own, 3).samples.tolist() == [6, 2, 0]


# --- herding ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(sketches)
def test_herding_takes_the_largest_inner_product_with_what_is_wanted(sketch: np.ndarray) -> None:
    exact = sketch.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = np.divide(exact, lengths, out=np.zeros_like(exact), where=lengths > 0)
    order = order_of("herding", sketch).samples.tolist()
    for step, sample in enumerate(order):
        wanted = (step + 1) * unit.mean(axis=0) - unit[order[:step]].sum(axis=0)
        left = [s for s in range(len(sketch)) if s not in order[:step]]
        assert unit[sample] @ wanted >= max(unit[left] @ wanted) - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_herding_of_unit_vectors_brings_the_mean_nearest_to_the_pools(seed: int) -> None:
    unit = np.random.default_rng(seed).standard_normal((25, 4))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    order = order_of("herding", unit).samples.tolist()
    for step, sample in enumerate(order):
        left = [s for s in range(25) if s not in order[:step]]
        off = {s: np.linalg.norm(unit[[*order[:step], s]].mean(axis=0) - unit.mean(axis=0)) for s in left}
        assert off[sample] <= min(off.values()) + 1e-6


@pytest.mark.parametrize("name", ["herding", "facility_location"])
def test_only_the_direction_of_a_sketch_counts(name: str) -> None:
    sketch = np.random.default_rng(1).standard_normal((30, 5))
    scales = 2.0 ** np.random.default_rng(2).integers(-20, 20, (30, 1))
    np.testing.assert_array_equal(order_of(name, sketch * scales).samples, order_of(name, sketch).samples)


# --- log determinant --------------------------------------------------------------------------------------------------


def log_determinant(sketch: np.ndarray) -> Callable[[list[int]], float]:
    exact = sketch.astype(np.float64)
    scale = np.mean(exact**2) or 1.0
    identity = np.eye(exact.shape[1])
    return lambda chosen: float(np.linalg.slogdet(identity + exact[chosen].T @ exact[chosen] / scale)[1])


@settings(deadline=None, max_examples=100)
@given(sketches)
def test_log_det_takes_the_sample_that_raises_the_determinant_most(sketch: np.ndarray) -> None:
    assert_best_at_each_step(order_of("log_det", sketch), log_determinant(sketch), slack=1e-9)


def test_a_thousand_rank_one_updates_stay_exact() -> None:
    sketch = random_sketch(8, 1000, 12)
    found = order_of("log_det", sketch)
    assert found.gains.sum() == pytest.approx(log_determinant(sketch)(list(range(1000))), rel=1e-12)
    last = log_determinant(sketch)(found.samples.tolist()) - log_determinant(sketch)(found.samples[:-1].tolist())
    assert found.gains[-1] == pytest.approx(last, abs=1e-10)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("name", ["log_det", "k_center"])
def test_the_order_does_not_depend_on_the_scale_of_the_sketches(name: str, scale: float) -> None:
    sketch = np.random.default_rng(1).standard_normal((30, 5))
    np.testing.assert_array_equal(order_of(name, sketch * scale).samples, order_of(name, sketch).samples)


def test_log_det_takes_every_direction_before_any_twice() -> None:
    sketch = np.concatenate([np.eye(4), np.eye(4)])[[0, 4, 1, 5, 2, 6, 3, 7]]
    assert order_of("log_det", sketch).samples.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


# --- COLA -------------------------------------------------------------------------------------------------------------


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sketches around far corners, in random order, and the corner of each."""
    generator = np.random.default_rng(seed)
    corner = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return 100.0 * np.eye(len(sizes))[corner] + generator.standard_normal((sum(sizes), len(sizes))), corner


@pytest.mark.parametrize("seed", range(4))
def test_cola_takes_one_sample_of_each_cluster_the_largest_first(seed: int) -> None:
    sketch, corner = blobs([3, 9, 5, 7])
    assert corner[order_of("cola", sketch, 4, seed).samples].tolist() == [1, 3, 2, 0]


def test_cola_takes_the_sample_nearest_the_middle_of_its_cluster() -> None:
    sketch, corner = blobs([6, 9, 4])
    for sample in order_of("cola", sketch, 3).samples:
        members = np.flatnonzero(corner == corner[sample])
        away = np.linalg.norm(sketch[members] - sketch[members].mean(axis=0), axis=1)
        assert members[away.argmin()] == sample


def test_cola_with_fewer_different_sketches_than_samples_lets_the_clusters_take_turns() -> None:
    sketch = np.array([[0.0], [5.0], [5.0], [0.0], [5.0]])
    assert order_of("cola", sketch, 5).samples.tolist() == [1, 0, 2, 3, 4]


@pytest.mark.filterwarnings("error")
def test_cola_of_copies_raises_no_warning() -> None:
    assert order_of("cola", np.ones((6, 3)), 4).samples.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_cola_never_takes_a_sample_twice(seed: int) -> None:
    sketch = random_sketch(seed, 40, 3)
    for extent in (1, 13, 39, 40):
        assert len(set(order_of("cola", sketch, extent, seed).samples.tolist())) == extent


def test_cola_of_one_cluster_takes_the_sample_nearest_the_mean() -> None:
    sketch = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    away = np.linalg.norm(sketch - sketch.mean(axis=0), axis=1)
    assert order_of("cola", sketch, 1).samples.tolist() == [int(away.argmin())]


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_a_mean_does_not_depend_on_the_order_of_the_pool() -> None:
    columns = np.random.default_rng(0).lognormal(0, 20, (5, 400))
    places = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(exact_mean(columns[:, places]), exact_mean(columns))
    np.testing.assert_allclose(exact_mean(columns), columns.mean(axis=1), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_unit_columns_have_length_one_or_zero(scale: float) -> None:
    columns = random_sketch(0, 50, 6).astype(np.float64).T * scale
    columns[:, 3] = 0
    lengths = np.linalg.norm(unit_columns(columns), axis=0)
    np.testing.assert_allclose(lengths, np.abs(columns).max(axis=0) > 0, atol=1e-15)


@pytest.mark.parametrize("samples", [1, 2, 7, 1000])
def test_products_and_distances_of_equal_samples_are_equal_wherever_they_stand(samples: int) -> None:
    generator = np.random.default_rng(samples)
    column, vector = generator.standard_normal((64, 1)), generator.standard_normal(64)
    columns = np.repeat(column, samples, axis=1)
    assert len(set(inner(columns, vector).tolist())) == 1
    assert len(set(squared_distances(columns, vector).tolist())) == 1
    assert inner(columns, vector)[0] == pytest.approx(float(column[:, 0] @ vector))
    assert squared_distances(columns, vector)[0] == pytest.approx(float(np.sum((column[:, 0] - vector) ** 2)))
