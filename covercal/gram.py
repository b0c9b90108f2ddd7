"""Gram matrices of layer inputs: H = (2 / sequences) * sum over tokens of x x^T (GPTQ, arXiv 2210.17323, eq. 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class GramSum:
    """A running Gram matrix of one site's inputs.

    Attributes
    ----------
    total
        float64 (channels, channels): sum of x x^T.
    sequences, tokens
        What went into it.
    """

    total: Tensor
    sequences: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> "GramSum":
        """Return the sum of nothing."""
        return cls(torch.zeros((channels, channels), dtype=torch.float64, device=device))

    def add(self, x: Tensor, sequences: int) -> None:
        """Add the inputs of some sequences, (…, channels): products in float32, the sum in float64."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total += flat.T @ flat
        self.sequences += sequences
        self.tokens += flat.shape[0]

    def gram(self) -> Tensor:
        """Return H in GPTQ's scaling, float64 (channels, channels)."""
        return self.total * (2.0 / max(self.sequences, 1))
