"""Choices of the walk over blocks: how sequences weigh, what is compared with the original, what the pool adds."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from covercal import quantization
from covercal.block_pass import BlockPass
from covercal.calibration import block_sums, round_parameters
from covercal.decoder import Decoder, linear_of, make_decoder, token_tensor
from covercal.errors import QuantizationError
from covercal.gram import SiteStatistics, SiteSums, Wanted
from covercal.hidden_states import HiddenStates
from covercal.input_scaling import ScaledSite, scale_block
from covercal.quantization import (
    VALIDATED_ALONE,
    PoolSource,
    QuantizedBlock,
    QuantizedLinear,
    Resumed,
    dequantized,
    quantize_blocks,
    quantize_one_block,
)
from covercal.quantization_settings import PRESETS, Dtype, Quantization
from covercal.quantizers.grid import GridSettings, min_max_grid
from covercal.quantizers.pieces import Solved
from covercal.quantizers.solver import NOTHING_HELD_OUT, solve_site
from tests.covercal.rounding import RoundingSettings, gptq
from tests.covercal.walks import (
    POOL,
    SummedPool,
    comparable,
    linear_bits,
    linears_of,
    logits,
    quantized_model,
    reports_of,
)
from tests.tiny import BLOCKS, WIDTH, random_tokens, tiny_model

CPU = torch.device("cpu")
Tokens = npt.NDArray[np.int32]
EQUAL = random_tokens(6, 20, 1)
MIXED = [*random_tokens(3, 24, 1), *random_tokens(4, 9, 2), *random_tokens(2, 15, 3)]
FIRST = "model.layers.0.self_attn.q_proj"
SITES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]  # a linear of each


def choices(method: str = "gptq", **fields: Any) -> Quantization:
    grid = {} if method.startswith("w8a8") else {"bits": 3, "group_size": 16}
    return Quantization(method=method, **{**grid, **fields})


@cache
def decoder_of(architecture: str) -> Decoder:
    return make_decoder(tiny_model(architecture))


def walk(
    settings: Quantization,
    samples: Sequence[Tokens] = MIXED,
    storage: Dtype = "float32",
    architecture: str = "llama",
    pool: PoolSource | None = None,
) -> list[QuantizedBlock]:
    return list(quantize_blocks(decoder_of(architecture), samples, settings, storage, pool=pool))


def codes_of(blocks: Sequence[QuantizedBlock]) -> dict[str, tuple[Any, ...]]:
    return {name: linear_bits(linear) for name, linear in linears_of(blocks).items()}


def inputs_of(model: PreTrainedModel, name: str, samples: Sequence[Tokens]) -> list[Tensor]:
    """Return what a linear reads of each sample in the model's own forward pass, float64 (tokens, channels)."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).double())

    hook = model.get_submodule(name).register_forward_pre_hook(note)
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=token_tensor([sample], CPU), use_cache=False)
    hook.remove()
    return seen


def expected_codes(name: str, gram: Tensor, **rounding: Any) -> Tensor:
    weight = decoder_of("llama").model.get_submodule(name).weight.detach().double()
    grid = min_max_grid(weight, GridSettings(3, 16, symmetric=False, scale_dtype=torch.float32))
    return gptq(weight, gram, grid, RoundingSettings(**rounding)).codes.to(torch.uint8)


# --- how sequences weigh (MaCa) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_weighing_sequences_is_gptq_to_the_bit_when_all_have_one_length(architecture: str) -> None:
    found = walk(choices("maca"), EQUAL, "bfloat16", architecture)
    assert comparable(found) == comparable(walk(choices("gptq"), EQUAL, "bfloat16", architecture))


def test_weighing_sequences_is_not_gptq_when_lengths_differ() -> None:
    maca, plain = codes_of(walk(choices("maca"))), codes_of(walk(choices("gptq")))
    assert maca[FIRST] != plain[FIRST]


def test_with_maca_every_sequence_weighs_the_same_whatever_its_length() -> None:
    inputs = inputs_of(decoder_of("llama").model, FIRST, MIXED)
    gram = sum(x.T @ x / len(x) for x in inputs) / len(inputs)
    found = linears_of(walk(choices("maca")))[FIRST].codes
    assert torch.equal(found, expected_codes(FIRST, torch.as_tensor(gram)))


