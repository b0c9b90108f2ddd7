"""The walk over blocks, against Gram matrices recomputed from the model's own forward passes."""

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from covercal.calibration import round_parameters
from covercal.decoder import DTYPES, Decoder, make_decoder
from covercal.errors import QuantizationError
from covercal.quantization import (
    LinearReport,
    QuantizedBlock,
    QuantizedLinear,
    Resumed,
    check_group_size,
    check_salient,
    dequantized,
    quantize_blocks,
)
from covercal.quantization_settings import Dtype, Quantization
from covercal.quantizers.grid import GridSettings, min_max_grid
from tests.covercal.rounding import RoundingSettings, gptq, round_to_nearest
from tests.tiny import ARCHITECTURES, BLOCKS, WIDTH, random_tokens, tiny_model

SAMPLES = [*random_tokens(5, 24, 1), *random_tokens(4, 15, 2), *random_tokens(3, 24, 3)]
GPTQ = Quantization(method="gptq", bits=3, group_size=16)
RTN = Quantization(method="rtn", bits=3, group_size=16)
AWQ = Quantization(method="awq", bits=3, group_size=16)
STATIC = Quantization(method="w8a8_static")
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def quantized(
    model: PreTrainedModel, settings: Quantization = GPTQ, storage: Dtype = "float32", samples: Any = SAMPLES
) -> list[QuantizedBlock]:
    return list(quantize_blocks(make_decoder(model), samples, settings, storage))


def by_name(blocks: list[QuantizedBlock]) -> dict[str, QuantizedLinear]:
    return {linear.name: linear for block in blocks for linear in block.linears}


def reports(blocks: list[QuantizedBlock]) -> dict[str, LinearReport]:
    return {report.name: report for block in blocks for report in block.reports}


