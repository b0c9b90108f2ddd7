"""Calibration sequences on their way through the blocks, and what the linears of a block read of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
from covercal.experts import Expert
from covercal.gram import SiteSums, Wanted
from covercal.hidden_states import HiddenStates
from covercal.quantization_settings import Dtype

BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
KEPT_SHARE = 0.25  # of the free memory, for what would be computed once for each site otherwise
Tokens = npt.NDArray[np.int32]


@dataclass(slots=True)
class Batch:
    """Calibration sequences of one length.

    Attributes
    ----------
    number
        Its place in the streams.
    first
        Number of its first sequence among all.
    shape
        (sequences, tokens).
    weight
        Of each token in a Gram matrix.
    arguments
        Of every block.
    outputs
        What the present block's finished linears gave for it.
    original_inputs
        What the present block's sites read in the original model, by order.
    """

    number: int
    first: int
    shape: tuple[int, int]
    weight: float
    arguments: list[BlockArguments]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    original_inputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Calibration:
    """All calibration sequences.

    Attributes
    ----------
    batches
        Sequences of one length each.
    hidden
        What enters the present block behind the quantised prefix.
    original
        What enters it in the original model; empty when nothing is compared with it.
    """

    batches: list[Batch]
    hidden: HiddenStates
    original: HiddenStates


@dataclass(frozen=True, slots=True)
class Memory:
    """Where hidden states go: `limit` bytes of memory (None: any number), then files in `folder`."""

    limit: int | None = None
    folder: Path | None = None


IN_MEMORY = Memory()


def start_calibration(
    decoder: Decoder,
    sequences: Sequence[Tokens],
    *,
    by_sequence: bool,
    compares: bool,
    storage_dtype: Dtype,
    memory: Memory,
    longest: int | None = None,
) -> Calibration:
    """Return what enters the first block.

    Parameters
    ----------
    by_sequence
        Every sequence weighs the same, not every token.
    compares
        Whether the original model's stream is kept, too.
    longest
        Tokens of a sequence whose tokens weigh 1 when every sequence weighs the same; None: of the longest here.
    storage_dtype
        Embeddings are rounded to it on the quantised side, as the checkpoint will hold them.
    """
    limit = BATCH_TOKENS if decoder.device.type == "cpu" else GPU_BATCH_TOKENS
    longest = longest or max((len(sequence) for sequence in sequences), default=1)
    streams = 2 if compares else 1
    each = None if memory.limit is None else memory.limit // streams
    folders = [None if memory.folder is None else memory.folder / name for name in ("hidden", "original")]
    hidden, original = (HiddenStates(decoder.device, each, folder) for folder in folders)
    found: list[Batch] = []
    first = 0
    with decoder.around():
        for members in batches(sequences, limit):
            tokens = token_tensor([sequences[m] for m in members], decoder.device)
            with rounded_outside_blocks(decoder, storage_dtype):
                entering, arguments = block_inputs(decoder, tokens)
            hidden.append(entering)
            if compares:
                original.append(block_inputs(decoder, tokens)[0])
            weight = longest / tokens.shape[1] if by_sequence else 1.0
            found.append(Batch(len(found), first, (tokens.shape[0], tokens.shape[1]), weight, arguments))
            first += len(members)
    return Calibration(found, hidden, original)


@contextmanager
def rounded_outside_blocks(decoder: Decoder, storage_dtype: Dtype) -> Iterator[None]:
    """Round embeddings and all else before the first block to the checkpoint's dtype for a while."""
    inside = {id(parameter) for block in decoder.blocks for parameter in block.parameters()}
    outside = [(p, p.data) for p in decoder.model.parameters() if id(p) not in inside and not p.is_meta]
    try:
        for parameter, _ in outside:
            parameter.data = parameter.data.to(DTYPES[storage_dtype]).to(parameter.dtype)
        yield
    finally:
        for parameter, original in outside:
            parameter.data = original


