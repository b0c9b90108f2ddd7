from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from covercal.decoder import Decoder, load_decoder
from covercal.recipe import Model, TextSource
from covercal.statistics import ActivationStatistics, capture
from storage.arrays import read_array
from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Outcome, Ref
from storage.tables import read_table
from tasks.capture import CHANNELS, ENERGY, MAGNITUDE, PEAK, SKETCH, VARIANCE, Shard, capture_shard, pool_shards
from tasks.identities import ModelIdentity, TokenizerIdentity, identify_model, identify_text
from tasks.pool import make_pool, sample_tokens
from tests import tiny

SHARD_SAMPLES = 6  # of 16: the last shard is shorter


@dataclass
class World:
    """A tiny model, a pool in a store, and the model loaded beside it."""

    files: Path
    store: ArtifactStore
    model: ModelIdentity
    decoder: Decoder

    def pool(self, samples: int = 16) -> Ref:
        source = TextSource(path=str(self.files / "pool.jsonl"), domain="domain")
        inputs = {
            "sources": (identify_text(source, self.store),),
            "tokenizer": TokenizerIdentity(self.model),
            "imported": None,
            "lengths": (16, 24),
            "packing": "join",
            "samples": samples,
            "seed": 0,
        }
        return make_pool.run(self.store, "pool", inputs).ref

    def shards(self, samples: int = 16) -> tuple[Shard, ...]:
        return pool_shards(self.store, self.pool(samples), SHARD_SAMPLES)

    def inputs(self, shard: Shard, samples: int = 16, **changed: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "imported": None,
            "pool": self.pool(samples),
            "shard": shard,
            "sites": "linear_inputs",
            "skip_tokens": 1,
            "dtype": "float32",
            "device": "cpu",
        } | changed

    def capture(self, shard: Shard, samples: int = 16, **changed: Any) -> Outcome:
        return capture_shard.run(self.store, "statistics", self.inputs(shard, samples, **changed))

    def measured(self, shard: Shard, **changed: Any) -> ActivationStatistics:
        """Return what the shard's statistics must be, from the pool's tokens."""
        tokens = sample_tokens(self.store, self.pool())[shard.start : shard.stop]
        return capture(self.decoder, tokens, ["sample"] * len(tokens), **changed)

    def columns(self, ref: Ref) -> dict[str, list[Any]]:
        return read_table(self.store.path(ref) / CHANNELS).to_pydict()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = tmp_path_factory.mktemp("files")
    tiny.recipe_value(files)
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    model = identify_model(Model(source=str(files / "model")), store)
    return World(files, store, model, load_decoder(files / "model", "float32", torch.device("cpu")))


# --- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_peak_and_energy_are_those_of_the_shards_samples(world: World, place: int) -> None:
    shard = world.shards()[place]
    folder = world.store.path(world.capture(shard).ref)
    expected = world.measured(shard)
    np.testing.assert_array_equal(read_array(folder / PEAK), expected.peak)
    np.testing.assert_array_equal(read_array(folder / ENERGY), expected.energy)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_variance_magnitude_and_sketch_are_those_of_the_shards_samples(world: World, place: int) -> None:
    shard = world.shards()[place]
    folder = world.store.path(world.capture(shard).ref)
    expected = world.measured(shard)
    np.testing.assert_array_equal(read_array(folder / VARIANCE), expected.variance, strict=True)
    np.testing.assert_array_equal(read_array(folder / MAGNITUDE), expected.magnitude, strict=True)
    np.testing.assert_array_equal(read_array(folder / SKETCH), expected.sketch, strict=True)


@pytest.mark.parametrize("settings", [{"skip_tokens": 0}, {"skip_tokens": 5}, {"sites": "block_inputs"}])
def test_sites_and_skipped_tokens_are_as_asked(world: World, settings: dict[str, Any]) -> None:
    shard = world.shards()[0]
    folder = world.store.path(world.capture(shard, **settings).ref)
    expected = world.measured(shard, **settings)
    for name, values in ((PEAK, expected.peak), (VARIANCE, expected.variance), (SKETCH, expected.sketch)):
        np.testing.assert_array_equal(read_array(folder / name), values)


def test_sums_and_token_counts_are_kept_for_every_channel(world: World) -> None:
    shard = world.shards()[1]
    columns = world.columns(world.capture(shard).ref)
    expected = world.measured(shard)
    assert columns["absolute_sum"] == expected.absolute_sum.tolist()
    assert columns["square_sum"] == expected.square_sum.tolist()
    assert set(columns["tokens"]) == {expected.tokens}


