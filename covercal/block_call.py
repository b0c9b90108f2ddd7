"""One block computes by itself: what enters it, what leaves it, and what it leaves to later blocks."""

import copy
import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from covercal.errors import InputError


@dataclass(frozen=True, slots=True)
class Left:
    """Keys or values that an earlier block left to later ones, in a mapping that the model gives to all of them.

    Attributes
    ----------
    argument
        Keyword argument of the blocks that is the mapping.
    key
        In the mapping.
    place
        In the tuple that is kept there; None where it is a tensor alone.
    heads, size
        Of the tensor, (sequences, heads, tokens, size).
    """

    argument: str
    key: Any
    place: int | None
    heads: int
    size: int


@dataclass(frozen=True, slots=True)
class BlockArguments:
    """What a block is called with besides hidden states.

    Attributes
    ----------
    positional, keywords
        As the model gives them, before any block has run.
    width
        Of the hidden states.
    left
        What earlier blocks left; it goes with the hidden states, behind them, in one tensor of `stream_width`.
    beside
        How many hidden states of one token lie side by side, in dimensions before that of the sequences.
    """

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    width: int
    left: tuple[Left, ...] = ()
    beside: int = 1

    @property
    def stream_width(self) -> int:
        """Return how wide the tensor is that enters the block."""
        return self.width + math.ceil(sum(each.heads * each.size for each in self.left) / self.beside)


@torch.inference_mode()
def run_block(block: nn.Module, entering: Tensor, arguments: BlockArguments) -> Tensor:
    """Return what leaves a block for the next one, (..., sequences, length, width): hidden states, and what it left.

    Parameters
    ----------
    entering
        What left the block before, (..., sequences, length, `arguments.stream_width`).
    """
    return run_and_tell(block, entering, arguments)[0]


@torch.inference_mode()
def run_and_tell(block: nn.Module, entering: Tensor, arguments: BlockArguments) -> tuple[Tensor, tuple[Left, ...]]:
    """Return what leaves a block, and what of it are keys and values: `BlockArguments.left` of the next block.

    Raises
    ------
    InputError
        When a block leaves anything but keys and values behind.
    """
    hidden, keywords = _opened(entering, arguments)
    hidden = hidden_of(block(hidden, *arguments.positional, **keywords))
    behind = tuple(_left_behind(arguments, keywords))
    if not behind:
        return hidden, ()
    if any(not _fits(tensor, hidden) for *_, tensor in behind):
        raise InputError(
            f"A {type(block).__name__} leaves more than keys and values, (sequences, heads, tokens, size), in "
            f"`{behind[0][0]}` for later blocks; covercal cannot quantise one block after the other so."
        )
    rows = torch.cat([tensor.transpose(1, 2).flatten(2) for *_, tensor in behind], dim=-1)
    rows = functional.pad(rows, (0, -rows.shape[-1] % arguments.beside))
    rows = rows.reshape(*rows.shape[:-1], arguments.beside, -1).movedim(2, 0).reshape(*hidden.shape[:-1], -1)
    left = tuple(
        Left(argument, key, place, tensor.shape[1], tensor.shape[3]) for argument, key, place, tensor in behind
    )
    return torch.cat([hidden, rows], dim=-1), left


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of what a block returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _opened(entering: Tensor, arguments: BlockArguments) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states, and the keyword arguments with what earlier blocks left, for one run of a block."""
    keywords = {
        name: copy.copy(value) if isinstance(value, MutableMapping) else value
        for name, value in arguments.keywords.items()
    }
    if not arguments.left:
        return entering, keywords
    hidden, rows = entering[..., : arguments.width], entering[..., arguments.width :]
    rows = rows.reshape(arguments.beside, *rows.shape[-3:]).movedim(0, 2).flatten(2)
    start = 0
    for left in arguments.left:
        end = start + left.heads * left.size
        tensor = rows[..., start:end].reshape(*rows.shape[:2], left.heads, left.size).transpose(1, 2)
        mapping = keywords[left.argument]
        mapping[left.key] = tensor if left.place is None else (*mapping.get(left.key, ()), tensor)
        start = end
    return hidden.contiguous(), keywords


def _left_behind(arguments: BlockArguments, keywords: dict[str, Any]) -> Iterator[tuple[str, Any, int | None, Any]]:
    """Yield what stands in mappings after a run and was not put there by the model: argument, key, place, tensor."""
    for argument, mapping in keywords.items():
        if isinstance(mapping, MutableMapping):
            for key, value in mapping.items():
                if key in arguments.keywords[argument]:
                    continue
                if isinstance(value, tuple):
                    yield from ((argument, key, place, each) for place, each in enumerate(value))
                else:
                    yield argument, key, None, value


def _fits(value: Any, hidden: Tensor) -> bool:
    """Return whether something has a row for each token, as keys and values have."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype != hidden.dtype:
        return False
    return value.shape[::2] == hidden.shape[-3:-1]
