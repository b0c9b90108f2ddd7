"""Numbers are written with sensible digits, whatever their size."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.report.drawing import fitting, spread, text_width
from tasks.report.numerals import MISSING, duration, known, number, one_line, percent, probability, size, span


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"), (0.1732, "0.1732"), (3.5391, "3.539"), (19.7668, "19.77"), (123.456, "123.5"), (12345.6, "12,346"),
        (0.00001234, "0.000012"), (-0.3395, "−0.3395"), (None, MISSING), (math.nan, MISSING), (math.inf, MISSING),
    ],
)  # fmt: skip
def test_a_measure_has_about_four_digits(value: float | None, words: str) -> None:
    assert number(value) == words


@given(st.floats(min_value=1e-6, max_value=1e9))
def test_a_shown_measure_is_within_a_part_in_twenty_of_its_value(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (0.3, "under 0:01"), (41.3, "0:41"), (437.4, "7:17"), (59.7, "1:00"), (8821, "2:27:01")],
)
def test_times_are_minutes_and_seconds(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("amount", "words"),
    [(900, "0.9 kB"), (103_681_024, "104 MB"), (15_500_000, "15.5 MB"), (1_530_000_000, "1.53 GB")],
)
def test_sizes_have_a_unit(amount: int, words: str) -> None:
    assert size(amount) == words


def test_an_interval_with_an_unknown_end_is_a_dash() -> None:
    assert span(0.1, None) == span(math.nan, 0.2) == MISSING
    assert span(-0.1, 0.25, sign=True) == "−0.1000 to +0.2500"


def test_a_share_is_a_percentage() -> None:
    assert percent(0.9127) == "91.3%"
    assert percent(-0.02, sign=True) == "−2.0%"


def test_small_p_values_are_not_zero() -> None:
    assert [probability(p) for p in (0.0002, 0.0012, 0.62, None)] == ["p < 0.001", "p = 0.001", "p = 0.62", ""]


def test_text_and_nothing_are_not_numbers() -> None:
    assert not any(map(known, (None, "0.1", math.nan, math.inf)))


def test_text_on_one_line_has_no_control_characters_and_is_cut_with_an_ellipsis() -> None:
    assert one_line("a\n\tb\x00c\x1bd\ud800") == "a b c d"
    assert one_line("abcdef", 4) == "abc…"


@given(st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=8))
def test_names_at_the_end_of_lines_never_overlap_and_keep_their_order(heights: list[float]) -> None:
    moved = spread(heights, 10, 0, 100)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 10 - 1e-9 for gap in gaps)
    assert min(moved) >= -1e-9
    assert max(moved) <= 100 + 1e-9


def test_names_that_are_far_apart_stay_where_they_are() -> None:
    assert spread([80.0, 10.0, 50.0], 10, 0, 100) == [80.0, 10.0, 50.0]


@given(st.text(max_size=60), st.floats(min_value=40, max_value=200))
def test_a_fitted_name_is_no_wider_than_its_place(text: str, width: float) -> None:
    assert text_width(fitting(text, width)) <= width + 8.2
