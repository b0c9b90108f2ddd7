"""Scaled inputs: the function stays the same, the inverse goes where it belongs, and no search loses to no scaling."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from covercal import input_scaling
from covercal.block_call import run_block
from covercal.calibration import IN_MEMORY, Calibration, block_sums, round_parameters, start_calibration
from covercal.decoder import DTYPES, Decoder, Site, block_inputs, linear_of, make_decoder, token_tensor
from covercal.folding import Fold, apply_scale, find_folds, undone_scale
from covercal.gram import SiteStatistics, Wanted
from covercal.input_scaling import (
    NOT_FOLDED,
    ScaledSite,
    head_size,
    inspected_module,
    module_loss,
    rounded_under,
    scale_block,
)
from covercal.quantization import quantize_blocks
from covercal.quantization_settings import Dtype, Quantization
from covercal.quantizers.grid import GridSettings
from tests.tiny import EXPERTS, WIDTH, random_tokens, tiny_model

CPU = torch.device("cpu")
SCALED = ["llama", "qwen3", "gemma", "gemma3_text", "opt", "mistral"]
SAMPLES = [*random_tokens(4, 20, 1), *random_tokens(3, 13, 2)]
GRID = GridSettings(3, 16, symmetric=False, scale_dtype=torch.float32)
every_architecture = pytest.mark.parametrize("architecture", SCALED)


def by_peaks() -> Quantization:
    """Return settings whose scale is whatever is given as the inputs' peaks."""
    return Quantization(method="gptq", bits=3, group_size=16, scaling={"search": "smooth", "power": 1.0})


