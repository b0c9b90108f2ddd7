"""Gram matrices of layer inputs: H = mean over tokens of x x^T; every token weighs 1, or every sequence the same."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class GramSum:
    """A running Gram matrix of one site's inputs.

    Attributes
    ----------
    total
        float64 (channels, channels): sum over tokens of weight * x x^T.
    weight
        Sum of the tokens' weights.
    sequences, tokens
        What went into it.
    """

    total: Tensor
    weight: float = 0.0
    sequences: int = 0
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> "GramSum":
        """Return the sum of nothing."""
        return cls(torch.zeros((channels, channels), dtype=torch.float64, device=device))

    def add(self, x: Tensor, sequences: int, weight: float = 1.0) -> None:
        """Add the inputs of some sequences, (…, channels): products in float32, the sum in float64.

        `weight` is that of each token: 1 for GPTQ, where a long sequence counts for more than a short one (arXiv
        2210.17323); the inverse of the sequence's length for MaCa (arXiv 2602.07465).
        """
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total.add_(flat.T @ flat, alpha=weight)
        self.weight += weight * flat.shape[0]
        self.sequences += sequences
        self.tokens += flat.shape[0]

    def gram(self) -> Tensor:
        """Return H, float64 (channels, channels): the weighted mean over tokens of x x^T."""
        return self.total / (self.weight or 1.0)
