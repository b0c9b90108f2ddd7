"""Mixture-of-experts layers: the experts that transformers keeps fused in one parameter, as linears of their own."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion

from covercal.errors import InputError

TAKES = 4  # self, hidden states, which experts, with what weights: names differ
TAKES_SORTED = 2  # self, hidden states
DEFAULT_GATING = "transformers.integrations.moe"
FEWEST_CHANNELS = 9
PROBED_TOKENS = 3
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Layout:
    """How a module of transformers holds its experts: one parameter for each of their linears, the first two in one.

    Attributes
    ----------
    gated
        Whether an expert has a gate; its weight then stands with that of `up_proj`, in `gate_up_proj`.
    transposed
        Whether weights are (experts, inputs, outputs), not (experts, outputs, inputs).
    interleaved
        Whether outputs of gate and up take turns; else all of the gate come first.
    biased
        Whether linears have biases, (experts, outputs).
    sorted
        Whether the module reads every token once for each expert, zeros where the expert was not chosen (Llama 4).
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    sorted: bool = False

    @property
    def parameters(self) -> set[str]:
        """Return the names of the module's parameters."""
        weights = {"gate_up_proj" if self.gated else "up_proj", "down_proj"}
        return weights | {f"{name}_bias" for name in weights} if self.biased else weights

    def apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what a parameter holds of all experts by its name in one, (experts, ...) each, in the same memory."""
        linear, bias = name.removesuffix("_bias"), name.endswith("_bias")
        last = "bias" if bias else "weight"
        if self.transposed and not bias:
            tensor = tensor.mT
        if linear != "gate_up_proj":
            return {f"{linear}.{last}": tensor}
        gate, up = (tensor[:, ::2], tensor[:, 1::2]) if self.interleaved else tensor.chunk(2, dim=1)
        return {f"gate_proj.{last}": gate, f"up_proj.{last}": up}

    def together(self, parts: Sequence[Tensor], *, bias: bool) -> Tensor:
        """Return the parameter of which `apart` makes some parts, in that order."""
        found = parts[0] if len(parts) == 1 else self.joined(parts[0], parts[1], dim=1)
        return found.mT if self.transposed and not bias else found

    def joined(self, gate: Tensor, up: Tensor, dim: int) -> Tensor:
        """Return gate and up as they lie in `gate_up_proj`, along a dimension."""
        if self.interleaved:
            dim %= gate.ndim
            return torch.stack((gate, up), dim=dim + 1).flatten(dim, dim + 1)
        return torch.cat((gate, up), dim=dim)


class Expert(nn.Module):
    """One expert: down_proj(activation(gate_proj(x)) * up_proj(x)), without a gate down_proj(activation(up_proj(x))).

    Parameters
    ----------
    tensors
        Weights and biases by their names here.
    activation
        Of the gate, or of `up_proj` where there is none.
    gating
        Of gate and up together, in place of the activation.

    Attributes
    ----------
    tokens
        int64: which rows of the layer's hidden states it was last given; None before the first.
    """

    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]
    gating: nn.Module | None

    def __init__(
        self, tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], gating: nn.Module | None
    ) -> None:
        super().__init__()
        self.gate_proj = _linear(tensors, "gate_proj") if "gate_proj.weight" in tensors else None
        self.up_proj, self.down_proj = _linear(tensors, "up_proj"), _linear(tensors, "down_proj")
        self.act_fn, self.gating = activation, gating
        self.tokens: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the expert's output, (tokens, width)."""
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        if self.gating is not None:
            inner = self.gating(gate, self.up_proj(hidden_states))
        elif gate is None:
            inner = self.act_fn(self.up_proj(hidden_states))
        else:
            inner = self.act_fn(gate) * self.up_proj(hidden_states)
        output: Tensor = self.down_proj(inner)
        return output


