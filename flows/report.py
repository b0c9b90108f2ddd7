"""The report of a run: its figures as an artifact, and one page that also says how this run went."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import covercal
from covercal.recipe import Recipe, plain
from flows.chain import Chain
from flows.execution import Event, Execution, Pending
from flows.summary import stage_rows, summarize
from storage.artifacts import ArtifactStore
from storage.durable import make_writable_folder, write_durably
from storage.errors import StorageError
from storage.manifest import LIBRARIES, Ref
from tasks.cached import references
from tasks.figures import Shown, draw_figures, read_figures

if TYPE_CHECKING:
    from tasks.report import Figure

PAGE = "report.html"


@dataclass(frozen=True, slots=True)
class Concluded:
    """What a run found, and the figures that show it.

    Attributes
    ----------
    summary
        Everything but the stages; empty while a plan has something to do.
    figures
        The report artifact; None where a run ends before it.
    made
        See `build_times`.
    """

    summary: dict[str, Any]
    figures: Any = None
    made: dict[str, float] = field(default_factory=dict)


def conclude(recipe: Recipe, chain: Chain, execution: Execution, events: Sequence[Event], *, until: str) -> Concluded:
    """Sum a run up and draw its figures; in a plan with something left to do, say that they wait."""
    todo = next((event.label for event in events if event.decision in ("build", "rebuild", "pull", "waits")), None)
    if todo is not None:
        figures = execution.run("report", draw_figures, shown=Pending(todo), parts=()) if until == "report" else None
        return Concluded({}, figures)
    summary = summarize(recipe, chain, execution.store)
    if until != "report":
        return Concluded(summary)
    made = build_times(execution.store, events)
    shown = {name: value for name, value in summary.items() if name not in ("checkpoint", "name")}
    shown["stages"] = [{"stage": label, "made_in": seconds} for label, seconds in made.items()]
    parts = tuple(dict.fromkeys(ref for part in _parts(chain) for ref in references(part)))
    return Concluded(summary, execution.run("report", draw_figures, shown=Shown(shown), parts=parts), made)


def lean(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without what is long: the report artifact holds it, a run record need not."""
    value = {name: each for name, each in summary.items() if name not in ("outlier_map", "layers")}
    if "selection" in value:
        value["selection"] = {n: each for n, each in value["selection"].items() if n not in ("texts", "curves")}
    return value


def _parts(chain: Chain) -> list[Any]:
    return [getattr(chain, each.name) for each in fields(chain)]


def build_times(store: ArtifactStore, events: Sequence[Event]) -> dict[str, float]:
    """Return the seconds that making each row once took, whoever made it and when.

    An artifact that stands in two rows counts in the first alone: together the rows are what making everything takes.
    """
    found: dict[str, float] = {}
    once = {(event.stage, event.key): event for event in reversed(events)}
    for event in (each for each in events if once[each.stage, each.key] is each):
        manifest = store.look_up(event.stage, event.key).manifest if event.key else None
        if manifest is not None:
            found[event.label] = round(found.get(event.label, 0.0) + manifest.seconds, 3)
    return found


@dataclass(frozen=True, slots=True)
class Took:
    """How a run went.

    Attributes
    ----------
    run, command, started
        Its name, what was typed, and when it began (ISO 8601).
    seconds
        Time it took.
    events
        What became of every artifact.
    """

    run: str
    command: str
    started: str
    seconds: float
    events: tuple[Event, ...]

    @property
    def finished(self) -> str:
        """Return when it ended (ISO 8601)."""
        end = datetime.fromisoformat(self.started) + timedelta(seconds=self.seconds)
        return end.isoformat(timespec="seconds")


def told(recipe: Recipe, concluded: Concluded, took: Took) -> dict[str, Any]:
    """Return everything that there is to say of a run: what `run --json` prints and what its page shows."""
    rows = [{**row, "made_in": concluded.made.get(row["stage"])} for row in stage_rows(took.events)]
    return {**concluded.summary, **_how(took, recipe.device), "recipe": plain(recipe), "stages": rows}


def _how(took: Took, device: str) -> dict[str, Any]:
    return {
        "command": took.command,
        "finished": took.finished,
        "seconds": took.seconds,
        "versions": versions(),
        "device": device_words(device),
    }


def write_page(store: ArtifactStore, figures: Ref, run: str, value: dict[str, Any]) -> Path:
    """Write the page of what is told of a run, with its figures as PNG beside it, and return the page's path."""
    from tasks.report import run_page

    drawn = read_figures(store, figures)
    folder = store.root / "reports" / run
    with _writing(folder):
        _write_figures(folder, drawn)
        write_durably(folder / PAGE, run_page(value, drawn).encode())
    return folder / PAGE


def write_sweep(folder: Path, summary: dict[str, Any], took: Took) -> list[Path]:
    """Write `sweep.json` (every number), `sweep.html` (the report) and the figures as PNG; return the first two."""
    from tasks.report import sweep_figures, sweep_page

    value = {**summary, **_how(took, summary["recipe"]["device"])}
    drawn = sweep_figures(value)
    written = [folder / "sweep.json", folder / "sweep.html"]
    with _writing(folder):
        _write_figures(folder, drawn)
        write_durably(written[0], (json.dumps(value, indent=1, default=str) + "\n").encode())
        write_durably(written[1], sweep_page(value, drawn).encode())
    return written


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise StorageError(f"Cannot write the report {folder}: {cause.strerror or cause}.") from cause


def _write_figures(folder: Path, figures: "Sequence[Figure]") -> None:
    """Write figures as PNG into a report's folder."""
    make_writable_folder(folder / "figures", "The folder of reports")
    for each in figures:
        write_durably(folder / "figures" / f"{each.name}.png", each.png)


def versions() -> dict[str, str]:
    """Return the versions of what decides numbers."""
    return {"covercal": covercal.__version__, **{name: version(name) for name in LIBRARIES}}


def device_words(device: str) -> str:
    """Return where a run computed, without waking a GPU's driver up for the purpose."""
    return "the first GPU, else the CPU" if device == "auto" else device
