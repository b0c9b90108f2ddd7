from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from covercal.errors import ActivationError
from covercal.recipe import Model, TextSource
from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Outcome, Ref
from storage.tables import read_table
from tasks.capture import Shard, capture_shard, pool_shards
from tasks.identities import ModelIdentity, TokenizerIdentity, identify_model, identify_text
from tasks.losses import LOSSES, sample_losses
from tasks.pool import make_pool, sample_tokens
from tasks.progress import Progress, listening
from tests import tiny

SAMPLES = 16
SHARD_SAMPLES = 6  # the last shard is shorter


@dataclass
class World:
    """A tiny model and a pool of mixed lengths in a store."""

    files: Path
    store: ArtifactStore
    model: ModelIdentity

    def pool(self, samples: int = SAMPLES) -> Ref:
        source = TextSource(path=str(self.files / "pool.jsonl"), domain="domain")
        inputs = {
            "sources": (identify_text(source, self.store),),
            "tokenizer": TokenizerIdentity(self.model),
            "imported": None,
            "lengths": (16, 24, 9),
            "packing": "join",
            "samples": samples,
            "seed": 0,
        }
        return make_pool.run(self.store, "pool", inputs).ref

    def shards(self, samples: int = SAMPLES) -> tuple[Shard, ...]:
        return pool_shards(self.store, self.pool(samples), SHARD_SAMPLES)

    def inputs(self, shard: Shard, samples: int = SAMPLES, **changed: Any) -> dict[str, Any]:
        place = {"model": self.model, "imported": None, "dtype": "float32", "device": "cpu"}
        return {**place, "pool": self.pool(samples), "shard": shard} | changed

    def run(self, shard: Shard, samples: int = SAMPLES, **changed: Any) -> Outcome:
        return sample_losses.run(self.store, "losses", self.inputs(shard, samples, **changed))

    def losses(self, outcome: Outcome) -> npt.NDArray[np.float64]:
        column = read_table(self.store.path(outcome.ref) / LOSSES)["loss"]
        values: npt.NDArray[np.float64] = column.to_numpy()
        return values


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    files = tmp_path_factory.mktemp("files")
    tiny.recipe_value(files)
    store = ArtifactStore(tmp_path_factory.mktemp("cache"))
    return World(files, store, identify_model(Model(source=str(files / "model")), store))


@pytest.fixture(scope="module")
def expected(world: World) -> npt.NDArray[np.float64]:
    """The cross-entropy of every sample of the pool that the model itself gives in float64."""
    model = AutoModelForCausalLM.from_pretrained(world.files / "model", dtype=torch.float64)
    tokens = [torch.from_numpy(t.astype(np.int64))[None] for t in sample_tokens(world.store, world.pool())]
    assert len({ids.shape[1] for ids in tokens}) == 3
    with torch.no_grad():
        return np.array([float(model(input_ids=ids, labels=ids).loss) for ids in tokens])


# --- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_losses_of_a_shard_are_the_models_own_of_its_samples(
    world: World, expected: npt.NDArray[np.float64], place: int
) -> None:
    shard = world.shards()[place]
    found = world.losses(world.run(shard))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected[shard.start : shard.stop], rtol=1e-5)


def test_a_model_of_16_bits_is_run_in_16_bits(world: World, expected: npt.NDArray[np.float64]) -> None:
    shard = world.shards()[0]
    exact, rounded = (world.losses(world.run(shard, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert (exact != rounded).all()
    np.testing.assert_allclose(rounded, exact, rtol=0.1)


def test_the_manifest_counts_the_samples(world: World) -> None:
    assert [world.run(shard).info for shard in world.shards()] == [{"samples": 6}, {"samples": 6}, {"samples": 4}]


def test_a_loss_that_is_not_finite_is_named_by_its_sample_and_nothing_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = np.array([2.0, 3.0, np.nan, np.inf, 2.0, 1.0])
    monkeypatch.setattr("covercal.evaluation.mean_losses", lambda *arguments, **how: found)
    fresh = World(world.files, ArtifactStore(tmp_path), world.model)
    with pytest.raises(ActivationError, match="The loss of sample 8 is NaN or infinite"):
        fresh.run(fresh.shards()[1])
    assert list(fresh.store.manifests("losses")) == []


def test_progress_counts_the_samples(world: World, tmp_path: Path) -> None:
    heard: list[Progress] = []
    with listening(heard.append):
        World(world.files, ArtifactStore(tmp_path), world.model).run(world.shards()[2])
    told = [each for each in heard if each.label == "losses"]
    assert [(each.done, each.total, each.unit) for each in told] == [(done, 4, "samples") for done in range(5)]


def test_two_stores_make_the_same_bytes_of_one_shard(world: World, tmp_path: Path) -> None:
    other = World(world.files, ArtifactStore(tmp_path), world.model)
    assert other.run(world.shards()[0]).ref == world.run(world.shards()[0]).ref


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"device": "cuda"}, {"pool": Ref("pool", "f" * 64)}, {"imported": Ref("model", "f" * 64)}]
)
def test_where_a_shard_runs_and_which_pool_it_is_of_do_not_change_its_key(
    world: World, changed: dict[str, Any]
) -> None:
    inputs = world.inputs(world.shards()[0])
    assert sample_losses.request(inputs | changed).key == sample_losses.request(inputs).key


def test_model_dtype_and_tokens_are_in_the_key(world: World, tmp_path: Path) -> None:
    other = identify_model(Model(source=str(tiny.save_model(tmp_path / "other", seed=1))), world.store)
    first, second, _ = world.shards()
    wanted = [world.inputs(first, **changed) for changed in ({}, {"model": other}, {"dtype": "bfloat16"})]
    assert len({sample_losses.request(each).key for each in [*wanted, world.inputs(second)]}) == 4


def test_losses_are_no_statistics(world: World) -> None:
    inputs = world.inputs(world.shards()[0])
    measured = capture_shard.request(inputs | {"sites": "linear_inputs", "skip_tokens": 1})
    assert sample_losses.request(inputs).key != measured.key


def test_a_larger_pool_runs_only_its_new_shards(world: World, tmp_path: Path) -> None:
    fresh = World(world.files, ArtifactStore(tmp_path), world.model)
    small = [fresh.run(shard, 12).decision for shard in fresh.shards(12)]
    large = [fresh.run(shard, 24).decision for shard in fresh.shards(24)]
    assert small == [Decision.BUILT] * 2
    assert large == [Decision.HIT] * 2 + [Decision.BUILT] * 2
