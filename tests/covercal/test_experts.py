"""Experts as linears of their own, against transformers' fused modules and the tokens that its routers choose."""

import copy
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from covercal.block_pass import expert_of
from covercal.calibration import IN_MEMORY, block_sums, start_calibration
from covercal.checkpoint import RECORD, check_format
from covercal.decoder import Decoder, Site, load_decoder, make_decoder, token_tensor
from covercal.errors import InputError, QuantizationError
from covercal.experts import (
    Expert,
    Experts,
    Layout,
    _marked_state,
    checkpoint_names,
    has_experts,
    is_fused,
    is_router,
    probing,
    skeleton_of,
    unfuse_experts,
    unfused,
)
from covercal.gram import Wanted
from covercal.input_scaling import _folds
from covercal.quantization import QuantizedBlock, dequantized, quantize_blocks, without_inputs
from covercal.quantization_settings import Quantization
from covercal.quantizers.grid import GridSettings, min_max_grid
from covercal.statistics import ActivationStatistics, capture
from tests.covercal.rounding import RoundingSettings, gptq, round_to_nearest
from tests.covercal.walks import linears_of, logits, quantized_model, reports_of, write_checkpoint
from tests.tiny import BLOCKS, EXPERTS, INNER, MIXTURES, WIDTH, random_tokens, tiny_model

CPU = torch.device("cpu")
SAMPLES = [*random_tokens(3, 12, 1), *random_tokens(2, 7, 2), *random_tokens(2, 12, 3)]
every_mixture = pytest.mark.parametrize("architecture", MIXTURES)
Floats = npt.NDArray[np.float64]


@cache
def fused_model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture)


@cache
def decoder_of(architecture: str) -> Decoder:
    """Return a decoder that tests do not change."""
    return make_decoder(tiny_model(architecture))


def experts_module(model: nn.Module, block: int) -> nn.Module:
    return model.get_submodule(f"model.layers.{block}.mlp.experts")


def routed(model: PreTrainedModel, block: int, tokens: npt.NDArray[np.int32]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return what the fused experts of a block read of one sample: (tokens, width), and (tokens, chosen) experts."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        seen.append((given["hidden_states"], given["top_k_index"]))

    hook = experts_module(model, block).register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=token_tensor([tokens], CPU), use_cache=False)
    hook.remove()
    ((hidden, index),) = seen
    return hidden.reshape(-1, hidden.shape[-1]).double().numpy(), index.numpy()


def expert_inputs(model: PreTrainedModel, site: Site, tokens: npt.NDArray[np.int32]) -> Floats:
    """Return what the site of an expert reads of one sample; zero where the expert is not chosen."""
    _, _, number, part = site.linears[0].split(".")
    hidden, index = routed(model, site.block, tokens)
    mine = (index == int(number)).any(axis=1)
    fused = experts_module(model, site.block)
    if part != "down_proj":
        return np.where(mine[:, None], hidden, 0)
    gate_up = fused.gate_up_proj[int(number)].detach().double().numpy()
    gate, up = np.split(hidden @ gate_up.T, 2, axis=1)
    return np.where(mine[:, None], gate / (1 + np.exp(-gate)) * up, 0)


def count_of(model: PreTrainedModel, site: Site, tokens: npt.NDArray[np.int32], skipped: int = 0) -> int:
    _, index = routed(model, site.block, tokens)
    return int((index[skipped:] == int(site.linears[0].split(".")[2])).sum())


def expert_sites(decoder: Decoder, block: int = 0) -> list[Site]:
    return [site for site in decoder.block_sites(block) if expert_of(decoder.block(block), site) is not None]


# --- the function --------------------------------------------------------------------------------------------------


@every_mixture
def test_experts_taken_apart_compute_what_the_fused_ones_do(architecture: str) -> None:
    expected = logits(fused_model(architecture))
    torch.testing.assert_close(logits(decoder_of(architecture).model), expected, rtol=1e-5, atol=1e-5)