def forced(sites: tuple[Site, ...], seed: int) -> dict[int, SiteStatistics]:
    """Return statistics from which `by_peaks` makes random scales."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.order: SiteStatistics(
            peak=torch.randn(site.channels, generator=generator).double().mul(0.7).exp(), tokens=1
        )
        for site in sites
    }


@cache
def decoder_of(architecture: str) -> Decoder:
    return make_decoder(tiny_model(architecture))


def randomly_scaled(architecture: str, index: int = 0) -> tuple[nn.Module, dict[int, ScaledSite]]:
    decoder = decoder_of(architecture)
    block, sites = decoder.own_block(index), decoder.block_sites(index)
    found = scale_block(decoder, block, sites, forced(sites, index), by_peaks(), "float32", None)
    return block, found


def block_output(decoder: Decoder, block: nn.Module, index: int = 0) -> Tensor:
    tokens = token_tensor(random_tokens(2, 17, 5), CPU)
    entering, arguments = block_inputs(decoder, tokens)
    hidden = torch.randn(entering.shape, generator=torch.Generator().manual_seed(3))
    return run_block(block, hidden, arguments[index])


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_tensor(random_tokens(2, 17, 6), CPU), use_cache=False).logits


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


# --- the function stays the same -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*SCALED, "gemma4_text"])
def test_scaling_preserves_the_function_of_a_block_before_rounding(architecture: str) -> None:
    decoder = decoder_of(architecture)
    block, _ = randomly_scaled(architecture)
    expected = block_output(decoder, decoder.block(0))
    torch.testing.assert_close(block_output(decoder, block), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [*SCALED, "gemma4_text"])
def test_scaling_preserves_the_function_of_the_whole_model_before_rounding(architecture: str) -> None:
    decoder = decoder_of(architecture)
    changed = copy.deepcopy(decoder.model)
    blocks = changed.get_submodule(decoder.blocks_path)
    for index in range(len(decoder.blocks)):
        blocks[index] = randomly_scaled(architecture, index)[0]
    torch.testing.assert_close(logits(changed), logits(decoder.model), rtol=1e-4, atol=1e-4)


@every_architecture
def test_every_linear_is_scaled_by_what_its_site_reports(architecture: str) -> None:
    block, found = randomly_scaled(architecture)
    before = decoder_of(architecture).block(0)
    rows = {name: by for site in decoder_of(architecture).block_sites(0) for name, by in inverses(block, site, found)}
    for site in decoder_of(architecture).block_sites(0):
        scale = found[site.order].scale
        assert scale is not None
        for name in site.linears:
            expected = linear_of(before, name).weight.double() * scale / rows.get(name, torch.ones(()))
            torch.testing.assert_close(linear_of(block, name).weight.double(), expected, rtol=1e-5, atol=1e-7)


def inverses(block: nn.Module, site: Site, found: dict[int, ScaledSite]) -> list[tuple[str, Tensor]]:
    """Return the linear whose rows take up the inverse of a site's scale, and by what each is divided (rows, 1)."""
    makers = {"self_attn.o_proj": "v_proj", "self_attn.out_proj": "v_proj", "mlp.down_proj": "up_proj", "fc2": "fc1"}
    maker = makers.get(site.linears[0])
    scale = found[site.order].scale
    if maker is None or scale is None:
        return []
    name = ".".join([*site.linears[0].split(".")[:-1], maker])
    rows = linear_of(block, name).weight.shape[0]
    heads = scale.reshape(rows // 8, -1, 8) if maker == "v_proj" else scale.reshape(rows, 1, 1)
    return [(name, heads[:, 0].reshape(rows, 1))]


@every_architecture
def test_no_scale_is_trivial_where_it_is_forced_to_be_random(architecture: str) -> None:
    _, found = randomly_scaled(architecture)
    assert all(each.scale is not None and float(each.scale.log().std()) > 0.3 for each in found.values())


@every_architecture
def test_the_decoders_own_block_is_not_changed(architecture: str) -> None:
    before = bits(decoder_of(architecture).block(0))
    randomly_scaled(architecture)
    assert bits(decoder_of(architecture).block(0)) == before


# --- where the inverse goes ----------------------------------------------------------------------------------------


def folds_of(decoder: Decoder, block: nn.Module) -> dict[int, Fold]:
    def run(module: nn.Module) -> Tensor:
        return block_output(decoder, module)

    return find_folds(block, decoder.block_sites(0), run, head_size(decoder, 0))


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = [
    (QKV, "input_layernorm", "weight"),
    (("self_attn.o_proj",), "self_attn.v_proj", "rows"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "weight"),
    (("mlp.down_proj",), "mlp.up_proj", "rows"),
]
WITH_OFFSETS = [(linears, module, kind.replace("weight", "offset")) for linears, module, kind in GATED]
PLACES: dict[str, list[tuple[tuple[str, ...], str, str]]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen3": GATED,
    "gemma": WITH_OFFSETS,
    "gemma3_text": [
        (linears, module.replace("post_attention", "pre_feedforward"), kind) for linears, module, kind in WITH_OFFSETS
    ],
    "opt": [
        (QKV, "self_attn_layer_norm", "weight"),
        (("self_attn.out_proj",), "self_attn.v_proj", "rows"),
        (("fc1",), "final_layer_norm", "weight"),
        (("fc2",), "fc1", "rows"),
    ],
}


@every_architecture
def test_the_inverse_goes_into_what_makes_the_input(architecture: str) -> None:
    decoder = decoder_of(architecture)
    folds = folds_of(decoder, decoder.own_block(0))
    found = [(set(site.linears), folds[site.order].module, folds[site.order].kind) for site in decoder.block_sites(0)]
    assert found == [(set(linears), module, kind) for linears, module, kind in PLACES[architecture]]


@pytest.mark.parametrize("architecture", [*SCALED, "gemma2"])
def test_looking_for_folds_leaves_the_block_as_it_was_to_the_bit(architecture: str) -> None:
    decoder = decoder_of(architecture)
    block = decoder.own_block(0)
    before, parameters = bits(block), dict(block.named_parameters())
    folds_of(decoder, block)
    assert bits(block) == before
    assert all(block.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_an_activation_between_two_linears_that_is_not_homogeneous_takes_up_no_scale() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("phi", **shape, vocab_size=320, pad_token_id=0, initializer_range=0.3)
    decoder = make_decoder(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    folds = folds_of(decoder, decoder.own_block(0))
    places = {site.linears[-1]: folds[site.order].module for site in decoder.block_sites(0) if site.order in folds}
    assert places == {"mlp.fc1": "input_layernorm", "self_attn.dense": "self_attn.v_proj"}


def initialized(architecture: str, dtype: torch.dtype, spread: float) -> Decoder:
    """Return a random model with weights as small, or as large, as they are asked for."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 256, "ffn_dim": 256, "num_hidden_layers": 1, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "word_embed_proj_dim": 64}
    config = AutoConfig.for_model(
        architecture, **shape, initializer_range=spread, init_std=spread, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return make_decoder(AutoModelForCausalLM.from_config(config, dtype=dtype))


def scaled_linears(decoder: Decoder) -> tuple[set[str], set[str]]:
    """Return the last linear of every site of block 0 that can be scaled, and of every one that cannot."""
    block, sites = decoder.own_block(0), decoder.block_sites(0)
    storage = str(decoder.model.dtype).removeprefix("torch.")
    found = scale_block(decoder, block, sites, forced(sites, 0), by_peaks(), storage, None)
    names = {site.linears[-1]: found[site.order] for site in sites}
    assert all((each.note == NOT_FOLDED) == (each.scale is None) for each in names.values())
    return {n for n, each in names.items() if not each.note}, {n for n, each in names.items() if each.note}


every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_spread = pytest.mark.parametrize("spread", [0.004, 0.02, 0.1])


@every_spread
@every_precision
@pytest.mark.parametrize(
    ("architecture", "scaled", "others"),
    [
        ("starcoder2", {"self_attn.v_proj", "self_attn.o_proj", "mlp.c_fc"}, {"mlp.c_proj"}),
        ("phi", {"mlp.fc1", "self_attn.dense"}, {"mlp.fc2"}),
        (
            "gpt_neox",
            {"attention.query_key_value", "mlp.dense_h_to_4h"},
            {"attention.dense", "mlp.dense_4h_to_h"},  # values are a part of one linear with queries and keys
        ),
    ],
)
def test_what_a_gelu_makes_takes_up_no_scale_in_any_precision(
    architecture: str, scaled: set[str], others: set[str], dtype: torch.dtype, spread: float
) -> None:
    assert scaled_linears(initialized(architecture, dtype, spread)) == (scaled, others)


@every_spread
@every_precision
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "opt"])
def test_every_site_is_scaled_in_any_precision_where_all_can_be(
    architecture: str, dtype: torch.dtype, spread: float
) -> None:
    scaled, others = scaled_linears(initialized(architecture, dtype, spread))
    assert (len(scaled), others) == (4, set())


@every_precision
@pytest.mark.parametrize("architecture", ["starcoder2", "llama"])
def test_scaling_changes_a_blocks_output_by_no_more_than_its_precision(architecture: str, dtype: torch.dtype) -> None:
    decoder = initialized(architecture, dtype, 0.1)
    block, sites = decoder.own_block(0), decoder.block_sites(0)
    scale_block(decoder, block, sites, forced(sites, 0), by_peaks(), str(dtype).removeprefix("torch."), None)
    before, after = (block_output(wide(decoder), each.float()) for each in (decoder.own_block(0), block))
    assert (after - before).norm() <= 2 * torch.finfo(dtype).eps * before.norm()


def wide(decoder: Decoder) -> Decoder:
    return make_decoder(copy.deepcopy(decoder.model).float())


def test_heads_that_share_keys_and_values_read_the_rows_of_their_values() -> None:
    decoder = decoder_of("llama")  # 4 heads of 8 share 2 of keys and values
    row = folds_of(decoder, decoder.own_block(0))[1].row.tolist()
    assert row == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_heads_that_share_keys_and_values_share_a_scale(architecture: str) -> None:
    _, found = randomly_scaled(architecture)
    scale = found[1].scale
    assert scale is not None
    heads = scale.reshape(2, 2, 8)  # groups, heads of a group, channels
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0, 0], heads[1, 0])


def test_channels_that_share_a_row_get_the_geometric_mean_of_their_scales() -> None:
    fold = Fold("v_proj", "rows", torch.tensor([0, 1, 0, 1, 2]))
    found = fold.shared(torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]).double())
    np.testing.assert_allclose(found.numpy(), [2, 4, 2, 4, 3], rtol=1e-14)


def test_a_norm_that_adds_one_to_its_weight_takes_up_the_inverse_of_the_sum() -> None:
    block = nn.Module()
    block.norm, block.linear = nn.Module(), nn.Linear(3, 2, bias=False)
    block.norm.weight = nn.Parameter(torch.tensor([0.0, 1.0, -0.5]))
    before = block.linear.weight.detach().clone()
    scale = torch.tensor([2.0, 4.0, 0.5]).double()
    with torch.no_grad():
        apply_scale(block, Site(0, 0, ("linear",), 3), Fold("norm", "offset", torch.arange(3)), scale)
    assert block.norm.weight.tolist() == [-0.5, -0.5, 0.0]
    assert torch.equal(block.linear.weight, before * scale)


def norms_as_used(decoder: Decoder, block: nn.Module) -> dict[int, Tensor]:
    """Return what each norm of a block that takes up a scale multiplies its channels by, by the site's order."""
    folds = {order: fold for order, fold in folds_of(decoder, decoder.own_block(0)).items() if fold.kind != "rows"}
    added = {order: 1.0 if fold.kind == "offset" else 0.0 for order, fold in folds.items()}
    return {o: block.get_submodule(fold.module).weight.detach().double() + added[o] for o, fold in folds.items()}


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma3_text", "opt"])
def test_weights_are_multiplied_by_what_their_norm_undoes_as_a_checkpoint_keeps_it(
    architecture: str, storage: Dtype
) -> None:
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    decoder = make_decoder(model)
    block, plain, sites = decoder.own_block(0), decoder.own_block(0), decoder.block_sites(0)
    for each in (block, plain):
        round_parameters(each, storage)
    found = scale_block(decoder, block, sites, forced(sites, 0), by_peaks(), storage, None)
    round_parameters(block, storage)
    before, after = norms_as_used(decoder, plain), norms_as_used(decoder, block)
    assert len(after) == 2
    for order, norm in after.items():
        scale = found[order].scale
        assert scale is not None
        torch.testing.assert_close(norm * scale, before[order], rtol=1e-6, atol=0.0)
    queries, scaled = (linear_of(each, "self_attn.q_proj").weight for each in (plain, block))
    assert found[0].scale is not None
    assert torch.equal(scaled, (queries.double() * found[0].scale).float().to(DTYPES[storage]).float())


def with_norm(weight: list[float], dtype: torch.dtype = torch.float32) -> nn.Module:
    block = nn.Module()
    block.norm = nn.Module()
    block.norm.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
    return block


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_a_channel_that_its_norm_would_lose_is_not_scaled(dtype: torch.dtype, step: float) -> None:
    """1 + weight divided by its scale is less than half of the last place of weights near -1, or more, or 0 itself."""
    block, scale = with_norm([step - 1.0, step - 1.0, -1.0]), torch.tensor([4.0, 1.25, 3.0]).double()
    found = undone_scale(block, Fold("norm", "offset", torch.arange(3)), scale, dtype)
    assert found.tolist() == [1.0, 1.0, 1.0]


def test_a_channel_that_would_overflow_in_its_norm_is_not_scaled() -> None:
    fold, scale = Fold("norm", "weight", torch.arange(2)), torch.tensor([2.0**-8, 2.0**-6]).double()
    assert undone_scale(with_norm([512.0, 512.0]), fold, scale, torch.float16).tolist() == [1.0, 2.0**-6]


@pytest.mark.parametrize("kind", ["weight", "offset"])
def test_norms_in_float32_undo_the_very_scale_that_was_asked_for(kind: str) -> None:
    scale = torch.tensor([1.7, 0.3, 11.0]).double()
    fold = Fold("norm", kind, torch.arange(3))
    assert torch.equal(undone_scale(with_norm([0.3, -0.2, 0.7]), fold, scale, torch.float32), scale)
    narrow = with_norm([0.3, -0.2, 0.7], torch.bfloat16)
    assert not torch.equal(undone_scale(narrow, fold, scale, torch.float32), scale)


def test_an_experts_inputs_are_not_scaled_but_what_its_down_projection_reads_is() -> None:
    settings = Quantization(method="awq", bits=3, group_size=16, gram={"expert_tokens": 1})
    block = next(quantize_blocks(decoder_of("mixtral"), SAMPLES, settings, "float32"))
    notes = {report.name.removeprefix("model.layers.0."): report.note for report in block.reports}
    experts = [[notes[f"mlp.experts.{n}.{part}_proj"] for part in ("gate", "up", "down")] for n in range(EXPERTS)]
    assert experts == [[NOT_FOLDED, NOT_FOLDED, ""]] * EXPERTS
    assert {notes[name] for name in (*QKV, "self_attn.o_proj")} == {""}


def test_a_site_that_no_token_reached_is_not_scaled() -> None:
    decoder = decoder_of("llama")
    block, sites = decoder.own_block(0), decoder.block_sites(0)
    before = bits(block)
    found = scale_block(decoder, block, sites, {}, by_peaks(), "float32", None)
    assert {(each.scale, each.note) for each in found.values()} == {(None, "inputs are not scaled: none were seen")}
    assert bits(block) == before


# --- the search ----------------------------------------------------------------------------------------------------


def calibration_of(decoder: Decoder) -> Calibration:
    return start_calibration(
        decoder, SAMPLES, by_sequence=False, compares=False, storage_dtype="float32", memory=IN_MEMORY
    )


def uneven() -> Decoder:
    """Return a model whose sites read a few channels that are far larger than the others."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 17]] = 12.0
            layer.mlp.up_proj.weight[5] *= 10
            layer.self_attn.v_proj.weight[2] *= 10
    return make_decoder(model)


def searched(search: str, loss: str, **fields: Any) -> tuple[Decoder, Calibration, dict[int, ScaledSite]]:
    settings = Quantization(
        method="gptq", bits=3, group_size=16, rounding="nearest", scaling={"search": search, "loss": loss, **fields}
    )
    decoder = uneven()
    running = calibration_of(decoder)
    sites = decoder.block_sites(0)
    sums = block_sums(decoder.block(0), sites, running, Wanted(magnitude=True))
    statistics = {order: each.statistics() for order, each in sums.items()}
    block = decoder.own_block(0)
    return decoder, running, scale_block(decoder, block, sites, statistics, settings, "float32", running)


def calls_of(decoder: Decoder, name: str) -> list[tuple[Any, Any]]:
    """Return the arguments of a module of block 0 for each sample, in the model's own forward pass."""
    seen: list[tuple[Any, Any]] = []
    module = decoder.block(0).get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.inference_mode():
        for sample in SAMPLES:
            decoder.model(input_ids=token_tensor([sample], CPU), use_cache=False)
    hook.remove()
    return seen


def module_outputs(decoder: Decoder, name: str, change: Callable[[nn.Module], None]) -> Tensor:
    """Return what a module of block 0 gives for all samples when the block was changed, float64 (tokens, width)."""
    block = decoder.own_block(0)
    change(block)
    module = block.get_submodule(name)
    with torch.inference_mode():
        outputs = [module(*args, **kwargs) for args, kwargs in calls_of(decoder, name)]
    plain = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return torch.cat([output.reshape(-1, output.shape[-1]).double() for output in plain])


def rounded_linears(site: Site, scale: Tensor) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name in site.linears:
            weight = linear_of(block, name).weight
            weight.data = rounded_under(weight.data, scale, GRID).to(weight.dtype)

    return change


def objective(decoder: Decoder, site: Site, loss: str, scale: Tensor) -> float:
    """Return what a scale is judged by, from the model's own forward passes in float64."""
    if loss == "module":
        name = inspected_module(site)
        expected = module_outputs(decoder, name, lambda block: None)
        found = module_outputs(decoder, name, rounded_linears(site, scale))
        return float((found - expected).square().mean())
    x = torch.cat([args[0].reshape(-1, site.channels).double() for args, _ in calls_of(decoder, site.linears[0])])
    weights = [linear_of(decoder.block(0), name).weight.double() for name in site.linears]
    changed = [rounded_under(weight, scale, GRID).double() - weight for weight in weights]
    return sum(float((x @ change.T).square().sum()) for change in changed) / len(x)


@pytest.mark.parametrize("loss", ["linear", "module"])
@pytest.mark.parametrize("search", ["awq", "duo"])
def test_a_searched_scale_never_loses_to_no_scaling_on_its_own_objective(search: str, loss: str) -> None:
    decoder, _, found = searched(search, loss)
    for site in decoder.block_sites(0):
        scale = found[site.order].scale
        assert scale is not None
        with_it = objective(decoder, site, loss, scale)
        without = objective(decoder, site, loss, torch.ones(site.channels).double())
        assert with_it <= without * (1 + 1e-5)


@pytest.mark.parametrize("loss", ["linear", "module"])
@pytest.mark.parametrize("search", ["awq", "duo"])
def test_where_a_few_channels_are_large_scaling_wins(search: str, loss: str) -> None:
    decoder, _, found = searched(search, loss)
    site = decoder.block_sites(0)[0]
    scale = found[0].scale
    assert scale is not None
    without = objective(decoder, site, loss, torch.ones(WIDTH).double())
    assert objective(decoder, site, loss, scale) < 0.8 * without
    assert min(float(scale[3]), float(scale[17])) > float(scale.median())


@pytest.mark.parametrize("loss", ["linear", "module"])
def test_the_power_of_the_search_is_the_best_of_those_tried(loss: str) -> None:
    decoder, running, found = searched("awq", loss, steps=5)
    site = decoder.block_sites(0)[2]  # an input whose channels share no row
    sums = block_sums(decoder.block(0), [site], running, Wanted(magnitude=True))[2].statistics()
    assert sums.magnitude is not None
    losses = {}
    for power in (0.0, 0.2, 0.4, 0.6, 0.8):
        scale = sums.magnitude.pow(power)
        losses[power] = objective(decoder, site, loss, scale / (scale.max() * scale.min()).sqrt())
    assert found[2].power == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("site", range(4))
def test_the_module_loss_is_the_mean_squared_error_of_the_modules_output(site: int) -> None:
    decoder = uneven()
    place = decoder.block_sites(0)[site]
    loss = module_loss(decoder.own_block(0), place, calibration_of(decoder), GRID)
    for seed in range(3):
        scale = torch.randn(place.channels, generator=torch.Generator().manual_seed(seed)).mul(0.5).exp()
        assert loss(scale) == pytest.approx(objective(decoder, place, "module", scale), rel=1e-4)


def test_the_scale_of_an_expert_is_judged_by_its_gram_matrix_and_no_other_by_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Site] = []
    monkeypatch.setattr(
        input_scaling, "module_loss", lambda block, site, *rest: asked.append(site) or module_loss(block, site, *rest)
    )
    decoder, powers = decoder_of("mixtral"), {}
    for loss in ("linear", "module"):
        scaling, gram = {"search": "awq", "loss": loss}, {"expert_tokens": 1}
        settings = Quantization(method="awq", bits=3, group_size=16, scaling=scaling, gram=gram)
        reports = next(quantize_blocks(decoder, SAMPLES, settings, "float32")).reports
        powers[loss] = {report.name: report.scaling for report in reports if ".down_proj" in report.name}
    assert [site.linears[-1] for site in asked] == ["self_attn.v_proj", "self_attn.o_proj"]
    assert len(powers["module"]) == EXPERTS
    assert powers["module"] == powers["linear"]


def test_the_module_loss_leaves_the_block_as_it_was() -> None:
    decoder = uneven()
    block = decoder.own_block(0)
    before = bits(block)
    module_loss(block, decoder.block_sites(0)[0], calibration_of(decoder), GRID)(torch.full((WIDTH,), 2.0))
    assert bits(block) == before


@pytest.mark.parametrize(
    ("linears", "expected"),
    [
        (QKV, "self_attn"),
        (("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        (("self_attn.o_proj",), "self_attn.o_proj"),
        (("mlp.down_proj",), "mlp.down_proj"),
        (("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj"), "mlp.experts.3"),
        (("self_attn.q_proj", "mlp.fc1"), ""),
        (("fc1",), "fc1"),
    ],
)
def test_what_is_inspected_is_the_module_around_the_linears_or_the_only_one(
    linears: tuple[str, ...], expected: str
) -> None:
    assert inspected_module(Site(0, 0, linears, 8)) == expected


@pytest.mark.parametrize("search", ["awq", "duo", "smooth"])
def test_the_chosen_power_is_in_the_report_of_every_linear(search: str) -> None:
    settings = Quantization(method="gptq", bits=3, group_size=16, rounding="nearest", scaling=search)
    for block in quantize_blocks(decoder_of("llama"), SAMPLES, settings, "float32"):
        assert all(0 <= report.scaling <= 1 and not report.note for report in block.reports)


def test_without_scaling_there_is_no_power_in_the_report() -> None:
    settings = Quantization(method="gptq", bits=3, group_size=16)
    block = next(quantize_blocks(decoder_of("llama"), SAMPLES, settings, "float32"))
    assert all(math.isnan(report.scaling) for report in block.reports)


@pytest.mark.parametrize("architecture", SCALED)
def test_what_a_scale_was_folded_into_is_with_the_rest_of_the_block(architecture: str) -> None:
    settings = Quantization(method="gptq", bits=8, group_size=16, rounding="nearest", scaling={"search": "smooth"})
    decoder = decoder_of(architecture)
    block = next(quantize_blocks(decoder, SAMPLES, settings, "float32"))
    place = PLACES[architecture][0][1]
    name = f"{decoder.blocks_path}.0.{place}.weight"
    assert not torch.equal(block.others[name], decoder.model.get_parameter(name))


class GroupedBlock(nn.Module):
    """A block with a linear that computes in two groups of rows, each from inputs of its own."""

    class Grouped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...gi,goi->...go", x.unflatten(-1, (2, -1)), self.weight.unflatten(0, (2, -1)))

    def __init__(self) -> None:
        super().__init__()
        self.grouped = self.Grouped(16, 64, bias=False)
        self.mixing = nn.Linear(64, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mixing(self.grouped(hidden).flatten(-2))


def test_no_scale_goes_into_a_linear_that_returns_its_outputs_in_groups() -> None:
    block, hidden = GroupedBlock(), torch.randn(3, 32)
    site = Site(0, 0, ("mixing",), 64)
    assert find_folds(block, [site], lambda module: module(hidden).detach(), 16) == {}
