"""The rows that a user watches: in place on a terminal, once per finished stage in a log."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from covercal.pool import Counts
from covercal.recipe import Recipe
from flows.console import printable, say
from flows.execution import FAILED, Event
from flows.summary import grid_name
from tasks.progress import Progress

PLANNED_WORDS = {"hit": "cached", "build": "to do", "rebuild": "to rebuild", "waits": "to do", "pull": "to pull"}
RUN_WORDS = {
    "failed": "failed",
    "hit": "cached",
    "built": "built",
    "waited": "built elsewhere",
    "pulled": "pulled",
    "rebuilt": "rebuilt",
}
RULE_WORDS = {
    "sigma": "mean + {k:g} sigma",
    "mad": "median + {k:g} MAD",
    "median": "{k:g} medians",
    "quantile": "quantile {k:g}",
    "absolute": "{k:g}",
}
NEW_WORDS = {"statistics": "captured", "measured": "captured", "gram": "summed", "held-out gram": "summed"}


@dataclass(slots=True)
class Row:
    """One stage on the display."""

    label: str
    detail: str
    count: int = 1
    events: list[Event] = field(default_factory=list)
    progress: dict[int, Progress] = field(default_factory=dict)
    started: float = 0.0

    @property
    def finished(self) -> bool:
        """Return whether all artifacts of the stage are there."""
        return len(self.events) >= self.count


def row_details(recipe: Recipe) -> dict[str, str]:
    """Return what each row does, from the recipe."""
    lengths = recipe.pool.lengths
    size = f"{lengths[0]}" if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)}"
    selection, outliers = recipe.selection, recipe.outliers
    texts, tasks = len(recipe.evaluation.texts), len(recipe.evaluation.tasks)
    return {
        "model": "GGUF file to safetensors",
        "pool": f"{recipe.pool.samples} samples x {size} tokens",
        "texts": f"{texts} evaluation text{'s' * (texts != 1)}, tokenised",
        "statistics": f"activations at {recipe.statistics.sites.replace('_', ' ')}",
        "losses": "how well the original predicts each sample",
        "outliers": f"channels above {RULE_WORDS[outliers.rule].format(k=outliers.k)}",
        "refined": f"the same, {outliers.adaptive_k:g} where the first try went wrong",
        "reselection": f"{selection.selector}, {selection.budget} of {recipe.pool.samples}",
        "first try": grid_name(recipe),
        "selection": f"{selection.selector}, {selection.budget} of {recipe.pool.samples}",
        "calibration": "your calibration set",
        "measured": f"its activations at {recipe.statistics.sites.replace('_', ' ')}",
        "measures": "coverage, likeness, distance from the pool",
        "reference": "original model on the evaluation texts",
        "nearest": grid_name(recipe, "rtn"),
        "gram": f"Gram matrices of all {recipe.pool.samples} samples",
        "held-out gram": "the same of the samples that validate",
        "blocks": "quantised one by one from the Gram matrices",
        "checkpoint": grid_name(recipe),
        "evaluation": "divergence and perplexity",
        "tasks": f"{tasks} task{'s' * (tasks != 1)}, scored with lm-eval",
        "layers": "error of every linear on held-out inputs",
        "rivals": "what other selectors would choose",
        "overview": "coverage against budget, map of outlier channels",
        "report": "figures",
        **_random_rows(recipe),
    }


def _random_rows(recipe: Recipe) -> dict[str, str]:
    """Return what the rows of the random sets do."""
    sets = recipe.evaluation.random
    names = ["random"] if sets == 1 else [f"random {seed}" for seed in range(sets)]
    chosen = {f"{name} choice": f"{recipe.selection.budget} of {recipe.pool.samples} by chance" for name in names}
    return chosen | {name: f"{grid_name(recipe)} with these" for name in names}


def finished_detail(row: Row) -> str:
    """Return what a finished row adds to its detail, from what the manifests note."""
    info = row.events[-1].info if row.events else {}
    if row.label == "pool" and "domains" in info:
        dropped = Counts(**info).dropped
        count = len(info["domains"])
        domains = "one domain" if count == 1 else f"{count} domains"
        return f"{row.detail}, {domains}" + (f"; dropped: {dropped}" if dropped else "")
    if row.label in ("outliers", "refined") and "outliers" in info:
        return f"{row.detail}: {info['outliers']:,} of {info['channels']:,}"
    if row.label == "model" and "dequantised_from" in info:
        return f"{row.detail}, dequantised {info['dequantised_from']}"
    if row.label in NEW_WORDS and "channels" in info:
        return f"{row.detail}: {info['channels']:,} channels"
    if info.get("grown_damping"):
        return f"{row.detail}; damping had to grow in {len(info['grown_damping'])} linears"
    return row.detail


def decision_words(row: Row, *, planned: bool) -> str:
    """Return `cached`, or `6 cached, 2 captured`, or for a plan what is to do and why."""
    words = PLANNED_WORDS if planned else RUN_WORDS
    named = [words.get(str(e.decision), str(e.decision)) for e in row.events]
    named = [NEW_WORDS.get(row.label, w) if w == "built" else w for w in named]
    counts = {word: named.count(word) for word in dict.fromkeys(named)}
    if len(row.events) == 1 or (len(counts) == 1 and planned and "waits" in {str(e.decision) for e in row.events}):
        return next(iter(counts), "")
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def reason_of(row: Row) -> str:
    """Return why the first artifact of the row that is not cached is not."""
    return next((e.reason for e in row.events if str(e.decision) != "hit"), "")


class Display:
    """Shows the rows of a run or a plan on `console`."""

    def __init__(self, recipe: Recipe, console: Console, *, planned: bool = False) -> None:
        self.console = console
        self.planned = planned
        self.rows: dict[str, Row] = {}
        self._details = row_details(recipe)
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render, transient=False)

    def __enter__(self) -> "Display":
        """Begin to show."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state."""
        if self.console.is_terminal:
            self._live.stop()

    def start(self, label: str, count: int) -> None:
        """Show that a stage begins."""
        with self._lock:
            self.rows[label] = Row(label, self._details.get(label, ""), count, started=time.monotonic())

    def event(self, event: Event) -> None:
        """Show that one artifact is there."""
        with self._lock:
            row = self.rows.setdefault(event.label, Row(event.label, self._details.get(event.label, "")))
            row.events.append(event)
            row.progress.clear()
            if row.finished and not self.console.is_terminal:
                say(self.console, self._line(row))

    def progress(self, progress: Progress) -> None:
        """Show how far a running step is."""
        with self._lock:
            row = self.rows.get(progress.label)
            if row is not None:
                row.progress[threading.get_ident()] = progress

    def _line(self, row: Row) -> str:
        seconds = sum(event.seconds for event in row.events)
        took = "" if self.planned else f"   {_clock(seconds)}"
        reason = reason_of(row)
        return f"  {row.label:<15} {finished_detail(row):<56} {decision_words(row, planned=self.planned)}{took}" + (
            f"   ({reason})" if reason else ""
        )

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        with self._lock:
            for row in self.rows.values():
                table.add_row(f"  {row.label}", *self._cells(row))
        return table

    def _cells(self, row: Row) -> Sequence[RenderableType]:
        if row.finished:
            seconds = sum(event.seconds for event in row.events)
            told = any(str(event.decision) in ("rebuilt", FAILED) for event in row.events)
            reason = reason_of(row) if self.planned or told else ""
            words = decision_words(row, planned=self.planned) + (f"  ({reason})" if reason else "")
            return _cell(finished_detail(row)), _cell(words), "" if self.planned else _clock(seconds)
        running = next(iter(row.progress.values()), None)
        elapsed = _clock(time.monotonic() - row.started)
        if running is None or not running.total:
            return _cell(row.detail), "running", elapsed
        step = f" ({len(row.events) + 1} of {row.count})" if row.count > 1 else ""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=running.total, completed=running.done, width=24),
            f"{running.unit} {running.done}/{running.total}{step}",
        )
        return _cell(row.detail), bar, elapsed


def _cell(text: str) -> str:
    return escape(printable(text))


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
