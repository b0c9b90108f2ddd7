"""How every figure is drawn: one sheet of paper in pixels, its colours as names, rendered as SVG and PNG.

A figure is drawn twice with one function: once in colours that stand for CSS variables, for the page, and once in the
light colours, for slides.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from tasks.report.figure import Figure, Table
from tasks.report.numerals import one_line

WIDTH: Final = 420  # pixels; at a phone's 366 its text is 11 pixels high
TEXT: Final = 13.0  # pixels
MARGIN: Final = 16  # pixels around a PNG
HEAD: Final = 40  # pixels above a PNG for its title
KEY: Final = 26  # pixels for a mark and the space before its meaning
GAP: Final = 12  # pixels from one meaning to the next mark

# name: (light, dark); every one is readable (4.5 : 1) on the page's background in its scheme
COLOURS: Final[dict[str, tuple[str, str]]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#596170", "#a3acb9"),
    "grid": ("#dfe3e8", "#343a43"),
    "paper": ("#ffffff", "#1a1d22"),
    "run": ("#0a5fa8", "#74b9ff"),
    "nearest": ("#a8470a", "#ffa566"),
    "random": ("#5d6573", "#a9b1bd"),
    "original": ("#1b1f24", "#e8eaed"),
    "missed": ("#b3206e", "#ff86bd"),
    "series-1": ("#0a5fa8", "#74b9ff"),
    "series-2": ("#a8470a", "#ffa566"),
    "series-3": ("#08704f", "#52d3a4"),
    "series-4": ("#8238a0", "#d9a3f0"),
    "series-5": ("#7d5f00", "#e3c04f"),
    "series-6": ("#b3206e", "#ff86bd"),
    "series-7": ("#08697d", "#62d2e6"),
}
SERIES: Final = tuple(name for name in COLOURS if name.startswith("series-"))
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
SENTINELS: Final = {name: f"#f1e2{index:02x}" for index, name in enumerate(COLOURS, start=16)}
FALLBACK_FONTS: Final = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")


class Sheet:
    """A matplotlib figure laid out in pixels from its upper left corner, without any global state of pyplot.

    Parameters
    ----------
    height
        Of the figure, pixels; it is `WIDTH` wide.
    colours
        The colour of every name in `COLOURS`.
    title
        Drawn in a head above the figure; empty for none.
    """

    def __init__(self, height: float, colours: dict[str, str], title: str = "") -> None:
        from matplotlib.figure import Figure as Paper

        self.colours = colours
        self.head = HEAD if title else 0
        self.height = height + self.head
        self.paper = Paper(figsize=(WIDTH / 72, self.height / 72), dpi=72, facecolor=colours["paper"])
        if title:
            self.paper.text(2 / WIDTH, 1 - 24 / self.height, one_line(title), weight="bold", size=15, va="center")

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Return axes at that place, with a light grid, and lines at the left and below alone."""
        bottom = self.height - self.head - top - height
        axes = self.paper.add_axes(
            (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height), facecolor="none"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(self.colours["grid"])
        axes.tick_params(length=0, pad=5, labelcolor=self.colours["muted"], labelsize=TEXT)
        axes.grid(color=self.colours["grid"], linewidth=1)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, colour: str = "ink", **options: Any) -> None:
        """Write one line of text with its middle at that height."""
        options = {"va": "center", "size": TEXT, **options}
        where = (x / WIDTH, 1 - (y + self.head) / self.height)
        self.paper.text(*where, one_line(text), color=self.colours[colour], **options)

    def key(self, y: float, entries: list[tuple[str, str, dict[str, Any]]], left: float = 2) -> None:
        """Draw one line of marks with their meaning: (meaning, colour, matplotlib's line options)."""
        from matplotlib.lines import Line2D

        for words, colour, style in entries:
            height = 1 - (y + self.head) / self.height
            ends = ((left + 1) / WIDTH, (left + 10.5) / WIDTH, (left + 20) / WIDTH)
            options = {"color": self.colours[colour], "linewidth": 2, "markevery": [1], **style}
            self.paper.add_artist(Line2D(ends, [height] * 3, **options))
            self.text(left + KEY, y, words, colour)
            left += KEY + text_width(words) + GAP


def rendered(
    name: str, title: str, caption: str, alt: str, table: Table, height: float, draw: Callable[[Sheet], None]
) -> Figure:
    """Draw a figure for the page and for slides.

    Parameters
    ----------
    name, title, caption, alt, table
        See `Figure`.
    height
        Pixels.
    draw
        Draws on a sheet; called twice, with different colours.
    """
    with _settings(name):
        sheet = Sheet(height, SENTINELS)
        draw(sheet)
        svg = _inline(_saved(sheet, "svg", metadata={"Date": None, "Creator": None}).decode("utf-8"), name, alt)
        slide = Sheet(height, {key: light for key, (light, _) in COLOURS.items()}, title)
        draw(slide)
        png = _saved(slide, "png", dpi=144, metadata={"Software": None}, bbox_inches=_with_margin(slide))
    return Figure(name, title, caption, alt, svg, png, table)


