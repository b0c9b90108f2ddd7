"""The page of a run: every number is the summary's, nothing of it can act, nothing is asked of the network."""

import base64
import hashlib
import json
import math
import re
from typing import Any

import pytest
import yaml
from scipy.stats import t

from tasks.report import Figure, run_figures, run_page
from tests.tasks.report.reading import Element, read, table_cells
from tests.tasks.report.summaries import ENDING, SCRIPT, run_summary

T_23 = float(t.ppf(0.975, 23))  # of 24 sequences


def redrawn(**changes: Any) -> Element:
    """Return the page of a changed summary, without its figures: they have tests of their own."""
    return read(run_page(run_summary(**changes), []))


def result(page: Element) -> dict[str, list[str]]:
    return table_cells(page.by_id("result").all("table")[0])


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict(page: Element, summary: dict[str, Any]) -> None:
    header = page.all("header")[0]
    assert header.all("h1")[0].text == summary["name"]
    assert header.all("p", class_="verdict")[0].text == summary["verdict"]
    assert page.all("title")[0].text == f"{summary['name']} – covercal"


def test_the_first_numbers_are_the_summarys(page: Element) -> None:
    facts = page.all("dl", class_="facts")[0].text
    assert "KL to the original 0.1732 round to nearest: 0.5127 32 random samples: 0.2214" in facts
    assert "Outlier weight covered 91.3% random choice: 78.8%" in facts
    assert "104 MB 39% of 269 MB" in facts
    assert "7:17 2 of 7 stages cached" in facts


def test_a_note_says_what_and_of_which_linears(summary: dict[str, Any]) -> None:
    notes = {"a.q_proj": "rounded to nearest", "a.k_proj": "rounded to nearest", "b.o_proj": "not validated"}
    page = redrawn(quantization={**summary["quantization"], "notes": notes})
    assert "rounded to nearest: a.q_proj, a.k_proj" in page.text
    assert "not validated: b.o_proj" in page.text


def test_the_result_has_a_column_for_every_model_and_comparison(page: Element) -> None:
    assert result(page)["measure"] == [
        "original", "round to nearest", "32 random samples", "this run",
        "this run minus round to nearest", "this run minus 32 random samples",
    ]  # fmt: skip


def test_divergence_stands_with_its_interval(page: Element) -> None:
    half = T_23 * 0.06 * 0.1732
    cells = result(page)["KL to the original, nats per token"]
    assert cells[0] == "0"
    assert cells[3] == f"0.1732 {0.1732 - half:.4f} to {0.1732 + half:.4f}"
    assert cells[2].endswith("3 seeds: 0.2099 to 0.2329")


def test_agreement_stands_with_its_interval(page: Element) -> None:
    value, half = 1 - 0.6 * 0.1732, T_23 * 0.0082
    cells = result(page)["Same top token as the original"]
    assert cells[0] == "100%"
    assert cells[3] == f"{value:.1%} {value - half:.1%} to {value + half:.1%}"


def test_perplexity_carries_the_interval_of_the_loss(page: Element) -> None:
    half = T_23 * 0.061
    cells = result(page)["Perplexity"]
    assert cells[3] == f"{math.exp(2.984):.2f} {math.exp(2.984 - half):.2f} to {math.exp(2.984 + half):.2f}"


def test_differences_are_read_by_whether_their_interval_holds_zero(page: Element) -> None:
    assert result(page)["KL to the original, nats per token"][4:] == [
        "−0.3395 lower (better) −0.3801 to −0.2989 p < 0.001",
        "−0.0482 lower (better) −0.0631 to −0.0333 p = 0.001",
    ]
    assert result(page)["Same top token as the original"][4:] == [
        "+20.4% higher (better) +17.6% to +23.1% p < 0.001",
        "+2.9% noise −0.1% to +5.9% p = 0.061",
    ]
    assert result(page)["Loss, nats per token"][5] == "−0.0570 not known"


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [(-0.2, -0.1, "lower (better)"), (0.1, 0.2, "higher (worse)"), (-0.1, 0.1, "noise"), (math.nan, 0.1, "not known")],
)
def test_a_reading_follows_the_interval_alone(summary: dict[str, Any], low: float, high: float, reading: str) -> None:
    found = {"divergence": {"mean": 0.05, "low": low, "high": high, "p_value": 0.5}}
    text = {**summary["evaluation"][0], "differences": {"nearest": found}}
    cell = result(redrawn(evaluation=[text]))["KL to the original, nats per token"][4]
    assert reading in cell


