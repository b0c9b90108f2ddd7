"""The pool's Gram matrices as artifacts: what they hold, how they grow and go on, and what runs of a recipe reuse."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor, nn

import covercal.calibration
import covercal.pool_gram
import tasks.gram
from covercal.activations import scale_from_peaks
from covercal.calibration import IN_MEMORY
from covercal.decoder import Decoder, Site, load_decoder, token_tensor
from covercal.errors import InputError
from covercal.pool_gram import PoolSite, sum_pool, symmetric
from covercal.quantization_settings import Quantization
from covercal.quantizers.grid import GridSettings, min_max_grid
from covercal.recipe import Model, TextSource, parse_recipe
from flows.chain import Chain, run_chain
from flows.execution import Direct, Event, Planned, Recorder
from flows.inputs import identify
from storage.artifacts import CONTINUED, ArtifactStore
from storage.errors import MissingArtifactError
from storage.manifest import MANIFEST, Decision, Outcome, Ref
from tasks.cached import Build, Step
from tasks.capture import Shard, capture_shard, pool_shards
from tasks.gram import CachedGram, CachedPool, held_out_shards, sum_gram
from tasks.identities import ModelIdentity, TokenizerIdentity, identify_model, identify_text
from tasks.pool import make_pool, sample_tokens
from tasks.quantize import NO_POOL, quantize_model
from tests import tiny
from tests.covercal.rounding import RoundingSettings, gptq

SHARD_SAMPLES = 6  # of 16: the last shard is shorter
CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]


@dataclass
class World:
    """A tiny model, the model loaded beside it, and a pool in a store of a test's own."""

    files: Path
    store: ArtifactStore
    model: ModelIdentity
    decoder: Decoder
    pool: Ref

    def shards(self) -> tuple[Shard, ...]:
        return pool_shards(self.store, self.pool, SHARD_SAMPLES)

    def tokens(self, *shards: Shard) -> list[npt.NDArray[np.int32]]:
        samples = sample_tokens(self.store, self.pool)
        return [sample for shard in shards for sample in samples[shard.start : shard.stop]]

    @property
    def place(self) -> dict[str, Any]:
        return {"model": self.model, "imported": None, "pool": self.pool, "dtype": "float32", "device": "cpu"}

    def gram(self, shards: tuple[Shard, ...], *, weight: str = "token", spread: bool = False) -> Outcome:
        return sum_gram.run(self.store, "gram", {**self.place, "shards": shards, "weight": weight, "spread": spread})

    def statistics(self, skip_tokens: int = 1) -> tuple[Ref, ...]:
        common = {**self.place, "sites": "linear_inputs", "skip_tokens": skip_tokens}
        return tuple(
            capture_shard.run(self.store, "statistics", {**common, "shard": shard}).ref for shard in self.shards()
        )

    def cached(self, fields: Mapping[str, Any], **parts: Any) -> CachedPool:
        given = {"gram": None, "held_out": None, "statistics_refs": ()} | parts
        return CachedPool(self.store, settings=Quantization(**fields), device=CPU, **given)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.recipe_value(folder)
    return folder


def make_world(files: Path, folder: Path) -> World:
    store = ArtifactStore(folder).prepare()
    model = identify_model(Model(source=str(files / "model")), store)
    pool = make_pool.run(
        store,
        "pool",
        {
            "sources": (identify_text(TextSource(path=str(files / "pool.jsonl"), domain="domain"), store),),
            "tokenizer": TokenizerIdentity(model),
            "imported": None,
            "lengths": (16, 24),
            "packing": "join",
            "samples": 16,
            "seed": 0,
        },
    ).ref
    return World(files, store, model, load_decoder(files / "model", "float32", CPU), pool)


