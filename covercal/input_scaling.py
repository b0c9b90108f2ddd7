"""Scales the inputs of a block's sites before rounding, the function staying the same: AWQ, SARQC-GS, SmoothQuant."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from covercal.block_call import hidden_of, run_block
from covercal.block_pass import expert_of
from covercal.calibration import Calibration
from covercal.decoder import DTYPES, Decoder, Site, linear_of
from covercal.errors import naming
from covercal.folding import Fold, apply_scale, find_folds, undone_scale
from covercal.gram import SiteStatistics
from covercal.quantization_settings import Dtype, Quantization
from covercal.quantizers.grid import GridSettings, dequantize, min_max_grid, quantize
from covercal.quantizers.scaling import (
    candidate_scales,
    drift_weights,
    search_scale,
    smooth_scale,
)
from covercal.quantizers.solver import energy, weight_magnitude

LARGE = 100.0  # of the inputs that experts are tried on, too: some clamp what is large
NOT_FOLDED = "inputs are not scaled: no module that makes them takes up the inverse"


@dataclass(frozen=True, slots=True)
class ScaledSite:
    """How one site's inputs are scaled.

    Attributes
    ----------
    scale
        (channels,) by which inputs are divided and weights multiplied; None when they are not.
    power
        That the search chose.
    note
        Why they are not scaled.
    """

    scale: Tensor | None = None
    power: float = math.nan
    note: str = ""


def scale_block(
    decoder: Decoder,
    block: nn.Module,
    sites: Sequence[Site],
    statistics: Mapping[int, SiteStatistics],
    settings: Quantization,
    storage_dtype: Dtype,
    running: Calibration | None,
) -> dict[int, ScaledSite]:
    """Choose a scale for every site, and fold it into the block; returns them by the site's order.

    Parameters
    ----------
    block
        Not quantised yet; is changed.
    statistics
        Of every site's inputs, by order.
    running
        For `scaling.loss: module`.

    Raises
    ------
    QuantizationError
        Naming the linear that cannot be quantised.
    """
    folds = _folds(decoder, block, sites)
    found = {}
    for site in sites:
        fold, known = folds.get(site.order), statistics.get(site.order, SiteStatistics())
        if fold is None:
            found[site.order] = ScaledSite(note=NOT_FOLDED)
        elif known.tokens < (1 if expert_of(block, site) is None else settings.gram.expert_tokens):
            found[site.order] = ScaledSite(note=f"inputs are not scaled: {known.tokens or 'none'} were seen")
        else:
            with naming(decoder.full_name(site, site.linears[0])):
                found[site.order] = _searched(block, site, known, settings, storage_dtype, running, fold)
    for site in sites:  # after all searches: a fold changes rows of weights that another site still looks at
        scale = found[site.order].scale
        if scale is not None:
            scale = undone_scale(block, folds[site.order], scale, DTYPES[storage_dtype])
            apply_scale(block, site, folds[site.order], scale)
            found[site.order] = replace(found[site.order], scale=scale)
    return found


def _folds(decoder: Decoder, block: nn.Module, sites: Sequence[Site]) -> dict[int, Fold]:
    """Return what takes up the inverse of each site's scale, tried on a few random hidden states in float32.

    An expert is tried by itself: a few tokens do not reach all of them, and what is outside is read by others, too.
    """
    probe, index = decoder.probed(), sites[0].block
    wide = copy.deepcopy(block).float()
    generator = torch.Generator().manual_seed(index)
    given = probe.arguments[index]
    arguments = replace(given, positional=_widened(given.positional), keywords=_widened(given.keywords))
    shape = (*probe.entering.shape[:-1], given.stream_width)
    hidden = torch.randn(shape, generator=generator).to(probe.entering.device)
    size = head_size(decoder, index)
    shared = [site for site in sites if expert_of(wide, site) is None]
    folds = find_folds(wide, shared, lambda module: run_block(module, hidden, arguments), size)
    for site in sites:
        expert = expert_of(wide, site)
        if expert is not None:
            read = hidden[0, :, : expert.up_proj.in_features]  # a block's hidden states may be several side by side
            read = torch.cat([read, LARGE * read])
            folds |= find_folds(wide, [site], _only(expert, read), size)
    return folds


def _widened(value: Any) -> Any:
    """Return arguments of a block with all floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_widened(each) for each in value)
    if isinstance(value, dict):
        return {name: _widened(each) for name, each in value.items()}
    return value


