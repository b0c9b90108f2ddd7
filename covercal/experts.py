"""Mixture-of-experts layers: the experts that transformers keeps fused in one parameter, as linears of their own."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from covercal.errors import InputError

FUSED = {"gate_up_proj", "down_proj"}  # (experts, 2 * inner, width) and (experts, width, inner)
FEWEST_CHANNELS = 9
PROBED_TOKENS = 3
TOLERANCE = 1e-3


class Expert(nn.Module):
    """One gated expert.

    Attributes
    ----------
    tokens
        int64: which rows of the layer's hidden states it was last given; None before the first.
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (linear_with(weight) for weight in (gate, up, down))
        self.act_fn = activation
        self.tokens: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the expert's output, (tokens, width)."""
        gated: Tensor = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        output: Tensor = self.down_proj(gated)
        return output


class Experts(nn.ModuleList):
    """The experts of one layer; computes what transformers' fused module does, one expert after the other.

    Attributes
    ----------
    probed
        Whether every expert is shown every token, so that the inputs of all can be traced; the output is then zero.
    """

    probed = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, (tokens, width).

        Parameters
        ----------
        hidden_states
            (tokens, width).
        top_k_index, top_k_weights
            (tokens, chosen): which experts, and with what weight.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            if self.probed:
                expert(hidden_states.clone())  # a tensor of its own: no two experts share an input
                continue
            place, tokens = torch.where(top_k_index.T.eq(number))
            expert.tokens = tokens
            if not tokens.numel():
                continue
            output = expert(hidden_states[tokens]) * top_k_weights[tokens, place, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Show every expert inside `module` every token for a while."""
    found = [each for each in module.modules() if isinstance(each, Experts)]
    for each in found:
        each.probed = True
    try:
        yield
    finally:
        for each in found:
            each.probed = False


def linear_with(weight: Tensor) -> nn.Linear:
    """Return a linear without bias around a weight (outputs, inputs), which is not copied."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds gated experts fused the way that `unfuse_experts` knows."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != FUSED or not callable(getattr(module, "act_fn", None)):
        return False
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up.ndim != 3 or down.ndim != 3:
        return False
    experts, width, inner = down.shape
    takes = list(inspect.signature(type(module).forward).parameters)[1:4]
    return gate_up.shape == (experts, 2 * inner, width) and takes == ["hidden_states", "top_k_index", "top_k_weights"]


def is_router(module: nn.Module, weight: Tensor) -> bool:
    """Return whether a weight (experts, width) scores experts; such weights are small and stay as they are."""
    return weight.ndim == 2 and weight.shape[0] in (
        getattr(module, name, None) for name in ("num_experts", "n_routed_experts", "num_local_experts")
    )


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear that is quantised: no gate of a few channels, and none that scores experts.

    Their weights are few, and what they decide is much.
    """
    if not isinstance(module, nn.Linear) or min(module.out_features, module.in_features) < FEWEST_CHANNELS:
        return False
    return not is_router(module, module.weight)


def unfused(module: nn.Module) -> Experts:
    """Return the experts of a fused module as linears that share its memory.

    Raises
    ------
    InputError
        When they do not compute what the fused module computes: then it is another kind of expert.
    """
    gate_up, down = module.get_parameter("gate_up_proj").data, module.get_parameter("down_proj").data
    inner = down.shape[2]
    activation: Any = module.act_fn
    experts = Experts(
        Expert(gate_up[number, :inner], gate_up[number, inner:], down[number], activation)
        for number in range(len(down))
    ).eval()
    if not down.is_meta:
        _check_same(module, experts, down)
    return experts


def unfuse_experts(module: nn.Module) -> None:
    """Replace every fused module inside `module` by its experts.

    Raises
    ------
    InputError
        As `unfused`.
    """
    for name, child in list(module.named_modules()):
        if name and is_fused(child):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, unfused(child))


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts, fused or taken apart."""
    return any(isinstance(module, Experts) or is_fused(module) for module in model.modules())


def checkpoint_names(model: PreTrainedModel) -> dict[str, str]:
    """Return what a model's modules inside and around experts are called in its checkpoints, by their name here.

    The names are found by letting transformers turn a state whose numbers tell where they come from back into
    a checkpoint's. Empty for a model without experts: its names are the same.
    """
    if not has_experts(model):
        return {}
    skeleton = skeleton_of(model)
    state, origins = _marked_state(skeleton)
    names = {}
    for name, tensor in revert_weight_conversion(skeleton, state).items():
        value = int(tensor.reshape(-1)[0]) if tensor.numel() else -1
        if value in origins:
            names[origins[value]] = name.rpartition(".")[0]
    return names


def keeps_together(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Return whether checkpoints of a model hold several experts in one tensor.

    Parameters
    ----------
    names
        The model's `checkpoint_names`.
    """
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts) or is_fused(module)]
    return any(f"{name}.1.{part}" not in names for name in experts for part in ("gate_proj", "up_proj", "down_proj"))


def put_together(skeleton: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of some blocks as a checkpoint keeps them, all experts of a layer in one: names and values.

    Parameters
    ----------
    skeleton
        See `skeleton_of`.
    tensors
        By their names in the model with its experts taken apart; experts whole or not at all.
    """
    state = dict(tensors)
    for name, module in skeleton.named_modules():
        if not is_fused(module) or f"{name}.0.down_proj.weight" not in state:
            continue
        count = module.get_parameter("down_proj").shape[0]
        gate, up, down = (
            torch.stack([state.pop(f"{name}.{number}.{part}.weight") for number in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        state |= {f"{name}.gate_up_proj": torch.cat([gate, up], dim=1), f"{name}.down_proj": down}
    return dict(revert_weight_conversion(skeleton, state))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as transformers makes it, without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def _marked_state(skeleton: nn.Module) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Return a state full of numbers, one for each of its parts that a checkpoint may tell apart, and the parts."""
    origins: dict[int, str] = {}

    def mark(module: str) -> float:
        origins[len(origins)] = module
        return float(len(origins) - 1)

    fused = {name for name, module in skeleton.named_modules() if is_fused(module)}
    state = {}
    for name, tensor in skeleton.state_dict().items():
        module, _, last = name.rpartition(".")
        if module not in fused:
            state[name] = torch.full((1,) * tensor.ndim, mark(module)).expand(tensor.shape)
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        marks = [[mark(f"{module}.{number}.{part}") for part in parts] for number in range(tensor.shape[0])]
        rows = torch.tensor(marks).repeat_interleave(tensor.shape[1] // len(parts), dim=1)
        state[name] = rows[:, :, None].expand(tensor.shape)
    return state, origins


@torch.inference_mode()
def _check_same(fused: nn.Module, experts: Experts, down: Tensor) -> None:
    count, width = down.shape[0], down.shape[1]
    chosen = min(2, count)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((PROBED_TOKENS, width), generator=generator).to(down.device, down.dtype)
    index = torch.stack([torch.randperm(count, generator=generator)[:chosen] for _ in range(PROBED_TOKENS)])
    weights = torch.rand((PROBED_TOKENS, chosen), generator=generator).to(down.device, down.dtype)
    refused = InputError(
        f"The experts of {type(fused).__name__} are not gated in the usual way (activation(gate) * up); "
        "covercal cannot take them apart into linears."
    )
    expected = fused(hidden, index.to(down.device), weights).float()
    try:
        found = experts(hidden, index.to(down.device), weights).float()
    except TypeError as cause:  # an activation of gate and up together
        raise refused from cause
    scale = float(expected.abs().max())
    precision = TOLERANCE if down.dtype == torch.float32 else 30 * TOLERANCE
    if float((found - expected).abs().max()) > precision * max(scale, torch.finfo(torch.float32).tiny):
        raise refused
