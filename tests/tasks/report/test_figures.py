"""The figures of a run: their numbers are the summary's, and a figure without data is not drawn."""

import math
import re
import struct
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from tasks.report import Figure, run_figures, run_left_out
from tasks.report.drawing import COLOURS, SENTINELS
from tasks.report.figures import RUN_PLANS
from tasks.report.outlier_map import binned
from tests.tasks.report.summaries import ENDING, SCRIPT, run_summary

EVERY = ["divergence", "coverage", "outlier-map", "domains", "layers", "size", "time", "tasks"]


def drawn(title: str, **changes: Any) -> Figure:
    """Return one figure of a changed summary; the others are not drawn."""
    plan = next(plan for plan in RUN_PLANS if plan.title == title)
    summary = run_summary(**changes)
    assert not plan.absent(summary)
    return plan.draw(summary)[0]


def rows(figure: Figure) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in figure.table.rows}


def test_a_whole_summary_gives_every_figure(figures: dict[str, Figure]) -> None:
    assert list(figures) == EVERY


def test_two_drawings_are_the_same_bytes(figures: dict[str, Figure]) -> None:
    for again in run_figures(run_summary()):
        assert again.svg == figures[again.name].svg
        assert again.png == figures[again.name].png


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_says_what_it_shows(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    assert figure.title
    assert figure.caption.endswith(".")
    assert len(figure.alt) > 40
    assert figure.table.rows
    assert all(len(row) == len(figure.table.headers) for row in figure.table.rows)


@pytest.mark.parametrize("name", EVERY)
def test_an_svg_is_well_formed_and_labelled_with_its_text_as_text(figures: dict[str, Figure], name: str) -> None:
    root = ET.fromstring(figures[name].svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == figures[name].alt
    texts = root.findall(".//{http://www.w3.org/2000/svg}text")
    assert len(texts) > 2
    sizes = [
        float(size)
        for text in texts
        for size in re.findall(r"font(?:-size)?: (?:\w+ )?([\d.]+)px", text.get("style", ""))
    ]
    assert len(sizes) == len(texts)
    assert min(sizes) * 366 / 420 >= 11, "below 11 pixels on a phone"


@pytest.mark.parametrize("name", EVERY)
def test_an_svg_has_the_colours_of_the_page_alone(figures: dict[str, Figure], name: str) -> None:
    svg = figures[name].svg
    bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)|base64,[^\"]*|href=\"#[^\"]*|url\(#[^)]*\)", "", svg)
    assert not any(sentinel in svg for sentinel in SENTINELS.values())
    assert not re.search(r"(fill|stroke): #", bare)
    assert set(re.findall(r"var\(--([\w-]+), #", svg)) <= set(COLOURS)


def test_ids_of_all_figures_differ_and_every_reference_is_met(figures: dict[str, Figure]) -> None:
    together = "".join(each.svg for each in figures.values())
    ids = re.findall(r'\bid="([^"]+)"', together)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", together)) <= set(ids)


@pytest.mark.parametrize("name", EVERY)
def test_a_png_is_opaque_white_and_twice_the_size(figures: dict[str, Figure], name: str) -> None:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(figures[name].png)).convert("RGBA")
    assert struct.unpack(">I", figures[name].png[16:20])[0] == image.width == 2 * (420 + 2 * 16)
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)
    assert image.getextrema()[3] == (255, 255)


def contrast(first: str, second: str) -> float:
    lights = []
    for colour in (first, second):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("name", [name for name in COLOURS if name not in ("grid", "paper")])
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_on_paper(name: str, scheme: int) -> None:
    assert contrast(COLOURS[name][scheme], COLOURS["paper"][scheme]) >= 4.5


# --- numbers -------------------------------------------------------------------------------------------------------


def test_coverage_says_what_the_run_and_random_choice_cover(figures: dict[str, Figure]) -> None:
    figure = figures["coverage"]
    assert "32 samples, coverage covers 91.3%" in figure.caption
    assert "covers 78.8% on average" in figure.caption
    assert list(rows(figure)) == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]
    assert figure.table.headers[1] == "coverage"


