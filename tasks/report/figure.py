"""One figure of the report: what it shows, in words, as a picture and as a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Summary: TypeAlias = Mapping[str, Any]  # the JSON that `run --json` prints; its fields are listed in docs


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers behind a figure, as people read them.

    Attributes
    ----------
    headers
        One a column; the first column names the row.
    rows
        Cells as text, as many as there are headers.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with everything that a page, a slide or a screen reader needs of it.

    Attributes
    ----------
    name
        File name without its end, and prefix of every id in the SVG; unique in a report.
    title
        What is shown.
    caption
        The one thing to take from it, with its numbers.
    alt
        The picture in words, for who cannot see it.
    svg
        An `<svg>` element to put into a page: text is text, colours are CSS variables with a light fallback.
    png
        The same on opaque white with its title, twice the size, for slides.
    table
        The numbers behind it.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes = field(repr=False)
    table: Table


@dataclass(frozen=True, slots=True)
class Plan:
    """A figure that a report may hold.

    Attributes
    ----------
    title
        What it would show.
    absent
        Summary -> why it cannot be drawn; empty when it can.
    draw
        Summary -> the figures, at least one; called only where `absent` is empty.
    """

    title: str
    absent: Callable[[Summary], str]
    draw: Callable[[Summary], list[Figure]]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A figure that is not in the report, and the sentence that says why."""

    title: str
    why: str


def drawn(plans: tuple[Plan, ...], summary: Summary) -> list[Figure]:
    """Return the figures whose data the summary holds, in the order of the plans."""
    return [figure for plan in plans if not plan.absent(summary) for figure in plan.draw(summary)]


def left_out(plans: tuple[Plan, ...], summary: Summary) -> list[LeftOut]:
    """Return the other plans, each with its reason."""
    return [LeftOut(plan.title, why) for plan in plans if (why := plan.absent(summary))]
