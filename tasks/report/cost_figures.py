"""Figures of what a run cost and saved: bytes and seconds."""

from tasks.report.drawing import WIDTH, Sheet, fitting, margin, rendered, text_width
from tasks.report.figure import Figure, Plan, Summary, Table
from tasks.report.numerals import count, duration, known, number, one_line, percent, size


def _without_size(summary: Summary) -> str:
    quantization = summary.get("quantization") or {}
    if not (known(quantization.get("bytes")) and known(quantization.get("original_bytes_16_bit"))):
        return "No checkpoint was made."
    return ""


def sizes(summary: Summary) -> list[Figure]:
    """Draw the bytes of the original at 16 bits, of round to nearest and of this run."""
    quantization = summary["quantization"]
    before, now = quantization["original_bytes_16_bit"], quantization["bytes"]
    nearest = quantization.get("nearest_bytes")
    bars = [("original, 16 bits", before, "original"), ("this run", now, "run")]
    if known(nearest):
        bars.insert(1, ("round to nearest", nearest, "nearest"))

    def draw(sheet: Sheet) -> None:
        _draw_bars(sheet, [(name, float(value), size(value), colour, True) for name, value, colour in bars])

    caption = f"{size(now)} on disk, {percent(now / before)} of the original's {size(before)}"
    if known(quantization.get("average_bits")):
        caption += f"; {number(quantization['average_bits'])} bits a quantised weight, scales included"
    caption += "."
    if quantization.get("why_dense"):
        caption += f" Saved dense: {one_line(quantization['why_dense'], 200)}"
    if quantization.get("left_out"):
        caption += f" Left out: {one_line(quantization['left_out'], 200)}"
    listed = "; ".join(f"{name} {size(value)}" for name, value, _ in bars)
    table = Table(("model", "bytes", "size"), tuple((name, count(value), size(value)) for name, value, _ in bars))
    return [rendered("size", "Size on disk", caption, f"Bar chart: {listed}.", table, _height(len(bars)), draw)]


def _without_time(summary: Summary) -> str:
    return "" if any(known(stage.get("made_in")) for stage in summary.get("stages") or ()) else "No stage took time."


def times(summary: Summary) -> list[Figure]:
    """Draw the seconds that making every stage took, when it was made: a hit costs next to none of them again."""
    stages = [stage for stage in summary["stages"] if known(stage.get("made_in"))]
    total = sum(float(stage["made_in"]) for stage in stages)
    longest = max(stages, key=lambda stage: float(stage["made_in"]))
    bars = [
        (one_line(stage["stage"]), float(stage["made_in"]), duration(stage["made_in"]), "run", True) for stage in stages
    ]

    def draw(sheet: Sheet) -> None:
        _draw_bars(sheet, bars)

    caption = (
        f"Made from nothing, everything here takes {duration(total)}, most of it "
        f"{one_line(longest['stage'])} ({duration(longest['made_in'])}). What the cache has costs nothing again."
    )
    listed = "; ".join(f"{name} {words}" for name, _, words, _, _ in bars)
    rows = tuple((name, words) for name, _, words, _, _ in bars)
    alt = f"Bar chart of the time that making every stage took: {listed}."
    return [rendered("time", "Time by stage", caption, alt, Table(("stage", "time"), rows), _height(len(bars)), draw)]


def _height(bars: int) -> float:
    return 8 + 30 * bars


def _draw_bars(sheet: Sheet, bars: list[tuple[str, float, str, str, bool]]) -> None:
    """Draw horizontal bars: (name, length, what stands beside it, colour, filled)."""
    from matplotlib.patches import Rectangle

    left = margin((name for name, *_ in bars), 150)
    longest = max((value for _, value, *_ in bars), default=0.0) or 1.0
    room = WIDTH - left - 8
    # The bar with the longest end, words included, just fits.
    scale = min((room - 12 - text_width(words)) * longest / (value or longest * 1e-9) for _, value, words, *_ in bars)
    width = max(40.0, min(scale, room - 12))
    axes = sheet.axes(left, 4, width, 30 * len(bars))
    axes.set_xlim(0, longest)
    axes.set_ylim(len(bars), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(sheet.colours["muted"])
    for place, (name, value, words, colour, filled) in enumerate(bars):
        ink = sheet.colours[colour]
        face = ink if filled else "none"
        bar = Rectangle((0, place + 0.2), value, 0.6, facecolor=face, edgecolor=ink, linewidth=1.2, clip_on=False)
        if not filled:
            bar.set_linestyle((0, (3, 2)))
        axes.add_patch(bar)
        middle = 4 + 30 * (place + 0.5)
        sheet.text(left - 8, middle, fitting(name, left - 12), ha="right")
        sheet.text(left + width * value / longest + 7, middle, words, "ink" if filled else "muted")


COST_PLANS = (Plan("Size on disk", _without_size, sizes), Plan("Time by stage", _without_time, times))
