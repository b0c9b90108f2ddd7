"""The walk over blocks: each site is quantised behind the already quantised prefix, in order of execution."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from covercal.decoder import (
    DTYPES,
    BlockArguments,
    Decoder,
    Site,
    batches,
    block_inputs,
    free_memory,
    linear_of,
    replaced_forward,
    run_block,
    token_tensor,
)
from covercal.errors import QuantizationError
from covercal.gram import GramSum
from covercal.quantizers.grid import Grid, GridSettings, dequantize, min_max_grid
from covercal.quantizers.registry import METHODS
from covercal.quantizers.rounding import Rounded, RoundingSettings, rounder
from covercal.recipe import Dtype, Quantization

BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
KEPT_SHARE = 0.25  # of the free memory, for outputs that would be computed once for each site otherwise


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One quantised linear as a checkpoint keeps it.

    Attributes
    ----------
    name
        Name inside the model.
    codes
        uint8 (outputs, inputs), in [0, 2**bits).
    scale
        (outputs, groups), in the checkpoint's dtype.
    zero
        uint8 (outputs, groups).
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, slots=True)
class LinearReport:
    """How well one linear was quantised.

    Attributes
    ----------
    output_error
        ||W X - Q X|| / ||W X|| on the calibration inputs behind the quantised prefix; NaN without calibration.
    weight_error
        ||W - Q|| / ||W||.
    damping, attempts, dead
        See `Rounded`.
    seconds
        Solver time, shared evenly by the linears of a site.
    """

    name: str
    outputs: int
    inputs: int
    output_error: float
    weight_error: float
    damping: float
    attempts: int
    dead: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One finished block.

    Attributes
    ----------
    index
        Its place.
    linears, reports
        Its linears as the checkpoint keeps them, and how well each was quantised.
    leaving
        What leaves it and enters the next block, (sequences, length, model width) for each batch of calibration
        sequences; with them the walk can be resumed.
    """

    index: int
    linears: tuple[QuantizedLinear, ...]
    reports: tuple[LinearReport, ...]
    leaving: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a walk that was cut short goes on.

    Attributes
    ----------
    index
        The first block that is not finished.
    entering
        `QuantizedBlock.leaving` of the block before it.
    """

    index: int
    entering: tuple[Tensor, ...]


@dataclass(slots=True)
class _Batch:
    """Calibration sequences of one length on their way through the blocks."""

    hidden: Tensor
    arguments: list[BlockArguments]
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of the present block's quantised linears


def check_group_size(linears: dict[str, tuple[int, int]], group_size: int | None) -> None:
    """Raise when the group size does not divide the input of some linear.

    Raises
    ------
    QuantizationError
        Naming the first such linear and group sizes that would do.
    """
    if group_size is None:
        return
    common = math.gcd(*(inputs for _, inputs in linears.values()))
    for name, (_, inputs) in linears.items():
        if inputs % group_size:
            fitting = [size for size in (32, 64, 96, 128, 256) if common % size == 0]
            raise QuantizationError(
                f"quantization.group_size {group_size} does not divide the {inputs} inputs of {name}; "
                f"it must divide {common}" + (f", for example {', '.join(map(str, fitting))}." if fitting else ".")
            )


@torch.inference_mode()
def quantize_blocks(
    decoder: Decoder,
    sequences: Sequence[npt.NDArray[np.int32]],
    settings: Quantization,
    storage_dtype: Dtype,
    resumed: Resumed | None = None,
) -> Iterator[QuantizedBlock]:
    """Quantise block by block and yield each when it is done; the decoder itself is not changed.

    Parameters
    ----------
    decoder
        The original model.
    sequences
        Calibration samples; not used by a method without calibration.
    settings
        Method, grid, damping, order.
    storage_dtype
        Dtype in which the checkpoint keeps scales and all other weights; they are rounded to it here too, so
        that later blocks are calibrated behind what the checkpoint will hold.
    resumed
        Goes on behind blocks that were finished earlier, with the same result to the bit.

    Raises
    ------
    QuantizationError
        Naming the linear that cannot be quantised.
    """
    calibrated = METHODS[settings.method].calibrated
    with _rounded_outside_blocks(decoder, storage_dtype):
        running = _entering_batches(decoder, sequences) if calibrated else []
    first = 0
    if resumed is not None:
        first = resumed.index
        for batch, hidden in zip(running, resumed.entering, strict=True):
            if hidden.shape != batch.hidden.shape:
                raise ValueError(f"batch of shape {tuple(hidden.shape)} resumed as {tuple(batch.hidden.shape)}")
            batch.hidden = torch.empty_like(batch.hidden).copy_(hidden)  # aligned in memory as it was
    for index, block in enumerate(decoder.blocks[first:], start=first):
        working = copy.deepcopy(block)
        round_parameters(working, storage_dtype)
        sites = [site for site in decoder.sites if site.block == index]
        keep = _outputs_fit(working, sites, running)
        finished: list[str] = []
        linears: list[QuantizedLinear] = []
        reports: list[LinearReport] = []
        for site in sites:
            gram = _site_gram(working, site, running, finished) if calibrated else None
            for linear, report in _quantize_site(decoder, working, site, gram, settings, storage_dtype):
                linears.append(linear)
                reports.append(report)
            finished += site.linears if keep else ()
        for batch in running:
            with _recalled(working, finished, batch.outputs):
                batch.hidden = run_block(working, batch.hidden, batch.arguments[index]).contiguous()
            batch.outputs.clear()
        yield QuantizedBlock(index, tuple(linears), tuple(reports), tuple(batch.hidden for batch in running))


def round_parameters(module: nn.Module, storage_dtype: Dtype) -> None:
    """Round all parameters of a module to the checkpoint's dtype, keeping the dtype they compute in."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[storage_dtype]).to(parameter.dtype)


