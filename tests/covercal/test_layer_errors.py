"""The error of every linear on held-out inputs, against the inputs themselves and against what must hold."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from covercal.decoder import Decoder, make_decoder, token_tensor
from covercal.layer_errors import linear_errors
from tests import tiny

SEQUENCES = [np.random.default_rng(seed).integers(3, tiny.VOCABULARY, 24).astype(np.int32) for seed in range(3)]


def decoder(architecture: str = "llama") -> Decoder:
    return make_decoder(tiny.tiny_model(architecture))


def changed(original: Decoder, seed: int = 0, spread: float = 0.05) -> Decoder:
    """Return a copy whose linears are off by random numbers."""
    other = make_decoder(copy.deepcopy(original.model))
    generator = torch.Generator().manual_seed(seed)
    for site in other.sites:
        for name in site.linears:
            weight = other.linear(site, name).weight
            weight.data += spread * torch.randn(weight.shape, generator=generator)
    return other


def read_by(original: Decoder, name: str) -> Tensor:
    """Return all that a linear of the original reads, float64 (tokens, inputs)."""
    seen: list[Tensor] = []
    module = original.model.get_submodule(name)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].double().flatten(0, -2))

    handle = module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        for each in SEQUENCES:
            original.body(input_ids=token_tensor([each], original.device), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "mixtral"])
def test_each_error_is_that_of_its_own_weight_on_the_originals_inputs(architecture: str) -> None:
    original = decoder(architecture)
    other = changed(original)
    found = linear_errors(original, other, SEQUENCES)
    assert list(found) == [original.full_name(site, name) for site in original.sites for name in site.linears]
    for name, error in found.items():
        linear, quantized = (each.model.get_submodule(name) for each in (original, other))
        x = read_by(original, name)
        bias = 0.0 if linear.bias is None else linear.bias.double()
        wanted = (x @ (quantized.weight - linear.weight).double().T).norm() / (
            x @ linear.weight.double().T + bias
        ).norm()
        assert error == pytest.approx(float(wanted), rel=1e-4), name


def test_a_model_beside_itself_has_no_error() -> None:
    original = decoder()
    found = linear_errors(original, make_decoder(copy.deepcopy(original.model)), SEQUENCES)
    assert set(found.values()) == {0.0}


def test_one_linear_answers_for_itself_alone() -> None:
    original = decoder()
    other = make_decoder(copy.deepcopy(original.model))
    first = original.sites[0]
    other.linear(first, first.linears[0]).weight.data += 0.1
    found = linear_errors(original, other, SEQUENCES)
    assert {name for name, error in found.items() if error} == {original.full_name(first, first.linears[0])}


def test_the_models_are_as_they_were_and_run_without_hooks() -> None:
    original, other = decoder(), changed(decoder())
    before = [{n: p.clone() for n, p in each.model.state_dict().items()} for each in (original, other)]
    linear_errors(original, other, SEQUENCES)
    for each, kept in zip((original, other), before, strict=True):
        assert all(torch.equal(p, kept[n]) for n, p in each.model.state_dict().items())
        assert not any(module._forward_hooks for module in each.model.modules())


def test_an_expert_that_saw_no_token_has_no_number() -> None:
    original = decoder("mixtral")
    for name, module in original.model.named_modules():
        if name.endswith("gate") and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.data[0] = 0
            module.weight.data[1:] = 0
            module.weight.data[1:3] = 100 * module.weight.data[1:3]
    found = linear_errors(original, changed(original), SEQUENCES[:1])
    experts = {name: error for name, error in found.items() if "experts" in name}
    unseen = [name for name, error in experts.items() if math.isnan(error)]
    assert unseen
    assert len(unseen) < len(experts)
    assert not any(math.isnan(error) for name, error in found.items() if name not in experts)