def inputs_of(model: PreTrainedModel, name: str) -> Tensor:
    """Return what the linear reads over all samples in the model's own forward pass, float64 (tokens, channels)."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

    hook = module.register_forward_pre_hook(note)
    with torch.inference_mode():
        for sample in SAMPLES:
            model(input_ids=torch.from_numpy(sample.astype(np.int64))[None], use_cache=False)
    hook.remove()
    return torch.cat(seen)


def replace_linears(model: PreTrainedModel, linears: list[QuantizedLinear]) -> PreTrainedModel:
    """Return a copy of the model that holds the dequantised weights of some linears."""
    changed = copy.deepcopy(model)
    for linear in linears:
        changed.get_submodule(linear.name).weight.data = dequantized(linear, torch.float32)
    return changed


def expected_codes(model: PreTrainedModel, name: str, x: Tensor, storage: Dtype = "float32") -> Tensor:
    """Return the GPTQ codes of one linear for given inputs."""
    weight = model.get_submodule(name).weight.detach().double()
    grid = min_max_grid(weight, GridSettings(GPTQ.bits, GPTQ.group_size, GPTQ.symmetric, DTYPES[storage]))
    rounding = RoundingSettings(0.01, GPTQ.activation_order)
    return gptq(weight, x.T @ x * (2 / len(SAMPLES)), grid, rounding).codes.to(torch.uint8)


# --- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QKV)
def test_the_first_site_is_calibrated_on_the_models_own_inputs(name: str) -> None:
    model, full = tiny_model(), f"model.layers.0.{name}"
    found = by_name(quantized(model))[full].codes
    assert torch.equal(found, expected_codes(model, full, inputs_of(model, full)))


@pytest.mark.parametrize(
    ("architecture", "full", "before"),
    [
        ("llama", "model.layers.0.self_attn.o_proj", QKV),
        ("opt", "model.decoder.layers.0.self_attn.out_proj", QKV),
        ("qwen3", "model.layers.0.mlp.gate_proj", [*QKV, "self_attn.o_proj"]),
    ],
)
def test_a_later_site_is_calibrated_behind_the_quantised_earlier_ones(
    architecture: str, full: str, before: list[str]
) -> None:
    model = tiny_model(architecture)
    linears = by_name(quantized(model))
    prefix = full.split(".0.")[0] + ".0."
    x = inputs_of(replace_linears(model, [linears[prefix + name] for name in before]), full)
    assert torch.equal(linears[full].codes, expected_codes(model, full, x))


def test_a_later_site_is_not_calibrated_on_the_original_models_inputs() -> None:
    model, full = tiny_model(), "model.layers.0.self_attn.o_proj"
    found = by_name(quantized(model))[full].codes
    assert not torch.equal(found, expected_codes(model, full, inputs_of(model, full)))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_later_block_is_calibrated_behind_the_quantised_earlier_blocks(architecture: str) -> None:
    model, full = tiny_model(architecture), "model.layers.2.self_attn.q_proj"
    blocks = quantized(model)
    behind = replace_linears(model, [linear for block in blocks[:2] for linear in block.linears])
    assert torch.equal(by_name(blocks)[full].codes, expected_codes(model, full, inputs_of(behind, full)))


def test_a_finished_block_is_let_go_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[weakref.ref[Tensor]] = []
    held: list[bool] = []
    own_block = Decoder.own_block

    def watched(self: Decoder, index: int) -> nn.Module:
        held.extend(codes() is not None for codes in done)
        return own_block(self, index)

    monkeypatch.setattr(Decoder, "own_block", watched)
    for block in quantize_blocks(make_decoder(tiny_model()), SAMPLES, GPTQ, "float32"):
        done.append(weakref.ref(block.linears[0].codes))
        del block
    assert held == [False] * sum(range(BLOCKS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_that_are_kept_change_no_bit(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture)
    kept = quantized(model)
    monkeypatch.setattr("covercal.calibration.KEPT_SHARE", 0.0)
    for one, other in zip(kept, quantized(model), strict=True):
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(one.linears, other.linears, strict=True))
        assert comparable([one]) == comparable([other])


@pytest.mark.parametrize("method", ["gptq", "covercal"])
def test_outputs_that_are_kept_change_no_bit_where_inputs_are_rounded(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Quantization(method=method, bits=8, group_size=16, activations="dynamic")
    samples = random_tokens(16, 40, 1)
    kept = quantized(tiny_model(), settings, samples=samples)
    monkeypatch.setattr("covercal.calibration.KEPT_SHARE", 0.0)
    assert comparable(kept) == comparable(quantized(tiny_model(), settings, samples=samples))


@pytest.mark.parametrize(("share", "computed", "last"), [(0.25, 7, 6), (0.0, 3 + 4 + 6 + 7, 3 + 4 + 6)])
def test_a_linear_is_computed_once_a_batch_when_memory_allows(
    share: float, computed: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # behind the last linear of the last block there is nothing to calibrate
    decoder = make_decoder(tiny_model())
    calls: list[Tensor] = []
    plain = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(x)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    monkeypatch.setattr("covercal.calibration.KEPT_SHARE", share)
    blocks = list(quantize_blocks(decoder, SAMPLES, GPTQ, "float32"))
    assert len(calls) == 2 * (computed * (len(blocks) - 1) + last)  # two lengths, a batch each


def with_uneven_norms() -> PreTrainedModel:
    """Return a model with norms that bfloat16 cannot represent, and embeddings that it can."""
    model = tiny_model("qwen2")
    round_parameters(model.model.embed_tokens, "bfloat16")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data *= torch.linspace(0.5, 1.5, WIDTH)
    return model


def stored(model: PreTrainedModel, storage: Dtype) -> PreTrainedModel:
    """Return a copy of the model with every weight as a checkpoint keeps those that are not quantised."""
    rounded = copy.deepcopy(model)
    round_parameters(rounded, storage)
    return rounded


def test_the_first_site_is_calibrated_behind_its_norm_as_the_checkpoint_keeps_it() -> None:
    model = with_uneven_norms()
    blocks = quantized(model, storage="bfloat16")
    assert_output_error(stored(model, "bfloat16"), "model.layers.0.self_attn.q_proj", blocks)


def test_a_later_block_is_calibrated_behind_blocks_as_the_checkpoint_keeps_them() -> None:
    model = with_uneven_norms()
    blocks = quantized(model, storage="bfloat16")
    behind = replace_linears(stored(model, "bfloat16"), [linear for block in blocks[:2] for linear in block.linears])
    assert_output_error(behind, "model.layers.2.self_attn.q_proj", blocks)


def test_the_first_site_is_calibrated_behind_the_embedding_as_the_checkpoint_keeps_it() -> None:
    model = tiny_model()
    blocks = quantized(model, storage="bfloat16")
    assert_output_error(stored(model, "bfloat16"), "model.layers.0.self_attn.q_proj", blocks)


def assert_output_error(model: PreTrainedModel, full: str, blocks: list[QuantizedBlock]) -> None:
    """Check a linear's reported error against the outputs of `model`, whose weight is not quantised there."""
    weight, x = model.get_submodule(full).weight.detach().double(), inputs_of(model, full)
    linear = by_name(blocks)[full]
    scale, zero = (each.double().repeat_interleave(16, dim=1) for each in (linear.scale, linear.zero))
    rounded = (linear.codes - zero) * scale
    expected = torch.linalg.norm(x @ (weight - rounded).T) / torch.linalg.norm(x @ weight.T)
    assert reports(blocks)[full].output_error == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", QKV)