def round_parameters(module: nn.Module, storage_dtype: Dtype) -> None:
    """Round all parameters of a module to the checkpoint's dtype, keeping the dtype they compute in."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[storage_dtype]).to(parameter.dtype)


class _InputSeenError(Exception):
    """Ends a block's forward pass once the site's input has been seen."""


def site_sums(
    block: nn.Module,
    site: Site,
    running: Calibration,
    finished: Sequence[str],
    wanted: Wanted,
    original: nn.Module | None = None,
) -> SiteSums:
    """Run all sequences up to a site behind the finished linears before it, and sum what it reads.

    Parameters
    ----------
    block
        Its finished linears are quantised.
    finished
        Linears whose outputs are kept from pass to pass.
    original
        The block of the original model, when its inputs are compared and were not kept by `advance_original`.
    """
    sums = SiteSums(site.channels, next(block.parameters()).device, wanted)
    first = linear_of(block, site.linears[0])
    expert = expert_of(block, site)
    for batch in running.batches:
        reference = None
        if expert is None:  # an expert's tokens are not the same in both models
            reference = _original_input(original, site, running, batch)

        def note(_: nn.Module, inputs: tuple[Tensor, ...], batch: Batch = batch, y: Tensor | None = reference) -> None:
            add_input(sums, inputs[0], batch, expert, y)
            raise _InputSeenError

        hook = first.register_forward_pre_hook(note)
        try:
            with recalled(block, finished, batch.outputs):
                run_block(block, running.hidden[batch.number], batch.arguments[site.block])
        except _InputSeenError:
            continue
        finally:
            hook.remove()
    return sums


def block_sums(block: nn.Module, sites: Sequence[Site], running: Calibration, wanted: Wanted) -> dict[int, SiteSums]:
    """Run all sequences through a block once, and sum what every site reads, by the site's order."""
    device = next(block.parameters()).device
    found = {site.order: SiteSums(site.channels, device, wanted) for site in sites}
    for batch in running.batches:

        def note(site: Site, batch: Batch = batch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            expert = expert_of(block, site)
            return lambda _, inputs: add_input(found[site.order], inputs[0], batch, expert)

        with ExitStack() as stack:
            for site in sites:
                hook = linear_of(block, site.linears[0]).register_forward_pre_hook(note(site))
                stack.callback(hook.remove)
            run_block(block, running.hidden[batch.number], batch.arguments[sites[0].block])
    return found


def add_input(sums: SiteSums, x: Tensor, batch: Batch, expert: Expert | None, original: Tensor | None = None) -> None:
    """Add what a site reads of one batch; an expert reads only some tokens, which belong to several sequences."""
    sequences, length = batch.shape
    if expert is None or expert.tokens is None:
        x = x.reshape(sequences, length, -1)
        sums.add(x, weight=batch.weight, first=batch.first, original=original)
        return
    owner = expert.tokens // length
    for sequence in range(sequences):
        mine = owner == sequence
        if mine.any():
            sums.add(x[mine][None], weight=batch.weight, first=batch.first + sequence)


def expert_of(block: nn.Module, site: Site) -> Expert | None:
    """Return the expert whose input a site is; None for any other site."""
    parent, _, _ = site.linears[0].rpartition(".")
    module = block.get_submodule(parent)
    return module if isinstance(module, Expert) else None


def advance(
    running: Calibration, block: nn.Module, index: int, finished: Sequence[str], original: nn.Module | None
) -> None:
    """Run all sequences through a block and let what leaves it be what enters the next."""
    for batch in running.batches:
        with recalled(block, finished, batch.outputs):
            leaving = run_block(block, running.hidden[batch.number], batch.arguments[index])
        running.hidden[batch.number] = leaving
        if original is not None:
            running.original[batch.number] = run_block(original, running.original[batch.number], batch.arguments[index])
        batch.outputs.clear()
        batch.original_inputs.clear()


def outputs_fit(block: nn.Module, sites: Sequence[Site], running: Calibration, *, compares: bool) -> bool:
    """Return whether what the block's linears give for all batches takes at most a part of the free memory."""
    width = sum(linear_of(block, name).weight.shape[0] for site in sites for name in site.linears)
    width += sum(site.channels for site in sites) if compares else 0
    item = next(block.parameters()).element_size()
    wanted = sum(batch.shape[0] * batch.shape[1] * width * item for batch in running.batches)
    return wanted <= KEPT_SHARE * free_memory(next(block.parameters()).device)


@contextmanager
def recalled(block: nn.Module, finished: Sequence[str], outputs: dict[str, Tensor]) -> Iterator[None]:
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


def advance_original(original: nn.Module, sites: Sequence[Site], running: Calibration) -> None:
    """Run the original model's block for the last time: keep what every site reads, and advance its stream."""
    for batch in running.batches:

        def note(site: Site, batch: Batch = batch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                batch.original_inputs[site.order] = inputs[0]

            return keep

        with ExitStack() as stack:
            for site in sites:
                hook = linear_of(original, site.linears[0]).register_forward_pre_hook(note(site))
                stack.callback(hook.remove)
            entering = running.original[batch.number]
            running.original[batch.number] = run_block(original, entering, batch.arguments[sites[0].block])


def _original_input(original: nn.Module | None, site: Site, running: Calibration, batch: Batch) -> Tensor | None:
    """Return what a site reads in the original model, kept or computed now; None when nothing is compared."""
    if original is None:
        return batch.original_inputs.get(site.order)
    found: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _InputSeenError

    hook = linear_of(original, site.linears[0]).register_forward_pre_hook(note)
    try:
        run_block(original, running.original[batch.number], batch.arguments[site.block])
    except _InputSeenError:
        pass
    finally:
        hook.remove()
    return found[0]