def _only(expert: nn.Module, hidden: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return what runs an expert, whatever block it is asked for."""

    def run(_: nn.Module) -> Tensor:
        output: Tensor = expert(hidden)
        return output

    return run


def head_size(decoder: Decoder, block: int) -> int:
    """Return the width of an attention head of a block."""
    config = decoder.model.config.get_text_config()
    each = getattr(config, "per_layer_config", None)
    config = config if each is None else each[block]
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _searched(
    block: nn.Module,
    site: Site,
    known: SiteStatistics,
    settings: Quantization,
    storage_dtype: Dtype,
    running: Calibration | None,
    fold: Fold,
) -> ScaledSite:
    weights = [linear_of(block, name).weight.data for name in site.linears]
    scaling = settings.scaling
    if scaling.search == "smooth":
        largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).double()
        return ScaledSite(fold.shared(smooth_scale(_known(known.peak), largest, scaling.power)), scaling.power)
    grid = GridSettings(settings.bits, settings.group_size, settings.symmetric, DTYPES[storage_dtype])
    magnitude, mean_weight = _known(known.magnitude), weight_magnitude(weights)
    candidates = candidate_scales(
        magnitude,
        mean_weight,
        scaling.steps,
        duo=scaling.search == "duo",
        guard=scaling.regularization == "none",
    )
    shared = [(power, fold.shared(scale)) for power, scale in candidates]
    drift = None
    if scaling.regularization != "none":
        drift = _drift(weights, drift_weights(magnitude, mean_weight, scaling.regularization), grid)
    # an expert's only linear loses what its Gram matrix tells, without a pass of the whole block for each expert
    alone = len(site.linears) == 1 and expert_of(block, site) is not None
    if scaling.loss == "module" and running is not None and not alone:
        loss = module_loss(block, site, running, grid)
    else:
        loss = _linear_loss(weights, _known(known.gram), grid)
    power, scale = search_scale(shared, loss, drift, scaling.strength)
    return ScaledSite(scale, power)


def rounded_under(weight: Tensor, scale: Tensor, grid: GridSettings) -> Tensor:
    """Return Q(W diag(s)) diag(s)^-1, float32 (rows, columns), rounded to nearest."""
    scaled = weight.float() * scale.float()
    found = min_max_grid(scaled, grid)
    steps, zero = found.columns(weight.shape[1])
    return dequantize(quantize(scaled, steps, zero, grid.bits), steps, zero).div_(scale.float())


def _linear_loss(weights: Sequence[Tensor], gram: Tensor, grid: GridSettings) -> Callable[[Tensor], float]:
    """Return the squared error of the linears' outputs on the inputs of a Gram matrix."""
    single = gram.float()
    return lambda scale: sum(float(energy(rounded_under(w, scale, grid) - w.float(), single)) for w in weights)


def _drift(weights: Sequence[Tensor], weighting: Tensor, grid: GridSettings) -> Callable[[Tensor], float]:
    """Return the weighted squared distance of the rounded weights from the weights."""
    single = weighting.float()
    return lambda scale: sum(
        float(((rounded_under(w, scale, grid) - w.float()).square() * single).sum()) for w in weights
    )


def module_loss(block: nn.Module, site: Site, running: Calibration, grid: GridSettings) -> Callable[[Tensor], float]:
    """Return the mean squared error of what AWQ inspects: the module around a site's linears, or its only linear."""
    module = block.get_submodule(inspected_module(site))
    calls = _calls(block, module, site, running)
    expected = [_output(module, call) for call in calls]
    count = sum(each.numel() for each in expected)
    linears = [linear_of(block, name) for name in site.linears]

    def loss(scale: Tensor) -> float:
        kept = [linear.weight.data for linear in linears]
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = rounded_under(weight, scale, grid).to(weight.dtype)
        try:
            pairs = zip(calls, expected, strict=True)
            squares = [(_output(module, call) - wanted).float().square().sum() for call, wanted in pairs]
        finally:
            for linear, weight in zip(linears, kept, strict=True):
                linear.weight.data = weight
        return float(torch.stack(squares).double().sum()) / count

    return loss


def inspected_module(site: Site) -> str:
    """Return the name of the module around a site's linears; the linear's own when it is alone."""
    if len(site.linears) == 1:
        return site.linears[0]
    parts = [name.split(".")[:-1] for name in site.linears]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(block: nn.Module, module: nn.Module, site: Site, running: Calibration) -> list[Call]:
    """Return the arguments that a module of a block is called with for every batch."""
    found: list[Call] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        for batch in running.batches:
            run_block(block, running.hidden[batch.number], batch.arguments[site.block])
    finally:
        hook.remove()
    return found


def _output(module: nn.Module, call: Call) -> Tensor:
    return hidden_of(module(*call[0], **call[1]))


def _known(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("the scale search reads what was not measured")
    return value