@pytest.fixture(scope="module")
def world(files: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose artifacts tests share."""
    return make_world(files, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fresh(files: Path, tmp_path: Path) -> World:
    """A world with nothing but the pool."""
    return make_world(files, tmp_path / "fresh")


def inputs_of(world: World, samples: list[npt.NDArray[np.int32]], skipped: int = 0) -> dict[Site, list[Floats]]:
    """Return what every site reads of each sample in the model's own forward pass, (tokens, channels)."""
    seen: dict[Site, list[Floats]] = {site: [] for site in world.decoder.sites}

    def note(site: Site) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[site].append(args[0].reshape(-1, site.channels)[skipped:].double().numpy())

        return before

    hooks = [world.decoder.linear(s, s.linears[0]).register_forward_pre_hook(note(s)) for s in seen]
    with torch.inference_mode():
        for sample in samples:
            world.decoder.model(input_ids=token_tensor([sample], CPU), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def mean_gram(inputs: list[Floats]) -> Floats:
    return sum(x.T @ x for x in inputs) / sum(map(len, inputs))


def files_of(world: World, ref: Ref) -> dict[str, bytes]:
    folder = world.store.path(ref)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def counted_sequences(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the sequences of every pass through a block while this is open."""
    counts: list[int] = []
    run = covercal.calibration.run_block

    def counting(block: nn.Module, hidden: Tensor, arguments: Any) -> Tensor:
        counts.append(len(hidden))
        return run(block, hidden, arguments)

    with monkeypatch.context() as patched:
        patched.setattr(covercal.calibration, "run_block", counting)
        yield counts


PASSES = tiny.BLOCKS  # every block runs once


# --- what is stored ------------------------------------------------------------------------------------------------


def test_every_site_of_an_artifact_is_the_mean_over_the_pools_tokens(world: World) -> None:
    cached = CachedGram(world.store, world.gram(world.shards()).ref)
    for site, inputs in inputs_of(world, world.tokens(*world.shards())).items():
        kept = cached.pool_site(site)
        gram = symmetric(kept.gram, site.channels, torch.float64, CPU).numpy()
        expected = mean_gram(inputs)
        np.testing.assert_allclose(gram, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(kept.magnitude, np.abs(np.concatenate(inputs)).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(kept.peak, np.abs(np.concatenate(inputs)).max(axis=0), rtol=1e-5)
        assert (kept.sequences, kept.tokens) == (16, sum(map(len, inputs)))


@pytest.mark.parametrize("spread", [False, True])
def test_an_artifact_is_read_back_to_the_bit(world: World, spread: bool) -> None:
    shards = world.shards()
    cached = CachedGram(world.store, world.gram(shards, spread=spread).ref)
    blocks = sum_pool(
        world.decoder,
        [world.tokens(shard) for shard in shards],
        lambda _: None,
        by_sequence=False,
        spread=spread,
        memory=IN_MEMORY,
    )
    for block in blocks:
        for site in world.decoder.block_sites(block.index):
            found, expected = cached.pool_site(site), block.sites[site.order]
            assert_equal_sites(found, expected)


def assert_equal_sites(found: PoolSite, expected: PoolSite) -> None:
    for name in ("gram", "magnitude", "peak"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)
    for name in ("weight", "mean_square", "concentration", "sequences", "tokens"):
        assert getattr(found, name) == getattr(expected, name)


def test_the_artifact_notes_its_shards_and_sites(world: World) -> None:
    info = world.store.claim("gram", world.gram(world.shards()).ref.key).manifest.info
    assert (info["shards"], info["sites"]) == (3, 4 * tiny.BLOCKS)


def test_weighing_sequences_is_another_artifact(world: World) -> None:
    plain, other = world.gram(world.shards()), world.gram(world.shards(), weight="sequence")
    assert plain.ref.key != other.ref.key
    site = world.decoder.sites[0]
    inputs = inputs_of(world, world.tokens(*world.shards()))[site]
    expected = sum(x.T @ x / len(x) for x in inputs) / len(inputs)
    kept = CachedGram(world.store, other.ref).pool_site(site)
    gram = symmetric(kept.gram, site.channels, torch.float64, CPU).numpy()
    np.testing.assert_allclose(gram, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())


# --- growing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_pool_that_grew_has_the_bytes_of_one_that_was_summed_at_once(
    world: World, fresh: World, earlier: int
) -> None:
    shards = fresh.shards()
    fresh.gram(shards[:earlier])
    grown = fresh.gram(shards)
    assert fresh.store.claim("gram", grown.ref.key).manifest.info["added_to"] == earlier
    assert files_of(fresh, grown.ref) == files_of(world, world.gram(shards).ref)


def test_only_the_new_shards_sequences_run(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = fresh.shards()
    with counted_sequences(monkeypatch) as first:
        fresh.gram(shards[:2])
    with counted_sequences(monkeypatch) as second:
        fresh.gram(shards)
    assert sum(first) == 12 * PASSES
    assert sum(second) == 4 * PASSES


def test_the_longest_earlier_sum_is_gone_on_from(fresh: World) -> None:
    shards = fresh.shards()
    for count in (1, 2):
        fresh.gram(shards[:count])
    assert fresh.store.claim("gram", fresh.gram(shards).ref.key).manifest.info["added_to"] == 2


def test_a_sum_of_other_shards_is_not_gone_on_from(fresh: World) -> None:
    shards = fresh.shards()
    fresh.gram(shards[1:2])
    assert fresh.store.claim("gram", fresh.gram(shards).ref.key).manifest.info["added_to"] == 0


def test_a_sum_with_other_weights_is_not_gone_on_from(fresh: World) -> None:
    shards = fresh.shards()
    fresh.gram(shards[:2], weight="sequence")
    assert fresh.store.claim("gram", fresh.gram(shards).ref.key).manifest.info["added_to"] == 0


def test_a_sum_that_is_there_is_not_made_again(world: World) -> None:
    world.gram(world.shards())
    assert world.gram(world.shards()).decision is Decision.HIT


# --- going on after an interruption --------------------------------------------------------------------------------


class InterruptedPassError(Exception):
    """Stands for a killed process."""


def run_interrupted(world: World, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum the pool, and end with an error when so many blocks were given."""

    def cut_short(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, block in enumerate(sum_pool(*args, **kwargs)):
            if number == blocks:
                raise InterruptedPassError
            yield block

    with monkeypatch.context() as patched:
        patched.setattr(covercal.pool_gram, "sum_pool", cut_short)
        with pytest.raises(InterruptedPassError):
            world.gram(world.shards())


@pytest.mark.parametrize("finished", range(1, tiny.BLOCKS))
def test_a_sum_that_was_cut_short_goes_on_and_has_the_same_bytes(
    world: World, fresh: World, finished: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.gram, "LEAVING_SECONDS", 0.0)
    run_interrupted(fresh, finished, monkeypatch)
    with counted_sequences(monkeypatch) as counts:
        whole = fresh.gram(fresh.shards())
    assert sum(counts) == 16 * (PASSES - finished)
    info = fresh.store.claim("gram", whole.ref.key).manifest.info
    assert info[CONTINUED] == f"block {finished + 1} of {tiny.BLOCKS}"
    assert files_of(fresh, whole.ref) == files_of(world, world.gram(world.shards()).ref)


def test_a_sum_that_was_cut_short_while_it_grew_goes_on_and_has_the_same_bytes(
    world: World, fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.gram, "LEAVING_SECONDS", 0.0)
    fresh.gram(fresh.shards()[:1])
    run_interrupted(fresh, 2, monkeypatch)
    whole = fresh.gram(fresh.shards())
    info = fresh.store.claim("gram", whole.ref.key).manifest.info
    assert (info[CONTINUED], info["added_to"]) == ("block 3 of 3", 1)
    assert files_of(fresh, whole.ref) == files_of(world, world.gram(world.shards()).ref)


def test_a_sum_cut_short_before_hidden_states_were_kept_begins_again(
    world: World, fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.gram, "LEAVING_SECONDS", 3600.0)
    run_interrupted(fresh, 2, monkeypatch)
    whole = fresh.gram(fresh.shards())
    assert CONTINUED not in fresh.store.claim("gram", whole.ref.key).manifest.info
    assert files_of(fresh, whole.ref) == files_of(world, world.gram(world.shards()).ref)


def test_a_damaged_part_is_done_again(world: World, fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.gram, "LEAVING_SECONDS", 0.0)
    run_interrupted(fresh, 2, monkeypatch)
    (damaged,) = fresh.store.root.rglob("block-00001/leaving.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\1")
    whole = fresh.gram(fresh.shards())
    assert fresh.store.claim("gram", whole.ref.key).manifest.info[CONTINUED] == "block 2 of 3"
    assert files_of(fresh, whole.ref) == files_of(world, world.gram(world.shards()).ref)


@pytest.mark.parametrize("step", [sum_gram, quantize_model], ids=lambda step: step.stage)
def test_a_block_is_not_kept_when_the_model_has_changed(world: World, tmp_path: Path, step: Step) -> None:
    checks = iter([True, False])

    def check() -> None:
        if not next(checks):
            raise InputError("The model was changed.")

    given: dict[str, Any] = {"shards": world.shards(), "weight": "token", "spread": False}
    if step is quantize_model:
        settings = Quantization(method="rtn", bits=4, group_size=16, storage_dtype="float32")
        given = {"calibration": None, "cached_pool": NO_POOL, "blocks": (), "quantization": settings}
    build = Build(tmp_path / "artifact", world.store, step.stage, tmp_path / "work", check)
    with pytest.raises(InputError, match="was changed"):
        step.build(build, **world.place, **given)
    assert [path.name for path in (tmp_path / "work").glob("block-*")] == ["block-00000"]


# --- what quantisation reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_last_quarter_of_the_shards_validates(count: int, expected: int) -> None:
    shards = tuple(Shard(start, start + 1, str(start)) for start in range(count))
    assert held_out_shards(shards) == (shards[-expected:] if expected else ())


def test_the_pools_gram_matrix_is_that_of_all_its_tokens(world: World) -> None:
    pool = world.cached({"method": "cached"}, gram=world.gram(world.shards()).ref)
    for site, inputs in inputs_of(world, world.tokens(*world.shards())).items():
        found, expected = pool.statistics(site), mean_gram(inputs)
        assert found.gram is not None
        assert found.gram.dtype == torch.float64
        np.testing.assert_allclose(found.gram, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())
        assert (found.validation, found.training, found.pool_energy) == (None, None, None)
        assert found.tokens == sum(map(len, inputs))


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_held_out_shards_are_apart_from_those_that_train(world: World, weight: str) -> None:
    shards = world.shards()
    held_out = held_out_shards(shards)
    pool = world.cached(
        {"method": "cached", "shrinkage": "validated"},
        gram=world.gram(shards, weight=weight).ref,
        held_out=world.gram(held_out, weight=weight).ref,
    )
    validation = inputs_of(world, world.tokens(*held_out))
    training = inputs_of(world, world.tokens(*shards[: -len(held_out)]))
    for site in world.decoder.sites:
        found = pool.statistics(site)
        for part, inputs in ((found.validation, validation[site]), (found.training, training[site])):
            shares = [len(x) if weight == "token" else 1.0 for x in inputs]
            expected = np.average([x.T @ x / len(x) for x in inputs], axis=0, weights=shares)
            np.testing.assert_allclose(part, expected, rtol=5e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_the_pools_ledoit_wolf_share_is_that_of_all_its_sequences(world: World, weight: str) -> None:
    pool = world.cached({"method": "cached"}, gram=world.gram(world.shards(), weight=weight, spread=True).ref)
    for site, inputs in inputs_of(world, world.tokens(*world.shards())).items():
        shares = np.array([float(len(x)) if weight == "token" else 1.0 for x in inputs])
        shares /= shares.sum()
        off = ~np.eye(site.channels, dtype=bool)
        own = np.stack([(x.T @ x / len(x))[off] for x in inputs])
        mean = shares @ own
        variance = (shares @ np.square(own - mean)).sum() * np.square(shares).sum() / (1 - np.square(shares).sum())
        expected = min(variance / np.square(mean).sum(), 1.0)
        assert pool.statistics(site).ledoit_wolf == pytest.approx(expected, rel=1e-3)


def test_a_pool_whose_spread_was_not_measured_has_no_ledoit_wolf_share(world: World) -> None:
    pool = world.cached({"method": "cached"}, gram=world.gram(world.shards()).ref)
    assert np.isnan(pool.statistics(world.decoder.sites[0]).ledoit_wolf)


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_the_pools_energy_is_the_mean_square_of_each_sites_own_channels(world: World, skipped: int) -> None:
    fields = {"gram": "blend", "shrinkage": {"strength": 0.3, "towards": "pool"}}
    pool = world.cached(fields, gram=world.gram(world.shards()).ref, statistics_refs=world.statistics(skipped))
    for site, inputs in inputs_of(world, world.tokens(*world.shards()), skipped).items():
        energy = pool.statistics(site).pool_energy
        np.testing.assert_allclose(energy, np.square(np.concatenate(inputs)).mean(axis=0), rtol=1e-5)


def test_without_gram_matrices_the_pool_tells_only_its_energy(world: World) -> None:
    pool = world.cached({"shrinkage": {"strength": 0.3, "towards": "pool"}}, statistics_refs=world.statistics())
    found = pool.statistics(world.decoder.sites[2])
    assert found.gram is None
    assert found.pool_energy is not None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ranges", ["min_max", "percentile", "mse"])
def test_a_static_step_comes_from_the_peaks_of_the_sites_own_channels(world: World, ranges: str, scaled: bool) -> None:
    fields = {"method": "w8a8_static", "activations": {"source": "statistics", "ranges": ranges, "percentile": 90}}
    pool = world.cached(fields, statistics_refs=world.statistics())
    samples = world.tokens(*world.shards())
    for site, inputs in inputs_of(world, samples, 1).items():
        scale = torch.randn(site.channels, generator=torch.Generator().manual_seed(site.order)).double().exp()
        by = scale.numpy() if scaled else np.ones(site.channels)
        peak = torch.from_numpy(np.stack([np.abs(x / by).max(axis=0) for x in inputs]))
        energy = float(np.square(np.concatenate(inputs) / by).mean())
        tokens = sum(map(len, inputs)) // len(samples)
        expected = scale_from_peaks(peak, energy, tokens, pool.settings.activations)
        assert pool.input_scale(site, scale if scaled else None) == pytest.approx(expected, rel=1e-5)


# --- recipes -------------------------------------------------------------------------------------------------------

CACHED = {"method": "cached", "bits": 4, "group_size": 16, "storage_dtype": "float32"}


def run(files: Path, store: ArtifactStore, planned: bool = False, **quantization: Any) -> tuple[Chain, list[Event]]:
    """Run, or plan, a small recipe without evaluation."""
    value = tiny.recipe_value(files) | {"quantization": {**CACHED, **quantization}}
    value["evaluation"] = {"divergence": []}
    recipe = parse_recipe(value, files)
    recorder = Recorder()
    execution = Planned(store, recorder) if planned else Direct(store, recorder)
    return run_chain(recipe, identify(recipe, store), execution), recorder.events


def decisions(events: list[Event]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for event in events:
        found.setdefault(event.label, []).append(str(event.decision))
    return found


@pytest.fixture(scope="module")
def after_cached(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, Chain, list[Event]]:
    """A store in which a cached recipe was run, and what that run did."""
    store = ArtifactStore(tmp_path_factory.mktemp("run")).prepare()
    return store, *run(files, store)


def test_a_cached_recipe_sums_the_pool_and_quantises_every_block_by_itself(after_cached: Any) -> None:
    found = decisions(after_cached[2])
    assert found["gram"] == ["built"]
    assert found["blocks"] == ["built"] * tiny.BLOCKS
    assert found["checkpoint"] == ["built"]
    assert "held-out gram" not in found


def test_the_plan_of_a_cached_recipe_builds_or_waits_before_it_ran(files: Path, store: ArtifactStore) -> None:
    found = decisions(run(files, store.prepare(), planned=True)[1])
    expected = {"gram": ["build"], "blocks": ["build"] * tiny.BLOCKS, "checkpoint": ["build"]}
    assert {label: found[label] for label in expected} == expected
    assert {each for label in found if label != "pool" for each in found[label]} == {"build", "waits"}


def test_the_plan_of_a_cached_recipe_hits_everywhere_after_it_ran(files: Path, after_cached: Any) -> None:
    found = decisions(run(files, after_cached[0], planned=True)[1])
    assert {each for decision in found.values() for each in decision} == {"hit"}
    assert {"gram", "blocks", "checkpoint"} <= set(found)


def test_other_bits_read_no_text_and_run_no_sequence(
    files: Path, after_cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_sequences(monkeypatch) as counts:
        found = decisions(run(files, after_cached[0], bits=3)[1])
    assert counts == []
    assert found["blocks"] == ["built"] * tiny.BLOCKS
    assert found["checkpoint"] == ["built"]
    others = {label: each for label, each in found.items() if label not in ("blocks", "checkpoint", "nearest")}
    assert {each for decision in others.values() for each in decision} == {"hit"}
    assert {"gram", "statistics"} <= set(others)


def test_another_choice_of_samples_changes_nothing_of_a_cached_checkpoint(files: Path, after_cached: Any) -> None:
    store, chain, _ = after_cached
    value = tiny.recipe_value(files, selection={"budget": 2}) | {"quantization": CACHED, "evaluation": {}}
    value["evaluation"] = {"divergence": []}
    recipe = parse_recipe(value, files)
    other = run_chain(recipe, identify(recipe, store), Direct(store, Recorder()))
    assert other.checkpoint == chain.checkpoint


def test_the_first_site_has_the_codes_of_gptq_on_the_pools_shrunk_gram_matrix(files: Path, after_cached: Any) -> None:
    store = after_cached[0]
    chain, events = run(files, store, method="gptq", gram="pool", shrinkage=0.3)
    assert decisions(events)["gram"] == ["hit"]
    decoder = load_decoder(files / "model", "float32", CPU)
    (gram_key,) = (event.key for event in events if event.label == "gram")
    manifest = store.claim("gram", gram_key).manifest
    kept = CachedGram(store, manifest.ref).pool_site(decoder.sites[0])
    gram = symmetric(kept.gram, tiny.WIDTH, torch.float64, CPU)
    tensors = load_file(store.path(chain.checkpoint) / "model-00001-of-00004.safetensors")
    for name in decoder.sites[0].linears:
        weight = decoder.linear(decoder.sites[0], name).weight.double()
        grid = min_max_grid(weight, GridSettings(4, 16, symmetric=False, scale_dtype=torch.float32))
        expected = gptq(weight, gram, grid, RoundingSettings(0.01, activation_order=True, shrinkage=0.3)).codes
        packed = tensors[f"model.layers.0.{name}.weight_packed"]
        codes = unpack_from_int32(packed, 4, weight.shape).to(torch.int16) + 8
        assert torch.equal(codes, expected.to(torch.int16))


def test_validated_shrinkage_sums_the_held_out_shards_apart(files: Path, after_cached: Any) -> None:
    found = decisions(run(files, after_cached[0], shrinkage="validated")[1])
    assert found["gram"] == ["hit"]
    assert found["held-out gram"] == ["built"]
    assert found["blocks"] == ["built"] * tiny.BLOCKS


def test_a_blend_calibrates_and_sums_the_pool(files: Path, after_cached: Any) -> None:
    found = decisions(run(files, after_cached[0], gram={"source": "blend"})[1])
    assert found["gram"] == ["hit"]
    assert "blocks" not in found
    assert found["checkpoint"] == ["built"]


def test_the_manifest_of_every_block_lists_the_gram_matrices_it_read(after_cached: Any) -> None:
    store, _, events = after_cached
    (gram_key,) = (event.key for event in events if event.label == "gram")
    blocks = [store.claim("block", event.key).manifest for event in events if event.label == "blocks"]
    assert len(blocks) == tiny.BLOCKS
    for manifest in blocks:
        assert [each["key"] for each in manifest.inputs if each["stage"] == "gram"] == [gram_key]


def test_the_manifest_of_a_checkpoint_of_blocks_lists_them(after_cached: Any) -> None:
    store, chain, events = after_cached
    listed = [each["key"] for each in store.manifest(chain.checkpoint).inputs if each["stage"] == "block"]
    assert listed == [event.key for event in events if event.label == "blocks"]


def test_a_block_that_was_damaged_with_its_checkpoint_is_made_again_and_not_linked_again(
    files: Path, after_cached: Any, tmp_path: Path
) -> None:
    first, chain, events = after_cached
    store = ArtifactStore(shutil.copytree(first.root, tmp_path / "copy", ignore=shutil.ignore_patterns("locks")))
    block = Ref("block", next(event.key for event in events if event.label == "blocks"))
    shared = store.folder("block", block.key) / "model-00001-of-00004.safetensors"
    twin = store.folder("checkpoint", chain.checkpoint.key) / shared.name
    twin.unlink()
    twin.hardlink_to(shared)
    data = shared.read_bytes()
    with twin.open("r+b") as stream:
        stream.write(data[:-1] + bytes([data[-1] ^ 1]))
    assert store.verify("checkpoint", chain.checkpoint.key) != []
    with pytest.raises(
        MissingArtifactError, match=f"{block.short} is damaged here and was not put into the checkpoint"
    ):
        run(files, store)
    again, after = run(files, store)
    assert (decisions(after)["blocks"].count("rebuilt"), decisions(after)["checkpoint"]) == (1, ["rebuilt"])
    assert again.checkpoint == chain.checkpoint


def test_the_manifest_of_a_checkpoint_lists_the_statistics_and_gram_matrices_it_read(
    files: Path, after_cached: Any
) -> None:
    store = after_cached[0]
    chain, events = run(files, store, gram="blend", shrinkage={"strength": 0.3, "towards": "pool"})
    made = {label: [e.key for e in events if e.label == label] for label in ("gram", "statistics")}
    assert made["gram"]
    assert made["statistics"]
    for stage, keys in made.items():
        listed = [each["key"] for each in store.manifest(chain.checkpoint).inputs if each["stage"] == stage]
        assert listed == keys