def test_tokens_are_counted_without_the_skipped_ones(world: World) -> None:
    shard = world.shards()[1]
    lengths = [tokens.size for tokens in sample_tokens(world.store, world.pool())[shard.start : shard.stop]]
    made = world.capture(shard, skip_tokens=3)
    assert made.info["tokens"] == sum(length - 3 for length in lengths)
    assert set(world.columns(made.ref)["tokens"]) == {made.info["tokens"]}


def test_the_peak_of_a_channel_is_its_highest_in_any_sample(world: World) -> None:
    ref = world.capture(world.shards()[0]).ref
    peak = read_array(world.store.path(ref) / PEAK)
    assert world.columns(ref)["peak"] == peak.max(axis=0).tolist()


def test_every_channel_says_which_site_block_and_linears_it_belongs_to(world: World) -> None:
    columns = world.columns(world.capture(world.shards()[0]).ref)
    rows = [
        (number, site.block, ", ".join(site.linears), channel)
        for number, site in enumerate(world.decoder.sites)
        for channel in range(site.channels)
    ]
    assert columns["position"] == list(range(len(rows)))
    names = ("site", "block", "linears", "channel")
    assert list(zip(*(columns[name] for name in names), strict=True)) == rows


def test_the_sites_are_those_of_the_architecture(world: World) -> None:
    columns = world.columns(world.capture(world.shards()[0]).ref)
    found = dict.fromkeys(zip(columns["block"], columns["linears"], strict=True))
    expected = [
        "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj, mlp.up_proj",
        "mlp.down_proj",
    ]
    assert list(found) == [(block, linears) for block in range(tiny.BLOCKS) for linears in expected]


def test_column_norms_are_those_of_the_weights_on_disk(world: World) -> None:
    columns = world.columns(world.capture(world.shards()[0]).ref)
    weights = load_file(world.files / "model" / "model.safetensors")
    expected = []
    for block, linears in dict.fromkeys(zip(columns["block"], columns["linears"], strict=True)):
        stacked = [weights[f"model.layers.{block}.{name}.weight"].double().numpy() for name in linears.split(", ")]
        expected.append(np.linalg.norm(np.concatenate(stacked), axis=0))
    np.testing.assert_allclose(columns["column_norm"], np.concatenate(expected), rtol=1e-6)


def test_the_manifest_counts_samples_and_channels(world: World) -> None:
    shard = world.shards()[-1]
    info = world.capture(shard).info
    assert (info["samples"], info["channels"]) == (16 - 2 * SHARD_SAMPLES, sum(s.channels for s in world.decoder.sites))


def test_two_stores_make_the_same_bytes_of_one_shard(world: World, tmp_path: Path) -> None:
    other = World(world.files, ArtifactStore(tmp_path), world.model, world.decoder)
    shard = world.shards()[0]
    assert other.capture(shard).ref == world.capture(shard).ref


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"device": "cuda"}, {"pool": Ref("pool", "f" * 64)}, {"imported": Ref("model", "f" * 64)}]
)
def test_where_a_shard_runs_and_which_pool_it_is_of_do_not_change_its_key(
    world: World, changed: dict[str, Any]
) -> None:
    inputs = world.inputs(world.shards()[0])
    assert capture_shard.request(inputs | changed).key == capture_shard.request(inputs).key


@pytest.mark.parametrize("changed", [{"sites": "block_inputs"}, {"skip_tokens": 0}, {"dtype": "bfloat16"}])
def test_what_is_measured_is_in_the_key(world: World, changed: dict[str, Any]) -> None:
    inputs = world.inputs(world.shards()[0])
    assert capture_shard.request(inputs | changed).key != capture_shard.request(inputs).key


def test_every_shard_has_a_key_of_its_own(world: World) -> None:
    keys = {capture_shard.request(world.inputs(shard)).key for shard in world.shards()}
    assert len(keys) == 3


def test_another_model_has_another_key(world: World, tmp_path: Path) -> None:
    other = identify_model(Model(source=str(tiny.save_model(tmp_path / "other", seed=1))), world.store)
    inputs = world.inputs(world.shards()[0])
    assert capture_shard.request(inputs | {"model": other}).key != capture_shard.request(inputs).key


def test_a_larger_pool_captures_only_its_new_shards(world: World, tmp_path: Path) -> None:
    fresh = World(world.files, ArtifactStore(tmp_path), world.model, world.decoder)
    small = [fresh.capture(shard, 12).decision for shard in fresh.shards(12)]
    large = [fresh.capture(shard, 24).decision for shard in fresh.shards(24)]
    assert small == [Decision.BUILT] * 2
    assert large == [Decision.HIT] * 2 + [Decision.BUILT] * 2