def test_experts_taken_apart_share_the_memory_of_the_fused_ones() -> None:
    fused = experts_module(tiny_model("mixtral"), 0)
    apart = unfused(fused)
    assert apart[2].gate_proj.weight.data_ptr() == fused.gate_up_proj[2].data_ptr()
    assert apart[2].down_proj.weight.data_ptr() == fused.down_proj[2].data_ptr()


@every_mixture
def test_a_block_whose_experts_were_taken_apart_has_no_fused_ones(architecture: str) -> None:
    model = tiny_model(architecture)
    assert any(is_fused(module) for module in model.modules())
    unfuse_experts(model)
    assert not any(is_fused(module) for module in model.modules())
    assert has_experts(model)


def test_a_dense_model_has_no_experts() -> None:
    model = tiny_model("llama")
    assert not has_experts(model)
    assert checkpoint_names(model) == {}


def test_an_expert_knows_which_rows_it_was_given() -> None:
    experts = unfused(experts_module(tiny_model("mixtral"), 0))
    index = torch.tensor([[0, 1], [1, 3], [0, 3]])
    experts(torch.randn(3, WIDTH), index, torch.rand(3, 2))
    found = [sorted(expert.tokens.tolist()) for expert in experts]
    assert found == [[0, 2], [0, 1], [], [1, 2]]


def test_a_chosen_expert_counts_with_its_weight() -> None:
    experts = unfused(experts_module(tiny_model("mixtral"), 0))
    hidden, weights = torch.randn(2, WIDTH), torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    found = experts(hidden, torch.tensor([[0, 2], [2, 1]]), weights)
    expected = torch.stack(
        [
            0.3 * experts[0](hidden[:1])[0] + 0.7 * experts[2](hidden[:1])[0],
            0.6 * experts[2](hidden[1:])[0] + 0.4 * experts[1](hidden[1:])[0],
        ]
    )
    torch.testing.assert_close(found, expected)


def test_probing_shows_every_expert_every_token_for_a_while() -> None:
    experts = unfused(experts_module(tiny_model("mixtral"), 0))
    shown: list[tuple[int, int]] = []
    for number, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, n=number: shown.append((n, len(args[0]))))
    call = torch.randn(5, WIDTH), torch.zeros((5, 1), dtype=torch.int64), torch.ones(5, 1)
    with probing(experts):
        experts(*call)
    assert shown == [(number, 5) for number in range(EXPERTS)]
    shown.clear()
    experts(*call)
    assert shown == [(0, 5)]


# --- sites ---------------------------------------------------------------------------------------------------------


@every_mixture
def test_every_expert_has_two_sites_of_its_own(architecture: str) -> None:
    decoder = decoder_of(architecture)
    for block in range(BLOCKS):
        found = {(frozenset(site.linears), site.channels) for site in expert_sites(decoder, block)}
        assert found == {
            each
            for number in range(EXPERTS)
            for each in (
                (frozenset({f"mlp.experts.{number}.gate_proj", f"mlp.experts.{number}.up_proj"}), WIDTH),
                (frozenset({f"mlp.experts.{number}.down_proj"}), INNER),
            )
        }


@every_mixture
def test_the_other_sites_of_a_block_are_those_of_its_attention(architecture: str) -> None:
    decoder = decoder_of(architecture)
    others = [site for site in decoder.block_sites(1) if site not in expert_sites(decoder, 1)]
    assert [len(site.linears) for site in others] == [3, 1]
    assert all(name.startswith("self_attn.") for site in others for name in site.linears)