def _linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear:
    return linear_with(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


class Gating(nn.Module):
    """The gating that a module of transformers has of its own.

    Parameters
    ----------
    experts
        The module, without its parameters.
    layout
        Its layout.
    """

    def __init__(self, experts: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.experts: Any = experts
        self.layout = layout

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the inputs of `down_proj`, (tokens, inner)."""
        gated: Tensor = self.experts._apply_gate(self.layout.joined(gate, up, dim=-1))
        return gated


class Experts(nn.ModuleList):
    """The experts of one layer; computes what transformers' fused module does, one expert after the other.

    Attributes
    ----------
    probed
        Whether every expert is shown every token, so that the inputs of all can be traced; the output is then zero.
    """

    probed = False


class ChosenExperts(Experts):
    """Experts that are told which tokens are theirs, and how much their outputs count."""

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


class SortedExperts(Experts):
    """Experts that are given all tokens one after the other, weighted, and zeros in place of those of others."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return every expert's outputs, zeros where it was given zeros, (experts x tokens, width).

        Parameters
        ----------
        hidden_states
            (experts x tokens, width): those of the first expert, of the second, and so on.
        """
        given = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        total = torch.zeros_like(given)
        for number, expert in enumerate(self):
            if self.probed:
                tokens = torch.arange(given.shape[1], device=given.device)
                expert(given[given.abs().sum(dim=2).argmax(dim=0), tokens])  # what the expert of each token reads
                continue
            expert.tokens = tokens = given[number].any(dim=1).nonzero().flatten()
            if tokens.numel():
                total[number, tokens] = expert(given[number, tokens]).to(total.dtype)
        return total.view_as(hidden_states)


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


def linear_with(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear around a weight (outputs, inputs) and a bias, which are not copied."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def layout_of(module: nn.Module) -> Layout | None:
    """Return how a module holds fused experts; None where it is no such module, or holds them in another way."""
    parameters = dict(module.named_parameters(recurse=False))
    takes = len(inspect.signature(type(module).forward).parameters)
    layout = Layout(
        "gate_up_proj" in parameters,
        bool(getattr(module, "is_transposed", takes == TAKES_SORTED)),
        not getattr(module, "is_concatenated", True),
        "down_proj_bias" in parameters,
        takes == TAKES_SORTED,
    )
    if set(parameters) != layout.parameters or takes not in (TAKES, TAKES_SORTED) or (layout.sorted and layout.biased):
        return None
    if not callable(getattr(module, "act_fn", None)) and not has_own_gating(module):
        return None
    weights = {name: each for name, each in parameters.items() if not name.endswith("_bias")}
    if any(each.ndim != 3 for each in weights.values()):
        return None
    shapes = {part: each.shape for name in weights for part, each in layout.apart(name, weights[name]).items()}
    experts, width, inner = shapes.pop("down_proj.weight")
    return layout if set(shapes.values()) == {(experts, inner, width)} else None


def has_own_gating(module: nn.Module) -> bool:
    """Return whether fused experts have a gating of their own, not activation(gate) * up."""
    gating = getattr(type(module), "_apply_gate", None)
    return gating is not None and gating.__module__ != DEFAULT_GATING


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds experts fused the way that `unfuse_experts` knows."""
    return layout_of(module) is not None


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
    layout = layout_of(module)
    if layout is None:
        raise TypeError(f"{type(module).__name__} holds no fused experts")
    parts: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        parts |= layout.apart(name, parameter.data)
    gating: nn.Module | None = None
    if has_own_gating(module):
        bare = copy.copy(module)
        bare._parameters = {}
        gating = Gating(bare, layout)
    activation: Any = getattr(module, "act_fn", None)
    kind = SortedExperts if layout.sorted else ChosenExperts
    experts = kind(
        Expert({name: part[number] for name, part in parts.items()}, activation, gating)
        for number in range(len(parts["down_proj.weight"]))
    ).eval()
    down = parts["down_proj.weight"]
    if not down.is_meta:
        _check_same(module, experts, layout, down)
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
    """Return what the tensors of a model with experts are called in its checkpoints, by their name here.

    The names are found by letting transformers turn a state whose numbers tell where they come from back into
    a checkpoint's. What is not an expert's and has other values there (with others in one tensor, transposed) has no
    name: transformers reads it by its name in the model, too. Empty for a model without experts.
    """
    if not has_experts(model):
        return {}
    skeleton = skeleton_of(model)
    state, origins = _marked_state(skeleton)
    names = {}
    for name, tensor in revert_weight_conversion(skeleton, state).items():
        value = int(tensor.reshape(-1)[0]) if tensor.numel() else -1
        if value in origins:
            names[origins[value]] = name
    own = get_model_conversion_mapping(skeleton, add_legacy=False)[::-1]
    converters = [each.reverse_transform() for each in own if isinstance(each, WeightConverter)]
    changed = {name for name in state if apply_converters(name, converters)[1] is not None}
    return {name: stored for name, stored in names.items() if name not in changed}


def keeps_together(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Return whether checkpoints of a model hold several experts in one tensor.

    Parameters
    ----------
    names
        The model's `checkpoint_names`.
    """
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts) or is_fused(module)]
    return any(f"{name}.1.down_proj.weight" not in names for name in experts)


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
        layout = layout_of(module)
        if layout is None or f"{name}.0.down_proj.weight" not in state:
            continue
        for parameter, empty in module.named_parameters(recurse=False):
            parts = [
                torch.stack([state.pop(f"{name}.{number}.{part}") for number in range(len(empty))])
                for part in layout.apart(parameter, empty)
            ]
            state[f"{name}.{parameter}"] = layout.together(parts, bias=empty.ndim == 2)
    return dict(revert_weight_conversion(skeleton, state))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as transformers makes it, without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def _marked_state(skeleton: nn.Module) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Return a state full of numbers, one for each of its parts that a checkpoint may tell apart, and the parts."""
    origins: dict[int, str] = {}

    def mark(name: str) -> float:
        origins[len(origins)] = name
        return float(len(origins) - 1)

    layouts = {name: layout_of(module) for name, module in skeleton.named_modules()}
    state = {}
    for name, tensor in skeleton.state_dict().items():
        module, _, last = name.rpartition(".")
        layout = layouts[module]
        if layout is None:
            state[name] = torch.full((1,) * tensor.ndim, mark(name)).expand(tensor.shape)
            continue
        parts = []
        for part, empty in layout.apart(last, tensor).items():
            marks = torch.tensor([mark(f"{module}.{number}.{part}") for number in range(len(tensor))])
            rows = marks.reshape(-1, *[1] * (tensor.ndim - 1)).expand(-1, empty.shape[1], *[1] * (tensor.ndim - 2))
            parts.append(rows)
        state[name] = layout.together(parts, bias=tensor.ndim == 2)  # other dimensions stay 1, or it would be large
    return state, origins


@torch.inference_mode()
def _check_same(fused: nn.Module, experts: Experts, layout: Layout, down: Tensor) -> None:
    inputs = _random_inputs(layout, down)
    refused = InputError(
        f"The experts of {type(fused).__name__} are not gated in the usual way (activation(gate) * up); "
        "covercal cannot take them apart into linears."
    )
    expected = fused(*inputs).float()
    try:
        found = experts(*inputs).float()
    except TypeError as cause:  # an activation of gate and up together
        raise refused from cause
    scale = float(expected.abs().max())
    precision = TOLERANCE if down.dtype == torch.float32 else 30 * TOLERANCE
    if float((found - expected).abs().max()) > precision * max(scale, torch.finfo(torch.float32).tiny):
        raise refused


def _random_inputs(layout: Layout, down: Tensor) -> tuple[Tensor, ...]:
    """Return what a module of fused experts may be given, some tokens, each for at most two experts."""
    count, width = down.shape[0], down.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((PROBED_TOKENS, width), generator=generator).to(down.device, down.dtype)
    chosen = [torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(PROBED_TOKENS)]
    index = torch.stack(chosen).to(down.device)
    weights = torch.rand(index.shape, generator=generator).to(down.device, down.dtype)
    if not layout.sorted:
        return hidden, index, weights
    scores = torch.zeros((PROBED_TOKENS, count), dtype=down.dtype, device=down.device).scatter_(1, index, weights)
    return ((scores.T[..., None] * hidden).reshape(-1, width),)
