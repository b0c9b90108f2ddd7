"""Linears whose weights transformers keeps (inputs, outputs), those of GPT-2, as `nn.Linear` of the same memory."""

from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Straightened(nn.Linear):
    """What a `Conv1D` computes, as a linear (outputs, inputs) that shares its memory."""

    def __init__(self, turned: Conv1D) -> None:
        with torch.device("meta"):
            super().__init__(turned.nx, turned.nf)
        self.weight = nn.Parameter(turned.weight.data.T, requires_grad=False)
        self.bias = nn.Parameter(turned.bias.data, requires_grad=False)


def is_turned(module: nn.Module) -> TypeGuard[Conv1D]:
    """Return whether a module is a linear with its weight (inputs, outputs)."""
    return isinstance(module, Conv1D)


def straighten(module: nn.Module) -> None:
    """Replace every `Conv1D` inside `module` by a linear."""
    for name, child in list(module.named_modules()):
        if name and is_turned(child):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, Straightened(child))


def turned_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that files keep (inputs, outputs), straightened or not."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Straightened) or is_turned(module)
    )