# --- Gram matrices and tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_sequence", [False, True])
@every_mixture
def test_the_gram_matrix_of_an_expert_is_that_of_the_tokens_routed_to_it(architecture: str, by_sequence: bool) -> None:
    decoder, model = decoder_of(architecture), fused_model(architecture)
    running = start_calibration(
        decoder, SAMPLES, by_sequence=by_sequence, compares=False, storage_dtype="float32", memory=IN_MEMORY
    )
    sites = expert_sites(decoder)
    found = block_sums(decoder.block(0), sites, running, Wanted(magnitude=True, peak=True))
    for site in sites:
        inputs = [expert_inputs(model, site, tokens) for tokens in SAMPLES]
        counts = [count_of(model, site, tokens) for tokens in SAMPLES]
        weights = [1 / len(tokens) if by_sequence else 1.0 for tokens in SAMPLES]
        whole = float(np.dot(weights, counts))
        gram = sum(w * x.T @ x for w, x in zip(weights, inputs, strict=True)) / whole
        magnitude = sum(w * np.abs(x).sum(axis=0) for w, x in zip(weights, inputs, strict=True)) / whole
        statistics = found[site.order].statistics()
        assert (statistics.tokens, statistics.sequences) == (sum(counts), sum(count > 0 for count in counts))
        np.testing.assert_allclose(statistics.gram, gram, rtol=1e-4, atol=1e-5 * np.abs(gram).max())
        np.testing.assert_allclose(statistics.magnitude, magnitude, rtol=1e-4)
        np.testing.assert_allclose(statistics.peak, np.abs(np.concatenate(inputs)).max(axis=0), rtol=1e-4)


@every_mixture
def test_the_validation_sequences_of_an_expert_are_those_of_every_site(architecture: str) -> None:
    decoder, model = decoder_of(architecture), fused_model(architecture)
    running = start_calibration(
        decoder, SAMPLES, by_sequence=False, compares=False, storage_dtype="float32", memory=IN_MEMORY
    )
    in_order = sorted(range(len(SAMPLES)), key=lambda number: len(SAMPLES[number]))
    held_out = [SAMPLES[number] for place, number in enumerate(in_order) if place % 4 == 3]
    sites = expert_sites(decoder)
    found = block_sums(decoder.block(0), sites, running, Wanted(validation=True))
    for site in sites:
        counts = sum(count_of(model, site, tokens) for tokens in held_out)
        gram = sum(x.T @ x for x in (expert_inputs(model, site, tokens) for tokens in held_out)) / counts
        np.testing.assert_allclose(found[site.order].statistics().validation, gram, rtol=1e-4, atol=1e-4)


@every_mixture
def test_the_report_of_an_expert_counts_the_tokens_that_reached_it_behind_the_quantised_attention(
    architecture: str,
) -> None:
    decoder, model = decoder_of(architecture), copy.deepcopy(fused_model(architecture))
    block = next(quantize_blocks(decoder, SAMPLES, Quantization(method="gptq", bits=3, group_size=16), "float32"))
    for linear in (linear for linear in block.linears if ".self_attn." in linear.name):
        model.get_submodule(linear.name).weight.data = dequantized(linear, torch.float32)
    found = reports_of([block])
    for site in expert_sites(decoder):
        expected = sum(count_of(model, site, tokens) for tokens in SAMPLES)
        assert {found[decoder.full_name(site, name)].tokens for name in site.linears} == {expected}
    assert found["model.layers.0.self_attn.q_proj"].tokens == sum(map(len, SAMPLES))


# --- experts that few tokens reach ---------------------------------------------------------------------------------


