"""The page of a sweep."""

import re
from typing import Any

import pytest

from tasks.report import Figure, sweep_page
from tests.tasks.report.reading import Element, read, table_cells
from tests.tasks.report.summaries import ENDING, SCRIPT, sweep_summary


@pytest.fixture(scope="module")
def page(sweep_html: str) -> Element:
    return read(sweep_html)


def test_every_row_is_there_with_its_numbers(page: Element, sweep: dict[str, Any]) -> None:
    cells = table_cells(page.by_id("rows").all("table")[0])
    cells = {name.replace(" ", ""): rest for name, rest in cells.items()}
    assert len(cells) == len(sweep["rows"]) + 1
    for row in sweep["rows"]:
        fields = row["fields"]
        name = f"{fields['selection.selector']}@{fields['selection.budget']},bits{fields['quantization.bits']}"
        mean, minus, beats, runs = cells[name]
        assert mean.split()[0] == f"{row['mean']:.4f}"
        assert runs == str(len(row["values"]))
        if row["difference"] is None:
            assert minus == beats == ""
            assert mean.endswith(f"± {row['interval']:.4f}")
        else:
            low, high = (row["difference"] + s * row["difference_interval"] for s in (-1, 1))
            words = "lower (better)" if high < 0 else "higher (worse)" if low > 0 else "noise"
            assert words in minus
            assert minus.split()[0] == f"{row['difference']:+.4f}".replace("-", "−")
            assert beats == "80%"


def test_the_first_numbers_count_cells(page: Element) -> None:
    facts = page.all("dl", class_="facts")[0].text
    assert "Cells 90 1 failed" in facts
    assert "of 40 by more than the noise" in facts
    assert "2:27:01" in facts


def test_a_failed_cell_is_shown_with_its_whole_error(page: Element) -> None:
    section = page.by_id("failed")
    assert section.all("h2")[0].text == "1 failed cell"
    assert f"ValueError: the sketch is empty {ENDING}" in section.text
    assert "Traceback" in section.all("pre")[0].text


def test_every_cell_that_ended_well_is_listed(page: Element, sweep: dict[str, Any]) -> None:
    rows = page.by_id("cells").all("table")[0].all("tr")
    assert len(rows) == 91
    cell = sweep["cells"][0]
    main = cell["scores"][0]["run"]["divergence"]
    assert f"random@8, bits 3, seed 0 {cell['measures']['weighted_coverage']:.1%} 104 MB" in rows[1].text
    assert f"KL, heldout.jsonl.gz: {main:.4f}" in rows[1].text


def test_a_sweep_of_failures_alone_has_a_page() -> None:
    failed = [{"fields": {"selection.budget": 8, "selection.seed": 1}, "error": f"ValueError: {SCRIPT}"}]
    page = read(sweep_page(sweep_summary(rows=[], cells=failed), []))
    assert "No cell of this sweep ended well" in page.by_id("rows").text
    assert f"ValueError: {SCRIPT}" in page.by_id("failed").text
    assert "budget 8, seed 1" in page.by_id("failed").text


def test_hostile_text_is_text_and_numbers_are_numbers(sweep_html: str) -> None:
    assert sweep_html.count("<script>") == 1
    assert "<img" not in sweep_html
    visible = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", sweep_html, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|None|Undefined|undefined|inf)\b", visible)


def test_two_pages_of_a_sweep_are_the_same(sweep_html: str, sweep_drawn: dict[str, Figure]) -> None:
    assert sweep_page(sweep_summary(), list(sweep_drawn.values())) == sweep_html
