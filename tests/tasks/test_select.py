from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covercal.recipe import Model, Selection, TextSource
from covercal.selectors.registry import SELECTORS, Evidence, Order
from covercal.selectors.registry import selector as named_selector
from storage.arrays import read_array, write_array
from storage.artifacts import ArtifactStore
from storage.manifest import Outcome, Ref
from storage.tables import read_table, write_table
from tasks.cached import Build
from tasks.capture import CHANNELS, ENERGY, MAGNITUDE, SKETCH, VARIANCE, capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.losses import LOSSES, sample_losses
from tasks.pool import make_pool, sample_columns
from tasks.select import ORDER, chosen_samples, extent, gains, order_samples, selection_inputs, site_energies
from tasks.thresholds import coverage_matrix, find_outliers
from tests import tiny

SAMPLES = 24
SHARD_SAMPLES = 10  # the last shard is shorter
ANY = {
    "pool": Ref("pool", "1" * 64),
    "outliers": Ref("outliers", "2" * 64),
    "statistics": (Ref("statistics", "3" * 64), Ref("statistics", "4" * 64)),
    "losses": (Ref("losses", "5" * 64), Ref("losses", "6" * 64)),
}
NESTED = sorted(name for name in SELECTORS if named_selector(name).nested)
SINGLE = sorted(set(SELECTORS) - set(NESTED))
every_selector = pytest.mark.parametrize("selector", sorted(SELECTORS))


def wanted(selector: str, budget: int = 4, seed: int = 0, samples: int = SAMPLES) -> Selection:
    """Return the selection of a recipe; `given` gets the pool backwards."""
    given = tuple(reversed(range(samples))) if selector == "given" else ()
    return Selection(selector=selector, budget=budget, seed=seed, samples=given)


