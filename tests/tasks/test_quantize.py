"""The bits of a quantised weight, against counting all that its method stores."""

from typing import Any

import pytest

from covercal.quantization_settings import Quantization
from tasks.quantize import average_bits

SHAPES = {"narrow": (10, 128), "wide": (6, 256)}
WEIGHTS = 10 * 128 + 6 * 256
GROUPS = WEIGHTS // 64


def bits_of(**fields: Any) -> float:
    """Return the bits of all weights together, on 3-bit grids of groups of 64."""
    settings = Quantization(**{"method": "rtn", "bits": 3, "group_size": 64, "storage_dtype": "bfloat16", **fields})
    return average_bits(settings, SHAPES) * WEIGHTS


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scale_takes_the_bits_of_its_dtype(dtype: str, number: int, symmetric: bool) -> None:
    zero = 0 if symmetric else 3
    found = bits_of(storage_dtype=dtype, symmetric=symmetric)
    assert found == pytest.approx(WEIGHTS * 3 + GROUPS * (number + zero), abs=1e-4 * WEIGHTS)


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16)])
@pytest.mark.parametrize("bits", [4, 15])
def test_salient_weights_on_a_grid_take_their_codes_places_and_two_more_numbers_a_group(
    bits: int, dtype: str, number: int
) -> None:
    salient = 0.125 * WEIGHTS
    expected = (WEIGHTS - salient) * 3 + salient * (bits + 6) + GROUPS * (number + 3 + 2 * number)
    found = bits_of(storage_dtype=dtype, salient={"share": 0.125, "bits": bits})
    assert found == pytest.approx(expected, abs=1e-4 * WEIGHTS)


@pytest.mark.parametrize(("dtype", "number"), [("float32", 32), ("bfloat16", 16)])
def test_salient_weights_that_are_kept_take_themselves_and_their_places_and_have_no_grid(
    dtype: str, number: int
) -> None:
    salient = 0.125 * WEIGHTS
    expected = (WEIGHTS - salient) * 3 + salient * (number + 6) + GROUPS * (number + 3)
    found = bits_of(storage_dtype=dtype, salient={"share": 0.125, "bits": 16})
    assert found == pytest.approx(expected, abs=1e-4 * WEIGHTS)


def test_without_salient_weights_their_bits_do_not_count() -> None:
    assert bits_of(salient={"share": 0.0, "bits": 16}) == bits_of(salient={"share": 0.0, "bits": 4})