def test_coverage_counts_the_samples_that_random_choice_needs_for_the_same(summary: dict[str, Any]) -> None:
    selection = dict(summary["selection"])
    curves = {**selection["curves"], "random": {p: [0.1 * i for i in range(1, 11)] for p in ("mean", "low", "high")}}
    changed = {**selection, "curves": curves, "weighted_coverage": 0.65}
    figure = drawn("Weighted coverage against budget", selection=changed)
    assert "needs about 64 samples for the same" in figure.caption


def test_the_map_counts_every_cell_of_its_summary(summary: dict[str, Any], figures: dict[str, Figure]) -> None:
    for site, (name, channels, covered, missed) in zip(
        summary["outlier_map"]["sites"], figures["outlier-map"].table.rows, strict=True
    ):
        cells = np.array(site["cells"])
        assert name == site["name"]
        assert channels == f"{site['channels']:,}"
        assert covered == f"{(cells == 1).sum():,}"
        assert missed == f"{(cells == 2).sum():,}"
    assert "2,100 of 2,411 outlier channels (87.1%)" in figures["outlier-map"].caption


def test_joined_channels_keep_the_worst_of_them() -> None:
    states = np.array([[0, 1, 0, 0, 2, 1], [0, 0, 0, 0, 0, 0]], dtype=np.uint8)
    assert binned(states, 3).tolist() == [[1, 0, 2], [0, 0, 0]]
    assert binned(states, 6).tolist() == states.tolist()


def test_the_domain_mix_is_counts_and_shares(figures: dict[str, Figure]) -> None:
    assert rows(figures["domains"])["code"] == ("9", "28.1%", "120", "23.4%")
    assert f"law {SCRIPT}" in rows(figures["domains"])


def test_divergence_by_domain_is_the_summarys(summary: dict[str, Any], figures: dict[str, Figure]) -> None:
    figure = figures["divergence"]
    assert figure.table.headers[1:] == tuple(
        f"{name}, 95% interval" for name in ("round to nearest", "32 random samples", "this run")
    )
    assert rows(figure)["all texts"][2].startswith("0.1732 (0.1517 to 0.1947)")
    scores = summary["evaluation"][0]
    for domain, cells in list(rows(figure).items())[1:]:
        for model, cell in zip(("nearest", "random", "run"), cells, strict=True):
            assert cell.split()[0] == f"{scores[model]['domains'][domain]['divergence']:.4f}"
    run, nearest = (scores[model]["domains"] for model in ("run", "nearest"))
    lower = sum(run[d]["divergence"] < nearest[d]["divergence"] for d in run)
    assert f"lower in {lower} of 7 domains" in figure.caption


def test_errors_by_block_name_the_worst_linear(summary: dict[str, Any], figures: dict[str, Figure]) -> None:
    linears = summary["layers"]["linears"]
    worst = max(linears, key=lambda each: each["run"])
    caption = figures["layers"].caption
    assert f"Worst: {worst['name']}, {worst['run']:.4f}" in caption
    assert f"Median relative error {np.median([each['run'] for each in linears]):.4f}" in caption
    assert len(figures["layers"].table.rows) == 7


def test_sizes_and_times(figures: dict[str, Figure]) -> None:
    assert rows(figures["size"])["this run"] == ("103,681,024", "104 MB")
    assert "38.5% of the original's 269 MB" in figures["size"].caption
    assert rows(figures["time"])["gram"][-1] == "6:22"


def test_task_scores_have_their_intervals(figures: dict[str, Figure]) -> None:
    half = 1.959964 * math.sqrt(0.3 * 0.7 / 200)
    assert rows(figures["tasks"])["arc_challenge"][3] == f"30.0% ({30 - 100 * half:.1f}% to {30 + 100 * half:.1f}%)"
    assert "none of 2 tasks" in figures["tasks"].caption


