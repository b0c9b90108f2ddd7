"""What every selector in the table keeps to, on ordinary pools and on degenerate ones."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from covercal.selectors.registry import SELECTORS, Evidence, Order, selector

STAGES = {"outliers", "statistics", "losses"}
FIELDS = {
    "outliers": ("coverage", "weights"),
    "statistics": ("variance", "magnitude", "sketch", "energies"),
    "losses": ("losses",),
}
NESTED = [name for name in SELECTORS if selector(name).nested]


def pool(samples: int = 24, seed: int = 0) -> Evidence:
    """A pool of which every number differs from every other; `given` is a permutation."""
    generator = np.random.default_rng(seed)
    sites = [generator.lognormal(0, 1, (samples, channels)).astype(np.float32) for channels in (7, 1, 12)]
    return Evidence(
        samples,
        domains=[f"domain {d}" for d in generator.integers(0, 4, samples)],
        texts=[" ".join(f"w{w}" for w in generator.zipf(1.5, 20)) for _ in range(samples)],
        lengths=generator.permutation(samples).astype(np.int64) + 5,
        coverage=generator.random((samples, 60)) < 0.15,
        weights=generator.lognormal(0, 1, 60),
        variance=generator.lognormal(0, 1, (samples, 3)).astype(np.float32),
        magnitude=generator.lognormal(0, 1, (samples, 3)).astype(np.float32),
        sketch=generator.standard_normal((samples, 8)).astype(np.float32),
        energies=lambda: iter(sites),
        losses=generator.lognormal(0, 1, samples),
        given=generator.permutation(samples).tolist(),
    )


def permuted(evidence: Evidence, places: np.ndarray) -> Evidence:
    """A pool of the samples at these places, which may repeat."""
    sites = [site[places] for site in evidence.energies()]
    back = np.argsort(places)
    return Evidence(
        len(places),
        [evidence.domains[p] for p in places],
        [evidence.texts[p] for p in places],
        evidence.lengths[places],
        evidence.coverage[places],
        evidence.weights,
        evidence.variance[places],
        evidence.magnitude[places],
        evidence.sketch[places],
        lambda: iter(sites),
        evidence.losses[places],
        [int(back[g]) for g in evidence.given] if len(places) == evidence.samples else range(len(places)),
    )


def equal_samples(samples: int) -> Evidence:
    """Copies of one sample."""
    return permuted(pool(3), np.zeros(samples, dtype=int))


def silent_pool(samples: int) -> Evidence:
    """No text, no length, all activations zero."""
    many = pool(samples)
    sites = [np.zeros((samples, 5), np.float32)] * 2
    return replace(
        many,
        texts=[""] * samples,
        lengths=np.zeros_like(many.lengths),
        coverage=np.zeros_like(many.coverage),
        weights=np.zeros_like(many.weights),
        variance=np.zeros_like(many.variance),
        magnitude=np.zeros_like(many.magnitude),
        sketch=np.zeros_like(many.sketch),
        losses=np.zeros_like(many.losses),
        energies=lambda: iter(sites),
    )


def empty_pool(samples: int) -> Evidence:
    """No outlier channels, no sites, sketches of no width."""
    many = pool(samples)
    return replace(
        many,
        coverage=np.zeros((samples, 0), dtype=bool),
        weights=np.zeros(0),
        variance=np.zeros((samples, 0), np.float32),
        magnitude=np.zeros((samples, 0), np.float32),
        sketch=np.zeros((samples, 0), np.float32),
        energies=lambda: iter(()),
    )


POOLS = {
    "ordinary": pool(),
    "one sample": pool(1),
    "two samples": pool(2),
    "equal samples": equal_samples(9),
    "each sample twice": permuted(pool(10), np.arange(20) % 10),
    "silent": silent_pool(9),
    "one silent sample": silent_pool(1),
    "without channels": empty_pool(9),
    "huge sketches": replace(pool(9), sketch=pool(9).sketch * np.float32(1e37)),
    "tiny sketches": replace(pool(9), sketch=pool(9).sketch * np.float32(1e-40)),
}


def same(first: Order, second: Order) -> bool:
    return all(
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in ((first.samples, second.samples), (first.gains, second.gains), (first.rounds, second.rounds))
    )


@pytest.mark.parametrize("name", SELECTORS)
def test_an_entry_of_the_table_is_a_selector(name: str) -> None:
    found = selector(name)
    assert isinstance(found.reads, frozenset)
    assert found.reads <= STAGES
    assert isinstance(found.seeded, bool)
    assert isinstance(found.nested, bool)
    assert list(inspect.signature(found.order).parameters) == ["evidence", "extent", "seed"]


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("name", SELECTORS)
def test_an_order_has_the_length_asked_for_and_no_repeats(name: str, kind: str) -> None:
    evidence = POOLS[kind]
    for extent in sorted({0, 1, evidence.samples // 2, evidence.samples}):
        order = selector(name).order(evidence, extent, seed=3)
        assert order.samples.dtype == np.int64
        assert order.samples.shape == (extent,)
        assert set(order.samples.tolist()) <= set(range(evidence.samples))
        assert len(set(order.samples.tolist())) == extent


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("name", SELECTORS)
def test_gains_and_rounds_are_finite_and_of_every_sample_or_none(name: str, kind: str) -> None:
    order = selector(name).order(POOLS[kind], POOLS[kind].samples, seed=3)
    if order.gains is not None:
        assert (order.gains.dtype, order.gains.shape) == (np.float64, order.samples.shape)
        assert np.isfinite(order.gains).all()
    if order.rounds is not None:
        assert (order.rounds.dtype, order.rounds.shape) == (np.int64, order.samples.shape)
        assert (np.diff(order.rounds) >= 0).all()


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("name", SELECTORS)
def test_the_same_evidence_gives_the_same_order_twice(name: str, kind: str) -> None:
    evidence = POOLS[kind]
    extent = (evidence.samples + 1) // 2
    assert same(*(selector(name).order(evidence, extent, seed=5) for _ in range(2)))


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("name", NESTED)
def test_a_smaller_extent_of_a_nested_order_is_a_prefix(name: str, kind: str) -> None:
    evidence = POOLS[kind]
    whole = selector(name).order(evidence, evidence.samples, seed=3)
    for extent in range(evidence.samples + 1):
        part = selector(name).order(evidence, extent, seed=3)
        np.testing.assert_array_equal(part.samples, whole.samples[:extent])
        if whole.gains is not None:
            np.testing.assert_array_equal(part.gains, whole.gains[:extent])


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_says_truly_whether_its_seed_matters(name: str) -> None:
    orders = {tuple(selector(name).order(pool(), 7, seed).samples.tolist()) for seed in range(6)}
    assert (len(orders) > 1) == selector(name).seeded


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_reads_no_stage_that_it_does_not_ask_for(name: str) -> None:
    unread = {field: None for stage in STAGES - selector(name).reads for field in FIELDS[stage]}
    few, all_ = (selector(name).order(e, 11, seed=2) for e in (replace(pool(), **unread), pool()))
    assert same(few, all_)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_leaves_the_evidence_as_it_was(name: str) -> None:
    evidence = pool()
    selector(name).order(evidence, 24, seed=2)
    for field in ("lengths", "coverage", "weights", "variance", "magnitude", "sketch", "losses"):
        np.testing.assert_array_equal(getattr(evidence, field), getattr(pool(), field))
    for site, untouched in zip(evidence.energies(), pool().energies(), strict=True):
        np.testing.assert_array_equal(site, untouched)


FREE_OF_TIES = [
    name
    for name in SELECTORS
    if name not in {"random", "first", "stratified_domain", "cola", "coverage", "zipcal"}  # chance, index, or many ties
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FREE_OF_TIES)
def test_a_permuted_pool_gives_the_permuted_order(name: str, seed: int) -> None:
    evidence = pool(60, seed)
    places = np.random.default_rng(seed).permutation(60)
    moved = selector(name).order(permuted(evidence, places), 12, seed=1).samples  # later on, ties are natural
    np.testing.assert_array_equal(places[moved], selector(name).order(evidence, 12, seed=1).samples)


TO_THE_LOWEST_INDEX = [name for name in SELECTORS if not selector(name).seeded and name not in {"given"}]


@pytest.mark.parametrize("name", TO_THE_LOWEST_INDEX)
def test_equal_samples_come_by_index(name: str) -> None:
    assert selector(name).order(equal_samples(9), 9, seed=0).samples.tolist() == list(range(9))


@pytest.mark.parametrize("name", TO_THE_LOWEST_INDEX)
def test_of_a_sample_and_its_copy_the_first_is_chosen_first(name: str) -> None:
    order = selector(name).order(POOLS["each sample twice"], 20, seed=0).samples.tolist()
    assert all(order.index(sample) < order.index(sample + 10) for sample in range(10))


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("extent", [-1, 25])
def test_an_extent_outside_the_pool_is_refused(name: str, extent: int) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and the number of samples, 24"):
        selector(name).order(pool(), extent, seed=0)


NEEDS = {
    "coverage": {"coverage": None},
    "coverage_soft": {"weights": None},
    "longest": {"lengths": None},
    "max_perplexity": {"losses": None},
    "min_perplexity": {"losses": None},
    "max_variance": {"variance": None},
    "stratified_magnitude": {"magnitude": None},
    "stratified_domain": {"domains": ()},
    "zipcal": {"texts": ()},
    "cola": {"sketch": None},
    "k_center": {"sketch": None},
    "facility_location": {"sketch": None},
    "herding": {"sketch": None},
    "gram_matching": {"energies": None},
    "log_det": {"sketch": None},
    "given": {"given": ()},
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_selector_refuses_to_guess_without_its_evidence(name: str) -> None:
    with pytest.raises(ValueError, match=r"selector reads|are given, and 3 are asked for"):
        selector(name).order(replace(pool(), **NEEDS[name]), 3, seed=0)


def test_every_selector_is_here_that_needs_evidence() -> None:
    assert set(SELECTORS) - set(NEEDS) == {"random", "first"}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("longest", "lengths"),
        ("max_perplexity", "losses"),
        ("max_variance", "variance"),
        ("stratified_magnitude", "magnitude"),
        ("herding", "sketch"),
    ],
)
def test_numbers_of_another_pool_are_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match="must begin with the number of samples, 24"):
        selector(name).order(replace(pool(), **{field: getattr(pool(23), field)}), 3, seed=0)


@pytest.mark.parametrize(("name", "field"), [("zipcal", "texts"), ("stratified_domain", "domains")])
def test_words_of_another_pool_are_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match="of 24 samples, and the evidence has 23"):
        selector(name).order(replace(pool(), **{field: getattr(pool(23), field)}), 3, seed=0)


def test_a_number_that_is_not_finite_is_named_by_its_sample() -> None:
    losses = pool().losses.copy()
    losses[17] = np.nan
    with pytest.raises(ValueError, match="the losses of sample 17 must be finite"):
        selector("max_perplexity").order(replace(pool(), losses=losses), 3, seed=0)