def test_coverage_and_size_are_rows(page: Element) -> None:
    cells = result(page)
    assert cells["Outlier weight covered 32 samples"] == ["", "", "78.8% on average", "91.3%", "", ""]
    assert cells["Outlier channels covered 32 samples"] == ["", "", "70.3% on average", "87.1%", "", ""]
    assert cells["Size on disk"] == ["269 MB at 16 bits", "100.0 MB", "104 MB", "104 MB", "", ""]


def test_every_text_has_a_heading_in_the_result(page: Element) -> None:
    assert "heldout.jsonl.gz, 24 sequences, 12,264 tokens" in result(page)
    assert f"wikitext2 {SCRIPT}.txt, 20 sequences, 10,220 tokens" in result(page)


def test_every_figure_is_there_with_caption_and_table(page: Element, figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        box = page.by_id(f"figure-{name}")
        assert box.all("h3")[0].text == figure.title
        assert box.all("svg")[0].attributes["aria-label"] == figure.alt
        assert box.all("figcaption")[0].text == " ".join(figure.caption.split())
        cells = [[c.text for c in row.children if isinstance(c, Element)] for row in box.all("tr")]
        assert cells == [[" ".join(c.split()) for c in row] for row in (figure.table.headers, *figure.table.rows)]


def test_tasks_have_scores_differences_and_reasons_of_failure(page: Element) -> None:
    section = page.by_id("tasks")
    cells = table_cells(section.all("table")[0])
    name = "arc_challenge acc_norm; 0 shots; 200 items; the first 200 asked for; McNemar, exact"
    assert [each.split()[0] for each in cells[name]] == ["31.5%", "21.5%", "28.5%", "30.0%", "−1.5%", "+8.5%"]
    assert "noise" in cells[name][4]
    assert "higher (better)" in cells[name][5]
    assert f"piqa the data set could not be read {ENDING}" in section.text


def test_the_worst_ten_linears_come_first_and_all_are_there(page: Element, summary: dict[str, Any]) -> None:
    worst, every = page.by_id("layers").all("table")
    linears = sorted(summary["layers"]["linears"], key=lambda each: -each["run"])
    assert [each.replace(" ", "") for each in table_cells(worst)][1:] == [each["name"] for each in linears[:10]]
    cells = {name.replace(" ", ""): rest for name, rest in table_cells(every).items()}
    assert len(cells) == 211
    for each in linears:
        assert cells[each["name"]] == [
            f"{each['nearest']:.4f}",
            f"{each['run']:.4f}",
            f"{each['run'] / each['nearest']:.2f}",
            str(each["outlier_channels"]),
            str(each["uncovered"]),
            f"{each['uncovered_weight']:.1%}",
        ]


def test_every_chosen_text_is_listed_in_its_order(page: Element, summary: dict[str, Any]) -> None:
    items = [each for each in page.by_id("texts").all("li") if "data-item" in each.attributes]
    texts = summary["selection"]["texts"]
    assert len(items) == len(texts) == 32
    for item, text in zip(items, texts, strict=True):
        assert item.all("span", class_="rank")[0].text == str(text["rank"] + 1)
        assert item.all("bdi")[0].text == " ".join(text["domain"].split())
        assert item.all("p", class_="whole")[0].text == " ".join(text["text"].split())
        assert f"sample {text['sample']} of the pool, 256 tokens" in item.text
        gain = item.all("span", class_="gain")[0].text
        assert gain == ("" if text["gain"] is None else f"+{text['gain']:.1%}")


def test_stages_say_what_was_cached_and_why_not(page: Element) -> None:
    cells = table_cells(page.by_id("run").all("table")[0])
    assert cells["pool"][:3] == ["cached", "–", "0:12"]
    assert cells["statistics"][:4] == ["ran 2 ran, 6 cached", "0:41", "2:44", "selection changed"]
    assert cells["evaluation"][3] == f"scores.json has 12 bytes instead of 411 {SCRIPT}"


def test_the_command_recipe_and_versions_are_whole(page: Element, summary: dict[str, Any]) -> None:
    assert page.by_id("command").text == summary["command"]
    recipe = page.by_id("run").all("pre")[-1]
    assert yaml.safe_load("".join(c for c in recipe.children if isinstance(c, str))) == summary["recipe"]
    for name, version in summary["versions"].items():
        assert f"{name} {version}" in page.by_id("run").text
    assert summary["checkpoint"] in page.by_id("run").text


# --- absent parts --------------------------------------------------------------------------------------------------


def test_a_run_without_random_choice_has_no_column_for_it(summary: dict[str, Any]) -> None:
    text = {name: each for name, each in summary["evaluation"][0].items() if name != "random"}
    text["differences"] = {"nearest": text["differences"]["nearest"]}
    page = redrawn(evaluation=[text], models=[m for m in summary["models"] if m["id"] != "random"], tasks=[])
    assert result(page)["measure"] == [
        "original",
        "round to nearest",
        "this run",
        "this run minus round to nearest",
    ]


def test_a_run_without_tasks_says_why_there_is_no_figure() -> None:
    page = redrawn(tasks=[])
    assert not [each for each in page.walk() if each.attributes.get("id") == "tasks"]
    assert "Tasks: The recipe names no tasks." in page.by_id("figures").text


def test_a_run_whose_tasks_all_failed_shows_the_errors(summary: dict[str, Any]) -> None:
    page = redrawn(tasks=[summary["tasks"][2]])
    assert "piqa" in page.by_id("tasks").text
    assert not page.by_id("tasks").all("table")


def test_a_task_that_failed_for_one_model_shows_the_others_and_the_error(summary: dict[str, Any]) -> None:
    task = dict(summary["tasks"][0])
    task["scores"] = {model: score for model, score in task["scores"].items() if model != "nearest"}
    section = redrawn(tasks=[{**task, "error": "nearest: out of memory"}]).by_id("tasks")
    cells = list(table_cells(section.all("table")[0]).values())[1]
    assert cells[1] == ""
    assert cells[3].startswith("30.0%")
    assert "arc_challenge nearest: out of memory" in section.text


def test_a_run_without_layers_or_evaluation_still_has_a_page() -> None:
    page = redrawn(layers=None, evaluation=[], tasks=[])
    assert "The recipe evaluates no held-out text." in page.by_id("figures").text
    assert result(page)["Size on disk"]


def test_a_selection_alone_has_a_page(summary: dict[str, Any]) -> None:
    parts = {name: summary[name] for name in ("name", "verdict", "command", "seconds", "recipe", "selection")}
    page = read(run_page(parts, run_figures(parts)))
    assert page.by_id("texts")
    assert "No checkpoint was made." in page.by_id("figures").text


def test_numbers_that_are_not_known_are_dashes(summary: dict[str, Any]) -> None:
    text = json.loads(json.dumps(summary["evaluation"][0]))
    text["run"]["all"] |= {"divergence": None, "divergence_error": None, "loss_error": math.nan}
    cells = result(redrawn(evaluation=[text]))
    assert cells["KL to the original, nats per token"][3] == "–"
    assert cells["Perplexity"][3] == f"{math.exp(2.984):.2f}"


def test_no_page_holds_nan_none_or_undefined(run_html: str) -> None:
    visible = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", run_html, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|None|Undefined|undefined|inf)\b", visible)


