"""Moving the artifacts of whole runs between this store and the remote."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import MissingArtifactError, RemoteSettingsError, StorageError
from storage.manifest import Ref
from storage.remote import RemoteObjects
from storage.runs import LATEST, RunRecord, find_run, parse_run, run_bytes, save_run

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Moved:
    """What a push or pull did.

    Attributes
    ----------
    run
        Name of the run.
    moved, there
        Artifacts that were copied, and those that were there already.
    """

    run: str
    moved: int
    there: int


def artifacts_of(record: RunRecord) -> list[Ref]:
    """Return the artifacts that a run used or made, each once."""
    return list(dict.fromkeys(Ref(stage.stage, stage.key) for stage in record.stages if stage.key))


def push_run(
    store: ArtifactStore, name: str, advance: Advance = lambda done, total: None, *, verify: bool = False
) -> Moved:
    """Send a run's artifacts, then its record; with `verify` what is there is re-hashed, and replaced if damaged.

    Raises
    ------
    MissingArtifactError
        When some of them are no longer here, and nothing is sent then; or when one is damaged here.
    """
    remote = remote_of(store)
    record = find_run(store.root, name)
    refs = artifacts_of(record)
    missing = [ref.short for ref in refs if store.claim(ref.stage, ref.key).manifest is None]
    if missing:
        raise MissingArtifactError(
            f"Run {record.run} cannot be pushed: {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} not here (any more); run its recipe again."
        )
    moved = 0
    for done, ref in enumerate(refs, start=1):
        moved += store.push(ref, verify=verify)
        advance(done, len(refs))
    remote.send_record(record.run, run_bytes(record))
    return Moved(record.run, moved, len(refs) - moved)


def pull_run(store: ArtifactStore, name: str, advance: Advance = lambda done, total: None) -> Moved:
    """Copy a run's artifacts from the remote, then its record."""
    record = _one(_records(store), name)
    refs = artifacts_of(record)
    moved = 0
    for done, ref in enumerate(refs, start=1):
        moved += store.pull(ref.stage, ref.key)
        advance(done, len(refs))
    save_run(store.root, record)
    return Moved(record.run, moved, len(refs) - moved)


def remote_runs(store: ArtifactStore) -> Sequence[RunRecord]:
    """Return the run records that were pushed to the remote, the oldest first."""
    return list(_records(store).values())


def remote_of(store: ArtifactStore) -> RemoteObjects:
    """Return the store's remote.

    Raises
    ------
    RemoteSettingsError
        When it has none.
    """
    if store.remote is None:
        raise RemoteSettingsError("No remote is set: COVERCAL_REMOTE is not set, or --offline was given.")
    return store.remote


def _records(store: ArtifactStore) -> dict[str, RunRecord]:
    remote = remote_of(store)
    found = {}
    for name, text in remote.records().items():
        try:
            found[name] = parse_run(text)
        except StorageError as cause:
            raise StorageError(f"Run {name} of remote {remote.place}: {cause}") from cause
    return found


def _one(records: dict[str, RunRecord], name: str) -> RunRecord:
    matches = [record for each, record in records.items() if each.startswith(name)]
    if name == LATEST:
        matches = [record for record in records.values() if record.state == "completed"][-1:]
    if len(matches) != 1:
        raise MissingArtifactError(
            f"{len(matches)} runs of the remote have a name that begins with {name!r}; "
            "`covercal cache runs --remote` lists them."
        )
    return matches[0]