def test_the_output_error_is_the_relative_distance_of_the_outputs(name: str) -> None:
    model = tiny_model()
    assert_output_error(model, f"model.layers.0.{name}", quantized(model))


def test_the_weight_error_is_the_relative_distance_of_the_weights() -> None:
    model = tiny_model()
    blocks = quantized(model)
    for name, linear in by_name(blocks).items():
        weight = model.get_submodule(name).weight.double()
        expected = torch.linalg.norm(weight - dequantized(linear, torch.float64)) / torch.linalg.norm(weight)
        assert reports(blocks)[name].weight_error == pytest.approx(float(expected), rel=1e-6)


def test_gptq_keeps_the_first_outputs_better_than_rounding_to_nearest() -> None:
    model, full = tiny_model(), "model.layers.0.self_attn.q_proj"
    weight, x = model.get_submodule(full).weight.double(), inputs_of(model, full)
    nearest = dequantized(by_name(quantized(model, RTN))[full], torch.float64)
    nearest_error = torch.linalg.norm(x @ (weight - nearest).T) / torch.linalg.norm(x @ weight.T)
    assert reports(quantized(model))[full].output_error < nearest_error


def test_a_channel_that_no_sample_uses_is_reported_as_dead() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[[3, 11]] = 0
    found = reports(quantized(model))
    assert [found[f"model.layers.0.{name}"].dead for name in [*QKV, "self_attn.o_proj"]] == [2, 2, 2, 0]


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GPTQ, RTN], ids=["gptq", "rtn"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_of_every_block_is_quantised_once(architecture: str, settings: Quantization) -> None:
    decoder = make_decoder(tiny_model(architecture))
    found = list(quantize_blocks(decoder, SAMPLES, settings, "bfloat16"))
    names = [decoder.full_name(site, name) for site in decoder.sites for name in site.linears]
    assert [linear.name for block in found for linear in block.linears] == names
    assert [report.name for block in found for report in block.reports] == names
    assert [block.index for block in found] == list(range(BLOCKS))


@pytest.mark.parametrize("storage", DTYPES)
def test_a_quantised_linear_has_the_dtypes_and_shapes_of_a_checkpoint(storage: Dtype) -> None:
    model = tiny_model()
    for name, linear in by_name(quantized(model, storage=storage)).items():
        outputs, inputs = model.get_submodule(name).weight.shape
        assert (linear.codes.dtype, linear.codes.shape) == (torch.uint8, (outputs, inputs))
        assert (linear.scale.dtype, linear.scale.shape) == (DTYPES[storage], (outputs, inputs // 16))
        assert (linear.zero.dtype, linear.zero.shape) == (torch.uint8, (outputs, inputs // 16))


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_codes_and_zero_points_fit_in_the_bits(bits: int) -> None:
    for linear in by_name(quantized(tiny_model(), replace_bits(GPTQ, bits))).values():
        assert max(int(linear.codes.max()), int(linear.zero.max())) < 2**bits


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_dequantised_weight_is_code_less_zero_times_scale_rounded_once(bits: int, storage: Dtype) -> None:
    linear = by_name(quantized(tiny_model(), replace_bits(RTN, bits), storage))["model.layers.1.mlp.down_proj"]
    scale, zero = (np.repeat(each.double().numpy(), 16, axis=1) for each in (linear.scale, linear.zero))
    exact = torch.from_numpy((linear.codes.double().numpy() - zero) * scale)
    assert torch.equal(dequantized(linear, torch.float32), exact.to(DTYPES[storage]).float())


def replace_bits(settings: Quantization, bits: int) -> Quantization:
    return settings.model_copy(update={"bits": bits})


def test_round_to_nearest_gives_the_nearest_codes_of_every_linear() -> None:
    model = tiny_model()
    for name, linear in by_name(quantized(model, RTN)).items():
        weight = model.get_submodule(name).weight.double()
        grid = min_max_grid(weight, GridSettings(3, 16, False, torch.float32))
        nearest = round_to_nearest(weight, None, grid, RoundingSettings()).codes
        assert torch.equal(linear.codes, nearest.to(torch.uint8))


def test_round_to_nearest_needs_no_samples() -> None:
    model = tiny_model()
    with_samples, without = by_name(quantized(model, RTN)), by_name(quantized(model, RTN, samples=[]))
    assert all(torch.equal(with_samples[name].codes, without[name].codes) for name in without)


def test_without_calibration_there_is_no_output_error() -> None:
    assert all(math.isnan(report.output_error) for report in reports(quantized(tiny_model(), RTN)).values())


def test_eight_bits_lose_less_than_four_and_four_less_than_two() -> None:
    errors = {bits: reports(quantized(tiny_model(), replace_bits(GPTQ, bits))) for bits in (2, 4, 8)}
    for name in errors[2]:
        assert errors[8][name].output_error < errors[4][name].output_error < errors[2][name].output_error


# --- what stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GPTQ, RTN], ids=["gptq", "rtn"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "opt"])
def test_the_original_model_is_not_changed(architecture: str, settings: Quantization) -> None:
    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized(model, settings, "bfloat16")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("settings", [GPTQ, RTN], ids=["gptq", "rtn"])
def test_two_runs_give_the_same_bytes(settings: Quantization) -> None:
    first, second = (by_name(quantized(tiny_model(), settings, "bfloat16")) for _ in range(2))
    for name, linear in first.items():
        for field in ("codes", "scale", "zero"):
            assert torch.equal(getattr(linear, field), getattr(second[name], field))


def test_two_runs_give_the_same_reports_but_for_the_time() -> None:
    first, second = (reports(quantized(tiny_model())) for _ in range(2))
    assert {n: replace(r, seconds=0) for n, r in first.items()} == {n: replace(r, seconds=0) for n, r in second.items()}


@pytest.mark.parametrize("storage", DTYPES)
def test_rounded_parameters_keep_their_dtype_and_are_representable(storage: Dtype) -> None:
    model = tiny_model("qwen2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    round_parameters(model, storage)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].to(DTYPES[storage]).float())


# --- resuming ------------------------------------------------------------------------------------------------------


def comparable(blocks: Sequence[QuantizedBlock]) -> list[tuple[Any, ...]]:
    """Return all of some blocks, to the bit, but the time that they took."""
    return [
        (
            block.index,
            [(each.name, *map(bits_of, (each.codes, each.scale, each.zero))) for each in block.linears],
            [repr(asdict(replace(report, seconds=0))) for report in block.reports],  # NaN is not equal to itself
            [bits_of(hidden) for stream in block.leaving for hidden in stream],
        )
        for block in blocks
    ]


def bits_of(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def through_a_file(hidden: Sequence[Tensor], path: Path) -> tuple[Tensor, ...]:
    save_file({str(i): each.contiguous() for i, each in enumerate(hidden)}, path)
    found = load_file(path)
    return tuple(found[str(i)] for i in range(len(found)))


def misaligned(hidden: Sequence[Tensor], path: Path) -> tuple[Tensor, ...]:
    """Return the same tensors one element past where an allocator would put them."""
    return tuple(torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in hidden)


def entering(block: QuantizedBlock, kept: Any, folder: Path) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(kept(list(stream), folder / "leaving") for stream in block.leaving)


@pytest.mark.parametrize("kept", [through_a_file, misaligned])
@pytest.mark.parametrize("settings", [GPTQ, RTN], ids=["gptq", "rtn"])
@pytest.mark.parametrize(
    ("architecture", "storage"), [("llama", "float32"), ("gemma2", "bfloat16"), ("opt", "float16")]
)
def test_a_walk_that_is_resumed_at_any_block_gives_the_same_bits(
    architecture: str, storage: Dtype, settings: Quantization, kept: Any, tmp_path: Path
) -> None:
    whole = quantized(tiny_model(architecture), settings, storage)
    assert len(whole) == BLOCKS
    for first in range(1, BLOCKS + 1):
        resumed = Resumed(first, entering(whole[first - 1], kept, tmp_path))
        rest = quantize_blocks(make_decoder(tiny_model(architecture)), SAMPLES, settings, storage, resumed)
        assert comparable(list(rest)) == comparable(whole[first:]), first


def test_a_walk_of_a_bfloat16_model_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    whole = quantized(tiny_model().to(torch.bfloat16), storage="bfloat16")
    assert {hidden.dtype for block in whole for stream in block.leaving for hidden in stream} == {torch.bfloat16}
    for first in range(1, BLOCKS):
        resumed = Resumed(first, entering(whole[first - 1], through_a_file, tmp_path))
        rest = quantize_blocks(make_decoder(tiny_model().to(torch.bfloat16)), SAMPLES, GPTQ, "bfloat16", resumed)
        assert comparable(list(rest)) == comparable(whole[first:]), first


def test_a_walk_can_be_resumed_again_and_again(tmp_path: Path) -> None:
    whole = quantized(tiny_model())
    pieces: list[QuantizedBlock] = []
    resumed = None
    for index in range(BLOCKS):
        pieces.append(next(quantize_blocks(make_decoder(tiny_model()), SAMPLES, GPTQ, "float32", resumed)))
        resumed = Resumed(index + 1, entering(pieces[-1], through_a_file, tmp_path))
    assert comparable(pieces) == comparable(whole)


def test_what_leaves_a_block_is_what_enters_the_next_behind_the_quantised_prefix() -> None:
    model = tiny_model("gemma2")
    blocks = quantized(model)
    for block in blocks[:-1]:
        done = [linear for each in blocks[: block.index + 1] for linear in each.linears]
        entered: list[Tensor] = []
        behind = replace_linears(model, done)
        behind.model.layers[block.index + 1].register_forward_pre_hook(
            lambda _, inputs, seen=entered: seen.append(inputs[0])
        )
        with torch.inference_mode():
            for length in sorted({sample.size for sample in SAMPLES}):
                ids = np.stack([sample for sample in SAMPLES if sample.size == length]).astype(np.int64)
                behind(input_ids=torch.from_numpy(ids), use_cache=False)
        (leaving,) = block.leaving
        assert len(leaving) == len(entered)
        for found, expected in zip(leaving, entered, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_leaves_a_block_is_not_changed_by_the_blocks_after_it() -> None:
    blocks, then = [], []
    for block in quantize_blocks(make_decoder(tiny_model()), SAMPLES, GPTQ, "float32"):
        blocks.append(block)
        then.append([hidden.clone() for stream in block.leaving for hidden in stream])
    for block, copies in zip(blocks, then, strict=True):
        now = [hidden for stream in block.leaving for hidden in stream]
        assert all(torch.equal(here, before) for here, before in zip(now, copies, strict=True))


def test_nothing_is_kept_behind_the_last_block() -> None:
    assert [len(block.leaving) for block in quantized(tiny_model())] == [*[1] * (BLOCKS - 1), 0]


def test_without_calibration_nothing_is_kept_to_resume_with() -> None:
    assert [block.leaving for block in quantized(tiny_model(), RTN)] == [()] * BLOCKS


@pytest.mark.parametrize("samples", [SAMPLES[:-1], SAMPLES[:5]], ids=["fewer samples", "fewer batches"])
def test_a_walk_is_not_resumed_with_what_left_a_block_on_other_samples(samples: list[np.ndarray]) -> None:
    resumed = Resumed(1, quantized(tiny_model())[0].leaving)
    with pytest.raises(ValueError):
        next(quantize_blocks(make_decoder(tiny_model()), samples, GPTQ, "float32", resumed))


def test_the_original_model_is_not_changed_by_a_walk_that_is_resumed() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resumed = Resumed(1, quantized(model, storage="bfloat16")[0].leaving)
    list(quantize_blocks(make_decoder(model), SAMPLES, GPTQ, "bfloat16", resumed))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_would() -> None:
    linears = {"a.q_proj": (64, 192), "a.down_proj": (192, 320)}
    message = (
        r"^quantization\.group_size 96 does not divide the 320 inputs of a\.down_proj; "
        r"it must divide 64, for example 32, 64\.$"
    )
    with pytest.raises(QuantizationError, match=message):
        check_group_size(linears, 96)


def test_a_refused_group_size_without_a_usual_alternative_names_the_common_divisor() -> None:
    with pytest.raises(QuantizationError, match=r"does not divide the 30 inputs of a; it must divide 6\.$"):
        check_group_size({"a": (4, 30), "b": (4, 36)}, 32)


@pytest.mark.parametrize("size", [None, 1, 32, 64])
def test_a_group_size_that_divides_every_input_is_accepted(size: int | None) -> None:
    check_group_size({"a.q_proj": (64, 192), "a.down_proj": (192, 320)}, size)


@pytest.mark.parametrize(
    ("scope", "group_size", "size"), [("row", None, 30), ("group", None, 30), ("group", 10, 10), ("tensor", None, 1200)]
)
def test_a_share_that_marks_no_weight_of_some_linear_is_refused(scope: str, group_size: int | None, size: int) -> None:
    linears = {"a.down_proj": (40, 30), "a.q_proj": (60, 60)}
    grid = {"method": "precal", "group_size": group_size}
    message = rf"marks no weight in a {scope} of {size} weights of a.down_proj: give at least {1 / size:.3g}, or"
    with pytest.raises(QuantizationError, match=message):
        check_salient(linears, Quantization(**grid, salient={"share": 0.4 / size, "scope": scope}))
    check_salient(linears, Quantization(**grid, salient={"share": 1 / size, "scope": scope}))
    check_salient(linears, Quantization(method="gptq", group_size=None))


def test_a_linear_that_cannot_be_grouped_is_named() -> None:
    message = r"^model\.layers\.0\.self_attn\.q_proj cannot be quantised: a group size of 48 does not divide 32 .*\.$"
    with pytest.raises(QuantizationError, match=message):
        quantized(tiny_model(), Quantization(bits=4, group_size=48))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("settings", "what"), [(GPTQ, "Gram matrix holds"), (STATIC, "inputs hold")], ids=["gptq", "static"]
)
def test_a_linear_whose_inputs_are_not_finite_is_named(settings: Quantization, what: str, bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = bad
    message = rf"^model\.layers\.1\.self_attn\.q_proj cannot be quantised: its {what} NaN or infinity\.$"
    with pytest.raises(QuantizationError, match=message):
        quantized(model, settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [(GPTQ, "mlp.down_proj"), (RTN, "mlp.down_proj"), (AWQ, "self_attn.q_proj")],
    ids=["gptq", "rtn", "awq"],
)
def test_a_weight_that_is_nan_is_refused(settings: Quantization, name: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{name}").weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=rf"^model\.layers\.1\.{name} cannot be quantised: .*NaN.*\.$"):
        quantized(model, settings)


def test_no_static_step_is_too_small_for_its_dtype() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(1e-7)
    found = by_name(quantized(model, STATIC, "float16"))["model.layers.0.self_attn.q_proj"].input_scale
    assert found is not None
    assert found.tolist() == [2.0**-24]