# --- safety --------------------------------------------------------------------------------------------------------


def test_hostile_text_is_text(page: Element, run_html: str) -> None:
    assert run_html.count("<script>") == 1
    assert "<img" not in run_html
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for each in page.walk() for name in each.attributes)


def test_the_policy_lets_the_one_script_run_and_nothing_load(page: Element) -> None:
    policy = next(m.attributes["content"] for m in page.all("meta") if m.attributes.get("http-equiv"))
    script = page.all("script")[0].children
    digest = base64.b64encode(hashlib.sha256("".join(str(c) for c in script).encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert "img-src data:" in policy
    assert "http" not in policy


def test_no_address_leads_out_of_the_page(page: Element) -> None:
    for each in page.walk():
        for name in ("href", "src", "xlink:href", "action", "srcset"):
            assert each.attributes.get(name, "#").startswith(("#", "data:")), each
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", each.attributes.get("style", ""))
    assert "@import" not in page.all("style")[0].text


def test_ids_are_unique_and_links_and_labels_lead_to_one(page: Element) -> None:
    ids = [each.attributes["id"] for each in page.walk() if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    wanted = [a.attributes["href"][1:] for a in page.all("a")]
    wanted += [n for e in page.walk() for n in e.attributes.get("aria-labelledby", "").split()]
    wanted += [label.attributes["for"] for label in page.all("label")]
    assert set(wanted) <= set(ids)


def test_the_page_names_its_language_and_landmarks(page: Element) -> None:
    assert page.all("html")[0].attributes["lang"] == "en"
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert len(page.all(tag)) == 1, tag


def test_two_pages_of_a_summary_are_the_same(run_html: str, figures: dict[str, Figure]) -> None:
    assert run_page(run_summary(), list(figures.values())) == run_html
