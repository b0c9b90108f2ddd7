"""Reads a page as a reader would: a small tree of elements over the standard library's parser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "img", "br", "hr", "wbr"}


@dataclass
class Element:
    """One element of a page, its attributes and children; text is a child that is a string."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        """Yield this element and all below it, in the order of the page."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Return the elements of that tag below, with those attributes."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.walk() if e.tag == tag and wanted.items() <= e.attributes.items()]

    def by_id(self, name: str) -> Element:
        """Return the one element with that id."""
        found = [each for each in self.walk() if each.attributes.get("id") == name]
        assert len(found) == 1, f"{len(found)} elements have the id {name}"
        return found[0]

    @property
    def text(self) -> str:
        """Return all text below on one line, elements parted by spaces."""
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("page")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """Return the tree of a page; raises where an element is not closed in its place."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].tag}> is never closed"
    return reader.root


def table_cells(table: Element) -> dict[str, list[str]]:
    """Return a table as first cell -> the other cells of its row; rows of one name keep the first."""
    found: dict[str, list[str]] = {}
    for row in table.all("tr"):
        cells = [each.text for each in row.children if isinstance(each, Element) and each.tag in ("th", "td")]
        if cells:
            found.setdefault(cells[0], cells[1:])
    return found


def one(found: list[Element], which: Callable[[Element], bool]) -> Element:
    """Return the one element that it holds for."""
    kept = [each for each in found if which(each)]
    assert len(kept) == 1, f"{len(kept)} elements instead of one"
    return kept[0]
