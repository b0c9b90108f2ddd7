"""Calibration sequences on their way through the blocks, and what the linears of a block read of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from covercal.block_call import run_block
from covercal.block_pass import Batch, BlockPass, Read, expert_of
from covercal.decoder import (
    DTYPES,
    Decoder,
    Site,
    batches,
    block_inputs,
    free_memory,
    linear_of,
    stays_wide,
    token_tensor,
)
from covercal.gram import SiteSums, Wanted
from covercal.hidden_states import HiddenStates
from covercal.quantization_settings import Dtype

BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
KEPT_SHARE = 0.25  # of the free memory, for what would be computed once for each site otherwise
Tokens = npt.NDArray[np.int32]


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
    samples: Sequence[int] | None = None,
    one_by_one: bool = False,
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
    samples
        Number of the sample that each sequence is a prefix of; None: each is one, numbered in the order of batches.
    one_by_one
        A batch for each sequence, in their order, so that the prefixes of a sample follow each other.
    """
    limit = BATCH_TOKENS if decoder.device.type == "cpu" else GPU_BATCH_TOKENS
    longest = longest or max((len(sequence) for sequence in sequences), default=1)
    streams = 2 if compares else 1
    each = None if memory.limit is None else memory.limit // streams
    folders = [None if memory.folder is None else memory.folder / name for name in ("hidden", "original")]
    hidden, original = (HiddenStates(decoder.device, each, folder) for folder in folders)
    found: list[Batch] = []
    first = 0
    order = [[m] for m in range(len(sequences))] if one_by_one else list(batches(sequences, limit))
    together = [[sequences[m] for m in members] for members in order]
    with decoder.around():
        with rounded_outside_blocks(decoder, storage_dtype):
            for members, some in zip(order, together, strict=True):
                entering, arguments = block_inputs(decoder, token_tensor(some, decoder.device))
                hidden.append(entering)
                weight = longest / len(some[0]) if by_sequence else 1.0
                numbers = range(first, first + len(some)) if samples is None else [samples[m] for m in members]
                found.append(Batch(len(found), tuple(numbers), (len(some), len(some[0])), weight, arguments))
                first += len(some)
        for some in together if compares else ():
            original.append(block_inputs(decoder, token_tensor(some, decoder.device))[0])
    return Calibration(found, hidden, original)


@contextmanager
def rounded_outside_blocks(decoder: Decoder, storage_dtype: Dtype) -> Iterator[None]:
    """Round embeddings and all else before the first block to the checkpoint's dtype for a while."""
    inside = {id(parameter) for block in decoder.blocks for parameter in block.parameters()}
    stays = stays_wide(decoder.model, storage_dtype)
    outside = [
        (parameter, parameter.data)
        for name, parameter in decoder.model.named_parameters()
        if id(parameter) not in inside and not parameter.is_meta and not stays(name)
    ]
    try:
        for parameter, _ in outside:
            parameter.data = parameter.data.to(DTYPES[storage_dtype]).to(parameter.dtype)
        yield
    finally:
        for parameter, original in outside:
            parameter.data = original


def round_parameters(
    module: nn.Module, storage_dtype: Dtype, stays: Callable[[str], bool] = lambda name: False
) -> None:
    """Round all parameters and kept buffers of a module to the checkpoint's dtype, keeping the dtype they compute in.

    Parameters
    ----------
    stays
        Which are kept as they are, by name: see `covercal.decoder.stays_wide`.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not stays(name):
            tensor.data = tensor.data.to(DTYPES[storage_dtype]).to(tensor.dtype)


def site_sums(
    site: Site,
    passing: BlockPass,
    original: BlockPass | None = None,
    *,
    wanted: Wanted,
    weights: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> SiteSums:
    """Sum what a site reads behind the finished sites before it.

    Parameters
    ----------
    passing
        Of the block that is being quantised.
    original
        Of the original model's block over the same batches, when inputs are compared. Not with an expert's: its tokens
        are not the same in both models.
    weights
        See `SiteSums`.
    scale
        (channels,) by which the block's inputs are divided, and the original's are not.
    """
    sums = SiteSums(site.channels, passing.device, wanted, weights)
    if original is None or passing.is_expert(site):
        for batch, read in passing.inputs(site):
            add_input(sums, read, batch)
        return sums
    for (batch, read), (_, reference) in zip(passing.inputs(site), original.inputs(site), strict=True):
        x = reference.x.float()
        add_input(sums, read, batch, x if scale is None else x / scale.float())
    return sums


def block_sums(
    block: nn.Module, sites: Sequence[Site], running: Calibration, wanted: Wanted, *, advance: bool = False
) -> dict[int, SiteSums]:
    """Run all sequences through a block once, and sum what every site reads, by the site's order.

    Parameters
    ----------
    advance
        Whether what leaves the block then is what enters the next.
    """
    device = next(block.parameters()).device
    found = {site.order: SiteSums(site.channels, device, wanted) for site in sites}
    for batch in running.batches:

        def note(site: Site, batch: Batch = batch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            expert = expert_of(block, site)

            def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                read = Read(site.order, inputs[0], None if expert is None else expert.tokens)
                add_input(found[site.order], read, batch)

            return add

        with ExitStack() as stack:
            for site in sites:
                hook = linear_of(block, site.linears[0]).register_forward_pre_hook(note(site))
                stack.callback(hook.remove)
            leaving = run_block(block, running.hidden[batch.number], batch.arguments[sites[0].block])
        if advance:
            running.hidden[batch.number] = leaving
    return found


def add_input(sums: SiteSums, read: Read, batch: Batch, original: Tensor | None = None) -> None:
    """Add what a site reads of one batch; an expert reads only some tokens, which belong to several sequences.

    They are added together where nothing tells sequences apart.
    """
    sequences, length = batch.shape
    if read.tokens is None:
        x = read.x.reshape(sequences, length, -1)
        sums.add(x, weight=batch.weight, samples=batch.samples, original=original)
        return
    owner = read.tokens // length
    if not sums.by_sequence:
        sums.add(read.x[None], weight=batch.weight, sequences=int((owner.bincount(minlength=1) > 0).sum()))
        return
    for sequence, sample in enumerate(batch.samples):
        mine = owner == sequence
        if mine.any():
            sums.add(read.x[mine][None], weight=batch.weight, samples=(sample,))


def passes_fit(block: nn.Module, sites: Sequence[Site], running: Calibration, *, compares: bool) -> bool:
    """Return whether what passes of all batches hold while they wait takes at most a part of the free memory.

    What they hold is not known; it is taken for what all sites read and what all their linears give.
    """
    width = sum(linear_of(block, name).weight.shape[0] for site in sites for name in site.linears)
    width += sum(site.channels for site in sites)
    item = next(block.parameters()).element_size() * (2 if compares else 1)
    wanted = sum(batch.shape[0] * batch.shape[1] * width * item for batch in running.batches)
    return wanted <= KEPT_SHARE * free_memory(next(block.parameters()).device)