def test_with_gptq_every_token_weighs_the_same() -> None:
    x = torch.cat(inputs_of(decoder_of("llama").model, FIRST, MIXED))
    assert torch.equal(linears_of(walk(choices("gptq")))[FIRST].codes, expected_codes(FIRST, x.T @ x))


def test_sequences_of_3_and_7_tokens_are_each_divided_by_their_length() -> None:
    """Two sequences of lengths 3 and 7: X1^T X1 / 3 + X2^T X2 / 7 (GPTQModel's test of its MaCa mode)."""
    samples = [MIXED[0][:3], MIXED[1][:7]]
    short, long = inputs_of(decoder_of("llama").model, FIRST, samples)
    found = linears_of(walk(choices("maca", shrinkage=0.3), samples))[FIRST].codes
    assert torch.equal(found, expected_codes(FIRST, short.T @ short / 3 + long.T @ long / 7, shrinkage=0.3))


# --- nested lengths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "maca", "coreq", "awq"])
def test_prefixes_calibrate_on_every_sample_cut_to_every_length(method: str) -> None:
    cut = [sample[:length] for sample in EQUAL for length in (6, 13, 20)]
    found = walk(choices(method, gram={"prefixes": [6, 13, 20]}), EQUAL)
    assert comparable(found) == comparable(walk(choices(method), cut))


def test_a_prefix_that_is_longer_than_a_sample_is_left_out_for_it() -> None:
    cut = [sample[:length] for sample in MIXED for length in (8, 15) if length <= len(sample)]
    found = walk(choices(gram={"prefixes": [8, 15]}))
    assert comparable(found) == comparable(walk(choices(), cut))
    assert reports_of(found)[FIRST].tokens == sum(map(len, cut))


