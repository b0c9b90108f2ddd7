from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covercal.recipe import Model, TextSource
from covercal.selectors.registry import SELECTORS
from storage.artifacts import ArtifactStore
from storage.manifest import Outcome, Ref
from storage.tables import read_table
from tasks.cached import Build
from tasks.capture import capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.pool import make_pool
from tasks.select import ORDER, chosen_samples, extent, gains, order_samples, selection_inputs
from tasks.thresholds import coverage_matrix, find_outliers
from tests import tiny

SAMPLES = 24
ANY_POOL, ANY_OUTLIERS = Ref("pool", "1" * 64), Ref("outliers", "2" * 64)


@dataclass
class World:
    """A pool of a tiny model and its statistics, in a store."""

    store: ArtifactStore
    pool: Ref
    statistics: tuple[Ref, ...]

    def outliers(self, k: float) -> Ref:
        inputs = {"statistics": self.statistics, "rule": "sigma", "k": k, "weighting": "full"}
        return find_outliers.run(self.store, "outliers", inputs).ref

    def coverage(self, k: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        return coverage_matrix(self.store, self.outliers(k))

    def select(self, selector: str, *, k: float = 4.0, budget: int = 4, seed: int = 0) -> Outcome:
        inputs = selection_inputs(selector, self.pool, self.outliers(k), budget, SAMPLES, seed)
        return order_samples.run(self.store, "selection", inputs)

    def chosen(self, selector: str, budget: int, **settings: Any) -> list[int]:
        made = self.select(selector, budget=budget, **settings)
        return chosen_samples(self.store, made.ref, budget).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = tmp_path_factory.mktemp("files")
    tiny.recipe_value(files)
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    model = identify_model(Model(source=str(files / "model")), store)
    source = identify_text(TextSource(path=str(files / "pool.jsonl"), domain="domain"), store)
    wanted = {"lengths": (16,), "packing": "join", "samples": SAMPLES, "seed": 0}
    texts = {"sources": (source,), "tokenizer": TokenizerIdentity(model), "imported": None}
    pool = make_pool.run(store, "pool", texts | wanted).ref
    settings = {"sites": "linear_inputs", "skip_tokens": 1, "dtype": "float32", "device": "cpu"}
    inputs = {"model": model, "imported": None, "pool": pool} | settings
    shards = pool_shards(store, pool, 8)
    refs = [capture_shard.run(store, "statistics", {**inputs, "shard": shard}).ref for shard in shards]
    return World(store, pool, tuple(refs))


def request_key(selector: str, **changed: Any) -> str:
    inputs = {"pool": ANY_POOL, "outliers": ANY_OUTLIERS, "budget": 4, "samples": 512, "seed": 0} | changed
    return order_samples.request(selection_inputs(selector, **inputs)).key


# --- extent --------------------------------------------------------------------------------------------------------

_pools = st.integers(1, 10**6).flatmap(lambda samples: st.tuples(st.integers(1, samples), st.just(samples)))


@given(_pools)
def test_an_order_serves_its_budget_and_never_exceeds_the_pool(sizes: tuple[int, int]) -> None:
    budget, samples = sizes
    assert budget <= extent(budget, samples) <= samples


@given(st.integers(1, 10**6), st.integers(1, 1024), st.integers(1, 1024))
def test_one_order_serves_all_budgets_up_to_1024(samples: int, first: int, second: int) -> None:
    assert extent(first, samples) == extent(second, samples)


@given(st.integers(1025, 10**6))
def test_a_large_budget_is_served_by_the_next_power_of_two(budget: int) -> None:
    wanted = extent(budget, 10**9)
    assert wanted & (wanted - 1) == 0
    assert budget <= wanted < 2 * budget


@given(_pools)
def test_an_order_of_its_own_extent_is_not_extended_again(sizes: tuple[int, int]) -> None:
    wanted = extent(*sizes)
    assert extent(wanted, sizes[1]) == wanted


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_budgets_share_one_order(selector: str) -> None:
    assert len({request_key(selector, budget=budget) for budget in (1, 4, 100, 512)}) == 1


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_another_pool_has_another_order(selector: str) -> None:
    assert request_key(selector) != request_key(selector, pool=Ref("pool", "9" * 64))


def test_the_seed_changes_the_key_of_a_random_order() -> None:
    assert len({request_key("random", seed=seed) for seed in range(5)}) == 5


def test_the_seed_does_not_change_the_key_of_a_coverage_order() -> None:
    assert len({request_key("coverage", seed=seed) for seed in range(5)}) == 1


def test_other_outliers_change_the_key_of_a_coverage_order_and_not_of_a_random_one() -> None:
    other = Ref("outliers", "9" * 64)
    assert request_key("coverage") != request_key("coverage", outliers=other)
    assert request_key("random") == request_key("random", outliers=other)


def test_a_random_order_reads_no_outliers(world: World) -> None:
    manifest = world.store.manifest(world.select("random").ref)
    assert manifest.inputs == [asdict(world.pool)]
    assert manifest.material["outliers"] is None


def test_a_coverage_order_lists_pool_and_outliers_as_its_inputs(world: World) -> None:
    manifest = world.store.manifest(world.select("coverage").ref)
    assert manifest.inputs == [asdict(world.pool), asdict(world.outliers(4.0))]
    assert manifest.material["selection.seed"] is None


# --- orders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_a_budget_chooses_a_prefix_of_what_a_larger_one_does(world: World, selector: str) -> None:
    orders = [world.chosen(selector, budget) for budget in range(1, SAMPLES + 1)]
    assert all(longer[:-1] == shorter for shorter, longer in pairwise(orders))


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_the_whole_pool_is_chosen_once_by_the_largest_budget(world: World, selector: str) -> None:
    assert sorted(world.chosen(selector, SAMPLES)) == list(range(SAMPLES))


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_two_runs_make_the_same_bytes(world: World, tmp_path: Path, selector: str) -> None:
    inputs = selection_inputs(selector, world.pool, world.outliers(4.0), 4, SAMPLES, 3)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        order_samples.build(Build(folder, world.store, "selection", tmp_path / "work"), **inputs)
    assert (first / ORDER).read_bytes() == (second / ORDER).read_bytes()


def test_every_seed_gives_another_random_order(world: World) -> None:
    assert len({tuple(world.chosen("random", SAMPLES, seed=seed)) for seed in range(5)}) == 5


def test_every_chosen_sample_gains_the_most_of_those_that_are_left(world: World) -> None:
    coverage, weights = world.coverage(4.0)
    chosen = world.chosen("coverage", SAMPLES)
    table = read_table(world.store.path(world.select("coverage").ref) / ORDER).to_pydict()
    uncovered = np.ones(weights.size, dtype=bool)
    first_round = [sample for sample, number in zip(chosen, table["round"], strict=True) if number == 0]
    assert len(first_round) > 2
    left = set(range(SAMPLES))
    for sample, gain in zip(first_round, table["gain"], strict=False):
        possible = {other: weights[coverage[other] & uncovered].sum() for other in left}
        assert gain == pytest.approx(possible[sample], rel=1e-12)
        assert gain == pytest.approx(max(possible.values()), rel=1e-12)
        uncovered &= ~coverage[sample]
        left.remove(sample)


def test_the_gains_of_the_first_round_are_the_whole_weight(world: World) -> None:
    _, weights = world.coverage(4.0)
    ref = world.select("coverage").ref
    rounds = read_table(world.store.path(ref) / ORDER)["round"].to_pylist()
    first = rounds.count(0)
    assert first < SAMPLES
    assert sum(value for value in gains(world.store, ref, first) if value) == pytest.approx(weights.sum(), rel=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_coverage_comes_as_near_to_the_best_choice_as_greedy_must(world: World, budget: int) -> None:
    coverage, weights = world.coverage(4.0)

    def covered(chosen: Sequence[int]) -> float:
        return float(weights[coverage[list(chosen)].any(axis=0)].sum())

    best = max(covered(chosen) for chosen in combinations(range(SAMPLES), budget))
    share = 1 - (1 - 1 / budget) ** budget  # Nemhauser, Wolsey and Fisher 1978
    assert share * best <= covered(world.chosen("coverage", budget)) * (1 + 1e-12)


def test_a_random_order_has_no_gains(world: World) -> None:
    assert gains(world.store, world.select("random").ref, 4) == [None] * 4


def test_without_any_outlier_channel_coverage_still_orders_the_whole_pool(world: World) -> None:
    coverage, weights = world.coverage(1e6)
    assert coverage.shape == (SAMPLES, 0)
    assert weights.shape == (0,)
    assert sorted(world.chosen("coverage", SAMPLES, k=1e6)) == list(range(SAMPLES))
    assert gains(world.store, world.select("coverage", k=1e6).ref, SAMPLES) == [0.0] * SAMPLES