# --- absent and strange data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"tasks": []}, {"tasks"}),
        ({"layers": None}, {"layers"}),
        ({"outlier_map": {"sites": []}}, {"outlier-map"}),
        ({"stages": []}, {"time"}),
        ({"evaluation": []}, {"divergence"}),
        ({"quantization": None, "evaluation": [], "models": []}, {"size", "divergence"}),
    ],
)
def test_a_figure_without_data_is_left_out_with_a_reason(changes: dict[str, Any], missing: set[str]) -> None:
    reasons = run_left_out(run_summary(**changes))
    titles = {"tasks": "Tasks", "layers": "Relative error by block", "outlier-map": "Where the outlier channels are"}
    titles |= {"time": "Time by stage", "divergence": "KL by domain", "size": "Size on disk"}
    assert {each.title for each in reasons} == {titles[name] for name in missing}
    assert all(each.why.endswith(".") for each in reasons)


def test_without_random_choice_nothing_is_said_of_it(summary: dict[str, Any]) -> None:
    selection = {**summary["selection"], "random_weighted_coverage": None, "random_coverage": None}
    selection["curves"] = {**selection["curves"], "random": None}
    text = {name: each for name, each in summary["evaluation"][0].items() if name != "random"}
    models = [each for each in summary["models"] if each["id"] != "random"]
    for title in ("Weighted coverage against budget", "KL by domain"):
        figure = drawn(title, selection=selection, evaluation=[text], models=models)
        assert "random" not in figure.caption + figure.alt
        assert not any("random" in header for header in figure.table.headers)


def test_perplexity_alone_shows_the_loss_and_the_original(summary: dict[str, Any]) -> None:
    found = drawn("KL by domain", evaluation=[summary["evaluation"][1]])
    assert found.title == "Loss"
    assert found.table.headers[1] == "original, 95% interval"
    assert found.table.rows[0][1].startswith("3.011")


def test_unknown_errors_draw_no_interval(summary: dict[str, Any]) -> None:
    text = {**summary["evaluation"][0]}
    for model in ("nearest", "random", "run"):
        scores = {**text[model]["all"], "divergence_error": None}
        text[model] = {"all": scores, "domains": {}}
    found = drawn("KL by domain", evaluation=[text])
    assert found.table.rows == (("all texts", "0.5127", "0.2214", "0.1732"),)


def test_scores_that_are_no_numbers_draw_no_figure(summary: dict[str, Any]) -> None:
    text = {**summary["evaluation"][0]}
    for model in ("nearest", "random", "run"):
        text[model] = {"all": {**text[model]["all"], "divergence": math.nan}, "domains": {}}
    assert [each.title for each in run_left_out(run_summary(evaluation=[text]))] == ["KL by domain"]


def test_a_linear_whose_error_is_unknown_is_skipped(summary: dict[str, Any]) -> None:
    first, *others = summary["layers"]["linears"]
    layers = {**summary["layers"], "linears": [{**first, "run": None, "nearest": math.nan}, *others]}
    figure = drawn("Relative error by block", layers=layers)
    assert "of 209 linears" in figure.caption


def test_hostile_names_stay_text_in_a_picture(summary: dict[str, Any]) -> None:
    pool = {f"a {ENDING}": 5, "$x^2$ _label": 3, "b\n\x00c": 4, "": 1}
    selection = {**summary["selection"], "domains": {"$x^2$ _label": 3}, "pool_domains": pool}
    figure = drawn("Domains of the chosen set", selection=selection)
    ET.fromstring(figure.svg)
    assert "<script" not in figure.svg
    assert "<img" not in figure.svg
    assert ">$x^2$ _label<" in figure.svg


def test_a_text_of_many_domains_is_drawn_in_part_and_listed_whole(summary: dict[str, Any]) -> None:
    domains = {f"domain {i}": i + 1 for i in range(60)}
    selection = {**summary["selection"], "domains": domains, "pool_domains": domains}
    figure = drawn("Domains of the chosen set", selection=selection)
    assert len(figure.table.rows) == 60
    assert "47 other domains" in figure.svg
