"""Quantised inputs of linears: scales of static ranges, and what a linear then reads."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from covercal.gram import bin_values
from covercal.quantization_settings import Activations

CLIPS = 100  # clipping points that a search for the least squared error tries


def static_scale(histogram: Tensor, largest: float, settings: Activations) -> float:
    """Return the step of a symmetric static grid for inputs of known sizes.

    Parameters
    ----------
    histogram
        int64 (bins,): how many |x| lie in each bin (`covercal.gram.bin_values`).
    largest
        Largest |x|.
    settings
        `min_max`: the grid ends at the largest; `percentile`: at that percentile of |x|, the zeros left out; `mse`:
        where the mean squared error is least.
    """
    if largest <= 0:
        return 1.0
    if settings.ranges == "min_max":
        return largest / top_code(settings.bits)
    values = bin_values(histogram.device).clamp(max=largest)
    if settings.ranges == "percentile":
        wanted = settings.percentile / 100.0 * float(histogram.sum())
        index = int(torch.searchsorted(histogram.cumsum(0).double(), wanted))
        return float(values[min(index, len(values) - 1)]) / top_code(settings.bits)
    steps = largest * torch.arange(1, CLIPS + 1, device=histogram.device).double() / CLIPS / top_code(settings.bits)
    return float(steps[_clipping_errors(values, histogram.double(), steps, settings.bits).argmin()])


def scale_from_peaks(peak: Tensor, energy: float, tokens: int, settings: Activations) -> float:
    """Return the step of a symmetric static grid from cached statistics alone.

    Parameters
    ----------
    peak
        (samples, channels): largest |x| of every sample and channel at the site.
    energy
        Mean of x**2 over the site's tokens and channels.
    tokens
        Tokens a sample.
    settings
        `percentile` is of the peaks. `mse` balances the error of rounding, step**2 / 12 for every input (but no more
        than its energy), with that of clipping, which counts every peak as one clipped input: a lower bound, for the
        inputs below a peak are not known.
    """
    flat = peak.double().flatten()
    largest = float(flat.max())
    if largest <= 0:
        return 1.0
    if settings.ranges == "min_max":
        return largest / top_code(settings.bits)
    if settings.ranges == "percentile":
        index = min(int(settings.percentile / 100.0 * flat.numel()), flat.numel() - 1)
        return float(flat.sort().values[index]) / top_code(settings.bits)
    ends = largest * torch.arange(1, CLIPS + 1, device=flat.device).double() / CLIPS
    steps = ends / top_code(settings.bits)
    rounding = (steps.square() / 12.0).clamp(max=energy)
    clipping = torch.stack([(flat - end).clamp_(min=0).square_().sum() for end in ends]) / (flat.numel() * tokens)
    return float(steps[(rounding + clipping).argmin()])


def top_code(bits: int) -> int:
    """Return the largest code of a signed grid."""
    return int(2 ** (bits - 1)) - 1


def quantized_input(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """Return x on a symmetric grid: of one step for all of it, or (None) of a step for each token.

    Codes lie in [-2**(bits-1), 2**(bits-1) - 1], as compressed-tensors has them.
    """
    if scale is None:
        # compressed-tensors spans 2**bits - 1 steps from -max to +max
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / ((2**bits - 1) / 2)).to(x.dtype)
        scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(x.dtype).eps), scale)
    codes = torch.round(x / scale).clamp(-(2 ** (bits - 1)), top_code(bits))
    return codes * scale


def quantize_inputs(linear: nn.Linear, scale: Tensor | None, bits: int) -> RemovableHandle:
    """Let a linear read quantised inputs from now on."""

    def quantized(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return quantized_input(inputs[0], scale, bits), *inputs[1:]

    return linear.register_forward_pre_hook(quantized)


def _clipping_errors(values: Tensor, counts: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Return the sum of squared errors of |x| in bins for each step, float64 (steps,)."""
    used = counts > 0
    values, counts = values[used], counts[used]
    codes = torch.round(values / steps[:, None]).clamp(max=top_code(bits))
    clipped = values > steps[:, None] * top_code(bits)
    error = (codes * steps[:, None] - values).square()
    # within a bin wider than a step, any error of rounding is as likely as another
    smooth = torch.where(clipped, error, (steps.square() / 12.0)[:, None].minimum(values.square()))
    return (smooth * counts).sum(dim=1)
