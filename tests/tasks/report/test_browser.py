"""Pages in a real browser, that of a real run among them: on a phone and a desk, in light and in dark.

Chromium is the system's own; nothing is downloaded. Screenshots of whole pages are left in the folder that
`COVERCAL_SCREENSHOTS` names, else in `build/screenshots`.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tasks.report import Figure
from tests.browser import launched, screenshots

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCHEMES = ("light", "dark")
WIDTHS = (390, 1280)

CONTRASTS = """() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const p = c.map((v) => linear(v / 255));
    return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2]; };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const p = parts(getComputedStyle(e).backgroundColor);
    if (p.length === 3 || p[3] === 1) return p; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = Array.from(e.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parts(e instanceof SVGElement ? style.fill : style.color);
    const a = light(ink), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, e.tagName + " " + e.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
CLIPPED = """() => Array.from(document.querySelectorAll("figure svg")).flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return Array.from(svg.querySelectorAll("text")).filter((t) => { const r = t.getBoundingClientRect();
    return r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2; })
    .map((t) => svg.closest("figure").id + ": " + t.textContent);
})"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with launched() as chromium:
        yield chromium


@dataclass
class Opened:
    """A page in the browser, and what it did while it loaded."""

    page: "Page"
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def opened(browser: "Browser", path: Path, width: int = 1280, scheme: Any = "light", **options: Any) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=scheme, **options)
    found = Opened(page)
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.goto(path.as_uri())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_html: str, sweep_html: str, tiny_html: str) -> Path:
    """A folder with all pages."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "run.html").write_text(run_html, encoding="utf-8")
    (folder / "sweep.html").write_text(sweep_html, encoding="utf-8")
    (folder / "tiny.html").write_text(tiny_html, encoding="utf-8")
    return folder


KINDS = ("run", "sweep", "tiny")


@pytest.fixture(scope="module", params=[(k, s, w) for k in KINDS for s in SCHEMES for w in WIDTHS], ids=str)
def view(request: pytest.FixtureRequest, browser: "Browser", folder: Path) -> Iterator[Opened]:
    """Each page at each width in each scheme, with a screenshot of it left behind."""
    kind, scheme, width = request.param
    found = opened(browser, folder / f"{kind}.html", width, scheme)
    found.page.screenshot(path=screenshots() / f"{kind}-{scheme}-{width}.png", full_page=True)
    yield found
    found.page.close()


@pytest.fixture
def run_view(browser: "Browser", folder: Path) -> "Iterator[Page]":
    """The page of a run on a desk, for a test that changes it."""
    page = opened(browser, folder / "run.html").page
    yield page
    page.close()


def test_a_page_loads_nothing_but_itself_and_complains_of_nothing(view: Opened) -> None:
    assert view.complaints == []
    assert [url for url in view.requests if not url.startswith("data:")] == [view.page.url]


def test_a_page_never_scrolls_sideways(view: Opened) -> None:
    sizes = view.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert max(sizes[:2]) <= sizes[2]


def test_every_figure_has_a_picture_of_some_size_with_a_label(
    view: Opened, figures: dict[str, Figure], sweep_drawn: dict[str, Figure], tiny_drawn: dict[str, Figure]
) -> None:
    expected = {"run": figures, "sweep": sweep_drawn, "tiny": tiny_drawn}[Path(view.page.url).stem]
    pictures = view.page.locator("figure svg").all()
    assert len(pictures) == len(expected)
    for picture, figure in zip(pictures, expected.values(), strict=True):
        box = picture.bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 60
        assert picture.get_attribute("role") == "img"
        assert picture.get_attribute("aria-label") == figure.alt


def test_no_text_of_a_picture_leaves_it(view: Opened) -> None:
    assert view.page.evaluate(CLIPPED) == []


def test_text_of_a_picture_is_readable_on_a_phone(view: Opened) -> None:
    heights = view.page.evaluate(
        "Array.from(document.querySelectorAll('figure svg text')).map((t) => parseFloat(getComputedStyle(t).fontSize)"
        " * t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width)"
    )
    assert min(heights) >= 10


def test_all_text_stands_out_from_its_background(view: Opened) -> None:
    found = view.page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [each for each in found if each[0] < 4.5] == []


def test_headings_go_down_one_level_at_a_time(view: Opened) -> None:
    levels = view.page.evaluate("Array.from(document.querySelectorAll('h1,h2,h3,h4')).map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_two_schemes_look_different(browser: "Browser", folder: Path) -> None:
    colours = set()
    for scheme in SCHEMES:
        page = opened(browser, folder / "run.html", scheme=scheme).page
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(colours) == 2


def test_the_filter_keeps_the_texts_that_hold_every_word(run_view: "Page") -> None:
    shown = run_view.locator("[data-item]:not([hidden])")
    count = run_view.locator("[data-count]")
    assert shown.count() == 32
    assert count.inner_text() == "32 of 32 texts"
    run_view.get_by_label("Find in texts and domains").fill("RIVER wiki")
    assert shown.count() == 5
    assert count.inner_text() == "5 of 32 texts"
    assert run_view.locator("[data-more]").get_attribute("open") is not None
    run_view.get_by_label("Find in texts and domains").fill("no such word")
    assert shown.count() == 0
    assert run_view.get_by_text("No text holds these words.").is_visible()
    run_view.get_by_label("Find in texts and domains").fill("")
    assert shown.count() == 32


def test_the_filter_finds_what_a_closed_text_holds(run_view: "Page", summary: dict[str, Any]) -> None:
    run_view.get_by_label("Find in texts and domains").fill("مرحبا")
    arabic = [text for text in summary["selection"]["texts"] if "مرحبا" in text["text"]]
    assert run_view.locator("[data-item]:not([hidden])").count() == len(arabic) > 0


def test_the_copy_button_gives_the_command(browser: "Browser", folder: Path, summary: dict[str, Any]) -> None:
    page = opened(browser, folder / "run.html", permissions=["clipboard-read", "clipboard-write"]).page
    page.get_by_role("button", name="Copy the command").click()
    page.get_by_text(re.compile(r"^(Copied\.|Selected)")).wait_for()
    if page.get_by_text("Copied.").count():
        assert page.evaluate("navigator.clipboard.readText()") == summary["command"]
    else:
        assert page.evaluate("getSelection().toString()") == summary["command"]
    page.close()


def test_without_scripts_every_text_is_a_plain_list(browser: "Browser", folder: Path) -> None:
    page = opened(browser, folder / "run.html", java_script_enabled=False).page
    assert page.locator("[data-filter]").is_hidden()
    assert page.get_by_role("button").count() == 0
    assert page.locator("[data-item]").count() == 32
    first = page.locator("[data-item] summary").first
    first.click()
    assert page.locator("[data-item] .whole").first.is_visible()
    page.close()


def test_hostile_text_runs_nothing(run_view: "Page") -> None:
    dialogs: list[str] = []
    run_view.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    run_view.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert dialogs == []
    assert run_view.locator("img").count() == 0
    assert run_view.locator("script").count() == 1


def test_a_keyboard_reaches_every_control_and_shows_where_it_is(run_view: "Page") -> None:
    run_view.keyboard.press("Tab")
    assert run_view.evaluate("document.activeElement.className") == "skip"
    run_view.keyboard.press("Tab")
    assert run_view.evaluate("document.activeElement.getAttribute('href')") == "#result"
    assert run_view.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_opened_tables_scroll_inside_their_own_box(browser: "Browser", folder: Path) -> None:
    for kind in ("run", "sweep"):
        page = opened(browser, folder / f"{kind}.html", width=390).page
        page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()


def test_print_is_light_and_without_controls(browser: "Browser", folder: Path) -> None:
    page = opened(browser, folder / "run.html", scheme="dark").page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.get_by_role("button").count() == 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    page.close()
