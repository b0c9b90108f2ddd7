"""Run records: one JSON file per run, with every decision of the store and its reason."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.local import make_writable_folder, write_durably


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What happened to one artifact in a run."""

    label: str
    stage: str
    key: str
    decision: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run: its recipe, what the store decided and why, and what came out."""

    run: str
    command: str
    started: str
    seconds: float
    state: str
    recipe: dict[str, Any]
    stages: list[StageRecord]
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def new_run_name() -> str:
    """Return a name that sorts by time and does not collide."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}"


def write_run(root: Path, record: RunRecord) -> Path:
    """Write a run record under `root/runs` and return its path."""
    folder = root / "runs"
    make_writable_folder(folder, "The folder of run records")
    path = folder / f"{record.run}.json"
    write_durably(path, json.dumps(asdict(record), indent=1, sort_keys=True, default=str).encode())
    return path


def read_runs(root: Path) -> Iterator[RunRecord]:
    """Yield the run records under `root/runs`, the oldest first."""
    for path in sorted((root / "runs").glob("*.json")):
        value = json.loads(path.read_bytes())
        stages = [StageRecord(**each) for each in value.pop("stages")]
        yield RunRecord(stages=stages, **value)
