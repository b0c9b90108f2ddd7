"""Decoders of other makes: blocks that return tuples, heads that ask for more, hybrids, latent attention, experts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from covercal.block_call import run_block
from covercal.checkpoint import RECORD, check_format
from covercal.decoder import (
    Decoder,
    block_inputs,
    describe_decoder,
    final_hidden,
    head_logits,
    load_decoder,
    make_decoder,
)
from covercal.errors import InputError, QuantizationError
from covercal.quantization import dequantized, quantize_blocks
from covercal.quantization_settings import Quantization
from tests.covercal.walks import linears_of, logits, quantized_model, write_checkpoint
from tests.tiny import ARCHITECTURES, BLOCKS, EXPERTS, INNER, MIXTURES, OTHERS, WIDTH, random_tokens, tiny_model

CPU = torch.device("cpu")
SAMPLES = random_tokens(4, 18, 1)
TOKENS = torch.from_numpy(random_tokens(1, 20, 0)[0])[None].long()
RTN = Quantization(method="rtn", symmetric=True, bits=4, group_size=16)
every_other = pytest.mark.parametrize("architecture", OTHERS)


def walked(decoder: Decoder) -> torch.Tensor:
    hidden, arguments = block_inputs(decoder, TOKENS)
    for block, each in zip(decoder.blocks, arguments, strict=True):
        hidden = run_block(block, hidden, each)
    return hidden[..., : arguments[-1].width]


def left_a_block(decoder: Decoder, index: int, tokens: torch.Tensor) -> torch.Tensor:
    left: list[Any] = []
    handle = decoder.blocks[index].register_forward_hook(lambda _, __, output: left.append(output))
    final_hidden(decoder, tokens)
    handle.remove()
    return left[0][0] if isinstance(left[0], tuple | list) else left[0]


@every_other
def test_blocks_one_by_one_and_the_head_are_the_model(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    assert torch.equal(walked(decoder), left_a_block(decoder, -1, TOKENS))
    with torch.inference_mode():
        expected = decoder.model(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(head_logits(decoder, final_hidden(decoder, TOKENS)), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@every_other
def test_a_streamed_model_is_quantised_to_a_checkpoint_of_the_same_logits(
    architecture: str, symmetric: bool, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "model")
    whole = make_decoder(model)
    streamed = load_decoder(tmp_path / "model", "float32", CPU, streamed=True)
    assert streamed.sites == whole.sites
    settings = Quantization(method="coreq", bits=4, group_size=16, symmetric=symmetric)
    written = tmp_path / "checkpoint"
    _, blocks = write_checkpoint(written, streamed, SAMPLES, settings)
    expected = logits(quantized_model(whole.model, blocks, settings, "bfloat16"))
    assert not torch.allclose(expected, logits(whole.model), atol=1e-3)
    assert torch.equal(logits(load_decoder(written, "float32", CPU).model), expected)
    own = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)  # its experts are fused
    torch.testing.assert_close(logits(own.float()), expected, rtol=1e-4, atol=1e-4)  # those unpacked are bfloat16


def test_experts_that_checkpoints_keep_in_one_tensor_are_written_so_and_it_is_told(tmp_path: Path) -> None:
    model = tiny_model("granitemoe")
    model.save_pretrained(tmp_path / "original")
    writer, _ = write_checkpoint(tmp_path / "written", make_decoder(model), SAMPLES, RTN)
    assert "all experts of a layer in one tensor" in writer.why_dense
    shapes = [
        {
            name: each.shape
            for path in (tmp_path / folder).glob("*.safetensors")
            for name, each in load_file(path).items()
        }
        for folder in ("original", "written")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("architecture", "each", "form"),
    [
        ("nemotron_h", ["up_proj", "down_proj"], "pack-quantized"),  # no gate
        ("minimax_m3_vl_text", ["gate_proj", "up_proj", "down_proj"], "dense"),  # a gating of its own
        ("gpt_oss", ["gate_proj", "up_proj", "down_proj"], "dense"),  # its own gating, biases, in turns
        ("llama4_text", ["gate_proj", "up_proj", "down_proj"], "dense"),  # each is given every token, or zeros
    ],
)
def test_experts_of_other_kinds_are_quantised(architecture: str, each: list[str], form: str, tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model(architecture))
    writer, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, RTN)
    found = [name.rpartition("experts.")[2] for name in linears_of(blocks) if ".experts." in name]
    wanted = [f"{number}.{name}" for number in range(EXPERTS) for name in each]
    assert found == wanted * (len(found) // len(wanted))
    assert found
    assert writer.format == form


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_biases_that_choose_experts_are_read_and_written_as_they_are(compute: Any, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    name = "mlp.gate.e_score_correction_bias"
    expected = model.model.layers[1].state_dict()[name]
    assert not torch.equal(expected, expected.bfloat16().float())
    streamed = load_decoder(tmp_path, compute, CPU, streamed=True)
    assert torch.equal(streamed.own_block(1).state_dict()[name], expected)
    writer, _ = write_checkpoint(tmp_path / "written", streamed, SAMPLES, RTN)
    kept = load_file(tmp_path / "written" / writer.shard_name(1))
    assert torch.equal(kept[f"model.layers.1.{name}"], expected)
    assert kept["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("streamed", [True, False])
def test_weights_that_files_keep_transposed_are_quantised_as_linears_and_written_so(
    streamed: bool, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    decoder = load_decoder(tmp_path / "model", "float32", CPU, streamed=streamed)
    assert decoder.linear_shapes["transformer.h.0.attn.c_attn"] == (3 * WIDTH, WIDTH)
    assert describe_decoder(tmp_path / "model").linear_shapes == decoder.linear_shapes
    writer, blocks = write_checkpoint(tmp_path / "written", decoder, SAMPLES, RTN)
    assert writer.why_dense.startswith("files of this model keep weights (inputs, outputs)")
    kept = load_file(tmp_path / "written" / writer.shard_name(0))
    linear = linears_of(blocks)["transformer.h.0.attn.c_attn"]
    assert torch.equal(kept["transformer.h.0.attn.c_attn.weight"], dequantized(linear, torch.bfloat16).T)
    with pytest.raises(QuantizationError, match=r"type gpt2: its files keep the weights of linears transposed"):
        check_format(Quantization(method="w8a8_static"), model)


def test_gates_and_routers_stay_as_they_are() -> None:
    gated, routed = make_decoder(tiny_model("qwen2_moe")), make_decoder(tiny_model("phimoe"))
    assert not [name for name in gated.linear_shapes if name.endswith(("shared_expert_gate", ".gate"))]
    assert not [name for name in routed.linear_shapes if name.endswith("router")]


@pytest.mark.parametrize(("bits", "form"), [(4, "pack-quantized"), (2, "dense")])
def test_zero_points_that_compressed_tensors_cannot_unpack_are_kept_dense(bits: int, form: str, tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model("llama"))  # keys and values have 16 outputs: one word of 2 bits
    settings = Quantization(method="rtn", bits=bits, group_size=16)
    _, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, settings)
    assert json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["format"] == form
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert torch.equal(found, logits(quantized_model(decoder.model, blocks, settings, "bfloat16")))


_SEEING = {
    **{"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "depth": BLOCKS},
    **{"num_attention_heads": 4, "num_heads": 4, "image_size": 28, "patch_size": 14, "out_hidden_size": WIDTH},
}  # as deep as the language model: not to be taken for it
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_TWO_KINDS = {"head_dim": 16, "moe_intermediate_size": [INNER, WIDTH]} | {
    "rope_parameters": _ROTARY["rope_parameters"] | {"mrope_section": [3, 3, 2]}
}  # of experts: for text, and for images
_MISTRAL_4 = OTHERS["deepseek_v3"] | {"model_type": "mistral4", "head_dim": 16, "first_k_dense_replace": 0}
READING_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": ARCHITECTURES["gemma3_text"], "mm_tokens_per_image": 4},
    "gemma4": {"text_config": OTHERS["gemma4_text"]},
    "llava": {"text_config": ARCHITECTURES["llama"]},
    "kimi_k25": {"text_config": OTHERS["deepseek_v3"]},  # queries, keys and values of its images are one in files
    "ernie4_5_vl_moe": {"text_config": OTHERS["ernie4_5_moe"] | _TWO_KINDS},
    "mistral3": {"text_config": ARCHITECTURES["mistral"]},
    "mistral3 with experts": {"text_config": _MISTRAL_4},
    "qwen2_5_vl": {"text_config": ARCHITECTURES["llama"] | _ROTARY},
    "qwen3_vl_moe": {"text_config": MIXTURES["qwen3_moe"] | _ROTARY},
}


@pytest.mark.parametrize("symmetric", [True, False])  # packed experts, or dense ones
@pytest.mark.parametrize("kind", READING_IMAGES)
def test_what_reads_images_stays_in_the_checkpoint_as_it_is(kind: str, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **READING_IMAGES[kind], vision_config=_SEEING)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    decoder = load_decoder(tmp_path / "model", "float32", CPU, streamed=True)
    assert decoder.sites == load_decoder(tmp_path / "model", "float32", CPU).sites
    written = tmp_path / "checkpoint"
    settings = Quantization(method="gptq", bits=4, group_size=16, symmetric=symmetric)
    write_checkpoint(written, decoder, SAMPLES, settings)
    loaded, found = AutoModelForImageTextToText.from_pretrained(written, output_loading_info=True)
    assert not (found["missing_keys"] | found["unexpected_keys"])
    kept, original = dict(loaded.named_parameters()), dict(model.named_parameters())
    changed = {name for name in original if not torch.equal(kept[name], original[name])}
    language = {
        name for name in original if name.startswith("model.language_model.layers.") and original[name].ndim > 1
    }
    stays = ("router", ".gate.", "vision_moe")
    assert changed == {name for name in language if not any(each in name for each in stays)}


def test_what_transformers_takes_apart_in_files_has_no_quantised_weights_beside(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qianfan_ocr", text_config=ARCHITECTURES["qwen3"], vision_config=_SEEING)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    writer, _ = write_checkpoint(tmp_path, make_decoder(model), SAMPLES, RTN)
    assert "no packed weights of a model whose files keep several linears in one" in writer.why_dense
    _, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not (found["missing_keys"] | found["unexpected_keys"])
    settings = Quantization(method="w8a8_static")
    with pytest.raises(QuantizationError, match=r"^quantization\.activations: static cannot be kept for a model of t"):
        check_format(settings, model)


def test_a_linear_that_no_text_reads_stays_as_it_is(tmp_path: Path) -> None:
    decoder = make_decoder(tiny_model("mamba"))
    names = [f"backbone.layers.{index}.mixer.dt_proj" for index in range(BLOCKS)]
    assert list(decoder.unread) == names
    writer, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, RTN)
    assert not {*names} & {*linears_of(blocks)}
    kept = load_file(tmp_path / writer.shard_name(1))[f"{names[1]}.weight"]
    assert torch.equal(kept, decoder.model.get_submodule(names[1]).weight.bfloat16())


def test_a_large_linear_that_no_text_reads_is_refused() -> None:
    model = tiny_model("mamba")
    for layer in model.backbone.layers:
        layer.for_nothing = torch.nn.Linear(8 * WIDTH, 8 * WIDTH)
    with pytest.raises(InputError, match=r"^Block 0 of MambaForCausalLM reads 0 inputs with `for_nothing` in a text"):
        make_decoder(model)


def test_keys_and_values_that_later_blocks_read_go_with_the_hidden_states() -> None:
    decoder = make_decoder(tiny_model("gemma4_text"))
    hidden, arguments = block_inputs(decoder, TOKENS)
    assert [len(each.left) for each in arguments] == [0, 2, 4, 4]
    widths = [each.stream_width - each.width for each in arguments]
    assert widths == [0, 2 * 2 * 8, 2 * 2 * (8 + 16), 2 * 2 * (8 + 16)]  # keys and values of two heads
    given = arguments[0].keywords["shared_kv_states"]
    leaving = run_block(decoder.blocks[0], hidden, arguments[0])
    assert leaving.shape == (*hidden.shape[:2], arguments[1].stream_width)
    assert not given  # what the model gave is as it was, for the other streams that run through the blocks


def test_each_stream_is_behind_the_keys_and_values_of_its_own_model() -> None:
    original = make_decoder(tiny_model("gemma4_text"))
    settings = Quantization(method="coreq", bits=3, group_size=16)
    blocks = list(quantize_blocks(original, SAMPLES, settings, "float32"))
    changed = make_decoder(quantized_model(original.model, blocks, settings, "float32"))
    for index, block in enumerate(blocks[:-1]):
        streams = [leaving[0][..., :WIDTH] for leaving in block.leaving]
        expected = [
            left_a_block(decoder, index, torch.from_numpy(np.stack(SAMPLES))) for decoder in (changed, original)
        ]
        torch.testing.assert_close(streams, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(*streams, rtol=1e-2, atol=1e-2)


def test_a_block_that_leaves_something_else_is_refused() -> None:
    model = tiny_model("gemma4_text")
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def leaves_hidden_states(hidden_states: torch.Tensor, *given: Any, **keywords: Any) -> Any:
        keywords["shared_kv_states"]["more"] = hidden_states
        return own(hidden_states, *given, **keywords)

    attention.forward = leaves_hidden_states
    with pytest.raises(InputError, match=r"^A Gemma4TextDecoderLayer leaves more than keys and values.*`shared_kv_sta"):
        make_decoder(model)


def test_a_model_whose_own_pass_differs_from_its_blocks_is_refused() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[1].input_layernorm
    calls: list[int] = []
    own = norm.forward

    def second_time_twice(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return own(hidden) * len(calls)

    norm.forward = second_time_twice
    with pytest.raises(InputError, match="do not compute by themselves what the model does"):
        make_decoder(model)
