"""Gram sums against X^T X in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.gram import GramSum

CPU = torch.device("cpu")


def inputs(seed: int, sequences: int, length: int, channels: int) -> Tensor:
    return torch.randn(sequences, length, channels, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=5),
    st.integers(1, 24),
    st.integers(0, 2**31),
)
def test_the_gram_matrix_is_the_mean_over_tokens_of_the_products(
    shapes: list[tuple[int, int]], channels: int, seed: int
) -> None:
    parts = [inputs(seed + i, count, length, channels) for i, (count, length) in enumerate(shapes)]
    running = GramSum.empty(channels, CPU)
    for part in parts:
        running.add(part, part.shape[0])
    x = np.concatenate([part.numpy().astype(np.float64).reshape(-1, channels) for part in parts])
    expected = x.T @ x / len(x)
    np.testing.assert_allclose(running.gram().numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_sequences_and_tokens_are_counted() -> None:
    running = GramSum.empty(4, CPU)
    running.add(inputs(0, 3, 7, 4), 3)
    running.add(inputs(1, 2, 5, 4), 2)
    assert (running.sequences, running.tokens) == (5, 31)


def test_flattened_tokens_give_the_same_matrix_as_sequences() -> None:
    x = inputs(0, 3, 8, 6)
    whole, flat = GramSum.empty(6, CPU), GramSum.empty(6, CPU)
    whole.add(x, 3)
    flat.add(x.reshape(24, 6), 3)
    assert torch.equal(whole.gram(), flat.gram())


def test_the_sum_is_float64() -> None:
    running = GramSum.empty(4, CPU)
    running.add(inputs(0, 1, 7, 4), 1)
    assert running.gram().dtype == torch.float64


def test_a_small_sequence_is_not_lost_behind_a_large_one() -> None:
    running = GramSum.empty(1, CPU)
    running.add(torch.full((1, 1, 1), 2.0**14), 1)
    for _ in range(4):
        running.add(torch.ones(1, 1, 1), 1)  # float32 would drop 1 next to 2**28
    assert running.total.item() == 2.0**28 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    x = inputs(3, 2, 16, 5).to(dtype)
    half, single = GramSum.empty(5, CPU), GramSum.empty(5, CPU)
    half.add(x, 2)
    single.add(x.float(), 2)
    assert torch.equal(half.gram(), single.gram())


def test_the_gram_matrix_of_nothing_is_zero() -> None:
    assert torch.equal(GramSum.empty(3, CPU).gram(), torch.zeros(3, 3, dtype=torch.float64))


def test_with_the_inverse_length_as_weight_every_sequence_counts_the_same() -> None:
    short, long = inputs(1, 1, 3, 5), inputs(2, 1, 7, 5)
    running = GramSum.empty(5, CPU)
    running.add(short, 1, weight=1 / 3)
    running.add(long, 1, weight=1 / 7)
    x, y = short[0].double(), long[0].double()
    expected = (x.T @ x / 3 + y.T @ y / 7) / 2
    assert torch.allclose(running.gram(), expected, rtol=1e-6, atol=1e-9)


def test_equal_lengths_give_the_same_bits_whatever_the_tokens_weigh_relative_to_the_longest() -> None:
    plain, weighted = GramSum.empty(5, CPU), GramSum.empty(5, CPU)
    for seed in range(3):
        plain.add(inputs(seed, 2, 7, 5), 2)
        weighted.add(inputs(seed, 2, 7, 5), 2, weight=7 / 7)
    assert torch.equal(plain.gram(), weighted.gram())
