"""Stage `report`: the figures of a run and every number behind them. How this very run went is told by its page."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from storage.artifacts import ArtifactStore
from storage.keys import canonical_json
from storage.manifest import Ref
from tasks.cached import Build, cached

if TYPE_CHECKING:
    from tasks.report import Figure

SUMMARY = "summary.json"
FIGURES = "figures.json"


@dataclass(frozen=True, slots=True)
class Shown:
    """What a report shows.

    Attributes
    ----------
    summary
        Every number, as plain JSON: what artifacts hold, nothing of this run or this machine.
    """

    summary: dict[str, Any]

    def key_material(self) -> dict[str, str]:
        """Return the digest of the numbers."""
        plain = json.loads(json.dumps(self.summary, allow_nan=False))
        return {"summary": hashlib.sha256(canonical_json(plain)).hexdigest()}


@cached("report", version=2, ignored=("parts",))
def draw_figures(build: Build, *, shown: Shown, parts: tuple[Ref, ...]) -> dict[str, Any]:
    """Draw the figures of a run; `parts` are the artifacts that the numbers come from."""
    from tasks.report import run_figures

    found = run_figures(shown.summary)
    for each in found:
        (build.folder / f"{each.name}.png").write_bytes(each.png)
    words = [{name: value for name, value in asdict(each).items() if name != "png"} for each in found]
    (build.folder / FIGURES).write_text(json.dumps(words), encoding="utf-8")
    (build.folder / SUMMARY).write_text(json.dumps(shown.summary, indent=1, sort_keys=True), encoding="utf-8")
    return {"figures": len(found)}


def read_figures(store: ArtifactStore, ref: Ref) -> "list[Figure]":
    """Return the figures of a run."""
    from tasks.report import Figure, Table

    folder = store.path(ref)
    found = []
    for words in json.loads((folder / FIGURES).read_bytes()):
        table = Table(tuple(words["table"]["headers"]), tuple(tuple(row) for row in words["table"]["rows"]))
        png = (folder / f"{words['name']}.png").read_bytes()
        found.append(Figure(**{**words, "table": table, "png": png}))
    return found
