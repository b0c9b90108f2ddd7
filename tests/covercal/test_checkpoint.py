"""Checkpoints as their users read them: transformers' logits, bit for bit, and the files themselves."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from covercal.calibration import round_parameters
from covercal.checkpoint import INDEX, RECORD, CheckpointWriter, checkpoint_bytes, packed_tensors, tensor_sizes
from covercal.decoder import DTYPES, Decoder, make_decoder
from covercal.quantization import QuantizedBlock, QuantizedLinear, dequantized, quantize_blocks
from covercal.quantization_settings import Dtype, Quantization
from tests.tiny import ARCHITECTURES, BLOCKS, random_tokens, tiny_model

RECORD_VALUE = {"written by": "a test", "name": "Ünï"}
TIED = ("gemma", "gemma2", "gemma3_text", "opt")
GRIDS: list[tuple[int, int | None, bool, Dtype]] = [
    (4, 16, False, "bfloat16"),
    (3, None, False, "float16"),
    (2, 16, True, "float16"),
    (8, None, True, "bfloat16"),
    (8, 32, False, "float32"),
]


def rtn(bits: int = 4, group_size: int | None = 16, symmetric: bool = False) -> Quantization:
    return Quantization(method="rtn", bits=bits, group_size=group_size, symmetric=symmetric)


def write(
    folder: Path, decoder: Decoder, settings: Quantization, storage: Dtype = "bfloat16", samples: Any = ()
) -> list[QuantizedBlock]:
    folder.mkdir(exist_ok=True)
    blocks = list(quantize_blocks(decoder, samples, settings, storage))
    writer = CheckpointWriter(decoder, settings, storage)
    for block in blocks:
        writer.write_block(block, folder)
    writer.finish(folder, linears_of(blocks), RECORD_VALUE)
    return blocks


def linears_of(blocks: list[QuantizedBlock]) -> list[str]:
    return [linear.name for block in blocks for linear in block.linears]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_memory(decoder: Decoder, blocks: list[QuantizedBlock], storage: Dtype) -> PreTrainedModel:
    """Return the model that the checkpoint stands for: rounded weights, and dequantised linears."""
    model = copy.deepcopy(decoder.model)
    round_parameters(model, storage)
    for linear in (linear for block in blocks for linear in block.linears):
        model.get_submodule(linear.name).weight.data = dequantized(linear, torch.float32)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor([sample.tolist() for sample in random_tokens(3, 20, 9)])
    with torch.inference_mode():
        return model.eval()(input_ids=ids, use_cache=False).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_loads_bit_for_bit(
    folder: Path, decoder: Decoder, settings: Quantization, storage: Dtype, samples: Any = ()
) -> None:
    blocks = write(folder, decoder, settings, storage, samples)
    assert torch.equal(logits(load(folder)), logits(in_memory(decoder, blocks, storage)))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- read by transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "storage"), GRIDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_computes_the_logits_of_the_quantised_model(
    architecture: str, bits: int, group_size: int | None, symmetric: bool, storage: Dtype, tmp_path: Path
) -> None:
    decoder = make_decoder(tiny_model(architecture))
    assert_loads_bit_for_bit(tmp_path, decoder, rtn(bits, group_size, symmetric), storage)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_scales_below_the_smallest_normal_number_of_float16_are_read_back(activations: str, tmp_path: Path) -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.data *= 1e-3 if name.endswith("proj.weight") else 1.0
    settings = Quantization(method="rtn", bits=8, group_size=16, activations=activations)
    blocks = write(tmp_path, make_decoder(model), settings, "float16")
    loaded, kept = load(tmp_path), tensors_of(tmp_path)
    for linear in (linear for block in blocks for linear in block.linears):
        weight, scale = model.get_submodule(linear.name).weight, kept[f"{linear.name}.weight_scale"]
        read = dequantized(linear, torch.float32)
        assert 0 < float(scale.min()) <= float(scale.max()) < torch.finfo(torch.float16).tiny
        assert torch.equal(scale, linear.scale)
        assert (read - weight).norm() < 0.02 * weight.norm()
        if activations == "none":  # else it is unpacked as it is used
            assert torch.equal(loaded.get_submodule(linear.name).weight, read)


@pytest.mark.parametrize("bits", range(2, 9))
def test_transformers_computes_the_logits_of_the_quantised_model_at_every_number_of_bits(
    bits: int, tmp_path: Path
) -> None:
    assert_loads_bit_for_bit(tmp_path, make_decoder(tiny_model()), rtn(bits), "bfloat16")


def test_transformers_computes_the_logits_of_a_calibrated_model(tmp_path: Path) -> None:
    settings = Quantization(method="gptq", bits=3, group_size=16)
    assert_loads_bit_for_bit(tmp_path, make_decoder(tiny_model()), settings, "bfloat16", random_tokens(4, 24))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("group_size", [None, 4])
def test_widths_that_fill_no_whole_word_are_read_back(
    bits: int, group_size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    changed = {"hidden_size": 28, "intermediate_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", **(ARCHITECTURES["llama"] | changed | {"head_dim": 14}))
    torch.manual_seed(0)
    decoder = make_decoder(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    assert_loads_bit_for_bit(tmp_path, decoder, rtn(bits, group_size, symmetric), "bfloat16")


def test_a_model_that_computes_in_bfloat16_is_written_like_its_float32_copy(tmp_path: Path) -> None:
    narrow = tiny_model().to(torch.bfloat16)
    write(tmp_path / "narrow", make_decoder(narrow), rtn())
    write(tmp_path / "wide", make_decoder(copy.deepcopy(narrow).float()), rtn())
    assert logits_and_names(tmp_path / "narrow") == logits_and_names(tmp_path / "wide")


def logits_and_names(folder: Path) -> tuple[list[float], list[str]]:
    return logits(load(folder)).flatten().tolist(), sorted(tensors_of(folder))


def test_transformers_misses_no_weight_and_finds_none_too_many(tmp_path: Path) -> None:
    write(tmp_path, make_decoder(tiny_model("qwen2")), rtn())
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# --- the files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, make_decoder(tiny_model("qwen2")), rtn())
    return tmp_path


def test_there_is_one_shard_a_block_and_one_for_the_rest(folder: Path) -> None:
    expected = [f"model-{n:05d}-of-{BLOCKS + 1:05d}.safetensors" for n in range(1, BLOCKS + 2)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == expected


def test_the_index_says_for_every_tensor_which_file_holds_it(folder: Path) -> None:
    places = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            places |= dict.fromkeys(shard.keys(), path.name)
    assert json.loads((folder / INDEX).read_text())["weight_map"] == places


def test_no_tensor_is_in_two_files(folder: Path) -> None:
    names = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert len(names) == len(set(names))


def test_the_index_says_the_size_of_all_tensors(folder: Path) -> None:
    total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors_of(folder).values())


def test_a_shard_holds_the_weights_of_its_block_alone(folder: Path) -> None:
    names = load_file(folder / "model-00002-of-00004.safetensors")
    assert all(name.startswith("model.layers.1.") for name in names)


def test_a_quantised_linear_is_not_kept_a_second_time(folder: Path) -> None:
    names = tensors_of(folder)
    packed = [name.removesuffix("_packed") for name in names if name.endswith(".weight_packed")]
    assert len(packed) == 7 * BLOCKS
    assert not set(packed) & set(names)


def test_biases_norms_embedding_and_head_are_kept_unquantised(folder: Path) -> None:
    linears = (name for name in tensors_of(folder) if not name.rpartition(".")[2].startswith("weight_"))
    quantised = {f"{name.removesuffix('.weight_packed')}.weight" for name in tensors_of(folder) if "_packed" in name}
    assert set(linears) == set(tiny_model("qwen2").state_dict()) - quantised


@pytest.mark.parametrize("storage", DTYPES)
def test_everything_but_codes_and_shapes_has_the_storage_dtype(storage: Dtype, tmp_path: Path) -> None:
    write(tmp_path, make_decoder(tiny_model()), rtn(), storage)
    whole = ("_packed", "_zero_point", "_shape")
    assert {t.dtype for name, t in tensors_of(tmp_path).items() if not name.endswith(whole)} == {DTYPES[storage]}


@pytest.mark.parametrize("architecture", TIED)
def test_tied_weights_are_kept_once(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    write(tmp_path, make_decoder(model), rtn())
    shape = model.get_input_embeddings().weight.shape
    assert sum(tensor.shape == shape for tensor in tensors_of(tmp_path).values()) == 1


def test_weights_that_are_not_tied_are_both_kept(folder: Path) -> None:
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(tensors_of(folder))


def test_a_checkpoint_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    settings = Quantization(method="gptq", bits=4, group_size=16)
    for name in ("first", "second"):
        write(tmp_path / name, make_decoder(tiny_model()), settings, samples=random_tokens(4, 24))
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")


def test_the_record_is_kept_as_given_with_the_format(folder: Path) -> None:
    kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert kept == {**RECORD_VALUE, "format": "pack-quantized", "why_dense": ""}


def test_a_block_is_one_file_with_the_name_of_its_place(tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model())
    writer = CheckpointWriter(decoder, rtn(), "bfloat16")
    for block in quantize_blocks(decoder, [], rtn(), "bfloat16"):
        (tmp_path / str(block.index)).mkdir()
        writer.write_block(block, tmp_path / str(block.index))
        assert [p.name for p in (tmp_path / str(block.index)).iterdir()] == [writer.shard_name(block.index)]


def test_shards_that_were_written_elsewhere_by_other_writers_give_the_same_bytes(tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model("qwen2"))
    blocks = write(tmp_path / "at once", decoder, rtn())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in parts").mkdir()
    for block in reversed(blocks):
        CheckpointWriter(decoder, rtn(), "bfloat16").write_block(block, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(tmp_path / "in parts" / path.name)
    CheckpointWriter(decoder, rtn(), "bfloat16").finish(tmp_path / "in parts", linears_of(blocks), RECORD_VALUE)
    assert bytes_of(tmp_path / "in parts") == bytes_of(tmp_path / "at once")


def test_a_checkpoint_is_not_finished_without_one_of_its_shards(tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model())
    writer = CheckpointWriter(decoder, rtn(), "bfloat16")
    blocks = list(quantize_blocks(decoder, [], rtn(), "bfloat16"))
    for block in blocks[::2]:
        writer.write_block(block, tmp_path)
    with pytest.raises(FileNotFoundError, match=writer.shard_name(1)):
        writer.finish(tmp_path, linears_of(blocks), RECORD_VALUE)
    assert not (tmp_path / INDEX).exists()


def test_the_sizes_of_a_shards_tensors_are_those_of_the_tensors(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        assert tensor_sizes(path) == {name: tensor.nbytes for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", *TIED])
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "storage"), GRIDS)
def test_the_size_of_a_checkpoint_is_known_beforehand(
    architecture: str, bits: int, group_size: int | None, symmetric: bool, storage: Dtype, tmp_path: Path
) -> None:
    decoder = make_decoder(tiny_model(architecture))
    settings = rtn(bits, group_size, symmetric)
    write(tmp_path, decoder, settings, storage)
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    assert checkpoint_bytes(decoder, settings, storage) == pytest.approx(total, rel=0.03)


def test_writing_leaves_the_models_configuration_as_it_was(tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model())
    before = decoder.model.config.to_json_string()
    write(tmp_path, decoder, rtn())
    assert decoder.model.config.to_json_string() == before


# --- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_exactly_their_bits(bits: int, tmp_path: Path) -> None:
    model = tiny_model()
    write(tmp_path, make_decoder(model), rtn(bits))
    for name, tensor in tensors_of(tmp_path).items():
        if name.endswith(".weight_packed"):
            weights = model.get_submodule(name.removesuffix(".weight_packed")).weight.numel()
            assert tensor.nbytes * 8 == weights * bits


def random_linear(bits: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (12, 40), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 2**bits, (12, 5), generator=generator).to(torch.uint8)
    return QuantizedLinear("name", codes, torch.rand(12, 5, generator=generator).to(torch.bfloat16), zero)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_count_from_the_middle(bits: int) -> None:
    linear = random_linear(bits)
    packed = packed_tensors(linear, rtn(bits, 8))
    unpacked = unpack_from_int32(packed["name.weight_packed"], bits, torch.Size((12, 40)))
    assert torch.equal(unpacked.to(torch.int16) + 2 ** (bits - 1), linear.codes.to(torch.int16))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_zero_points_count_from_the_middle(bits: int) -> None:
    linear = random_linear(bits)
    packed = packed_tensors(linear, rtn(bits, 8))
    unpacked = unpack_from_int32(packed["name.weight_zero_point"], bits, torch.Size((12, 5)), packed_dim=0)
    assert torch.equal(unpacked.to(torch.int16) + 2 ** (bits - 1), linear.zero.to(torch.int16))


def test_the_lowest_bits_hold_the_first_code() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    linear = QuantizedLinear("name", codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    assert packed_tensors(linear, rtn(4, 8))["name.weight_packed"].item() & 0xFFFFFFFF == 0x87654321


def test_a_packed_linear_keeps_its_scale_and_its_shape() -> None:
    linear = random_linear(4)
    packed = packed_tensors(linear, rtn(4, 8))
    assert torch.equal(packed["name.weight_scale"], linear.scale)
    assert packed["name.weight_shape"].tolist() == [12, 40]


def test_a_symmetric_linear_has_no_zero_points() -> None:
    packed = packed_tensors(random_linear(4), rtn(4, 8, symmetric=True))
    assert set(packed) == {"name.weight_packed", "name.weight_scale", "name.weight_shape"}


# --- the configuration ---------------------------------------------------------------------------------------------


def test_the_configuration_names_the_format(folder: Path) -> None:
    value = config_of(folder)["quantization_config"]
    assert (value["quant_method"], value["format"]) == ("compressed-tensors", "pack-quantized")


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "strategy"), [(3, 16, False, "group"), (8, None, True, "channel")]
)
def test_the_configuration_describes_the_grid(
    bits: int, group_size: int | None, symmetric: bool, strategy: str, tmp_path: Path
) -> None:
    write(tmp_path, make_decoder(tiny_model()), rtn(bits, group_size, symmetric))
    (group,) = config_of(tmp_path)["quantization_config"]["config_groups"].values()
    found = {key: group["weights"].get(key) for key in ("num_bits", "group_size", "symmetric", "strategy", "type")}
    assert found == {
        "num_bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "strategy": strategy,
        "type": "int",
    }


@pytest.mark.parametrize("architecture", ["qwen2", *TIED])
def test_the_configuration_leaves_out_only_the_head(architecture: str, tmp_path: Path) -> None:
    write(tmp_path, make_decoder(tiny_model(architecture)), rtn())
    assert config_of(tmp_path)["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("storage", DTYPES)
def test_the_configuration_says_the_storage_dtype(storage: Dtype, tmp_path: Path) -> None:
    write(tmp_path, make_decoder(tiny_model()), rtn(), storage)
    assert config_of(tmp_path)["dtype"] == storage


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_configuration_names_the_architecture(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    write(tmp_path, make_decoder(model), rtn())
    assert config_of(tmp_path)["architectures"] == [type(model).__name__]