def test_all_prefixes_of_a_sample_are_held_out_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = choices(shrinkage="validated", gram={"prefixes": [8, 12, 15]})
    found = Walked(monkeypatch, settings).statistics[0]
    kept = [[s[:length] for length in (8, 12, 15) if length <= len(s)] for s in MIXED]
    held_out = [inputs_of(decoder_of("llama").model, FIRST, prefixes) for prefixes in (kept[3], kept[7])]
    x = torch.cat([inputs for sample in held_out for inputs in sample])
    assert found.validation is not None
    torch.testing.assert_close(found.validation.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_samples_that_are_shorter_than_any_prefix_do_not_count_among_those_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = choices(shrinkage="validated", gram={"prefixes": [12, 15]})  # leaves out four of nine
    found = Walked(monkeypatch, settings).statistics[0]
    x = torch.cat(inputs_of(decoder_of("llama").model, FIRST, [MIXED[7][:12], MIXED[7]]))
    assert found.validation is not None
    torch.testing.assert_close(found.validation.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_the_ledoit_wolf_share_of_prefixes_is_that_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = choices(shrinkage="ledoit_wolf", gram={"prefixes": [15, 8, 12]})
    found = Walked(monkeypatch, settings).statistics[0]
    sums = SiteSums(WIDTH, CPU, Wanted(spread=True))
    for number, sample in enumerate(MIXED):
        prefixes = [sample[:length] for length in (15, 8, 12) if length <= len(sample)]
        x = torch.cat(inputs_of(decoder_of("llama").model, FIRST, prefixes))
        sums.add(x[None], samples=[number])
    assert found.ledoit_wolf == pytest.approx(sums.statistics().ledoit_wolf, rel=1e-4)


@pytest.mark.parametrize(
    ("samples", "prefixes", "message"),
    [
        (MIXED, [50, 60], "There is no calibration sample of at least 50 tokens (quantization.gram.prefixes)."),
        ([], [8], "There is no calibration sample of at least 8 tokens (quantization.gram.prefixes)."),
        ([], [], "There is no calibration sample."),
    ],
)
def test_no_sample_to_calibrate_on_is_an_error(samples: list[Tokens], prefixes: list[int], message: str) -> None:
    with pytest.raises(QuantizationError, match=f"^{re.escape(message)}$"):
        walk(choices(gram={"prefixes": prefixes}), samples)


# --- compared with the original (CoreQ, GPTAQ) ---------------------------------------------------------------------

COMPARING = ["coreq", "k_coreq", "gptaq", "covercal"]


def aiming_at_the_weights(method: str) -> Quantization:
    """Return a preset's choices but its target."""
    return choices("gptq", **{name: value for name, value in PRESETS[method].items() if name != "target"})


@pytest.mark.parametrize("method", COMPARING)
def test_nothing_has_drifted_at_the_first_site(method: str) -> None:
    found, plain = walk(choices(method)), walk(aiming_at_the_weights(method))
    assert linear_bits(linears_of(found)[FIRST]) == linear_bits(linears_of(plain)[FIRST])
    assert reports_of(found)[FIRST].alpha == (0.25 if method == "gptaq" else 0.0)


def test_at_the_first_site_only_the_storage_dtype_has_drifted() -> None:
    found = reports_of(walk(choices("coreq"), storage="bfloat16"))
    assert 0 < found[FIRST].alpha <= 1
    assert all(0 <= report.alpha <= 1 for report in found.values())


@pytest.mark.parametrize("method", COMPARING)
def test_later_sites_aim_at_something_else_than_the_weights(method: str) -> None:
    found, plain = walk(choices(method)), walk(aiming_at_the_weights(method))
    name = "model.layers.2.self_attn.q_proj"
    assert codes_of(found)[name] != codes_of(plain)[name]


def test_what_undoes_the_drift_may_be_rounded_to_nearest() -> None:
    found = codes_of(walk(choices("rtn", target="coreq")))
    nearest = codes_of(walk(choices("rtn")))
    assert found[FIRST] == nearest[FIRST]
    assert found["model.layers.2.mlp.down_proj"] != nearest["model.layers.2.mlp.down_proj"]


def drift_of(behind: PreTrainedModel, original: PreTrainedModel, name: str) -> SiteStatistics:
    """Return what a site's inputs are behind the quantised prefix, and how they differ from the original model's."""
    x, y = (torch.cat(inputs_of(model, name, MIXED)) for model in (behind, original))
    return SiteStatistics(
        gram=x.T @ x / len(x),
        drift=(y - x).T @ x / len(x),
        drift_energy=(y - x).T @ (y - x) / len(x),
        tokens=len(x),
    )


def before(blocks: Sequence[QuantizedBlock], name: str) -> list[QuantizedLinear]:
    """Return the linears of all sites before that of a linear, in order of execution."""
    decoder = decoder_of("llama")
    (place,) = (i for i, s in enumerate(decoder.sites) if name in {decoder.full_name(s, each) for each in s.linears})
    earlier = {decoder.full_name(site, each) for site in decoder.sites[:place] for each in site.linears}
    return [linear for linear in linears_of(blocks).values() if linear.name in earlier]


def replaced(linears: Sequence[QuantizedLinear]) -> PreTrainedModel:
    model = tiny_model("llama")
    for linear in linears:
        model.get_submodule(linear.name).weight.data = dequantized(linear, torch.float32)
    return model


def solved_with(statistics: SiteStatistics, name: str, settings: Quantization) -> Solved:
    weight = decoder_of("llama").model.get_submodule(name).weight.detach()
    return solve_site([weight], statistics, settings, torch.float32).weights[0]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("method", ["coreq", "gptaq"])
def test_a_later_site_reads_how_far_its_inputs_have_drifted(method: str, block: int, site: str) -> None:
    name, settings = f"model.layers.{block}.{site}", choices(method)
    blocks = walk(settings)
    expected = solved_with(drift_of(replaced(before(blocks, name)), decoder_of("llama").model, name), name, settings)
    report = reports_of(blocks)[name]
    assert report.alpha == pytest.approx(expected.alpha, rel=1e-4, abs=1e-9)
    agreement = (linears_of(blocks)[name].codes == expected.codes).double().mean()
    assert agreement > 0.99  # drift in float32: a value on an edge may go either way


def test_the_share_that_can_be_undone_is_that_of_the_drift_of_the_outputs() -> None:
    name = "model.layers.2.mlp.down_proj"
    blocks = walk(choices("coreq"))
    found = drift_of(replaced(before(blocks, name)), decoder_of("llama").model, name)
    assert found.gram is not None
    weight = decoder_of("llama").model.get_submodule(name).weight.detach().double()
    x, y = (torch.cat(inputs_of(m, name, MIXED)) for m in (replaced(before(blocks, name)), decoder_of("llama").model))
    damped = found.gram + 0.01 * found.gram.diagonal().mean() * torch.eye(len(found.gram)).double()
    drifted = weight @ (y - x).T
    direction = drifted @ x / len(x)  # W D
    share = float((torch.linalg.solve(damped, direction.T).T * direction).sum() / (drifted.square().sum() / len(x)))
    assert reports_of(blocks)[name].alpha == pytest.approx(share, rel=1e-3)


def test_undoing_nothing_of_the_drift_is_gptq() -> None:
    found = walk(choices("coreq", target={"kind": "coreq", "alpha": 0.0}), storage="bfloat16")
    assert codes_of(found) == codes_of(walk(choices("gptq"), storage="bfloat16"))


def test_undoing_nothing_of_the_drift_within_the_rounding_is_gptq() -> None:
    found = walk(choices("gptaq", target={"kind": "gptaq", "alpha": 0.0}), storage="bfloat16")
    assert codes_of(found) == codes_of(walk(choices("gptq"), storage="bfloat16"))


@pytest.mark.parametrize("method", COMPARING)
def test_undoing_drift_brings_the_last_blocks_outputs_closer_to_the_originals(method: str) -> None:
    original = logits_of_calibration(decoder_of("llama").model)

    def distance(settings: Quantization) -> float:
        model = quantized_model(decoder_of("llama").model, walk(settings), settings, "float32")
        return float((logits_of_calibration(model) - original).square().mean())

    assert distance(choices(method)) < distance(aiming_at_the_weights(method))


def logits_of_calibration(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return torch.cat(
            [model(input_ids=token_tensor([sample], CPU), use_cache=False).logits[0].double() for sample in MIXED]
        )


def through_a_file(hidden: Sequence[Tensor], path: Path) -> tuple[Tensor, ...]:
    save_file({str(number): each.contiguous() for number, each in enumerate(hidden)}, path)
    found = load_file(path)
    return tuple(found[str(number)] for number in range(len(found)))


@pytest.mark.parametrize("method", [*COMPARING, "awq"])
@pytest.mark.parametrize(
    ("architecture", "storage"), [("llama", "float32"), ("gemma2", "bfloat16"), ("gemma4_text", "bfloat16")]
)
def test_a_walk_beside_the_original_is_resumed_at_any_block_with_the_same_bits(
    architecture: str, storage: Dtype, method: str, tmp_path: Path
) -> None:
    whole = walk(choices(method), MIXED, storage, architecture)
    streams = 2 if method in COMPARING else 1
    assert [len(block.leaving) for block in whole] == [*[streams] * (len(whole) - 1), 0]
    for first in range(1, len(whole)):
        entering = tuple(through_a_file(list(stream), tmp_path / "leaving") for stream in whole[first - 1].leaving)
        resumed = Resumed(first, entering)
        rest = quantize_blocks(decoder_of(architecture), MIXED, choices(method), storage, resumed)
        assert comparable(list(rest)) == comparable(whole[first:]), first


@pytest.mark.parametrize("method", COMPARING)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gemma4_text"])
def test_a_walk_beside_the_original_gives_the_same_bits_when_memory_keeps_nothing(
    architecture: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = walk(choices(method), MIXED, "bfloat16", architecture)
    monkeypatch.setattr("covercal.calibration.KEPT_SHARE", 0.0)
    assert comparable(walk(choices(method), MIXED, "bfloat16", architecture)) == comparable(kept)


def test_what_leaves_a_block_of_the_original_is_what_leaves_it_in_the_original_model() -> None:
    blocks, model = walk(choices("coreq")), decoder_of("llama").model
    entered: list[Tensor] = []
    hook = model.model.layers[2].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.inference_mode():
        for length in sorted({len(sample) for sample in MIXED}):
            model(input_ids=token_tensor([s for s in MIXED if len(s) == length], CPU), use_cache=False)
    hook.remove()
    for found, expected in zip(blocks[1].leaving[1], entered, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- what is cached of the pool ------------------------------------------------------------------------------------


@cache
def pool_of(architecture: str) -> SummedPool:
    return SummedPool(decoder_of(architecture))


def pool_gram(name: str) -> Tensor:
    x = torch.cat(inputs_of(decoder_of("llama").model, name, POOL))
    return x.T @ x / len(x)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("block", [0, 2])
def test_with_the_pools_gram_matrix_every_linear_is_calibrated_on_the_originals_inputs(block: int, site: str) -> None:
    name = f"model.layers.{block}.{site}"
    found = linears_of(walk(choices("gptq", gram="pool"), [], pool=pool_of("llama")))[name].codes
    assert (found == expected_codes(name, pool_gram(name))).double().mean() > 0.99  # the cached matrix is float32


def test_with_the_pools_gram_matrix_a_block_by_itself_is_the_block_of_the_walk() -> None:
    settings, decoder = choices("cached", scaling="awq"), decoder_of("llama")
    whole = walk(settings, [], "bfloat16", pool=pool_of("llama"))
    alone = [quantize_one_block(decoder, index, settings, "bfloat16", pool_of("llama")) for index in range(BLOCKS)]
    assert comparable(alone) == comparable(whole)


def test_settings_that_calibrate_are_not_taken_for_a_block_by_itself() -> None:
    with pytest.raises(ValueError, match="behind the quantised prefix"):
        quantize_one_block(decoder_of("llama"), 0, choices("gptq"), "float32", None)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_blend_is_the_mean_of_both_gram_matrices(share: float) -> None:
    x = torch.cat(inputs_of(decoder_of("llama").model, FIRST, MIXED))
    mixed = (1 - share) * x.T @ x / len(x) + share * pool_gram(FIRST)
    settings = choices("gptq", gram={"source": "blend", "pool_share": share})
    found = linears_of(walk(settings, pool=pool_of("llama")))[FIRST].codes
    assert (found == expected_codes(FIRST, mixed)).double().mean() > 0.99


def test_shrinkage_towards_the_pool_goes_towards_its_mean_squares() -> None:
    x = torch.cat(inputs_of(decoder_of("llama").model, FIRST, MIXED))
    moved = 0.6 * x.T @ x / len(x) + 0.4 * 50.0 * torch.eye(x.shape[1]).double()
    settings = choices("gptq", shrinkage={"strength": 0.4, "towards": "pool"})
    found = linears_of(walk(settings, pool=SummedPool(decoder_of("llama"), energy=50.0)))[FIRST].codes
    assert torch.equal(found, expected_codes(FIRST, moved))


def test_the_ledoit_wolf_share_of_a_blend_is_that_of_the_calibration_samples() -> None:
    settings = [choices(shrinkage="ledoit_wolf", gram=source) for source in ("calibration", "blend")]
    plain, blend = (reports_of(walk(each, pool=pool_of("llama")))[FIRST].shrinkage for each in settings)
    assert 0 < plain < 1
    assert blend == plain


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_with_the_pools_gram_matrix_quantised_activations_change_no_weight(activations: str) -> None:
    plain = walk(choices(gram="pool"), [], pool=pool_of("llama"))
    found = linears_of(walk(choices(gram="pool", activations=activations), pool=pool_of("llama")))
    for name, linear in linears_of(plain).items():
        assert torch.equal(found[name].codes, linear.codes)
        assert torch.equal(found[name].scale, linear.scale)


def test_with_the_pools_gram_matrix_the_first_static_step_is_that_of_the_calibration_samples() -> None:
    largest = max(float(x.abs().max()) for x in inputs_of(decoder_of("llama").model, FIRST, MIXED))
    found = linears_of(walk(choices(gram="pool", activations="static"), pool=pool_of("llama")))[FIRST]
    assert found.input_scale is not None
    assert float(found.input_scale) == pytest.approx(largest / 127, rel=1e-6)


def test_a_pool_of_which_nothing_was_held_out_is_noted_for_every_linear() -> None:
    found = reports_of(walk(choices("cached", shrinkage="validated"), [], pool=pool_of("llama")))
    assert {report.note for report in found.values()} == {NOTHING_HELD_OUT}


@pytest.mark.parametrize(("count", "note"), [(3, NOTHING_HELD_OUT), (4, "")])
def test_fewer_samples_than_some_could_be_held_out_of_are_noted_for_every_linear(count: int, note: str) -> None:
    found = reports_of(walk(choices("sarqc_gbs"), MIXED[:count]))
    assert {report.note for report in found.values()} == {note}


@pytest.mark.parametrize(("count", "note"), [(3, NOTHING_HELD_OUT), (4, VALIDATED_ALONE)])
def test_a_blend_with_a_pool_of_which_nothing_was_held_out_is_noted_for_every_linear(count: int, note: str) -> None:
    found = reports_of(walk(choices(shrinkage="validated", gram="blend"), MIXED[:count], pool=pool_of("llama")))
    assert {report.note for report in found.values()} == {note}


def test_settings_that_read_the_pool_say_so_when_there_is_none() -> None:
    with pytest.raises(ValueError, match="read what is cached of the pool"):
        walk(choices("cached"), [])


# --- what is not in a key ------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "": {"activation_order": False},
    "ranges": {"shrink": 0.7, "steps": 5},
    "scaling": {"loss": "module", "steps": 4, "regularization": "identity", "strength": 0.1, "power": 0.8},
    "gram": {"pool_share": 0.2, "weight": "sequence", "expert_tokens": 4, "prefixes": (6, 11)},
    "shrinkage": {"strength": 0.4, "towards": "pool"},
    "damping": {"strength": 0.3, "weights": "saliency", "gamma": 0.35},
    "target": {"alpha": 0.6},
    "rounding": {"width": 2},
    "salient": {"bits": 8, "scope": "row", "clip": 0.8},
    "activations": {"bits": 6, "ranges": "mse", "percentile": 90, "source": "statistics"},
}
BASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in PRESETS},
    "rtn, mse": {"method": "rtn", "ranges": "mse"},
    "rtn, output": {"method": "rtn", "ranges": "output"},
    "rtn, polished": {"method": "rtn", "rounding": {"polish": 1}},
    "rtn, refitted": {"method": "rtn", "ranges": {"refit": 1}},
    "rtn, coreq": {"method": "rtn", "target": "coreq"},
    "smooth": {"scaling": "smooth"},
    "duo": {"scaling": "duo"},
    "blend": {"gram": "blend"},
    "pool, static": {"gram": "pool", "activations": "static"},
    "dynamic": {"activations": "dynamic"},
    "static, prefixes": {"method": "w8a8_static", "gram": {"prefixes": [6, 11]}},
    "static, percentile": {"activations": {"kind": "static", "ranges": "percentile"}},
    "salient": {"salient": 0.05},
}


def changed_without_a_trace(settings: Quantization) -> dict[str, Quantization]:
    """Return other settings with the same key, by what differs."""
    found = {}
    for section, fields in CHANGES.items():
        for name, value in fields.items():
            given = settings.model_dump()
            given |= {section: given[section] | {name: value}} if section else {name: value}
            try:
                other = Quantization(**given)
            except ValidationError:  # choices that do not go together
                continue
            if other != settings and other.key_material() == settings.key_material():
                found[f"{section}.{name}"] = other
    return found


def first_block(settings: Quantization) -> list[tuple[Any, ...]]:
    return comparable([next(quantize_blocks(decoder_of("llama"), MIXED, settings, "float32", pool=pool_of("llama")))])


@pytest.mark.parametrize("base", BASES)
def test_what_is_not_in_a_key_changes_no_bit(base: str) -> None:
    settings = choices(**BASES[base])
    others = changed_without_a_trace(settings)
    assert others
    expected = first_block(settings)
    for what, other in others.items():
        assert first_block(other) == expected, what


# --- the same bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRESETS)
def test_two_runs_of_a_preset_give_the_same_bytes(method: str) -> None:
    settings = choices(method)
    first, second = (
        comparable(list(quantize_blocks(decoder, MIXED, settings, "bfloat16", pool=SummedPool(decoder))))
        for decoder in (make_decoder(tiny_model()) for _ in range(2))
    )
    assert first == second


@pytest.mark.parametrize("method", PRESETS)
def test_no_preset_changes_the_original_model(method: str) -> None:
    decoder = make_decoder(tiny_model("gemma"))
    expected = logits(decoder.model)
    pool = SummedPool(decoder)
    list(quantize_blocks(decoder, MIXED, choices(method), "bfloat16", pool=pool))
    assert torch.equal(logits(decoder.model), expected)


@pytest.mark.parametrize("method", ["gptq", "maca", "awq", "coreq"])
def test_the_order_of_sequences_of_one_length_does_not_matter(method: str) -> None:
    plain, turned = (linears_of(walk(choices(method), samples)) for samples in (EQUAL, EQUAL[::-1]))
    agreement = [(plain[name].codes == turned[name].codes).double().mean() for name in plain]
    assert min(agreement) > 0.97  # sums of float32 products differ in their last bits


# --- scaled inputs beside the original's ---------------------------------------------------------------------------


class Walked:
    """What the solver was given in a walk over the first block, and the scales of its inputs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settings: Quantization, pool: PoolSource | None = None) -> None:
        self.statistics: list[SiteStatistics] = []
        self.weights: list[list[Tensor]] = []
        self.scales: dict[int, ScaledSite] = {}
        monkeypatch.setattr(quantization, "solve_site", self._solve)
        monkeypatch.setattr(quantization, "scale_block", self._scale)
        self.blocks = [next(quantize_blocks(decoder_of("llama"), MIXED, settings, "float32", pool=pool))]

    def _solve(self, weights: list[Tensor], statistics: SiteStatistics, *rest: Any) -> Any:
        self.weights.append(weights)
        self.statistics.append(statistics)
        return solve_site(weights, statistics, *rest)

    def _scale(self, *arguments: Any) -> dict[int, ScaledSite]:
        self.scales = scale_block(*arguments)
        return self.scales


@pytest.mark.parametrize("search", ["awq", "smooth"])
@pytest.mark.parametrize("kind", ["coreq", "gptaq"])
def test_the_originals_inputs_are_compared_in_the_scale_of_the_quantised_ones(
    search: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first site nothing is quantised yet: scaled or not, both models read the same."""
    alpha = {"alpha": 0.5} if kind == "gptaq" else {}
    first = Walked(monkeypatch, choices(scaling=search, target={"kind": kind, **alpha})).statistics[0]
    assert first.drift is not None
    assert first.gram is not None
    assert float(first.drift.abs().max()) < 1e-5 * float(first.gram.diagonal().max())


@pytest.mark.parametrize(
    ("settings", "gram"),
    [
        (choices("gptq", scaling="smooth"), False),
        (choices("w8a8_static", scaling="smooth"), False),
        (choices("rtn", scaling="smooth"), True),  # told of how well it was rounded
        (choices("gptq", scaling="awq"), True),
    ],
)
def test_before_rounding_gram_matrices_are_summed_where_they_are_read(
    settings: Quantization, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(block: nn.Module, sites: Any, running: Any, wanted: Wanted) -> dict[int, SiteSums]:
        asked.append(wanted.gram)
        return block_sums(block, sites, running, wanted)

    monkeypatch.setattr(quantization, "block_sums", noted)
    assert not any(np.isnan(report.output_error) for report in reports_of(walk(settings)).values())
    assert asked == [gram] * BLOCKS


@pytest.mark.parametrize("search", ["none", "awq"])
def test_the_outputs_drift_of_the_last_site_is_what_the_quantised_prefix_takes_from_its_outputs(
    search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = choices("coreq", scaling=search)
    walked = Walked(monkeypatch, settings)
    model, name = decoder_of("llama").model, "model.layers.0.mlp.down_proj"
    prefix = quantized_model(model, walked.blocks, settings, "float32")
    original, read = (torch.cat(inputs_of(each, name, MIXED)) for each in (model, prefix))
    found, (weight,) = walked.statistics[-1], walked.weights[-1]
    scale = walked.scales[3].scale if walked.scales else None
    difference = (original if scale is None else original / scale) - read
    lost = difference @ weight.double().T
    assert found.outputs_drift is not None
    assert found.outputs_drift_energy is not None
    expected = lost.T @ read / len(read)
    assert float((found.outputs_drift[0] - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    assert found.outputs_drift_energy[0] == pytest.approx(float(lost.square().sum()) / len(read), rel=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_pools_part_of_a_blend_has_no_drift(share: float) -> None:
    ones = torch.ones(4, 4).double()
    own = SiteStatistics(gram=3 * ones, drift=ones, drift_energy=2 * ones)
    outputs = SiteStatistics(gram=3 * ones, outputs_drift=(ones,), outputs_drift_energy=(5.0,))
    pool = SiteStatistics(gram=ones)
    found, turned = (quantization.blended(each, pool, share) for each in (own, outputs))
    torch.testing.assert_close(found.gram, (3 - 2 * share) * ones)
    torch.testing.assert_close(found.drift, (1 - share) * ones)
    torch.testing.assert_close(found.drift_energy, (2 - 2 * share) * ones)
    assert found.outputs_drift is None
    assert turned.drift is None
    assert turned.outputs_drift is not None
    torch.testing.assert_close(turned.outputs_drift[0], (1 - share) * ones)
    assert turned.outputs_drift_energy == pytest.approx((5 - 5 * share,))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_sizes_of_inputs_are_blended_as_their_gram_matrices_are(share: float) -> None:
    own = SiteStatistics(magnitude=torch.tensor([1.0, 4.0]).double(), peak=torch.tensor([9.0, 5.0]).double())
    pool = SiteStatistics(magnitude=torch.tensor([2.0, 1.0]).double(), peak=torch.tensor([3.0, 8.0]).double())
    found = quantization.blended(own, pool, share)
    torch.testing.assert_close(found.magnitude, (1 - share) * own.magnitude + share * pool.magnitude)
    assert found.peak is not None
    assert found.peak.tolist() == [9.0, 8.0]
    unknown = quantization.blended(own, SiteStatistics(), share)
    assert unknown.magnitude is own.magnitude
    assert unknown.peak is own.peak


@pytest.mark.parametrize("settings", [choices("sarqc_gbs"), choices("coreq", damping={"weights": "saliency"})])
def test_the_saliency_of_a_blend_reads_mean_sizes_of_both(
    settings: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = settings.model_copy(update={"gram": settings.gram.model_copy(update={"source": "blend"})})
    walked = Walked(monkeypatch, blend, pool_of("llama"))
    sizes = [torch.cat(inputs_of(decoder_of("llama").model, FIRST, each)).abs().mean(dim=0) for each in (MIXED, POOL)]
    torch.testing.assert_close(walked.statistics[0].magnitude, sum(sizes) / 2, rtol=1e-4, atol=1e-6)


# --- what a walk holds ---------------------------------------------------------------------------------------------


def test_the_originals_block_takes_no_memory_of_its_own() -> None:
    block = decoder_of("llama").own_block(0)
    kept = {name: value.clone() for name, value in block.named_parameters()}
    original = quantization._sharing(block)
    pairs = list(zip(block.parameters(), original.parameters(), strict=True))
    assert all(one is not other and one.data_ptr() == other.data_ptr() for one, other in pairs)
    round_parameters(block, "bfloat16")
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert all(torch.equal(value, kept[name]) for name, value in original.named_parameters())


@pytest.mark.parametrize("method", ["gptq", "coreq"])
def test_at_a_blocks_end_only_its_last_linears_have_weights(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[str]] = []
    finish = BlockPass.finish

    def looked_at(passing: BlockPass) -> HiddenStates:
        names = (name for site in passing._sites for name in site.linears)
        held.append({name for name in names if linear_of(passing._block, name).weight.numel()})
        return finish(passing)

    monkeypatch.setattr(BlockPass, "finish", looked_at)
    walk(choices(method))
    streams = 2 if method == "coreq" else 1
    assert held == [{"mlp.down_proj"}] * streams * (BLOCKS - 1)  # nothing leaves the last block
