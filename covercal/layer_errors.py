"""How far each quantised linear is from the original one, on inputs that it was not calibrated with."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from covercal.decoder import Decoder, token_tensor

Floats = npt.NDArray[np.float64]


@torch.inference_mode()
def linear_errors(
    original: Decoder,
    quantized: Decoder,
    sequences: Sequence[npt.NDArray[np.int32]],
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """Return the relative error of every linear's output, ||Q(x) - W x|| / ||W x|| over all tokens, by full name.

    x is what the original's linear reads, so each linear answers for itself alone, not for the blocks before it. Q is
    the quantised linear as it computes, quantised activations and all. NaN for a linear that saw no token (an expert).

    Parameters
    ----------
    original, quantized
        The same architecture; inputs of sites must not have been scaled.
    sequences
        Token ids, int32 (length,) each.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in original.sites:
            for name in site.linears:
                full = original.full_name(site, name)
                sums[full] = torch.zeros(2, dtype=torch.float64, device=original.device)
                stack.enter_context(_compared(original.linear(site, name), quantized.linear(site, name), sums[full]))
        for sequence in sequences:
            original.body(input_ids=token_tensor([sequence], original.device), use_cache=False)
            advance(1)
    return {name: _relative(*each.tolist()) for name, each in sums.items()}


@contextmanager
def _compared(linear: nn.Linear, other: nn.Linear, sums: Tensor) -> Iterator[None]:
    """Add to `sums` (2,), for a while, the squared error of `other` and the squared norm of what `linear` returns."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        error = other(inputs[0]).float() - output.float()
        sums[0] += error.square().sum(dtype=torch.float64)
        sums[1] += output.float().square().sum(dtype=torch.float64)

    handle = linear.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _relative(error: float, whole: float) -> float:
    if whole > 0:
        return math.sqrt(error / whole)
    return math.nan if error == 0 else math.inf
