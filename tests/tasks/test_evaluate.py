"""What is kept of an evaluation: scores by sequence, and comparisons that are paired by it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covercal.comparison import paired_difference
from covercal.decoder import load_decoder
from covercal.errors import EvaluationError
from covercal.recipe import load_recipe
from flows.chain import Chain, run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import Build, ByDigest
from tasks.evaluate import (
    compare_texts,
    evaluate_text,
    mean_scores,
    read_scores,
    reference_text,
    sequence_scores,
)
from tasks.pool import sample_tokens
from tests import tiny


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, Chain]:
    """A run of a tiny recipe with two random sets."""
    folder = tmp_path_factory.mktemp("evaluate")
    value = tiny.recipe_value(folder)
    value["evaluation"] |= {
        "random": 2,
        "perplexity": [{"path": value["evaluation"]["divergence"][0]["path"], "window": 32}],
    }
    (folder / "recipe.yaml").write_text(json.dumps(value))
    store = ArtifactStore(folder / "cache")
    recipe = load_recipe(folder / "recipe.yaml")
    return store, run_chain(recipe, identify(recipe, store), Direct(store, Recorder()), until="report")


def test_scores_over_a_text_are_the_means_of_its_sequences(ran: tuple[ArtifactStore, Chain]) -> None:
    store, chain = ran
    for text in chain.texts:
        for ref in (text.reference, text.nearest, text.run, *text.random):
            rows, scores = sequence_scores(store, ref), read_scores(store, ref)["all"]
            assert scores["tokens"] == rows["tokens"].sum()
            assert scores["perplexity"] == pytest.approx(math.exp(np.average(rows["loss"], weights=rows["tokens"])))
            for name in set(rows) - {"tokens"}:
                assert scores[name] == pytest.approx(rows[name].mean())
                spread = rows[name].std(ddof=1) / math.sqrt(len(rows[name]))
                assert scores[f"{name}_error"] == pytest.approx(spread)


def test_a_text_for_perplexity_alone_has_no_divergence(ran: tuple[ArtifactStore, Chain]) -> None:
    store, chain = ran
    perplexity, divergence = chain.texts
    assert set(sequence_scores(store, perplexity.run)) == {"tokens", "loss"}
    assert set(sequence_scores(store, divergence.run)) == {"tokens", "loss", "divergence", "agreement"}


def test_a_comparison_is_paired_by_sequence_and_with_the_mean_of_several(ran: tuple[ArtifactStore, Chain]) -> None:
    store, chain = ran
    text = chain.texts[1]
    found = compare_texts(store, text.run, text.random)
    mine = sequence_scores(store, text.run)["divergence"]
    one, other = (sequence_scores(store, ref)["divergence"] for ref in text.random)
    wanted = paired_difference(mine, (one + other) / 2)
    assert found["divergence"] == {name: getattr(wanted, name) for name in ("mean", "low", "high", "p_value", "test")}
    assert found["divergence"]["mean"] == pytest.approx(mine.mean() - (one.mean() + other.mean()) / 2)
    assert set(found) == {"loss", "divergence", "agreement"}


def test_a_model_beside_itself_does_not_differ(ran: tuple[ArtifactStore, Chain]) -> None:
    store, chain = ran
    found = compare_texts(store, chain.texts[1].run, [chain.texts[1].run])
    assert {(each["mean"], each["low"], each["high"], each["p_value"]) for each in found.values()} == {(0, 0, 0, 1)}


def test_the_scores_of_several_models_are_averaged_field_by_field() -> None:
    one: dict[str, Any] = {"tokens": 10, "divergence": 1.0, "divergence_error": 0.5}
    other: dict[str, Any] = {"tokens": 10, "divergence": 2.0, "divergence_error": None}
    found = mean_scores([{"all": each, "domains": {"a": each}} for each in (one, other)])
    assert found["all"] == found["domains"]["a"] == {"tokens": 10, "divergence": 1.5, "divergence_error": None}
    assert isinstance(found["all"]["tokens"], int)


def test_two_random_sets_are_two_checkpoints_of_the_same_size(ran: tuple[ArtifactStore, Chain]) -> None:
    _, chain = ran
    assert len({ref.digest for text in chain.texts for ref in (text.run, *text.random)}) == 6


@pytest.mark.parametrize("broken", ["original", "quantised"])
def test_a_model_that_gives_no_numbers_is_named_with_the_sequences(
    ran: tuple[ArtifactStore, Chain], tmp_path: Path, broken: str
) -> None:
    store, chain = ran
    text = next(each for each in chain.texts if each.kind == "divergence")
    texts = next(Ref(**each) for each in store.manifest(text.reference).inputs if each["stage"] == "texts")
    recipe = load_recipe(store.root.parent / "recipe.yaml")
    damaged = load_decoder(Path(recipe.model.source), "float32", torch.device("cpu"))
    with torch.no_grad():
        damaged.model.get_input_embeddings().weight[sample_tokens(store, texts)[1][3]] = torch.inf
    inputs: dict[str, Any] = {"model": identify(recipe, store).model, "imported": None, "texts": ByDigest(texts)}
    if broken == "original":
        step, name, inputs["keep_hidden"] = reference_text, "original_decoder", True
    else:
        step, name = evaluate_text, "checkpoint_decoder"
        inputs |= {"checkpoint": ByDigest(chain.checkpoint), "reference": text.reference}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"tasks.evaluate.{name}", lambda *arguments: damaged)
        with pytest.raises(
            EvaluationError,
            match=r"gives NaN, infinity or a loss of over 709 nats .* on \d+ of \d+ sequences .*a wider dtype",
        ):
            step.build(Build(tmp_path, store, "text", tmp_path / "work"), **inputs, dtype="float32", device="cpu")
