"""Matching of mean Gram diagonals against plain recomputation."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.selectors.gram_matching import centred_kernel
from covercal.selectors.registry import Evidence, Order, selector

Sites = list[np.ndarray]


def gram_matching(sites: Sites, extent: int | None = None, samples: int | None = None) -> Order:
    samples = len(sites[0]) if samples is None else samples
    evidence = Evidence(samples, energies=lambda: iter(sites))
    return selector("gram_matching").order(evidence, samples if extent is None else extent, seed=0)


def distance(sites: Sites, chosen: list[int]) -> float:
    """The sum over sites of the squared relative distance of the chosen mean from the pool's."""
    total = 0.0
    for site in sites:
        exact = site.astype(np.float64)
        mean = exact.mean(axis=0)
        of_chosen = exact[chosen].mean(axis=0) if chosen else np.zeros_like(mean)
        total += float(np.sum((of_chosen - mean) ** 2) / np.sum(mean**2)) if mean.any() else 0.0
    return total


def random_sites(seed: int, samples: int, channels: list[int], spread: float = 1.0) -> Sites:
    """Energies with some copied samples and some silent channels; sites differ in scale."""
    generator = np.random.default_rng(seed)
    source = generator.integers(0, samples, samples)
    copied = np.where(generator.random(samples) < 0.2, source, np.arange(samples))
    found = []
    for number, count in enumerate(channels):
        site = generator.lognormal(0, spread, (samples, count)) * 10.0 ** (3 * number)
        site[:, generator.random(count) < 0.1] = 0
        found.append(site[copied].astype(np.float32))
    return found


sites_of_pools = st.builds(
    random_sites,
    st.integers(0, 2**32 - 1),
    st.integers(1, 18),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.sampled_from([0.1, 1.0, 3.0]),
)


@settings(deadline=None, max_examples=150)
@given(sites_of_pools)
def test_every_choice_brings_the_chosen_mean_nearest_to_the_pools(sites: Sites) -> None:
    order = gram_matching(sites).samples.tolist()
    for step, sample in enumerate(order):
        left = [s for s in range(len(order)) if s not in order[:step]]
        reached = {s: distance(sites, [*order[:step], s]) for s in left}
        assert reached[sample] <= min(reached.values()) + 1e-9 * max(1.0, max(reached.values()))


@settings(deadline=None, max_examples=150)
@given(sites_of_pools)
def test_gains_are_by_how_much_the_distance_fell(sites: Sites) -> None:
    found = gram_matching(sites)
    order = found.samples.tolist()
    distances = np.array([distance(sites, order[:step]) for step in range(len(order) + 1)])
    np.testing.assert_allclose(found.gains, -np.diff(distances), rtol=1e-9, atol=1e-9 * max(1.0, distances.max()))


def test_the_whole_pool_is_at_no_distance_from_itself() -> None:
    sites = random_sites(4, 40, [5, 9])
    assert gram_matching(sites).gains.sum() == pytest.approx(2.0, abs=1e-12)  # from one per site to nothing


def test_the_first_choice_is_the_sample_nearest_the_mean() -> None:
    site = np.array([[1.0, 9.0], [5.0, 5.0], [9.0, 1.0], [4.0, 6.0]])
    assert gram_matching([site], 1).samples.tolist() == [1]


def test_a_deviation_is_followed_by_its_opposite() -> None:
    site = 5 + np.array([[0.0, 2.0], [1.0, 0.0], [0.0, -2.0], [-1.0, 0.0]])
    assert gram_matching([site]).samples.tolist() == [1, 3, 0, 2]


def test_the_scale_of_a_site_does_not_count() -> None:
    first, second = random_sites(2, 30, [6, 7])
    expected = gram_matching([first, second]).samples
    np.testing.assert_array_equal(gram_matching([first * np.float32(2**30), second]).samples, expected)


def test_the_order_of_sites_does_not_count() -> None:
    sites = random_sites(2, 30, [6, 7, 1])
    np.testing.assert_array_equal(gram_matching(sites[::-1]).samples, gram_matching(sites).samples)


def test_a_site_without_energy_does_not_count() -> None:
    sites = random_sites(3, 20, [6, 7])
    found, expected = gram_matching([*sites, np.zeros((20, 4), np.float32)]), gram_matching(sites)
    np.testing.assert_array_equal(found.samples, expected.samples)
    np.testing.assert_array_equal(found.gains, expected.gains)


def test_a_pool_without_sites_is_ordered_by_index() -> None:
    found = gram_matching([], 3, samples=5)
    assert (found.samples.tolist(), found.gains.tolist()) == ([0, 1, 2], [0.0, 0.0, 0.0])


def test_sites_are_read_once_and_one_at_a_time() -> None:
    sites = random_sites(1, 12, [4, 4, 4])
    begun = []

    def energies() -> Iterator[np.ndarray]:
        begun.append("begun")
        yield from sites

    selector("gram_matching").order(Evidence(12, energies=energies), 12, seed=0)
    assert begun == ["begun"]


def test_a_kernel_of_several_blocks_holds_the_products_of_deviations() -> None:
    sites = random_sites(6, 1100, [5, 3])
    kernel, energetic = centred_kernel((s.astype(np.float64) for s in sites), 1100)
    expected = np.zeros((1100, 1100))
    for site in sites:
        exact = site.astype(np.float64)
        deviation = (exact - exact.mean(axis=0)) / np.linalg.norm(exact.mean(axis=0))
        expected += deviation @ deviation.T
    np.testing.assert_allclose(kernel, expected, rtol=1e-10, atol=1e-10)
    assert energetic == 2


def test_copies_tie_across_blocks_of_the_kernel() -> None:
    sites = [np.concatenate([site, site, site]) for site in random_sites(7, 400, [33, 65])]
    order = gram_matching(sites, 300).samples.tolist()
    place = {sample: rank for rank, sample in enumerate(order)}
    copies = [(s, t) for s in range(1200) for t in range(s + 400, 1200, 400)]
    assert all(place.get(first, 1200) < place[later] for first, later in copies if later in place)


def test_energies_of_another_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="must begin with the number of samples, 9"):
        gram_matching(random_sites(0, 8, [3]), 2, samples=9)
