"""Quantised inputs: static steps against brute force on the raw values, codes against compressed-tensors itself."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from covercal.activations import CLIPS, quantize_inputs, quantized_input, scale_from_peaks, static_scale, top_code
from covercal.decoder import DTYPES
from covercal.gram import SiteSums, Wanted
from covercal.quantization_settings import Activations

HALF_BIN = 2 ** (1 / 64)  # bins are a 32nd of an octave wide, and stand for their middle
every_size = pytest.mark.parametrize("bits", [4, 6, 8])


def heavy_tailed(seed: int = 0, count: int = 6000) -> npt.NDArray[np.float64]:
    """Return signed values of which a few are far larger than the rest, and some are zero."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, count)
    values[:100] = 0
    return values.astype(np.float32).astype(np.float64)


def static(ranges: str, bits: int = 8, **fields: Any) -> Activations:
    return Activations(kind="static", ranges=ranges, bits=bits, **fields)


def step_of(values: npt.NDArray[np.float64], settings: Activations) -> float:
    """Return the static step that is found from the histogram of some values."""
    sums = SiteSums(1, torch.device("cpu"), Wanted(gram=False, histogram=True))
    sums.add(torch.from_numpy(values).float().reshape(1, -1, 1))
    found = sums.statistics()
    assert found.histogram is not None
    return static_scale(found.histogram, found.largest, settings)