def dequantized(linear: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """Return the weight as readers of the checkpoint do: (codes - zero) * scale in the scale's dtype, then `dtype`."""
    repeat = linear.codes.shape[1] // linear.scale.shape[1]
    zero = linear.zero.repeat_interleave(repeat, dim=1).to(torch.int16)
    scale = linear.scale.repeat_interleave(repeat, dim=1)
    return ((linear.codes.to(torch.int16) - zero).to(scale.dtype) * scale).to(dtype)


def _entering_batches(decoder: Decoder, sequences: Sequence[npt.NDArray[np.int32]]) -> list[_Batch]:
    limit = BATCH_TOKENS if decoder.device.type == "cpu" else GPU_BATCH_TOKENS
    entering = []
    for members in batches(sequences, limit):
        tokens = token_tensor([sequences[m] for m in members], decoder.device)
        entering.append(_Batch(*block_inputs(decoder, tokens)))
    return entering


@contextmanager
def _rounded_outside_blocks(decoder: Decoder, storage_dtype: Dtype) -> Iterator[None]:
    """Round embeddings and all else before the first block to the checkpoint's dtype for a while."""
    inside = {id(parameter) for block in decoder.blocks for parameter in block.parameters()}
    outside = [(p, p.data) for p in decoder.model.parameters() if id(p) not in inside]
    try:
        for parameter, _ in outside:
            parameter.data = parameter.data.to(DTYPES[storage_dtype]).to(parameter.dtype)
        yield
    finally:
        for parameter, original in outside:
            parameter.data = original


class _InputSeenError(Exception):
    """Ends a block's forward pass once the site's input has been seen."""


def _site_gram(block: nn.Module, site: Site, running: Sequence[_Batch], finished: Sequence[str]) -> GramSum:
    first = block.get_submodule(site.linears[0])
    gram = GramSum.empty(site.channels, next(block.parameters()).device)
    for batch in running:

        def note(_: nn.Module, inputs: tuple[Tensor, ...], sequences: int = batch.hidden.shape[0]) -> None:
            gram.add(inputs[0], sequences)
            raise _InputSeenError

        hook = first.register_forward_pre_hook(note)
        try:
            with _recalled(block, finished, batch.outputs):
                run_block(block, batch.hidden, batch.arguments[site.block])
        except _InputSeenError:
            continue
        finally:
            hook.remove()
    return gram


def _outputs_fit(block: nn.Module, sites: Sequence[Site], running: Sequence[_Batch]) -> bool:
    """Return whether what the block's linears give for all batches takes at most a part of the free memory."""
    width = sum(linear_of(block, name).weight.shape[0] for site in sites for name in site.linears)
    wanted = sum(batch.hidden.shape[:-1].numel() * width * batch.hidden.element_size() for batch in running)
    return wanted <= KEPT_SHARE * free_memory(next(block.parameters()).device)


@contextmanager
def _recalled(block: nn.Module, finished: Sequence[str], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Let the finished linears of a block give again what they gave for this batch, or give it and keep it.

    Every site of a block needs its own pass, behind the sites before it. Those no longer change, and each linear reads
    one input a pass, so that each has to be computed only once a batch.
    """

    def recall(name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if name not in outputs:
                outputs[name] = compute(x)
            return outputs[name]

        return forward

    with ExitStack() as stack:
        for name in finished:
            module = linear_of(block, name)
            stack.enter_context(replaced_forward(module, recall(name, module.forward)))
        yield


def _quantize_site(
    decoder: Decoder,
    block: nn.Module,
    site: Site,
    gram: GramSum | None,
    settings: Quantization,
    storage_dtype: Dtype,
) -> Iterator[tuple[QuantizedLinear, LinearReport]]:
    """Quantise the linears of a site together: rows are independent, so one factorisation serves all."""
    started = time.perf_counter()
    modules = [linear_of(block, name) for name in site.linears]
    weight = torch.cat([module.weight.double() for module in modules])
    matrix = gram.gram() if gram is not None else None
    grid_settings = GridSettings(settings.bits, settings.group_size, settings.symmetric, DTYPES[storage_dtype])
    rounding = RoundingSettings(settings.damping, settings.activation_order, settings.shrinkage)
    try:
        grid = min_max_grid(weight, grid_settings)
        rounded = rounder(settings.method)(weight, matrix, grid, rounding)
    except QuantizationError as cause:
        raise QuantizationError(f"{decoder.full_name(site, site.linears[0])} cannot be quantised: {cause}.") from cause
    seconds = (time.perf_counter() - started) / len(modules)
    start = 0
    for name, module in zip(site.linears, modules, strict=True):
        rows = slice(start, start + module.weight.shape[0])
        start = rows.stop
        linear = QuantizedLinear(
            decoder.full_name(site, name),
            rounded.codes[rows].to(torch.uint8),
            grid.scale[rows].to(DTYPES[storage_dtype]),
            grid.zero[rows].to(torch.uint8),
        )
        report = _report(
            linear.name, weight[rows], rounded, Grid(grid.scale[rows], grid.zero[rows], grid_settings), rows, matrix
        )
        module.weight.data = dequantized(linear, module.weight.dtype)
        yield linear, replace(report, seconds=seconds)


def _report(name: str, weight: Tensor, rounded: Rounded, grid: Grid, rows: slice, gram: Tensor | None) -> LinearReport:
    error = weight - dequantize(rounded.codes[rows], *grid.columns(weight.shape[1]))
    return LinearReport(
        name=name,
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        output_error=_relative(_energy(error, gram), _energy(weight, gram)) if gram is not None else math.nan,
        weight_error=_relative(error.square().sum(), weight.square().sum()),
        damping=rounded.damping,
        attempts=rounded.attempts,
        dead=rounded.dead,
    )


def _energy(matrix: Tensor, gram: Tensor) -> Tensor:
    """Return tr(M H M^T), the squared output of M on the inputs of H; float32 does for a report."""
    return ((matrix.float() @ gram.float()) * matrix).sum(dtype=torch.float64)


def _relative(error: Tensor, whole: Tensor) -> float:
    return math.sqrt(max(float(error), 0.0) / float(whole)) if float(whole) > 0 else 0.0