@dataclass
class World:
    """A pool of a tiny model and its statistics, in a store."""

    store: ArtifactStore
    pool: Ref
    statistics: tuple[Ref, ...]
    losses: tuple[Ref, ...]

    def outliers(self, k: float = 4.0) -> Ref:
        inputs = {"statistics": self.statistics, "rule": "sigma", "k": k, "weighting": "full"}
        return find_outliers.run(self.store, "outliers", {**inputs, "lowered": (), "lowered_k": None}).ref

    def parts(self, k: float = 4.0) -> dict[str, Any]:
        parts = {"pool": self.pool, "outliers": self.outliers(k), "statistics": self.statistics}
        return {**parts, "losses": self.losses}

    def coverage(self, k: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        return coverage_matrix(self.store, self.outliers(k))

    def select(self, selector: str, *, k: float = 4.0, budget: int = 4, seed: int = 0) -> Outcome:
        inputs = selection_inputs(wanted(selector, budget, seed), SAMPLES, **self.parts(k))
        return order_samples.run(self.store, "selection", inputs)

    def columns(self, refs: tuple[Ref, ...], name: str) -> npt.NDArray[Any]:
        """Return an array of the statistics over all samples."""
        return np.concatenate([read_array(self.store.path(ref) / name) for ref in refs])

    def all_losses(self) -> npt.NDArray[np.float64]:
        return np.concatenate([read_table(self.store.path(ref) / LOSSES)["loss"].to_numpy() for ref in self.losses])

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
    settings = {"lengths": (16, 24), "packing": "join", "samples": SAMPLES, "seed": 0}
    texts = {"sources": (source,), "tokenizer": TokenizerIdentity(model), "imported": None}
    pool = make_pool.run(store, "pool", texts | settings).ref
    place = {"model": model, "imported": None, "pool": pool, "dtype": "float32", "device": "cpu"}
    shards = pool_shards(store, pool, SHARD_SAMPLES)
    measured = {"sites": "linear_inputs", "skip_tokens": 1}
    refs = [capture_shard.run(store, "statistics", {**place, **measured, "shard": shard}).ref for shard in shards]
    losses = [sample_losses.run(store, "losses", {**place, "shard": shard}).ref for shard in shards]
    return World(store, pool, tuple(refs), tuple(losses))


def request_key(selector: str, budget: int = 4, seed: int = 0, **changed: Any) -> str:
    inputs = selection_inputs(wanted(selector, budget, seed, 512), 512, **(ANY | changed))
    return order_samples.request(inputs).key


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


@pytest.mark.parametrize("selector", NESTED)
def test_budgets_share_one_order(selector: str) -> None:
    assert len({request_key(selector, budget) for budget in (1, 4, 100, 512)}) == 1


@pytest.mark.parametrize("selector", SINGLE)
def test_where_budgets_are_no_prefixes_each_has_an_order_of_its_own_extent(selector: str) -> None:
    assert len({request_key(selector, budget) for budget in (1, 4, 100, 512)}) == 4
    for budget in (1, 4, 512):
        assert selection_inputs(wanted(selector, budget), 512, **ANY)["extent"] == budget


def test_cola_chooses_anew_for_each_budget() -> None:
    assert "cola" in SINGLE


@every_selector
def test_the_seed_counts_only_where_the_order_depends_on_it(selector: str) -> None:
    keys = {request_key(selector, seed=seed) for seed in range(5)}
    assert len(keys) == (5 if named_selector(selector).seeded else 1)


@pytest.mark.parametrize("part", ["pool", "outliers", "statistics", "losses"])
@every_selector
def test_of_what_was_measured_only_what_a_selector_reads_counts(selector: str, part: str) -> None:
    here = ANY[part]
    other = Ref(part, "9" * 64) if isinstance(here, Ref) else (here[0], Ref(part, "9" * 64))
    read = part == "pool" or part in named_selector(selector).reads
    assert (request_key(selector) != request_key(selector, **{part: other})) == read


def test_the_order_of_shards_is_in_the_key() -> None:
    turned = ANY["statistics"][::-1]
    assert request_key("k_center") != request_key("k_center", statistics=turned)


def test_given_samples_are_in_the_key_and_their_number_is_the_extent() -> None:
    lists = [(3, 1, 2), (1, 2, 3), (3, 1, 2, 0), (3, 1)]
    inputs = [selection_inputs(Selection(selector="given", budget=2, samples=each), 24, **ANY) for each in lists]
    assert [each["extent"] for each in inputs] == [3, 3, 4, 2]
    assert len({order_samples.request(each).key for each in inputs}) == 4


def test_selectors_share_no_order() -> None:
    assert len({request_key(selector) for selector in SELECTORS}) == len(SELECTORS)


@every_selector
def test_the_manifest_of_an_order_lists_what_its_selector_reads(world: World, selector: str) -> None:
    manifest = world.store.manifest(world.select(selector).ref)
    reads = named_selector(selector).reads
    parts = [each for name, each in world.parts().items() if name in {"pool", *reads}]
    refs = [ref for part in parts for ref in ([part] if isinstance(part, Ref) else part)]
    assert manifest.inputs == [asdict(ref) for ref in refs]
    assert {name for name in ("outliers", "statistics", "losses") if manifest.material[name] is not None} == reads


def test_the_manifest_names_settings_as_a_recipe_does(world: World) -> None:
    material = world.store.manifest(world.select("random", seed=3).ref).material
    settings = {name: value for name, value in material.items() if name.startswith("selection.")}
    expected = {"selection.selector": "random", "selection.budget (ordered)": SAMPLES, "selection.seed": 3}
    assert settings == expected | {"selection.samples": None}


# --- orders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", NESTED)
def test_a_budget_chooses_a_prefix_of_what_a_larger_one_does(world: World, selector: str) -> None:
    orders = [world.chosen(selector, budget) for budget in range(1, SAMPLES + 1)]
    assert all(longer[:-1] == shorter for shorter, longer in pairwise(orders))


@pytest.mark.parametrize("budget", [1, 3, SAMPLES])
@every_selector
def test_a_budget_chooses_that_many_samples_of_the_pool(world: World, selector: str, budget: int) -> None:
    chosen = world.chosen(selector, budget)
    assert len(set(chosen)) == budget
    assert set(chosen) <= set(range(SAMPLES))


@pytest.mark.parametrize("selector", SINGLE)
def test_an_order_of_one_budget_holds_no_more_than_it(world: World, selector: str) -> None:
    made = world.select(selector, budget=5)
    assert made.info == {"samples": SAMPLES, "ordered": 5}
    assert read_table(world.store.path(made.ref) / ORDER).num_rows == 5


@every_selector
def test_the_whole_pool_is_chosen_once_by_the_largest_budget(world: World, selector: str) -> None:
    assert sorted(world.chosen(selector, SAMPLES)) == list(range(SAMPLES))


@every_selector
def test_two_runs_make_the_same_bytes(world: World, tmp_path: Path, selector: str) -> None:
    inputs = selection_inputs(wanted(selector, 4, 3), SAMPLES, **world.parts())
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


def test_given_samples_are_chosen_in_the_order_of_the_recipe(world: World) -> None:
    selection = Selection(selector="given", budget=3, samples=(7, 0, 23, 5))
    made = order_samples.run(world.store, "selection", selection_inputs(selection, SAMPLES, **world.parts()))
    assert chosen_samples(world.store, made.ref, 3).tolist() == [7, 0, 23]
    assert read_table(world.store.path(made.ref) / ORDER)["sample"].to_pylist() == [7, 0, 23, 5]
    assert made.info == {"samples": SAMPLES, "ordered": 4}


def test_a_given_sample_that_the_pool_does_not_have_commits_nothing(world: World) -> None:
    selection = Selection(selector="given", budget=1, samples=(SAMPLES,))
    inputs = selection_inputs(selection, SAMPLES, **world.parts())
    with pytest.raises(ValueError, match=rf"sample {SAMPLES} is given"):
        order_samples.run(world.store, "selection", inputs)
    assert world.store.look_up("selection", order_samples.request(inputs).key).manifest is None


@pytest.mark.parametrize(("selector", "sign"), [("max_perplexity", -1), ("min_perplexity", 1)])
def test_orders_by_perplexity_are_those_of_the_losses_of_all_shards(world: World, selector: str, sign: int) -> None:
    expected = np.argsort(sign * world.all_losses(), kind="stable")
    assert world.chosen(selector, SAMPLES) == expected.tolist()


# --- what a selector is given --------------------------------------------------------------------------------------


class Spy:
    """Stands in for a selector: keeps what it is given, and orders the pool backwards."""

    reads: frozenset[str] = frozenset()
    seeded = True
    nested = True
    seen: ClassVar[list[tuple[Evidence, int, int]]] = []
    gains: ClassVar[npt.NDArray[np.float64] | None] = None
    rounds: ClassVar[npt.NDArray[np.int64] | None] = None

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        self.seen.append((evidence, extent, seed))
        return Order(np.arange(evidence.samples)[::-1][:extent], self.gains, self.rounds)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    """The stand-in, registered as `spy`."""
    monkeypatch.setattr("covercal.selectors.registry.SELECTORS", {"spy": f"{__name__}:Spy"})
    for name in ("reads", "seeded", "nested", "gains", "rounds"):
        monkeypatch.setattr(Spy, name, getattr(Spy, name))  # what a test changes is put back
    monkeypatch.setattr(Spy, "seen", [])
    return Spy


def order_by_spy(world: World, folder: Path, budget: int = 4, seed: int = 0) -> Path:
    """Build the stand-in's order in a folder and return it."""
    selection = Selection.model_construct(selector="spy", budget=budget, seed=seed, samples=())
    order_samples.build(
        Build(folder, world.store, "selection", folder / "work"),
        **selection_inputs(selection, SAMPLES, **world.parts()),
    )
    return folder / ORDER


def test_a_selector_that_reads_nothing_is_given_the_pool_alone(world: World, spy: type[Spy], tmp_path: Path) -> None:
    order_by_spy(world, tmp_path)
    ((evidence, _, _),) = spy.seen
    columns = sample_columns(world.store, world.pool, "domain", "text", "length")
    assert evidence.samples == SAMPLES
    assert (evidence.domains, evidence.texts) == (columns["domain"], columns["text"])
    assert evidence.lengths is not None
    assert (evidence.lengths.dtype, evidence.lengths.tolist()) == (np.int64, columns["length"])
    assert set(evidence.lengths.tolist()) == {16, 24}
    measured = ("coverage", "weights", "variance", "magnitude", "sketch", "energies", "losses")
    assert [name for name in measured if getattr(evidence, name) is not None] == []
    assert tuple(evidence.given) == ()


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("outliers", ("coverage", "weights")),
        ("statistics", ("variance", "magnitude", "sketch", "energies")),
        ("losses", ("losses",)),
    ],
)
def test_a_selector_is_given_what_it_reads_and_no_more(
    world: World,
    spy: type[Spy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    part: str,
    names: tuple[str, ...],
) -> None:
    monkeypatch.setattr(spy, "reads", frozenset({part}))
    order_by_spy(world, tmp_path)
    ((evidence, _, _),) = spy.seen
    measured = ("coverage", "weights", "variance", "magnitude", "sketch", "energies", "losses")
    assert tuple(name for name in measured if getattr(evidence, name) is not None) == names


def test_the_evidence_is_what_was_measured_of_all_shards(
    world: World, spy: type[Spy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spy, "reads", frozenset({"outliers", "statistics", "losses"}))
    order_by_spy(world, tmp_path)
    ((evidence, _, _),) = spy.seen
    coverage, weights = world.coverage(4.0)
    np.testing.assert_array_equal(evidence.coverage.unpacked(), coverage, strict=True)
    np.testing.assert_array_equal(evidence.weights, weights, strict=True)
    np.testing.assert_array_equal(evidence.losses, world.all_losses(), strict=True)
    for name, file in (("variance", VARIANCE), ("magnitude", MAGNITUDE), ("sketch", SKETCH)):
        np.testing.assert_array_equal(getattr(evidence, name), world.columns(world.statistics, file), strict=True)
    assert evidence.energies is not None
    for _ in range(2):  # each call reads them anew
        sites = list(evidence.energies())
        assert [site.shape for site in sites] == [(SAMPLES, w) for w in (32, 32, 32, 64) * tiny.BLOCKS]
        whole = world.columns(world.statistics, ENERGY)
        np.testing.assert_array_equal(np.concatenate(sites, axis=1), whole, strict=True)


def test_extent_and_seed_reach_the_selector(
    world: World, spy: type[Spy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = [(True, True), (True, False), (False, True)]
    for index, (nested, seeded) in enumerate(settings):
        monkeypatch.setattr(spy, "nested", nested)
        monkeypatch.setattr(spy, "seeded", seeded)
        (tmp_path / str(index)).mkdir()
        order_by_spy(world, tmp_path / str(index), budget=3, seed=7)
    assert [(extent, seed) for _, extent, seed in spy.seen] == [(SAMPLES, 7), (SAMPLES, 0), (3, 7)]


def test_an_order_is_stored_with_its_ranks_and_with_gains_and_rounds_where_it_has_them(
    world: World, spy: type[Spy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spy, "nested", False)
    (tmp_path / "plain").mkdir()
    plain = read_table(order_by_spy(world, tmp_path / "plain", budget=3)).to_pydict()
    assert plain == {"rank": [0, 1, 2], "sample": [23, 22, 21]}
    monkeypatch.setattr(spy, "gains", np.array([2.5, 1.0, -0.25]))
    monkeypatch.setattr(spy, "rounds", np.array([0, 0, 1]))
    whole = read_table(order_by_spy(world, tmp_path, budget=3)).to_pydict()
    assert whole == plain | {"gain": [2.5, 1.0, -0.25], "round": [0, 0, 1]}


# --- energies by site ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_energies_come_site_by_site_over_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("storage.arrays.CHUNK_COLUMNS", chunk)  # so that sites straddle chunks
    widths, heights = (6, 11, 3), (4, 1, 7)
    energy = np.random.default_rng(0).random((sum(heights), sum(widths))).astype(np.float32)
    folders = [tmp_path / str(index) for index in range(len(heights))]
    for folder, part in zip(folders, np.split(energy, np.cumsum(heights)[:-1]), strict=True):
        folder.mkdir()
        write_array(folder / ENERGY, part)
        of_channels = np.zeros(sum(widths))
        columns = {
            "position": np.arange(sum(widths), dtype=np.int32),
            "site": np.repeat(np.arange(len(widths), dtype=np.int32), widths),
            "block": np.zeros(sum(widths), dtype=np.int32),
            "linears": np.repeat(["a", "b", "c"], widths),
            "absolute_sum": of_channels,
            "square_sum": of_channels,
            "tokens": of_channels.astype(np.int64) + part.shape[0],
        }
        write_table(folder / CHANNELS, {name: pa.array(values) for name, values in columns.items()})
    found = list(site_energies(folders))
    for site, expected in zip(found, np.split(energy, np.cumsum(widths)[:-1], axis=1), strict=True):
        np.testing.assert_array_equal(site, expected, strict=True)
