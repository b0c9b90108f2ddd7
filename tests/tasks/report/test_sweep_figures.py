"""The figures of a sweep."""

import re
from typing import Any

import numpy as np

from tasks.report import Figure, sweep_figures, sweep_left_out
from tasks.report.sweep_figures import coverage_and_quality
from tests.tasks.report.summaries import sweep_summary


def test_a_whole_sweep_gives_every_figure(sweep_drawn: dict[str, Figure]) -> None:
    assert list(sweep_drawn) == ["against-random", "budget", "sweep-coverage", "coverage-quality"]


def test_two_drawings_are_the_same_bytes(sweep_drawn: dict[str, Figure]) -> None:
    for again in sweep_figures(sweep_summary()):
        assert (again.svg, again.png) == (sweep_drawn[again.name].svg, sweep_drawn[again.name].png)


def test_ids_differ(sweep_drawn: dict[str, Figure]) -> None:
    ids = re.findall(r'\bid="([^"]+)"', "".join(each.svg for each in sweep_drawn.values()))
    assert len(ids) == len(set(ids))


def test_rows_below_and_above_random_are_counted(sweep: dict[str, Any], sweep_drawn: dict[str, Figure]) -> None:
    compared = [row for row in sweep["rows"] if row["difference"] is not None]
    lower = sum(row["difference"] + row["difference_interval"] < 0 for row in compared)
    higher = sum(row["difference"] - row["difference_interval"] > 0 for row in compared)
    caption = sweep_drawn["against-random"].caption
    assert f"Of {len(compared)} rows, {lower} are lower (better)" in caption
    assert f"{higher} higher" in caption


def test_the_lowest_row_of_every_panel_is_named(sweep: dict[str, Any], sweep_drawn: dict[str, Figure]) -> None:
    for bits in (3, 4):
        mine = [row for row in sweep["rows"] if row["fields"]["quantization.bits"] == bits]
        best = min(mine, key=lambda row: row["mean"])
        words = f"{best['fields']['selection.selector']}@{best['fields']['selection.budget']}, bits {bits}"
        assert f"{words} at {best['mean']:.4f}" in sweep_drawn["budget"].caption


def test_the_table_of_the_budget_figure_holds_every_row(sweep: dict[str, Any], sweep_drawn: dict[str, Figure]) -> None:
    for row, cells in zip(sweep["rows"], sweep_drawn["budget"].table.rows, strict=True):
        fields = row["fields"]
        assert cells[:3] == (
            f"bits {fields['quantization.bits']}",
            fields["selection.selector"],
            str(fields["selection.budget"]),
        )
        assert cells[3] == f"{row['mean']:.4f}"
        assert cells[5] == str(len(row["values"]))


def test_coverage_is_the_mean_over_seeds_of_each_setting(sweep: dict[str, Any], sweep_drawn: dict[str, Figure]) -> None:
    for bits in (3, 4):
        wanted = {"selection.selector": "random", "selection.budget": 8, "quantization.bits": bits}
        mine = [
            cell["measures"]["weighted_coverage"] for cell in sweep["cells"] if wanted.items() <= cell["fields"].items()
        ]
        table = sweep_drawn["sweep-coverage"].table
        (row,) = [row for row in table.rows if row[:3] == (f"bits {bits}", "random", "8")]
        assert row[3] == f"{100 * np.mean(mine):.1f}%"


def test_coverage_with_other_outliers_has_a_panel_of_its_own() -> None:
    cells = [
        {
            "fields": {"selection.selector": name, "selection.budget": budget, "outliers.k": k},
            "measures": {"weighted_coverage": covered + budget / 100},
        }
        for k, values in ((4, {"coverage": 0.5, "random": 0.4}), (6, {"coverage": 0.7, "random": 0.8}))
        for name, covered in values.items()
        for budget in (8, 16)
    ]
    (figure,) = [each for each in sweep_figures(sweep_summary(rows=[], cells=cells)) if each.name == "sweep-coverage"]
    assert [row[0] for row in figure.table.rows] == ["k 4"] * 4 + ["k 6"] * 4
    assert [row[3][:2] for row in figure.table.rows] == ["58", "66", "48", "56", "78", "86", "88", "96"]
    assert figure.caption == (
        "Most of the outlier weight with the smallest budget: coverage@8, k 4 covers 58.0%; random@8, k 6 covers 88.0%."
    )


def test_a_sweep_without_random_or_budgets_says_so() -> None:
    rows = [
        {"fields": {"quantization.bits": bits}, "values": [0.3], "mean": 0.3, "interval": None, "difference": None}
        for bits in (3, 4)
    ]
    changed = sweep_summary(rows=rows, cells=[])
    assert sweep_figures(changed) == []
    assert {each.title for each in sweep_left_out(changed)} == {
        "Difference to random choice", "Quality against budget", "Coverage against budget",
        "Does coverage predict quality?",
    }  # fmt: skip


def test_a_sweep_of_failures_alone_draws_nothing() -> None:
    failed = [{"fields": {"selection.budget": 8}, "error": "ValueError: no"}]
    assert sweep_figures(sweep_summary(rows=[], cells=failed)) == []


def test_coverage_is_held_against_quality_inside_each_pool() -> None:
    def cell(pool: int, place: int) -> dict[str, Any]:
        fields = {"selection.selector": f"s{place}", "selection.budget": 8, "pool.seed": pool}
        scores = [{"kind": "divergence", "run": {"divergence": pool - 0.1 * place}}]
        return {"fields": fields, "measures": {"weighted_coverage": 0.2 * pool + 0.01 * place}, "scores": scores}

    (figure,) = coverage_and_quality(
        sweep_summary(cells=[cell(pool, place) for pool in range(3) for place in range(6)])
    )
    assert "8 samples −1.00." in figure.caption


def test_twenty_selectors_get_twenty_looks() -> None:
    from tasks.report.drawing import named_style

    looks = [named_style(index) for index in range(20)]
    assert len({(colour, style["marker"]) for colour, style in looks}) == 20
