"""Checkpoints of every preset as transformers reads them: the logits of the quantised model in memory."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from covercal.checkpoint import RECORD, check_format, checkpoint_bytes, checkpoint_format
from covercal.decoder import Decoder, load_decoder, make_decoder
from covercal.errors import QuantizationError
from covercal.quantization import dequantized
from covercal.quantization_settings import PRESETS, Dtype, Quantization
from tests.covercal.walks import linears_of, logits, quantized_model, write_checkpoint
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model

CPU = torch.device("cpu")
SAMPLES = [*random_tokens(4, 18, 1), *random_tokens(4, 11, 2)]
EIGHT = {"method": "w8a8_static"}
VARIANTS: dict[str, dict[str, Any]] = {
    **{method: {"method": method, "bits": 3, "group_size": 16} for method in PRESETS if method != "w8a8_static"},
    "w8a8_static": EIGHT,
    "gptq, symmetric": {"method": "gptq", "bits": 3, "group_size": 16, "symmetric": True},
    "gptq, refitted scales": {"method": "gptq", "bits": 3, "group_size": 16, "ranges": {"refit": 2}},
    "awq, one scale a row": {"method": "awq", "bits": 4, "group_size": None},
    "awq, judged by modules": {
        "method": "awq",
        "bits": 3,
        "group_size": 16,
        "scaling": {"search": "awq", "loss": "module"},
    },
    "gptq after awq scaling": {"method": "gptq", "bits": 3, "group_size": 16, "scaling": "awq"},
    "precal, kept in 16 bits": {"method": "precal", "bits": 3, "group_size": 16, "salient": {"bits": 16}},
    "gptq with salient weights": {"method": "gptq", "bits": 3, "group_size": 16, "salient": 0.02},
    "w8a8 dynamic": {**EIGHT, "activations": "dynamic"},
    "w8a8 static after smoothing": {**EIGHT, "scaling": "smooth"},
    "w8a8 dynamic after smoothing": {**EIGHT, "activations": "dynamic", "scaling": "smooth"},
    "w8a8 static, clipped": {**EIGHT, "activations": {"ranges": "mse"}},
    "w8a8 static, asymmetric groups": {**EIGHT, "symmetric": False, "group_size": 16},
    "w4a8 static behind gptq": {**EIGHT, "bits": 4, "group_size": 16, "rounding": "sequential"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def decoder_of(architecture: str) -> Decoder:
    return make_decoder(tiny_model(architecture))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_read_back(folder: Path, architecture: str, variant: str, storage: Dtype = "bfloat16") -> None:
    decoder, settings = decoder_of(architecture), Quantization(**VARIANTS[variant])
    _, blocks = write_checkpoint(folder, decoder, SAMPLES, settings, storage)
    expected = logits(quantized_model(decoder.model, blocks, settings, storage))
    assert not torch.allclose(expected, logits(decoder.model), atol=1e-3)
    assert torch.equal(logits(load(folder)), expected)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- read by transformers ------------------------------------------------------------------------------------------


@every_variant
def test_transformers_computes_the_logits_of_the_quantised_model(variant: str, tmp_path: Path) -> None:
    assert_read_back(tmp_path, "llama", variant)


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        (architecture, variant)
        for architecture in ARCHITECTURES
        for variant in ("awq", "coreq", "covercal", "precal", "w8a8 static after smoothing", "w8a8 dynamic")
        if architecture != "llama" and (architecture, variant) != ("opt", "w8a8 dynamic")
    ],
)
def test_transformers_computes_the_logits_of_the_quantised_model_of_every_architecture(
    architecture: str, variant: str, tmp_path: Path
) -> None:
    assert_read_back(tmp_path, architecture, variant)


def test_dynamic_activations_are_refused_where_compressed_tensors_cannot_tell_tokens_apart() -> None:
    message = r"^quantization\.activations: dynamic cannot be kept for a model of type opt: .* static or none\.$"
    with pytest.raises(QuantizationError, match=message):
        check_format(Quantization(**VARIANTS["w8a8 dynamic"]), decoder_of("opt").model)
    check_format(Quantization(**VARIANTS["w8a8_static"]), decoder_of("opt").model)
    check_format(Quantization(**VARIANTS["w8a8 dynamic"]), decoder_of("llama").model)


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("variant", ["awq", "precal", "w8a8_static", "w8a8 dynamic after smoothing"])
def test_transformers_computes_the_logits_of_the_quantised_model_in_every_storage_dtype(
    variant: str, storage: Dtype, tmp_path: Path
) -> None:
    assert_read_back(tmp_path, "qwen2", variant, storage)


@pytest.mark.parametrize("variant", ["gptq", "precal", "w8a8_static", "w8a8 dynamic"])
def test_covercal_reads_its_own_checkpoint_as_transformers_does(variant: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, decoder_of("llama"), SAMPLES, Quantization(**VARIANTS[variant]))
    assert torch.equal(logits(load_decoder(tmp_path, "float32", CPU).model), logits(load(tmp_path)))


@pytest.mark.parametrize("variant", ["awq", "precal", "w8a8_static", "w8a8 static, asymmetric groups"])
def test_transformers_misses_no_weight_and_finds_none_too_many(variant: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, decoder_of("qwen2"), SAMPLES, Quantization(**VARIANTS[variant]))
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# --- formats -------------------------------------------------------------------------------------------------------


@every_variant
def test_the_record_says_the_format_and_why_it_is_dense(variant: str, tmp_path: Path) -> None:
    settings = Quantization(**VARIANTS[variant])
    write_checkpoint(tmp_path, decoder_of("llama"), SAMPLES, settings)
    expected = ("pack-quantized", "")
    if settings.salient.share:
        expected = ("dense", "salient weights have a grid of their own, which no packed format has")
    elif settings.activations.kind != "none":
        expected = ("int-quantized", "")
    assert (record_of(tmp_path)["format"], record_of(tmp_path)["why_dense"]) == expected
    assert checkpoint_format(settings, decoder_of("llama").model) == expected


@pytest.mark.parametrize("variant", ["precal", "gptq with salient weights"])
def test_a_dense_checkpoint_is_a_plain_one_that_holds_the_dequantised_weights(variant: str, tmp_path: Path) -> None:
    _, blocks = write_checkpoint(tmp_path, decoder_of("llama"), SAMPLES, Quantization(**VARIANTS[variant]))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    saved = tensors_of(tmp_path)
    assert set(saved) == set(tiny_model("llama").state_dict())
    for name, linear in linears_of(blocks).items():
        assert torch.equal(saved[f"{name}.weight"], dequantized(linear, torch.bfloat16))


def test_salient_weights_kept_in_16_bits_are_the_original_ones(tmp_path: Path) -> None:
    decoder = decoder_of("llama")
    settings = Quantization(**VARIANTS["precal, kept in 16 bits"])
    _, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, settings)
    for name, linear in linears_of(blocks).items():
        weight = decoder.model.get_submodule(name).weight.to(torch.bfloat16)
        assert linear.salient is not None
        mask = linear.salient[0]
        assert int(mask.sum()) == round(0.08 * mask.numel())
        assert torch.equal(tensors_of(tmp_path)[f"{name}.weight"][mask], weight[mask])
        assert float(weight.abs()[mask].min()) >= float(weight.abs()[~mask].max()) * (1 - 2**-8)


@pytest.mark.parametrize(
    ("variant", "has_step"), [("w8a8_static", True), ("w8a8 static, clipped", True), ("w8a8 dynamic", False)]
)
def test_a_static_step_is_kept_for_every_linear_and_a_dynamic_one_for_none(
    variant: str, has_step: bool, tmp_path: Path
) -> None:
    _, blocks = write_checkpoint(tmp_path, decoder_of("llama"), SAMPLES, Quantization(**VARIANTS[variant]))
    saved = tensors_of(tmp_path)
    steps = {name.removesuffix(".input_scale") for name in saved if name.endswith(".input_scale")}
    assert steps == (set(linears_of(blocks)) if has_step else set())
    assert {saved[f"{name}.weight"].dtype for name in linears_of(blocks)} == {torch.int8}


def test_linears_that_share_an_input_share_its_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, decoder_of("llama"), SAMPLES, Quantization(**EIGHT))
    saved = tensors_of(tmp_path)
    for block in range(3):
        steps = {float(saved[f"model.layers.{block}.self_attn.{part}_proj.input_scale"]) for part in "qkv"}
        assert len(steps) == 1


def test_a_min_max_step_is_that_of_the_largest_input_behind_the_quantised_sites(tmp_path: Path) -> None:
    decoder, settings = decoder_of("llama"), Quantization(**EIGHT)
    _, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, settings, "float32")
    model = quantized_model(decoder.model, blocks, settings, "float32")
    largest: dict[str, float] = dict.fromkeys(linears_of(blocks), 0.0)

    def note(name: str) -> Any:
        def before(_: Any, args: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(args[0].abs().max()))

        return before

    for name in largest:
        model.get_submodule(name).register_forward_pre_hook(note(name), prepend=True)
    with torch.inference_mode():
        for sample in SAMPLES:
            model(input_ids=torch.tensor([sample.tolist()]), use_cache=False)
    for name, linear in linears_of(blocks).items():
        assert linear.input_scale is not None
        assert float(linear.input_scale) * 127 == pytest.approx(largest[name], rel=1e-4)


def test_smoothing_lowers_the_steps_of_inputs_with_outlying_channels(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 40.0
    decoder = make_decoder(model)
    steps = [
        {
            name: float(linear.input_scale if linear.input_scale is not None else math.nan)
            for name, linear in linears_of(
                write_checkpoint(tmp_path, decoder, SAMPLES, Quantization(**VARIANTS[variant]))[1]
            ).items()
        }
        for variant in ("w8a8_static", "w8a8 static after smoothing")
    ]
    for block in range(3):
        name = f"model.layers.{block}.self_attn.q_proj"
        assert steps[1][name] < steps[0][name] / 4


@every_variant
def test_the_size_of_a_checkpoint_is_about_known_beforehand(variant: str, tmp_path: Path) -> None:
    decoder, settings = decoder_of("llama"), Quantization(**VARIANTS[variant])
    write_checkpoint(tmp_path, decoder, SAMPLES, settings)
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    assert total * 0.97 < checkpoint_bytes(decoder, settings, "bfloat16") < total * 1.1


@pytest.mark.parametrize("variant", ["awq", "precal", "w8a8 static after smoothing"])
def test_a_checkpoint_written_twice_has_the_same_bytes(variant: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, decoder_of("gemma"), SAMPLES, Quantization(**VARIANTS[variant]))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