def with_limit(architecture: str, method: str = "gptq", **fields: Any) -> tuple[int, list[QuantizedBlock]]:
    """Return a limit that some experts reach and others do not, and the blocks that are quantised with it."""
    decoder, model = decoder_of(architecture), fused_model(architecture)
    counts = {sum(count_of(model, site, tokens) for tokens in SAMPLES) for site in expert_sites(decoder)}
    limit = sorted(counts)[len(counts) // 2]
    settings = Quantization(method=method, bits=3, group_size=16, gram={"expert_tokens": limit}, **fields)
    return limit, list(quantize_blocks(decoder, SAMPLES, settings, "float32"))


def nearest_codes(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight.double()
    grid = min_max_grid(weight, GridSettings(3, 16, symmetric=False, scale_dtype=torch.float32))
    return round_to_nearest(weight, None, grid, RoundingSettings()).codes.to(torch.uint8)


@every_mixture
def test_an_expert_that_few_tokens_reach_is_rounded_to_nearest_and_the_report_says_so(architecture: str) -> None:
    limit, blocks = with_limit(architecture)
    found, model = reports_of(blocks), decoder_of(architecture).model
    few, linears = 0, [linear for block in blocks for linear in block.linears if ".experts." in linear.name]
    for linear in linears:
        report = found[linear.name]
        is_nearest = torch.equal(linear.codes, nearest_codes(model, linear.name))
        assert is_nearest == (report.tokens < limit)
        expected = f"rounded to nearest: {report.tokens} calibration tokens reached this expert"
        assert report.note == (expected if report.tokens < limit else "")
        few += report.tokens < limit
    assert 0 < few < len(linears)


@every_mixture
def test_what_an_expert_that_few_tokens_reach_reads_is_not_scaled(architecture: str) -> None:
    limit, blocks = with_limit(architecture, method="awq")
    found, scaled = reports_of(blocks), {True: 0, False: 0}
    for linear in (linear for block in blocks for linear in block.linears if ".down_proj" in linear.name):
        few = found[linear.name].tokens < limit
        scaled[few] += not np.isnan(found[linear.name].scaling)
        if few:
            assert torch.equal(linear.codes, nearest_codes(decoder_of(architecture).model, linear.name))
    assert scaled[True] == 0 < scaled[False]


@every_mixture
def test_only_experts_are_spared_from_a_small_calibration(architecture: str) -> None:
    _, blocks = with_limit(architecture)
    dense = {name: each for name, each in reports_of(blocks).items() if ".experts." not in name}
    assert {each.note for each in dense.values()} == {""}
    assert not any(np.isnan(each.output_error) for each in dense.values())


@pytest.mark.parametrize("method", ["coreq", "gptaq"])
@every_mixture
def test_an_experts_report_says_that_its_target_is_left_out(architecture: str, method: str) -> None:
    limit, blocks = with_limit(architecture, method=method)
    left_out, few = set(), set()
    for name, report in reports_of(blocks).items():
        if ".experts." not in name:
            assert report.note == ""
        elif report.tokens < limit:
            few.add(report.note.partition(":")[0])
        else:
            left_out.add(report.note)
    assert left_out == {f"target {method} left out: an expert's tokens are not the same in both models"}
    assert few == {"rounded to nearest"}


@every_mixture
def test_an_expert_whose_target_is_left_out_is_rounded_by_the_tokens_behind_the_quantised_attention(
    architecture: str,
) -> None:
    decoder, model = decoder_of(architecture), copy.deepcopy(fused_model(architecture))
    settings = Quantization(method="coreq", bits=3, group_size=16, gram={"expert_tokens": 1})
    block = next(quantize_blocks(decoder, SAMPLES, settings, "float32"))
    found = linears_of([block])
    for name, linear in found.items():
        if ".self_attn." in name:
            model.get_submodule(name).weight.data = dequantized(linear, torch.float32)
    for site in (site for site in expert_sites(decoder) if len(site.linears) > 1):
        x = torch.from_numpy(np.concatenate([expert_inputs(model, site, tokens) for tokens in SAMPLES]))
        for name in (decoder.full_name(site, each) for each in site.linears):
            weight = decoder.model.get_submodule(name).weight.double()
            grid = min_max_grid(weight, GridSettings(3, 16, symmetric=False, scale_dtype=torch.float32))
            expected = gptq(weight, x.T @ x, grid, RoundingSettings()).codes
            assert (found[name].codes == expected).double().mean() > 0.99
            assert np.isnan(reports_of([block])[name].alpha)


def test_rounding_to_nearest_reports_no_expert() -> None:
    settings = Quantization(method="rtn", bits=3, group_size=16)
    found = reports_of(list(quantize_blocks(decoder_of("mixtral"), [], settings, "float32")))
    assert {each.note for each in found.values()} == {""}


def test_an_expert_that_few_tokens_reach_keeps_how_its_ranges_are_searched() -> None:
    asked = Quantization.model_validate({"method": "gptq", "ranges": {"search": "mse", "shrink": 0.3, "steps": 7}})
    left = without_inputs(asked).ranges
    assert (left.search, left.shrink, left.steps, left.refit) == ("mse", 0.3, 7, 0)


def test_an_expert_that_few_tokens_reach_keeps_its_salient_weights() -> None:
    _, blocks = with_limit("mixtral", salient=0.05)
    linears = [linear for block in blocks for linear in block.linears]
    assert all(linear.salient is not None for linear in linears)
    shares = [float(linear.salient[0].float().mean()) for linear in linears if linear.salient is not None]
    np.testing.assert_allclose(shares, 0.05, atol=2e-3)


# --- statistics ----------------------------------------------------------------------------------------------------


def assert_statistics_of_experts(
    found: ActivationStatistics, architecture: str, samples: list[npt.NDArray[np.int32]], skipped: int
) -> None:
    """Compare with what the fused model's experts read, sample by sample; where they are not chosen they read zeros."""
    decoder, model = decoder_of(architecture), fused_model(architecture)
    ends = np.cumsum([site.channels for site in decoder.sites])
    for place, site in enumerate(decoder.sites):
        if expert_of(decoder.block(site.block), site) is None:
            continue
        columns = slice(ends[place] - site.channels, ends[place])
        inputs = [expert_inputs(model, site, tokens)[skipped:] for tokens in samples]
        close = {"rtol": 2e-4, "atol": 1e-5}
        np.testing.assert_allclose(found.peak[:, columns], [np.abs(x).max(axis=0) for x in inputs], **close)
        np.testing.assert_allclose(found.energy[:, columns], [np.mean(x**2, axis=0) for x in inputs], **close)
        np.testing.assert_allclose(found.variance[:, place], [x.var() for x in inputs], **close)
        np.testing.assert_allclose(found.magnitude[:, place], [np.abs(x).mean() for x in inputs], **close)
        absolute, square = (sum(power(x).sum(axis=0) for x in inputs) for power in (np.abs, np.square))
        np.testing.assert_allclose(found.absolute_sum[columns], absolute, **close)
        np.testing.assert_allclose(found.square_sum[columns], square, **close)
        assert found.site_tokens[place] == sum(count_of(model, site, tokens, skipped) for tokens in samples)


@pytest.mark.parametrize("skipped", [0, 3])
@every_mixture
def test_statistics_of_experts_are_those_of_the_tokens_routed_to_them(architecture: str, skipped: int) -> None:
    samples = SAMPLES[1:5]  # of two lengths
    found = capture(decoder_of(architecture), samples, ["sample"] * 4, skip_tokens=skipped)
    assert_statistics_of_experts(found, architecture, samples, skipped)


@every_mixture
def test_an_expert_that_no_token_reaches_has_statistics_of_nothing(architecture: str) -> None:
    samples = [SAMPLES[0][:1], SAMPLES[1][:2]]
    found = capture(decoder_of(architecture), samples[:1], ["sample"], skip_tokens=0)
    assert_statistics_of_experts(found, architecture, samples[:1], 0)
    sites = [(place, s) for place, s in enumerate(decoder_of(architecture).sites) if ".experts." in s.linears[0]]
    assert sorted(found.site_tokens[place] for place, site in sites if site.block == 0) == [0, 0, 0, 0, 1, 1, 1, 1]


@every_mixture
def test_a_batch_that_does_not_reach_an_expert_does_not_repeat_what_the_batch_before_it_read(architecture: str) -> None:
    samples = [SAMPLES[0][:1], SAMPLES[1][:2], SAMPLES[2][:3]]  # a batch each
    found = capture(decoder_of(architecture), samples, ["sample"] * 3, skip_tokens=0)
    assert_statistics_of_experts(found, architecture, samples, 0)


# --- names in a checkpoint -----------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@every_mixture
def test_experts_are_called_in_a_checkpoint_what_transformers_calls_them(architecture: str, tmp_path: Path) -> None:
    fused_model(architecture).save_pretrained(tmp_path)
    saved, decoder = tensors_of(tmp_path), decoder_of(architecture)
    names = checkpoint_names(decoder.model)
    linears = [
        decoder.full_name(site, name)
        for b in range(BLOCKS)
        for site in expert_sites(decoder, b)
        for name in site.linears
    ]
    assert len(linears) == 3 * EXPERTS * BLOCKS
    for name in linears:
        assert torch.equal(saved[names[f"{name}.weight"]], decoder.model.get_submodule(name).weight)


def test_finding_names_takes_no_memory_for_weights() -> None:
    skeleton = skeleton_of(fused_model("mixtral"))
    named = revert_weight_conversion(skeleton, _marked_state(skeleton)[0])
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in named.values()}
    assert sum(storages.values()) < 20_000


@every_mixture
def test_no_other_tensor_is_renamed_but_to_what_it_is_called_in_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    fused_model(architecture).save_pretrained(tmp_path)
    saved = tensors_of(tmp_path)
    names = checkpoint_names(decoder_of(architecture).model)
    for name, parameter in decoder_of(architecture).model.named_parameters():
        assert torch.equal(saved[names.get(name, name)], parameter)


# --- other kinds ---------------------------------------------------------------------------------------------------


class OtherExperts(nn.Module):
    """Fused experts with the names and shapes of the usual kind, but another function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER, generator=generator))
        self.act_fn = nn.SiLU()
        self.kind = kind

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                out[token] += weight * (self.down_proj[expert] @ self.gated(gate, up))
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.kind == "swapped":
            return self.act_fn(up) * gate
        if self.kind == "one more":
            return self.act_fn(gate) * (up + 1)
        if self.kind == "clamped":
            return self.act_fn(gate) * up.clamp(-1, 1)
        return self.act_fn(gate) * up


def test_the_usual_kind_is_taken_apart_whoever_wrote_it() -> None:
    fused = OtherExperts("usual")
    assert is_fused(fused)
    apart = unfused(fused)
    assert isinstance(apart, Experts)
    assert all(isinstance(expert, Expert) for expert in apart)


@pytest.mark.parametrize("kind", ["swapped", "one more", "clamped"])
def test_experts_that_are_gated_in_another_way_are_refused(kind: str) -> None:
    fused = OtherExperts(kind)
    assert is_fused(fused)
    message = r"^The experts of OtherExperts are not gated in the usual way .*; covercal cannot take them apart"
    with pytest.raises(InputError, match=message):
        unfused(fused)


def test_experts_of_another_shape_are_not_taken_for_the_usual_kind() -> None:
    fused = OtherExperts("usual")
    fused.down_proj = nn.Parameter(torch.zeros(EXPERTS, INNER, WIDTH))
    assert not is_fused(fused)


@pytest.mark.parametrize("layout", [Layout(*choices) for choices in itertools.product((False, True), repeat=4)])
def test_parameters_of_every_layout_are_put_together_as_they_were(layout: Layout) -> None:
    outputs = {"gate_up_proj": 2 * INNER, "up_proj": INNER, "down_proj": WIDTH}
    inputs = {"gate_up_proj": WIDTH, "up_proj": WIDTH, "down_proj": INNER}
    parts: dict[str, Tensor] = {}
    for name in layout.parameters:
        linear = name.removesuffix("_bias")
        shape = (outputs[linear],) if name.endswith("_bias") else (outputs[linear], inputs[linear])
        shape = shape[::-1] if layout.transposed else shape
        parameter = torch.randn(EXPERTS, *shape)
        apart = layout.apart(name, parameter)
        assert torch.equal(layout.together(list(apart.values()), bias=len(shape) == 1), parameter)
        assert all(part.untyped_storage().data_ptr() == parameter.data_ptr() for part in apart.values())
        parts |= apart
    linears = {"up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)} | (
        {"gate_proj": (INNER, WIDTH)} if layout.gated else {}
    )
    assert {name: part.shape[1:] for name, part in parts.items() if name.endswith("weight")} == {
        f"{name}.weight": shape for name, shape in linears.items()
    }


class ClampingExperts(OtherExperts):
    """Experts that say how they gate: what is large is cut off."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.gated(gate, up)


@pytest.mark.parametrize("kind", ["swapped", "one more", "clamped"])
def test_a_gating_that_experts_have_of_their_own_is_computed(kind: str) -> None:
    fused = ClampingExperts(kind)
    hidden, index, weights = torch.randn(5, WIDTH), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    expected = fused(hidden, index, weights)
    torch.testing.assert_close(unfused(fused)(hidden, index, weights), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "count"), [("usual", 1), ("clamped", 0)])