@contextmanager
def _settings(name: str) -> Iterator[None]:
    """Set matplotlib for one figure: text stays text, `$` is a character, ids depend on the name alone."""
    from matplotlib import font_manager, rc_context

    installed = {font.name for font in font_manager.fontManager.ttflist}
    values = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.family": ["DejaVu Sans", *(each for each in FALLBACK_FONTS if each in installed)],
        "font.size": TEXT,
    }
    with rc_context(values), warnings.catch_warnings():
        # The SVG keeps the letters themselves; only the PNG lacks those that no installed font has.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


def _with_margin(sheet: Sheet) -> Any:
    """Return the sheet with white at its left, its right and below, in inches."""
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(-MARGIN / 72, -MARGIN / 72, (WIDTH + MARGIN) / 72, sheet.height / 72)


def _saved(sheet: Sheet, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    sheet.paper.savefig(buffer, format=kind, transparent=False, facecolor=sheet.colours["paper"], **options)
    return buffer.getvalue()


def _inline(document: str, name: str, alt: str) -> str:
    """Return an SVG document as an element of a page: own ids, CSS variables for colours, the page's font."""
    body = document[document.index("<svg") :]
    body = body[body.index(">") + 1 :]
    height = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', document)
    assert height is not None, "matplotlib writes a viewBox"
    for pattern, by in (
        (r"<metadata>.*?</metadata>", ""),
        (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
        (r"<!--.*?-->", ""),
        (r'\bid="', f'id="{name}-'),
        (r'xlink:href="#', f'href="#{name}-'),
        (r"xlink:href=", "href="),
        (r"url\(#", f"url(#{name}-"),
        (r"'DejaVu Sans'[^;\"]*", "var(--sans, sans-serif)"),
        (r"\s*\n\s*", "\n"),
    ):
        body = re.sub(pattern, by, body, flags=re.DOTALL)
    for key, sentinel in SENTINELS.items():
        body = body.replace(sentinel, f"var(--{key}, {COLOURS[key][0]})")
    label = escaped(alt)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height[1]}" role="img" '
        f'aria-label="{label}" stroke-linejoin="round">{body}'
    )


def text_width(text: str) -> float:
    """Return about how wide a line of text is, pixels, in a wide font; no font has to be looked into."""
    return sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> float:
    if unicodedata.combining(letter):
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF" or letter in "mwMW@%":
        return 13.0
    if letter in "iljft.,:;|' ()[]":
        return 4.8
    return 9.4 if letter.isupper() else 8.1


def margin(names: Iterable[str], most: float) -> float:
    """Return how many pixels names before an axis need, at most so many."""
    return min(most, 16 + max(map(text_width, names)))


def fitting(text: str, width: float) -> str:
    """Return text on one line, cut with an ellipsis where it is wider than that many pixels."""
    flat = one_line(text)
    if text_width(flat) <= width:
        return flat
    while flat and text_width(flat) + 8 > width:
        flat = flat[:-1]
    return flat.rstrip() + "…"


def escaped(text: str) -> str:
    """Return text as it may stand in an attribute of HTML or XML."""
    from html import escape

    return escape(one_line(text), quote=True)


def named_style(index: int) -> tuple[str, dict[str, Any]]:
    """Return colour, and marker and line of the series of that number; no two of the first 70 are alike."""
    return SERIES[index % len(SERIES)], {
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def spread(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart until neighbours are `gap` away from each other, each as near its own as that allows.

    Parameters
    ----------
    heights
        In any order; the result keeps it.
    gap
        Least distance of two.
    low, high
        Where they have to stay, as far as there is room.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, list[int]]] = []  # (centre, members): pooled neighbours, equal gaps within
    for i in order:
        blocks.append((min(max(heights[i], low), high), [i]))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (len(blocks[-1][1]) + len(blocks[-2][1])) / 2:
            members = blocks[-2][1] + blocks[-1][1]
            blocks = blocks[:-2]
            half = gap * (len(members) - 1) / 2
            centre = sum(heights[m] for m in members) / len(members)
            blocks.append((max(min(centre, high - half), low + half), members))
    moved = [0.0] * len(heights)
    for centre, members in blocks:
        for place, i in enumerate(members):
            moved[i] = centre + gap * (place - (len(members) - 1) / 2)
    return moved
