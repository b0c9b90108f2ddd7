"""A model that is read block by block, against the same model loaded whole."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from covercal.checkpoint import CheckpointWriter
from covercal.decoder import DTYPES, Decoder, load_decoder, replaced_forward
from covercal.errors import InputError
from covercal.experts import is_fused
from covercal.quantization import quantize_blocks
from covercal.quantization_settings import Dtype, Quantization
from tests.covercal.walks import bits_of, comparable, logits
from tests.tiny import ARCHITECTURES, BLOCKS, INNER, MIXTURES, WIDTH, random_tokens, save_model, tiny_model

CPU = torch.device("cpu")
SAMPLES = [*random_tokens(5, 18, 1), *random_tokens(3, 11, 2)]
every_model = pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
SavedModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    """Return a function that gives the folder of a tiny model, saved once."""
    place = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> Path:
        made = place / architecture
        return made if made.exists() else save_model(made, architecture)

    return folder


def both(folder: Path, dtype: Dtype = "float32") -> tuple[Decoder, Decoder]:
    """Return a model that is streamed, and the same loaded whole."""
    return load_decoder(folder, dtype, CPU, streamed=True), load_decoder(folder, dtype, CPU)


def state_bits(block: torch.nn.Module) -> dict[str, object]:
    return {name: bits_of(value) for name, value in block.state_dict().items()}


def streamed_logits(decoder: Decoder) -> Tensor:
    """Return the logits of a streamed model whose blocks are put in one by one."""
    with ExitStack() as stack:
        stack.enter_context(decoder.around(head=True))
        for index, empty in enumerate(decoder.blocks):
            stack.enter_context(replaced_forward(empty, decoder.own_block(index).forward))
        return logits(decoder.model)


# --- what is read --------------------------------------------------------------------------------------------------


@every_model
def test_a_streamed_model_has_the_sites_of_the_whole_one(architecture: str, saved: SavedModel) -> None:
    streamed, whole = both(saved(architecture))
    assert streamed.sites == whole.sites
    assert streamed.linear_shapes == whole.linear_shapes
    assert streamed.blocks_path == whole.blocks_path


@every_model
def test_a_block_that_is_read_is_that_of_the_whole_model_to_the_bit(architecture: str, saved: SavedModel) -> None:
    streamed, whole = both(saved(architecture))
    for index in range(BLOCKS):
        assert state_bits(streamed.own_block(index)) == state_bits(whole.own_block(index))


@every_model
def test_a_streamed_model_computes_the_logits_of_the_whole_one(architecture: str, saved: SavedModel) -> None:
    streamed, whole = both(saved(architecture))
    assert torch.equal(streamed_logits(streamed), logits(whole.model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_weights_are_read_in_the_dtype_that_is_asked_for(architecture: str, dtype: Dtype, saved: SavedModel) -> None:
    streamed, whole = both(saved(architecture), dtype)
    block = streamed.own_block(1)
    assert {parameter.dtype for parameter in block.parameters()} == {DTYPES[dtype]}
    assert state_bits(block) == state_bits(whole.own_block(1))
    assert torch.equal(streamed_logits(streamed), logits(whole.model))


@every_model
def test_the_models_own_blocks_stay_empty(architecture: str, saved: SavedModel) -> None:
    decoder = load_decoder(saved(architecture), "float32", CPU, streamed=True)
    for index in range(BLOCKS):
        before = dict(decoder.blocks[index].named_parameters())
        decoder.own_block(index)
        after = dict(decoder.blocks[index].named_parameters())
        assert before.keys() == after.keys()
        assert all(parameter.is_meta for parameter in after.values())


@every_model
def test_what_is_around_the_blocks_is_there_only_for_a_while(architecture: str, saved: SavedModel) -> None:
    decoder = load_decoder(saved(architecture), "float32", CPU, streamed=True)
    whole = load_decoder(saved(architecture), "float32", CPU)
    embedding, head = decoder.model.get_input_embeddings, decoder.model.get_output_embeddings
    assert embedding().weight.is_meta
    with decoder.around(head=True):
        assert torch.equal(embedding().weight, whole.model.get_input_embeddings().weight)
        assert torch.equal(head().weight, whole.model.get_output_embeddings().weight)
    assert embedding().weight.is_meta
    assert head().weight.is_meta


@pytest.mark.parametrize(("architecture", "apart"), [("llama", True), ("gemma", False)])
def test_a_head_that_is_apart_is_not_read_unless_it_is_asked_for(
    architecture: str, apart: bool, saved: SavedModel
) -> None:
    decoder = load_decoder(saved(architecture), "float32", CPU, streamed=True)
    with decoder.around():
        assert not decoder.model.get_input_embeddings().weight.is_meta
        assert decoder.model.get_output_embeddings().weight.is_meta is apart


def test_a_whole_model_has_all_around_its_blocks_all_the_time(saved: SavedModel) -> None:
    decoder = load_decoder(saved("llama"), "float32", CPU)
    with decoder.around():
        pass
    assert not any(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen3_moe"])
def test_who_reads_a_block_owns_it(architecture: str, saved: SavedModel) -> None:
    decoder = load_decoder(saved(architecture), "float32", CPU, streamed=True)
    first = decoder.own_block(0)
    expected = state_bits(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert state_bits(decoder.own_block(0)) == expected


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_of_a_block_that_is_read_are_taken_apart(architecture: str, saved: SavedModel) -> None:
    decoder = load_decoder(saved(architecture), "float32", CPU, streamed=True)
    assert not any(is_fused(module) for module in decoder.own_block(0).modules())
    assert any(is_fused(module) for module in decoder.blocks[0].modules())


def test_a_block_that_is_read_is_in_evaluation_mode_and_not_trained(saved: SavedModel) -> None:
    block = load_decoder(saved("opt"), "float32", CPU, streamed=True).own_block(0)
    assert not block.training
    assert not any(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_a_model_in_several_files_is_read_as_one_in_a_single_file(
    architecture: str, saved: SavedModel, tmp_path: Path
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > BLOCKS
    sharded, single = (load_decoder(each, "float32", CPU, streamed=True) for each in (tmp_path, saved(architecture)))
    for index in range(BLOCKS):
        assert state_bits(sharded.own_block(index)) == state_bits(single.own_block(index))
    assert torch.equal(streamed_logits(sharded), streamed_logits(single))


# --- tied weights --------------------------------------------------------------------------------------------------


def another_head(tensors: dict[str, Tensor]) -> None:
    """Give the files a head of its own beside the embedding, though the configuration ties them."""
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))


def the_same_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_a_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


TIED = {"another head": another_head, "the same head": the_same_head, "only a head": only_a_head}
every_tie = pytest.mark.parametrize("tie", TIED)


@every_tie
def test_tied_weights_are_streamed_as_they_are_loaded_whole(tie: str, saved: SavedModel, tmp_path: Path) -> None:
    streamed, whole = both(with_weights(saved("gemma"), TIED[tie], tmp_path / "model"))
    with streamed.around(head=True):
        for part in ("get_input_embeddings", "get_output_embeddings"):
            found, expected = (getattr(decoder.model, part)().weight for decoder in (streamed, whole))
            assert torch.equal(found, expected)
    assert torch.equal(streamed_logits(streamed), logits(whole.model))


@every_tie
def test_tied_weights_can_be_had_again_and_again(tie: str, saved: SavedModel, tmp_path: Path) -> None:
    streamed = load_decoder(with_weights(saved("gemma"), TIED[tie], tmp_path / "model"), "float32", CPU, streamed=True)
    first = streamed_logits(streamed)
    with streamed.around():
        pass
    assert torch.equal(streamed_logits(streamed), first)


@every_tie
def test_a_model_of_tied_weights_is_quantised_streamed_as_whole(tie: str, saved: SavedModel, tmp_path: Path) -> None:
    settings = Quantization(bits=3, group_size=16)
    found, expected = (
        comparable(list(quantize_blocks(decoder, SAMPLES, settings, "bfloat16")))
        for decoder in both(with_weights(saved("gemma"), TIED[tie], tmp_path / "model"))
    )
    assert found == expected


@every_tie
def test_a_checkpoint_of_tied_weights_has_the_same_bytes_streamed_as_whole(
    tie: str, saved: SavedModel, tmp_path: Path
) -> None:
    settings = Quantization(method="rtn", bits=4, group_size=16)
    written = []
    for number, decoder in enumerate(both(with_weights(saved("gemma"), TIED[tie], tmp_path / "model"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = CheckpointWriter(decoder, settings, "bfloat16")
        for block in quantize_blocks(decoder, [], settings, "bfloat16"):
            writer.write_block(block, folder)
        writer.finish(folder, [], {})
        written.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert written[0] == written[1]


# --- what is done with it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "coreq"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "mixtral"])
def test_a_streamed_model_is_quantised_to_the_same_bits(architecture: str, method: str, saved: SavedModel) -> None:
    settings = Quantization(method=method, bits=3, group_size=16)
    streamed, whole = (
        comparable(list(quantize_blocks(decoder, SAMPLES, settings, "bfloat16")))
        for decoder in both(saved(architecture))
    )
    assert streamed == whole


def test_a_streamed_model_is_the_same_after_it_was_quantised(saved: SavedModel) -> None:
    decoder = load_decoder(saved("llama"), "float32", CPU, streamed=True)
    before = streamed_logits(decoder)
    list(quantize_blocks(decoder, SAMPLES, Quantization(method="awq", bits=3, group_size=16), "bfloat16"))
    assert torch.equal(streamed_logits(decoder), before)


# --- what is missing -----------------------------------------------------------------------------------------------


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], object], target: Path) -> Path:
    """Return a copy of a model's folder whose weights are changed."""
    target.mkdir()
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def without(folder: Path, name: str, target: Path) -> Path:
    """Return a copy of a model's folder whose files lack one weight."""
    return with_weights(folder, lambda tensors: tensors.pop(name), target)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("architecture", "missing"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.layers.2.input_layernorm.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("opt", "model.decoder.layers.1.fc2.bias"),
        ("llama", "lm_head.weight"),
    ],
)
def test_a_weight_that_the_files_lack_is_named(
    architecture: str, missing: str, streamed: bool, saved: SavedModel, tmp_path: Path
) -> None:
    folder = without(saved(architecture), missing, tmp_path / "model")
    message = re.escape(f"The model's files lack the weight {missing}.")
    with pytest.raises(InputError, match=f"^{message}$"):
        load_decoder(folder, "float32", CPU, streamed=streamed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.up_proj.weight", (64, 32)),
        ("model.layers.2.input_layernorm.weight", (32,)),
        ("model.norm.weight", (32,)),
        ("model.embed_tokens.weight", (320, 32)),
        ("lm_head.weight", (320, 32)),
    ],
)
def test_a_weight_of_another_shape_is_named_with_both_shapes(
    name: str, shape: tuple[int, ...], saved: SavedModel, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros((3, *shape[1:]))

    folder = with_weights(saved("llama"), change, tmp_path / "model")
    message = f"The weight {name} has shape {(3, *shape[1:])} in the model's files, not {shape}."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_decoder(folder, "float32", CPU, streamed=True)


def test_what_the_files_have_beside_the_models_weights_is_left_alone(saved: SavedModel, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.layers.0.extra.weight", "model.extra.weight", f"model.layers.{BLOCKS}.mlp.up_proj.weight"):
            tensors[name] = torch.zeros(2, 2)

    folder = with_weights(saved("llama"), change, tmp_path / "model")
    decoder = load_decoder(folder, "float32", CPU, streamed=True)
    assert decoder.weights is not None
    assert len(decoder.weights.unknown) == 3
    found = streamed_logits(decoder)
    assert torch.equal(found, streamed_logits(load_decoder(saved("llama"), "float32", CPU, streamed=True)))


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("w1", "gate_up_proj of the model's files cannot be converted"),
        ("w2", f"down_proj has shape (3, {WIDTH}, {INNER}) in the model's files, not (4, {WIDTH}, {INNER})."),
    ],
)
def test_an_expert_that_the_files_lack_is_an_error(part: str, fault: str, saved: SavedModel, tmp_path: Path) -> None:
    folder = saved("mixtral")
    (missing,) = (
        name for name in load_file(folder / "model.safetensors") if "layers.1." in name and f"experts.2.{part}" in name
    )
    with pytest.raises(InputError, match=f"^{re.escape(f'The weight model.layers.1.mlp.experts.{fault}')}"):
        load_decoder(without(folder, missing, tmp_path / "model"), "float32", CPU, streamed=True)


def test_a_file_that_the_index_names_and_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        load_decoder(tmp_path, "float32", CPU, streamed=True)