def squared_error(values: npt.NDArray[np.float64], step: float, bits: int) -> float:
    """Return the mean squared error of the values on a grid, each rounded by itself."""
    codes = np.clip(np.rint(values / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.mean((codes * step - values) ** 2))


def tried_steps(largest: float, bits: int) -> npt.NDArray[np.float64]:
    return largest * np.arange(1, CLIPS + 1) / CLIPS / (2 ** (bits - 1) - 1)


# --- static steps from a histogram ---------------------------------------------------------------------------------


@every_size
def test_a_min_max_grid_ends_at_the_largest_value(bits: int) -> None:
    values = heavy_tailed()
    assert step_of(values, static("min_max", bits)) * top_code(bits) == pytest.approx(np.abs(values).max(), rel=1e-12)


@pytest.mark.parametrize("percentile", [60, 90, 99, 99.9, 100])
def test_a_percentile_grid_ends_at_that_percentile_of_the_values_that_are_not_zero(percentile: float) -> None:
    values = heavy_tailed()
    magnitude = np.abs(values[values != 0])
    expected = np.quantile(magnitude, percentile / 100, method="inverted_cdf")
    end = step_of(values, static("percentile", percentile=percentile)) * 127
    assert expected / HALF_BIN * (1 - 1e-6) <= end <= expected * HALF_BIN * (1 + 1e-6)


def test_no_percentile_grid_ends_beyond_the_largest_value() -> None:
    values = np.array([1.0001, -0.5, 0.25])  # the largest is at the lower end of its bin
    assert step_of(values, static("percentile", percentile=100)) * 127 == pytest.approx(1.0001, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@every_size
def test_an_mse_grid_has_the_least_squared_error_of_those_tried(seed: int, bits: int) -> None:
    values = heavy_tailed(seed)
    found = step_of(values, static("mse", bits))
    magnitude = np.abs(values)  # a histogram knows no signs, nor where in a step a value lies: hence the 3%
    tried = tried_steps(magnitude.max(), bits)
    least = min(squared_error(magnitude, step, bits) for step in tried)
    assert np.isclose(tried, found, rtol=1e-9).any()
    assert squared_error(magnitude, found, bits) <= 1.03 * least


@every_size
def test_an_mse_grid_clips_where_a_few_values_are_far_larger_than_the_rest(bits: int) -> None:
    values = heavy_tailed()
    clipping, whole = (step_of(values, static(ranges, bits)) for ranges in ("mse", "min_max"))
    assert squared_error(values, clipping, bits) < squared_error(values, whole, bits)


@pytest.mark.parametrize("ranges", ["min_max", "percentile", "mse"])
def test_a_static_step_grows_with_the_values(ranges: str) -> None:
    values = heavy_tailed()
    assert step_of(values * 4, static(ranges)) == pytest.approx(4 * step_of(values, static(ranges)), rel=1e-9)


@pytest.mark.parametrize("ranges", ["min_max", "percentile", "mse"])
def test_inputs_that_are_all_zero_get_a_step_of_one(ranges: str) -> None:
    assert step_of(np.zeros(10), static(ranges)) == 1.0


# --- static steps from cached statistics ---------------------------------------------------------------------------


def peaks(seed: int = 0) -> tuple[Tensor, float, int]:
    """Return (samples, channels) peaks of which a few stand out, the mean square of the inputs, and tokens a sample."""
    generator = np.random.default_rng(seed)
    peak = np.abs(generator.standard_t(4, (12, 40))) + 1
    peak[3, 7] = 60
    return torch.from_numpy(peak), 0.4, 25


def from_peaks(ranges: str, bits: int = 8, seed: int = 0, **fields: Any) -> float:
    return scale_from_peaks(*peaks(seed), static(ranges, bits, **fields))


@every_size
def test_a_min_max_grid_from_peaks_ends_at_the_largest(bits: int) -> None:
    assert from_peaks("min_max", bits) == pytest.approx(60 / top_code(bits), rel=1e-12)


@pytest.mark.parametrize("percentile", [75.0, 99.0, 100.0])
def test_a_percentile_grid_from_peaks_ends_at_one_of_them_with_that_share_below(percentile: float) -> None:
    flat = np.sort(peaks()[0].numpy().ravel())
    end = from_peaks("percentile", percentile=percentile) * 127
    assert np.isclose(flat, end, rtol=1e-12).any()
    assert np.mean(flat < end * (1 - 1e-12)) == pytest.approx(percentile / 100, abs=1 / flat.size)


@pytest.mark.parametrize("seed", range(3))
@every_size
def test_an_mse_grid_from_peaks_has_the_least_sum_of_rounding_and_clipping(seed: int, bits: int) -> None:
    peak, energy, tokens = peaks(seed)
    flat = peak.numpy().ravel()
    costs = {}
    for step in tried_steps(flat.max(), bits):
        clipped = sum(max(0.0, value - step * top_code(bits)) ** 2 for value in flat) / (flat.size * tokens)
        costs[step] = min(step**2 / 12, energy) + clipped
    assert from_peaks("mse", bits, seed) == pytest.approx(min(costs, key=costs.__getitem__), rel=1e-9)


def test_an_mse_grid_from_peaks_clips_a_single_outlier_when_steps_are_coarse() -> None:
    assert from_peaks("mse", 4) < from_peaks("min_max", 4)


def test_more_tokens_a_sample_clip_more() -> None:
    peak, energy, _ = peaks()
    few, many = (scale_from_peaks(peak, energy, tokens, static("mse")) for tokens in (1, 10_000))
    assert many < few


@pytest.mark.parametrize("ranges", ["min_max", "percentile", "mse"])
def test_a_step_from_peaks_grows_with_the_inputs(ranges: str) -> None:
    peak, energy, tokens = peaks()
    grown = scale_from_peaks(peak * 8, energy * 64, tokens, static(ranges))
    assert grown == pytest.approx(8 * from_peaks(ranges), rel=1e-9)


@pytest.mark.parametrize("ranges", ["min_max", "percentile", "mse"])
def test_peaks_that_are_all_zero_give_a_step_of_one(ranges: str) -> None:
    assert scale_from_peaks(torch.zeros(3, 4), 0.0, 5, static(ranges)) == 1.0


# --- codes ---------------------------------------------------------------------------------------------------------


def inputs(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return (sequences, tokens, channels) inputs, tokens of different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 50, 32, generator=generator) * torch.randn(3, 50, 1, generator=generator).mul(2).exp()
    x[1, 4] = 0
    return x.to(dtype)


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_dynamic_inputs_are_those_of_compressed_tensors_to_the_bit(dtype: torch.dtype, bits: int) -> None:
    x = inputs(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    assert torch.equal(quantized_input(x, None, bits), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_static_inputs_are_those_of_compressed_tensors_to_the_bit(dtype: torch.dtype, bits: int) -> None:
    x, step = inputs(dtype), torch.tensor([0.037]).to(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="tensor", dynamic=False)
    expected = fake_quantize(x, step, torch.zeros(1, dtype=torch.int8), args)
    assert torch.equal(quantized_input(x, step, bits), expected)


@every_size
def test_static_inputs_are_clipped_at_the_ends_of_the_signed_codes(bits: int) -> None:
    ends = quantized_input(torch.tensor([-1000.0, 1000.0]), torch.tensor([0.5]), bits)
    assert ends.tolist() == [-(2 ** (bits - 1)) * 0.5, (2 ** (bits - 1) - 1) * 0.5]


@every_size
def test_dynamic_inputs_lie_within_half_a_step_of_the_inputs(bits: int) -> None:
    x = inputs(torch.float32).double()
    step = x.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)
    error = (quantized_input(x, None, bits) - x).abs()
    assert bool((error <= step * (0.5 + 1e-4)).all())


def test_a_token_of_zeros_stays_zero() -> None:
    assert quantized_input(inputs(torch.float32), None, 8)[1, 4].tolist() == [0.0] * 32


@pytest.mark.parametrize("step", [None, torch.tensor([0.05])])
def test_a_linear_reads_quantised_inputs_until_the_hook_is_removed(step: Tensor | None) -> None:
    linear, x = nn.Linear(32, 5), inputs(torch.float32)
    expected, plain = linear(quantized_input(x, step, 8)), linear(x)
    handle = quantize_inputs(linear, step, 8)
    assert torch.equal(linear(x), expected)
    assert not torch.equal(expected, plain)
    handle.remove()
    assert torch.equal(linear(x), plain)
