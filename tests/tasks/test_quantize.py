"""The bits of a quantised weight, against counting all that its method stores; what of a model is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from covercal.quantization_settings import Quantization
from covercal.recipe import parse_recipe
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from storage.artifacts import ArtifactStore
from tasks.quantize import average_bits
from tests import tiny

SHAPES = {"narrow": (10, 128), "wide": (6, 256)}
WEIGHTS = 10 * 128 + 6 * 256
GROUPS = WEIGHTS // 64


def bits_of(**fields: Any) -> float:
    """Return the bits of all weights together, on 3-bit grids of groups of 64."""
    settings = Quantization(**{"method": "rtn", "bits": 3, "group_size": 64, "storage_dtype": "bfloat16", **fields})
    return average_bits(settings, SHAPES) * WEIGHTS


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scale_takes_the_bits_of_its_dtype(dtype: str, number: int, symmetric: bool) -> None:
    zero = 0 if symmetric else 3
    found = bits_of(storage_dtype=dtype, symmetric=symmetric)
    assert found == pytest.approx(WEIGHTS * 3 + GROUPS * (number + zero), abs=1e-4 * WEIGHTS)


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16)])
@pytest.mark.parametrize("bits", [4, 15])
def test_salient_weights_on_a_grid_take_their_codes_places_and_two_more_numbers_a_group(
    bits: int, dtype: str, number: int
) -> None:
    salient = 0.125 * WEIGHTS
    expected = (WEIGHTS - salient) * 3 + salient * (bits + 6) + GROUPS * (number + 3 + 2 * number)
    found = bits_of(storage_dtype=dtype, salient={"share": 0.125, "bits": bits})
    assert found == pytest.approx(expected, abs=1e-4 * WEIGHTS)


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16)])
def test_salient_weights_that_are_kept_take_themselves_and_their_places_and_have_no_grid(
    dtype: str, number: int
) -> None:
    salient = 0.125 * WEIGHTS
    expected = (WEIGHTS - salient) * 3 + salient * (number + 6) + GROUPS * (number + 3)
    found = bits_of(storage_dtype=dtype, salient={"share": 0.125, "bits": 16})
    assert found == pytest.approx(expected, abs=1e-4 * WEIGHTS)


def test_without_salient_weights_their_bits_do_not_count() -> None:
    assert bits_of(salient={"share": 0.0, "bits": 16}) == bits_of(salient={"share": 0.0, "bits": 4})


SEEING = {
    "gemma3": {
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 28, "patch_size": 14},
        },
        "text_config": tiny.ARCHITECTURES["gemma3_text"],
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32},
            "patch_size": 14,
        },
        "text_config": tiny.OTHERS["qwen3_next"],
    },
    "llava": {
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 28, "patch_size": 14},
        },
        "text_config": tiny.ARCHITECTURES["llama"],
    },
}


@pytest.mark.parametrize(("kind", "whole"), [("gemma3", True), ("qwen3_5", False), ("llava", True)])
def test_of_a_model_that_reads_images_all_is_kept_or_it_is_told(kind: str, whole: bool, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **SEEING[kind])
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
    tiny.write_texts(tmp_path / "pool.jsonl", range(20))
    value = tiny.recipe_value(tmp_path, quantization={"method": "rtn"}, evaluation={"divergence": [], "layers": 0})
    recipe, store = parse_recipe(value, tmp_path), ArtifactStore(tmp_path / "store")
    chain = run_chain(recipe, identify(recipe, store), Direct(store, Recorder()), until="evaluation")
    folder, info = store.path(chain.checkpoint), store.manifest(chain.checkpoint).info
    assert (folder / "preprocessor_config.json").is_file() == whole
    assert ("only the language model" in info["left_out"]) != whole
    assert json.loads((folder / "covercal.json").read_text(encoding="utf-8"))["left_out"] == info["left_out"]


def test_it_is_told_which_linears_no_text_reads(tmp_path: Path) -> None:
    tiny.tiny_model("mamba").save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny.write_texts(tmp_path / "pool.jsonl", range(20))
    value = tiny.recipe_value(tmp_path, quantization={"method": "rtn"}, evaluation={"divergence": [], "layers": 0})
    recipe, store = parse_recipe(value, tmp_path), ArtifactStore(tmp_path / "store")
    chain = run_chain(recipe, identify(recipe, store), Direct(store, Recorder()), until="evaluation")
    assert store.manifest(chain.checkpoint).info["left_out"] == (
        f"{tiny.BLOCKS} linears of the blocks that no text reads stay as they are, "
        "backbone.layers.0.mixer.dt_proj among them."
    )
