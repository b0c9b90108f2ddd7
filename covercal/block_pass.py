"""A block's forward pass that waits before every site until the site is quantised, and then goes on behind it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from covercal.block_call import BlockArguments, run_block
from covercal.decoder import Site, linear_of, replaced_forward
from covercal.experts import Expert
from covercal.hidden_states import HiddenStates


@dataclass(frozen=True, slots=True)
class Batch:
    """Calibration sequences of one length.

    Attributes
    ----------
    number
        Its place in the streams.
    samples
        Number of the sample that each sequence is, or is a prefix of.
    shape
        (sequences, tokens).
    weight
        Of each token in a Gram matrix.
    arguments
        Of every block.
    """

    number: int
    samples: tuple[int, ...]
    shape: tuple[int, int]
    weight: float
    arguments: list[BlockArguments]


@dataclass(frozen=True, slots=True)
class Read:
    """What a site reads of one batch.

    Attributes
    ----------
    order
        Of the site.
    x
        (..., channels).
    tokens
        int64: which of the batch's tokens, for an expert; None: all of them.
    """

    order: int
    x: Tensor
    tokens: Tensor | None


class BlockPass:
    """One forward pass of a block over all batches, for as long as the `with` statement lasts.

    A site is quantised from what it reads behind the quantised sites before it. Each batch's pass is a greenlet that
    hands over what a site reads before the site's first linear computes, and goes on when it is asked for a later
    site, so that everything is computed once.

    Parameters
    ----------
    block, sites
        The sites are those of the block, in the order of execution. Their linears may change until they have computed.
    stream
        What enters the block; after `finish`, what leaves it.
    batches
        Of the stream.
    keep
        Whether passes are held while they wait, with all that they still need. If not, they begin anew for each site,
        in the memory of one batch.
    """

    def __init__(
        self, block: nn.Module, sites: Sequence[Site], stream: HiddenStates, batches: Sequence[Batch], *, keep: bool
    ) -> None:
        self._block, self._sites, self._stream, self._batches, self._keep = block, sites, stream, batches, keep
        self._waiting: dict[int, _Running] = {}
        self._emptied: set[str] = set()
        self._gates = ExitStack()

    def __enter__(self) -> Self:
        for site in self._sites:
            linear = linear_of(self._block, site.linears[0])
            self._gates.enter_context(replaced_forward(linear, _gate(site, linear, expert_of(self._block, site))))
            for name in site.linears:
                hook = linear_of(self._block, name).register_forward_hook(_noted(name))
                self._gates.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._waiting.values():
            running.give_up()
        self._waiting.clear()
        self._gates.close()

    @property
    def device(self) -> torch.device:
        """Return where the block computes."""
        return next(self._block.parameters()).device

    def is_expert(self, site: Site) -> bool:
        """Return whether a site is an expert's input."""
        return expert_of(self._block, site) is not None

    def inputs(self, site: Site) -> Iterator[tuple[Batch, Read]]:
        """Yield what a site reads of every batch that reaches it, behind the sites before it as they are now."""
        for batch in self._batches:
            running = self._run(batch)
            stop = running.until(site.order)
            if self._keep:
                self._waiting[batch.number] = running
            if isinstance(stop, Read) and stop.order == site.order:
                yield batch, stop
            if not self._keep:
                running.give_up()

    def forget(self, site: Site) -> None:
        """Empty the weights of the linears of earlier sites that have computed in every batch's pass.

        They take no memory any more, and the block cannot be run again. Where passes begin anew for each site, nothing
        is emptied.
        """
        if not self._waiting or len(self._waiting) < len(self._batches):
            return
        earlier = {name for each in self._sites if each.order < site.order for name in each.linears} - self._emptied
        computed = earlier.intersection(*(running.computed for running in self._waiting.values()))
        for name in computed:
            weight = linear_of(self._block, name).weight
            weight.data = weight.new_empty(0)
        self._emptied |= computed

    def finish(self) -> HiddenStates:
        """Let all batches run to the end, and what leaves the block be what the stream holds; returns that."""
        for batch in self._batches:
            self._stream[batch.number] = self._run(batch).result()
        return self._stream.snapshot()

    def _run(self, batch: Batch) -> "_Running":
        if batch.number in self._waiting:
            return self._waiting.pop(batch.number)
        return _Running(self._block, self._stream[batch.number], batch.arguments[self._sites[0].block])


class _Running(greenlet):
    """The pass of one batch."""

    def __init__(self, block: nn.Module, hidden: Tensor, arguments: BlockArguments) -> None:
        super().__init__(run_block)
        self.wanted = 0  # order of the first site whose input is still asked for
        self.computed: set[str] = set()  # names of the linears that have computed
        self._call: tuple[Any, ...] = (block, hidden, arguments)
        self._stop: Read | Tensor | None = None

    def until(self, order: int) -> Read | Tensor:
        """Go on to a site, or behind it where it is not reached; returns what stands there, at the end what leaves."""
        self.wanted, stop = order, self._stop
        if stop is None or (isinstance(stop, Read) and stop.order < order):
            call, self._call = self._call, ()
            self._stop = stop = None  # not held while what follows computes
            self._stop = stop = cast(Read | Tensor, self.switch(*call))
        return stop

    def result(self) -> Tensor:
        """Go on to the end."""
        return torch.as_tensor(self.until(sys.maxsize))

    def give_up(self) -> None:
        """End here, and let go of everything."""
        if not self.dead:
            self.throw()


def _gate(site: Site, linear: nn.Module, expert: Expert | None) -> Callable[[Tensor], Tensor]:
    """Return what runs in place of a site's first linear: it waits, and then calls the linear as it is by then.

    It does not wait where only what later sites read is asked for.
    """
    compute: Callable[[Tensor], Tensor] = linear.forward

    def forward(x: Tensor) -> Tensor:
        here = getcurrent()
        if not isinstance(here, _Running) or site.order < here.wanted or here.parent is None:
            return compute(x)  # a finished site's hooks have seen x already
        tokens = None if expert is None else expert.tokens
        here.parent.switch(Read(site.order, x, tokens))
        if expert is not None:
            expert.tokens = tokens  # other batches have been here since
        result: Tensor = linear(x)  # with what hooks it was given in the meantime
        return result

    return forward


def _noted(name: str) -> Callable[..., None]:
    """Return a hook that notes that a linear has computed in the present pass."""

    def note(*_: object) -> None:
        here = getcurrent()
        if isinstance(here, _Running):
            here.computed.add(name)

    return note


def expert_of(block: nn.Module, site: Site) -> Expert | None:
    """Return the expert whose input a site is; None for any other site."""
    parent, _, _ = site.linears[0].rpartition(".")
    module = block.get_submodule(parent)
    return module if isinstance(module, Expert) else None
