"""Garbage collection: what no pinned or recent run needs, and what builds that were cut short left behind."""

import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from storage.artifacts import ArtifactStore
from storage.durable import PARTIAL, make_writable_folder, set_aside, subfolders
from storage.errors import StorageError
from storage.in_use import claims_of, last_change
from storage.lineage import ancestors
from storage.manifest import MANIFEST, SHORT_KEY, is_key
from storage.runs import RunRecord, pinned_runs, read_runs

DAY = 86_400.0
DAYS = 30.0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One artifact as garbage collection sees it.

    Attributes
    ----------
    stage, key
        Its name.
    size
        Bytes on the disk.
    arrived
        When it came into this store, in seconds since the epoch.
    reads
        Keys of the artifacts it was made from.
    """

    stage: str
    key: str
    size: int
    arrived: float
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leftover:
    """A staging or work folder, or a copy that was replaced, which no living process uses."""

    path: Path
    size: int
    what: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection deleted, or with `dry_run` would delete.

    Attributes
    ----------
    objects, leftovers
        What goes.
    kept
        Artifacts that stay.
    in_use
        How many of those stay only because a living process uses them.
    """

    objects: tuple[StoredObject, ...]
    leftovers: tuple[Leftover, ...]
    kept: int
    in_use: int

    @property
    def size(self) -> int:
        """Return the bytes that go."""
        return sum(o.size for o in self.objects) + sum(each.size for each in self.leftovers)


def garbage(roots: Collection[str], objects: Mapping[str, StoredObject]) -> tuple[StoredObject, ...]:
    """Return the objects that no root is or was made from, in the order of `objects`."""
    kept = {*roots, *ancestors(roots, {key: each.reads for key, each in objects.items()})}
    return tuple(each for key, each in objects.items() if key not in kept)


def recent_roots(
    runs: Iterable[RunRecord], pinned: Collection[str], objects: Iterable[StoredObject], since: float
) -> frozenset[str]:
    """Return the keys that stay by themselves.

    Parameters
    ----------
    runs
        All run records.
    pinned
        Names of the runs that stay whatever their age.
    objects
        All artifacts: one that came after `since` stays, since the run that made it may not have got to its record.
    since
        Seconds since the epoch; runs that began later stay.
    """
    used = {
        stage.key
        for run in runs
        if run.run in pinned or datetime.fromisoformat(run.started).timestamp() >= since
        for stage in run.stages
        if stage.key
    }
    return frozenset(used | {each.key for each in objects if each.arrived >= since})


def stored_objects(store: ArtifactStore) -> dict[str, StoredObject]:
    """Return every artifact folder of a store, readable or not, by key."""
    reads = {m.key: tuple(each["key"] for each in m.inputs) for m in store.manifests()}
    found = {}
    for stage, key in store.folders():
        folder = store.folder(stage, key)
        try:
            manifest = folder / MANIFEST
            arrived = (manifest if manifest.exists() else folder).stat().st_mtime
            found[key] = StoredObject(stage, key, folder_size(folder), arrived, reads.get(key, ()))
        except FileNotFoundError:
            continue  # somebody else just deleted it
    return found


def collect(store: ArtifactStore, days: float = DAYS, *, dry_run: bool = False, now: float | None = None) -> Collected:
    """Delete what no pinned run and no run or artifact of the last `days` needs.

    What a living process uses is never touched: while this looks and takes things out of sight, no process can begin
    to use anything. With `dry_run` nothing is deleted.

    Raises
    ------
    StorageError
        When the store cannot be written, or a run record cannot be read; nothing is deleted then. Or when a folder
        cannot be deleted, being another user's; the others are.
    """
    make_writable_folder(store.root, "The cache folder")
    since = (time.time() if now is None else now) - days * DAY
    aside: list[Path] = []
    refused: list[str] = []
    with claims_of(store.root).removing() as used:
        objects = stored_objects(store)
        roots = recent_roots(read_runs(store.root), pinned_runs(store.root), objects.values(), since)
        unneeded = garbage(roots, objects)
        needed = {*used, *ancestors(used, {key: each.reads for key, each in objects.items()})}
        going = tuple(each for each in unneeded if each.key not in needed)
        leftovers = tuple(_leftovers(store, objects, used, since))
        if not dry_run:
            for folder in (*(store.folder(each.stage, each.key) for each in going), *(each.path for each in leftovers)):
                try:
                    aside.append(set_aside(folder, store.root / "staging"))
                except FileNotFoundError:
                    continue  # another collection is just deleting it
                except OSError as cause:
                    refused.append(f"{folder}: {cause.strerror or cause}")
    for each in aside:
        shutil.rmtree(each, ignore_errors=True)
    if refused:
        raise StorageError(
            f"{len(refused)} of {len(going) + len(leftovers)} folders could not be deleted, the first {refused[0]}. "
            "The others are gone."
        )
    return Collected(going, leftovers, len(objects) - len(going), len(unneeded) - len(going))


def _leftovers(
    store: ArtifactStore, objects: Mapping[str, StoredObject], used: Collection[str], since: float
) -> Iterable[Leftover]:
    """Yield what builds left behind: none of these folders is ever read but work folders, by the next try."""
    for path in subfolders(store.root / "staging"):
        if _key_of(path.name) not in used:
            yield Leftover(path, folder_size(path), "staging folder of a build that was cut short")
    for path in store.local.contents():
        if path.name.startswith(PARTIAL) and _key_of(path.name.removeprefix(PARTIAL)) not in used:
            yield Leftover(path, folder_size(path), "copy that was never finished")
    for path in subfolders(store.root / "work"):
        if is_key(path.name) and path.name not in used:
            stored = objects.get(path.name)
            if stored is not None and store.look_up(stored.stage, stored.key).manifest is not None:
                yield Leftover(path, folder_size(path), "work folder of a finished build")
            elif last_change(path) < since:
                yield Leftover(path, folder_size(path), "work folder that nothing went on from")


def _key_of(name: str) -> str:
    return name.partition("-")[0]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder, those that vanish meanwhile left out."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def short_name(each: StoredObject) -> str:
    """Return what people call an object."""
    return f"{each.stage}/{each.key[:SHORT_KEY]}"
