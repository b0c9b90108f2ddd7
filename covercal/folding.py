"""Where the inverse of a site's scale goes: into the module that makes the site's input, if that changes nothing.

What makes an input is not read off names. Every module that ran before the site and whose output is as wide is tried,
the latest first: its weight is divided by some scales, the site's linears are multiplied by them, and the block must
give the same output, next to what multiplying the linears alone does to it. Trials are made in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from covercal.decoder import Site, linear_of

TOLERANCE = 1e-3  # of what scaling the linears alone changes


@dataclass(frozen=True, slots=True)
class Fold:
    """A module that takes up the inverse of a site's scale.

    Attributes
    ----------
    module
        Its name in the block.
    kind
        `rows` of a linear, `weight` of a norm, or `offset` of a norm that computes with 1 + weight.
    row
        int64 (channels,): which row of the module makes each channel; with grouped heads several channels share one,
        and so must have one scale.
    """

    module: str
    kind: str
    row: Tensor

    def shared(self, scale: Tensor) -> Tensor:
        """Return a scale in which channels that share a row have the geometric mean of theirs."""
        logs = scale.double().log()
        count = int(self.row.max()) + 1
        sums = torch.zeros(count, dtype=torch.float64, device=scale.device).index_add_(0, self.row, logs)
        members = torch.bincount(self.row, minlength=count)
        return (sums / members)[self.row].exp().to(scale.dtype)


def apply_scale(block: nn.Module, site: Site, fold: Fold, scale: Tensor) -> None:
    """Multiply the columns of a site's linears by a scale (channels,), and divide what makes its input by it."""
    for name in site.linears:
        weight = linear_of(block, name).weight
        weight.data = (weight.data * scale.to(torch.float64)).to(weight.dtype)
    module = block.get_submodule(fold.module)
    by_row = torch.ones(int(fold.row.max()) + 1, dtype=torch.float64, device=scale.device)
    by_row[fold.row] = scale.double()
    for name, parameter in module.named_parameters(recurse=False):
        if fold.kind == "offset" and name == "weight":
            parameter.data = ((parameter.data.double() + 1.0) / by_row - 1.0).to(parameter.dtype)
        elif parameter.ndim == 2:
            parameter.data = (parameter.data.double() / by_row[:, None]).to(parameter.dtype)
        else:
            parameter.data = (parameter.data.double() / by_row).to(parameter.dtype)


def undone_scale(block: nn.Module, fold: Fold, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale (channels,) that a norm undoes once its weight is rounded to a checkpoint's dtype.

    In 16 bits that is another one than was asked for, most of all where a norm computes with 1 + weight: next to -1 no
    weight is finer than 1/256 or 1/2048. A channel that would be lost, or overflow, is not scaled. A linear's rows undo
    the scale on average, float32 undoes it to seven digits: there it stays as it is.
    """
    weight = next(block.get_submodule(fold.module).parameters(recurse=False))
    if fold.kind == "rows" or weight.dtype == dtype == torch.float32:
        return scale
    added = 1.0 if fold.kind == "offset" else 0.0
    before = weight.double() + added
    after = (before / scale.double() - added).to(weight.dtype).to(dtype).double() + added
    undone = before / after
    return torch.where(torch.isfinite(undone) & (undone > 0), undone, 1.0).to(scale.dtype)


def find_folds(
    block: nn.Module, sites: Sequence[Site], run: Callable[[nn.Module], Tensor], head_size: int
) -> dict[int, Fold]:
    """Return the fold of every site that has one, by the site's order.

    Parameters
    ----------
    block
        A float32 copy; it is the same to the bit afterwards.
    sites
        Of the block.
    run
        Returns the block's output on a few tokens.
    head_size
        Of an attention head: how heads that share keys and values lie in an output.
    """
    trail = _trail(block, run)
    expected = run(block)
    folds = {}
    for site in sites:
        for fold in _candidates(block, site, trail, head_size):
            if _changes_nothing(block, site, fold, run, expected):
                folds[site.order] = fold
                break
    return folds


def _trail(block: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[tuple[str, int]]:
    """Return (name, width of the output) of the modules with weights of their own, in the order in which they ran."""
    ran: list[tuple[str, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            ran.append((name, output.shape[-1] if isinstance(output, Tensor) else 0))

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in block.named_modules()
        if name and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        run(block)
    finally:
        for each in hooks:
            each.remove()
    return ran


def _candidates(block: nn.Module, site: Site, trail: list[tuple[str, int]], head_size: int) -> Iterator[Fold]:
    """Yield what may make a site's input, the latest first."""
    names = [name for name, _ in trail]
    if site.linears[0] not in names:
        return
    before = trail[: names.index(site.linears[0])]
    device = next(block.parameters()).device
    for name, width in reversed(before):
        module = block.get_submodule(name)
        if isinstance(module, nn.Linear) and module.out_features == width:
            row = _rows(width, site.channels, head_size)
            if row is not None and name not in site.linears:
                yield Fold(name, "rows", row.to(device))
        elif width == site.channels and all(p.shape == (width,) for p in module.parameters(recurse=False)):
            for kind in ("weight", "offset"):
                yield Fold(name, kind, torch.arange(width, device=device))


def _rows(width: int, channels: int, head_size: int) -> Tensor | None:
    """Return which output of a linear each channel comes from, with heads repeated if there are too few outputs."""
    if channels == width:
        return torch.arange(channels)
    if width == 0 or channels % width or width % head_size:
        return None
    channel = torch.arange(channels)
    return (channel // head_size) // (channels // width) * head_size + channel % head_size


def _changes_nothing(
    block: nn.Module, site: Site, fold: Fold, run: Callable[[nn.Module], Tensor], expected: Tensor
) -> bool:
    generator = torch.Generator().manual_seed(site.order)
    by_row = torch.exp2(torch.randint(-2, 3, (int(fold.row.max()) + 1,), generator=generator).double())
    scale = by_row.to(fold.row.device)[fold.row]
    linears = [linear_of(block, name).weight for name in site.linears]
    kept = [(parameter, parameter.data) for parameter in linears]
    kept += [(parameter, parameter.data) for parameter in block.get_submodule(fold.module).parameters(recurse=False)]
    try:
        for weight in linears:
            weight.data = (weight.data * scale).to(weight.dtype)
        alone = run(block)
        for weight, data in kept[: len(linears)]:
            weight.data = data
        apply_scale(block, site, fold, scale)
        found = run(block)
    finally:
        for parameter, data in kept:
            parameter.data = data
    return bool((found - expected).abs().max() <= TOLERANCE * (alone - expected).abs().max())