def test_no_scale_goes_into_what_is_clamped_for_large_inputs_only(kind: str, count: int) -> None:
    fused = ClampingExperts(kind)
    fused.gate_up_proj.data *= 0.01  # nothing is clamped of inputs of the usual size
    decoder = decoder_of("mixtral")
    block = decoder.own_block(0)
    block.mlp.experts = unfused(fused)
    folds = _folds(decoder, block, [Site(0, 0, ("mlp.experts.0.down_proj",), INNER)])
    assert len(folds) == count


@pytest.mark.parametrize(("rows", "expected"), [(EXPERTS, True), (EXPERTS + 1, False)])
def test_a_router_is_a_matrix_with_a_row_for_each_expert(rows: int, expected: bool) -> None:
    module = nn.Module()
    module.num_experts = EXPERTS
    assert is_router(module, torch.zeros(rows, WIDTH)) is expected


# --- checkpoints ---------------------------------------------------------------------------------------------------


def grids() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "rtn", {"bits": 4, "group_size": 16}
    yield "gptq", {"bits": 3, "group_size": 16}
    yield "awq", {"bits": 3, "group_size": None}


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("method", "grid"), grids())
@every_mixture
def test_an_asymmetric_checkpoint_is_dense_says_why_and_is_read_by_transformers(
    architecture: str, method: str, grid: dict[str, Any], tmp_path: Path
) -> None:
    decoder = decoder_of(architecture)
    settings = Quantization(method=method, **grid)
    _, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, settings)
    record = record_of(tmp_path)
    assert (record["format"], record["why_dense"]) == (
        "dense",
        "transformers reads packed experts on symmetric grids only",
    )
    expected = logits(quantized_model(decoder.model, blocks, settings, "bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_fused(experts_module(loaded, 0))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(load_decoder(tmp_path, "float32", CPU).model), expected)


@pytest.mark.parametrize(("method", "grid"), grids())
@every_mixture
def test_a_symmetric_checkpoint_is_packed_and_read_by_the_decoder(
    architecture: str, method: str, grid: dict[str, Any], tmp_path: Path
) -> None:
    decoder = decoder_of(architecture)
    settings = Quantization(method=method, symmetric=True, **grid)
    _, blocks = write_checkpoint(tmp_path, decoder, SAMPLES, settings)
    assert (record_of(tmp_path)["format"], record_of(tmp_path)["why_dense"]) == ("pack-quantized", "")
    found = logits(load_decoder(tmp_path, "float32", CPU).model)
    assert torch.equal(found, logits(quantized_model(decoder.model, blocks, settings, "bfloat16")))


@every_mixture
def test_a_checkpoint_of_experts_has_no_name_that_transformers_does_not_know(architecture: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, decoder_of(architecture), SAMPLES, Quantization(method="rtn", bits=4, group_size=16))
    fused_model(architecture).save_pretrained(tmp_path / "original")
    assert set(tensors_of(tmp_path)) == set(tensors_of(tmp_path / "original"))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@every_mixture
def test_quantised_activations_of_experts_are_refused(architecture: str, kind: str) -> None:
    settings = Quantization(method="w8a8_static", activations=kind)
    message = rf"^quantization\.activations: {kind} cannot be kept for a model with experts: .*use activations: none\.$"
    for model in (fused_model(architecture), decoder_of(architecture).model):
        with pytest.raises(QuantizationError, match=message):
            check_format(settings, model)


def test_quantised_activations_of_a_dense_model_are_accepted() -> None:
    check_format(Quantization(method="w8a8_static"), tiny_model("llama"))


def test_weights_alone_are_accepted_for_experts() -> None:
    check_format(Quantization(method="awq"), fused_model("mixtral"))
