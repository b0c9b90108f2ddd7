"""Run records: one JSON file per run, with every decision of the store and its reason."""

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.durable import listed, make_writable_folder, write_durably
from storage.errors import MissingArtifactError, StorageError
from storage.manifest import check_name

LATEST = "latest"
RECORD = ".json"
PIN = ".pinned"
_NAME = re.compile(r"[0-9A-Za-z-]{1,80}")


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


def run_bytes(record: RunRecord) -> bytes:
    """Return a run record as JSON."""
    return json.dumps(asdict(record), indent=1, sort_keys=True, default=str).encode()


def parse_run(text: bytes) -> RunRecord:
    """Return the run record that `text` is.

    Raises
    ------
    StorageError
        When it is none, or its name is not that of a run.
    """
    try:
        value = json.loads(text)
        stages = [StageRecord(**each) for each in value.pop("stages")]
        record = RunRecord(stages=stages, **value)
        _check(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise StorageError(f"A run record is not readable ({cause}).") from cause
    return record


def _check(record: RunRecord) -> None:
    """Raise when a field is not what it should be: a record may come from elsewhere."""
    texts = [record.run, record.command, record.started, record.state, record.error]
    texts += [text for s in record.stages for text in (s.label, s.stage, s.key, s.decision, s.reason)]
    numbers = [record.seconds, *(s.seconds for s in record.stages)]
    if not all(isinstance(each, str) for each in texts) or not all(isinstance(each, int | float) for each in numbers):
        raise ValueError("a field is of the wrong type")
    if not isinstance(record.recipe, dict) or not isinstance(record.result, dict):
        raise ValueError("recipe or result is no mapping")
    if not _NAME.fullmatch(record.run):
        raise ValueError(f"{record.run!r} is no name of a run")
    for stage in record.stages:
        if stage.key:
            check_name(stage.stage, stage.key)
    datetime.fromisoformat(record.started)


def write_run(root: Path, record: RunRecord) -> Path:
    """Write a run record under `root/runs` and return its path.

    Raises
    ------
    StorageError
        When the folder cannot be written, or the disk is full.
    """
    folder = root / "runs"
    make_writable_folder(folder, "The folder of run records")
    path = folder / f"{record.run}{RECORD}"
    try:
        write_durably(path, run_bytes(record))
    except OSError as cause:
        raise StorageError(f"Cannot write run record {path}: {cause.strerror or cause}.") from cause
    return path


def save_run(root: Path, record: RunRecord) -> Path:
    """Keep the record of a run of another machine; one that is here stays as it is."""
    path = root / "runs" / f"{record.run}{RECORD}"
    return path if path.exists() else write_run(root, record)


def read_runs(root: Path) -> Iterator[RunRecord]:
    """Yield the run records under `root/runs`, the oldest first.

    Raises
    ------
    StorageError
        Naming a record that cannot be read: what it protects is not known.
    """
    for name in _names(root, RECORD):
        path = root / "runs" / f"{name}{RECORD}"
        try:
            yield parse_run(path.read_bytes())
        except OSError as cause:
            raise StorageError(f"Cannot read run record {path}: {cause.strerror or cause}.") from cause
        except StorageError as cause:
            raise StorageError(f"{path}: {cause} Delete the file if the run no longer matters.") from cause


def find_run(root: Path, name: str) -> RunRecord:
    """Return the one run whose name begins with `name`; `latest` is the last that was completed.

    Raises
    ------
    MissingArtifactError
        When none or several do.
    """
    runs = list(read_runs(root))
    matches = [run for run in runs if run.run.startswith(name)]
    if name == LATEST:
        matches = [run for run in runs if run.state == "completed"][-1:]
    if len(matches) != 1:
        raise MissingArtifactError(
            f"{len(matches)} runs have a name that begins with {name!r}; `covercal cache runs` lists them."
        )
    return matches[0]


def pin_run(root: Path, run: str, *, pinned: bool = True) -> None:
    """Keep the artifacts of a run from garbage collection, or no longer.

    Raises
    ------
    StorageError
        When the folder of run records cannot be written.
    """
    mark = root / "runs" / f"{run}{PIN}"
    try:
        if pinned:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
    except OSError as cause:
        raise StorageError(f"Cannot {'write' if pinned else 'delete'} {mark}: {cause.strerror or cause}.") from cause


def pinned_runs(root: Path) -> frozenset[str]:
    """Return the names of the pinned runs."""
    return frozenset(_names(root, PIN))


def _names(root: Path, suffix: str) -> list[str]:
    """Return the names of the runs that have a file of this suffix."""
    return [each.name.removesuffix(suffix) for each in listed(root / "runs") if each.name.endswith(suffix)]
