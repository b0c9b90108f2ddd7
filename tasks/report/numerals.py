"""Numbers as people read them: sensible digits, thousands separators, sizes in MB, times in minutes."""

import math
import re
from typing import Any, TypeGuard

from covercal.comparison import student_quantile

MISSING = "–"
NORMAL_95 = 1.959964  # 97.5% quantile of the normal distribution


def known(value: Any) -> TypeGuard[float]:
    """Return whether a value of the summary is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, sign: bool = False) -> str:
    """Return a measure with about four digits, such as `0.1234`, `12.35` or `1,235`; a dash for none."""
    if not known(value):
        return MISSING
    return _signed(f"{value:{'+' if sign else ''},.{decimals(value)}f}")


def decimals(value: float) -> int:
    """Return how many decimals a measure of that size is shown with."""
    size = abs(value)
    if size == 0 or size >= 1000:
        return 0
    if size >= 1:
        return 4 - len(str(int(size)))
    return 4 if size >= 0.001 else min(9, 1 - math.floor(math.log10(size)))


def alike(value: float, digits: int, sign: bool = False) -> str:
    """Return a number with the decimals of the number beside it."""
    return _signed(f"{value:{'+' if sign else ''},.{digits}f}")


def span(low: Any, high: Any, sign: bool = False, digits: int | None = None) -> str:
    """Return an interval, such as `0.11 to 0.14`; a dash when an end is not known."""
    if not (known(low) and known(high)):
        return MISSING
    shared = max(decimals(low), decimals(high)) if digits is None else digits
    return f"{alike(low, shared, sign)} to {alike(high, shared, sign)}"


def within(value: float, half: Any) -> str:
    """Return half the width of a value's interval, such as `± 0.0012`, with the value's decimals; empty for none."""
    if not known(half):
        return ""
    words = alike(half, decimals(value))
    return f"± {words if float(words.replace(',', '')) or not half else number(half)}"


def count(value: Any) -> str:
    """Return a whole number with thousands separators."""
    return f"{round(value):,}" if known(value) else MISSING


def percent(value: Any, sign: bool = False, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return _signed(f"{100 * value:{'+' if sign else ''},.{digits}f}%") if known(value) else MISSING


def percent_span(low: Any, high: Any, sign: bool = False) -> str:
    """Return an interval of shares as percentages."""
    return f"{percent(low, sign)} to {percent(high, sign)}" if known(low) and known(high) else MISSING


def probability(value: Any) -> str:
    """Return a p-value, such as `p = 0.031` or `p < 0.001`."""
    if not known(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def size(value: Any) -> str:
    """Return a number of bytes in kB, MB or GB (powers of ten)."""
    if not known(value):
        return MISSING
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if value >= step:
            return f"{value / step:,.{2 if value < 10 * step else 1 if value < 100 * step else 0}f} {unit}"
    return f"{value / 1e3:,.1f} kB"


def duration(seconds: Any) -> str:
    """Return a time as m:ss, or h:mm:ss from an hour on."""
    if not known(seconds):
        return MISSING
    if 0 < seconds < 0.5:
        return "under 0:01"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def half_width(error: Any, sequences: Any = None) -> float:
    """Return half the width of the 95% interval of a standard error; NaN when it is not known.

    Student's t where the error is over so many sequences or items, which may be few; else the normal distribution.
    """
    if not known(error):
        return math.nan
    quantile = student_quantile(0.975, sequences - 1) if known(sequences) and sequences > 1 else NORMAL_95
    return quantile * float(error)


def one_line(text: Any, length: int = 0) -> str:
    """Return text on one line without control characters, cut with an ellipsis where it is longer than `length`."""
    flat = re.sub(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()
    return flat if not length or len(flat) <= length else flat[: length - 1].rstrip() + "…"


def plural(amount: int, noun: str) -> str:
    """Return an amount with its noun, such as `1 task` or `3 tasks`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def _signed(text: str) -> str:
    return text.replace("-", "−")
