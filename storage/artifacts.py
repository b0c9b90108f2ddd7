"""The artifact store: look up, pull, build once, commit, share, verify."""

import errno
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.durable import build_lock, flush_and_hash, is_locked, listed, make_writable_folder
from storage.errors import MissingArtifactError, StorageError
from storage.explain import Known, explain_miss
from storage.in_use import claims_of
from storage.keys import content_digest
from storage.local import LocalObjects
from storage.manifest import (
    DAMAGED,
    MANIFEST,
    SHORT_KEY,
    Decision,
    Lookup,
    Manifest,
    Outcome,
    Ref,
    Request,
    check_files,
    library_versions,
)

if TYPE_CHECKING:
    from storage.remote import RemoteObjects

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b")
CONTINUED = "continued"  # what a build notes when it went on from the work of one that was cut short
BuildFolder = Callable[[Path], Mapping[str, Any] | None]


class ArtifactStore:
    """Artifacts on the local disk, found by key, built at most once, never read half-written, shared through a remote.

    Parameters
    ----------
    root
        The cache folder, with `objects/STAGE/KK/KEY/`, `staging/`, `work/`, `runs/` and `locks/`.
    remote
        Where artifacts that are not here are asked for, and, if it is writable, sent to when they are built.
    """

    def __init__(self, root: Path, remote: "RemoteObjects | None" = None) -> None:
        self.root = root.expanduser().absolute()
        self.local = LocalObjects(self.root)
        self.remote = remote

    def prepare(self) -> "ArtifactStore":
        """Create the root when it is not there, and return the store; one that cannot be written may still be read.

        Raises
        ------
        UnwritableStoreError
            When there is no such folder and it cannot be created.
        """
        if not self.root.is_dir():
            make_writable_folder(self.root, "The cache folder")
        return self

    # --- what is there -----------------------------------------------------------------------------------------------

    def folder(self, stage: str, key: str) -> Path:
        """Return where an artifact lies or would lie.

        Raises
        ------
        StorageError
            When stage or key are not what this store names its folders by.
        """
        return self.local.folder(stage, key)

    def look_up(self, stage: str, key: str) -> Lookup:
        """Return the manifest of a whole artifact that is here: every file there, at its size; or why there is none."""
        return self.local.look_up(stage, key)

    def claim(self, stage: str, key: str) -> Lookup:
        """Look an artifact up that this process is going to use: nobody deletes it while the process lives."""
        self.local.folder(stage, key)
        claims = claims_of(self.root)
        claims.claim(key)
        found = self.look_up(stage, key)
        if found.manifest is None:
            claims.leave(key)
        return found

    def look_up_remote(self, stage: str, key: str) -> Lookup:
        """Return what the remote knows of an artifact; without one, nothing."""
        return self.remote.look_up(stage, key) if self.remote is not None else Lookup(None, "not in the store")

    def path(self, ref: Ref) -> Path:
        """Return the folder of an artifact, pulled if it has to be.

        Raises
        ------
        MissingArtifactError
            When it is not there, or damaged.
        """
        self.manifest(ref)
        return self.folder(ref.stage, ref.key)

    def manifest(self, ref: Ref) -> Manifest:
        """Return the manifest of an artifact, pulled if it has to be.

        Raises
        ------
        MissingArtifactError
            When it is not there, damaged, or no longer the one that was asked for by its digest.
        """
        found = self.claim(ref.stage, ref.key)
        if found.manifest is None and self.remote is not None:
            self.pull(ref.stage, ref.key)
            found = self.look_up(ref.stage, ref.key)
        if found.manifest is None:
            raise MissingArtifactError(f"Artifact {ref.short} cannot be read: {found.reason}.")
        if ref.digest and found.manifest.digest != ref.digest:
            raise MissingArtifactError(
                f"Artifact {ref.short} was replaced while it was in use, by another machine's or by one made anew; "
                "run again to go on with what is there now."
            )
        return found.manifest

    def explain(self, request: Request, planned: Mapping[str, Request] | None = None) -> str:
        """Return why `request` is not in the store, in terms of the nearest artifact of its stage.

        Parameters
        ----------
        request
            What is wanted.
        planned
            Requests by key that a plan has made and nothing has answered yet: what an input was to be made from.
        """
        try:
            others = [(_known(m), m.created) for m in self.manifests(request.stage) if m.key != request.key]
        except StorageError as fault:  # of artifacts that this build does not need
            return f"not in the store; why cannot be told: {fault}"

        def find(stage: str, key: str) -> Known | None:
            if planned is not None and key in planned:
                return _wanted(planned[key])
            manifest = self.look_up(stage, key).manifest if key else None
            return _known(manifest) if manifest is not None else None

        return explain_miss(request.stage, _wanted(request), others, find)

    # --- building ----------------------------------------------------------------------------------------------------

    def build_once(self, request: Request, build: BuildFolder) -> Outcome:
        """Return the artifact of `request`, pulled or built when it is not there; one build at a time per key.

        Parameters
        ----------
        request
            What is wanted.
        build
            Writes the artifact's files into the empty folder it is given; what it returns is kept in the
            manifest (`info`) and is no part of the content.

        Raises
        ------
        StorageError
            When the disk is full, the store is not writable or the remote fails, naming the cause. An error of
            `build` itself passes through, and nothing is committed.
        """
        started = time.perf_counter()
        found = self.claim(request.stage, request.key)
        if found.manifest is not None:
            return _outcome(found.manifest, Decision.HIT, found.reason, started)
        make_writable_folder(self.root, "The cache folder")
        with self._build_lock(request.key) as waited:
            found = self.claim(request.stage, request.key)
            if found.manifest is not None:
                decision = Decision.WAITED if waited else Decision.HIT
                return _outcome(found.manifest, decision, "built by another process", started)
            pulled = self._pull(request.stage, request.key)
            if pulled.manifest is not None:
                reason = f"{found.reason}; {pulled.reason}" if found.damaged else pulled.reason
                return _outcome(pulled.manifest, Decision.PULLED, reason, started)
            damaged = [each.reason for each in (found, pulled) if each.damaged]
            reason = "; ".join(damaged) or self.explain(request)
            note = self._note_unsent(request, replace_there=pulled.damaged)
            manifest = self._build(request, build)
        if CONTINUED in manifest.info:
            reason += f"; continued at {manifest.info[CONTINUED]}"
        if note is not None:
            winner = self._share(manifest, note, replace_there=pulled.damaged)
            if winner.digest != manifest.digest:
                reason += "; another machine had sent its own to the remote first, which is used"
            manifest = winner
        return _outcome(manifest, Decision.REBUILT if damaged else Decision.BUILT, reason, started)

    def _build_lock(self, key: str) -> Any:
        return build_lock(self._lock_file(key))

    def _lock_file(self, key: str) -> Path:
        return self.root / "locks" / f"{key}.lock"

    def _staging(self, key: str) -> Path:
        return self.root / "staging" / f"{key}-{uuid.uuid4().hex}"

    def _build(self, request: Request, build: BuildFolder) -> Manifest:
        staged = self._staging(request.key)
        started = time.perf_counter()
        try:
            with self._named_fault(request.stage, request.key, staged):
                staged.mkdir(parents=True)
            with self._named_fault(request.stage, request.key, staged, DISK_FAULTS):  # others are the build's own
                info = dict(build(staged) or {})
            for name in (MANIFEST, DAMAGED):
                if (staged / name).exists():
                    raise ValueError(f"a build must not write {name}; the store does")
            info = json.loads(json.dumps(info, allow_nan=False))  # plain JSON, as a reader gets it, or an error
            with self._named_fault(request.stage, request.key, staged):
                manifest = self.local.commit(_manifest_of(staged, request, info, started), staged, replace=True)
                shutil.rmtree(self.work_folder(request.key), ignore_errors=True)
                return manifest
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def work_folder(self, key: str) -> Path:
        """Return where a build keeps what it can go on from when it is cut short; deleted once it is committed."""
        return self.root / "work" / key

    def require_space(self, wanted: int, purpose: str) -> None:
        """Check the free space before the work and not after it.

        Raises
        ------
        StorageError
            With the space that is needed and the space that is free.
        """
        free = shutil.disk_usage(self.root).free
        if free < wanted:
            raise StorageError(
                f"{purpose} needs {_megabytes(wanted)} under {self.root} and {_megabytes(free)} are free. "
                "Nothing was begun; `covercal cache gc` makes room, COVERCAL_CACHE names another folder."
            )

    @contextmanager
    def _named_fault(
        self, stage: str, key: str, staged: Path, errors: Container[int | None] | None = None
    ) -> Iterator[None]:
        """Turn an OSError (one of `errors`, or any) into a `StorageError` with its cause and the space that is needed.

        Libraries written in other languages tell a full disk by their own exceptions; its text gives it away.
        """
        try:
            yield
        except OSError as cause:
            if errors is not None and cause.errno not in errors and not FULL.search(str(cause)):
                raise
            raise self._disk_error(stage, key, staged, cause.strerror or str(cause)) from cause
        except Exception as cause:
            if not FULL.search(str(cause)):
                raise
            raise self._disk_error(stage, key, staged, str(cause)) from cause

    def _disk_error(self, stage: str, key: str, staged: Path, cause: str) -> StorageError:
        free = shutil.disk_usage(self.root).free if self.root.exists() else 0
        written = sum(p.stat().st_size for p in staged.rglob("*") if p.is_file()) if staged.exists() else 0
        return StorageError(
            f"Cannot write artifact {stage}/{key[:SHORT_KEY]} under {self.root}: {cause} ({_megabytes(free)} free; it "
            f"needs more than the {_megabytes(written)} that were written of it). "
            "Nothing was committed; run again when there is room."
        )

    # --- the remote --------------------------------------------------------------------------------------------------

    def _pull(self, stage: str, key: str) -> Lookup:
        """Copy an artifact from the remote; the caller holds the build lock."""
        with self._fetched(stage, key) as (found, staged):
            if found.manifest is not None:
                self._move_in(found.manifest, staged)
        return found

    @contextmanager
    def _fetched(self, stage: str, key: str) -> Iterator[tuple[Lookup, Path]]:
        """Yield what the remote has of an artifact, and a folder with its files, every one checked by its sha256."""
        found = self.look_up_remote(stage, key)
        staged = self._staging(key)
        try:
            if found.manifest is not None and self.remote is not None:
                with self._named_fault(stage, key, staged):
                    staged.mkdir(parents=True)
                    faults = self.remote.fetch(found.manifest, staged)
                reason = "; ".join(faults) or f"from {self.remote.place}"
                found = Lookup(None if faults else found.manifest, reason, damaged=bool(faults))
            yield found, staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _move_in(self, manifest: Manifest, staged: Path) -> None:
        with self._named_fault(manifest.stage, manifest.key, staged):
            self.local.commit(manifest, staged, replace=True)

    def _note_unsent(self, request: Request, *, replace_there: bool) -> Path | None:
        """Note, before anything is built, that it is to be sent: `send_unsent` makes up for a push that never was."""
        if self.remote is None or not self.remote.writable:
            return None
        note = self.root / "unsent" / f"{request.stage}-{request.key}"
        with self._named_fault(request.stage, request.key, note):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text("replace" if replace_there else "", encoding="ascii")
        return note

    def _share(self, manifest: Manifest, note: Path, *, replace_there: bool) -> Manifest:
        """Send an artifact that was just built and return the one that holds everywhere.

        When another machine was first, its artifact replaces ours, so that both go on with the same bytes; but not
        while another process or thread here already reads ours.
        """
        assert self.remote is not None
        folder = self.folder(manifest.stage, manifest.key)
        send = self.remote.repair if replace_there else self.remote.commit
        winner = send(manifest, folder)
        note.unlink(missing_ok=True)
        if winner.digest == manifest.digest:
            return manifest
        with self._build_lock(manifest.key), self._fetched(manifest.stage, manifest.key) as (found, staged):
            with claims_of(self.root).removing_as_only_user(manifest.key) as alone:
                if found.manifest is None or not alone:
                    return manifest
                self._move_in(found.manifest, staged)
            return found.manifest

    def send_unsent(self) -> int:
        """Send what was built here and did not reach the remote; returns how many artifacts that were."""
        if self.remote is None or not self.remote.writable:
            return 0
        sent = 0
        for note in (Path(each.path) for each in listed(self.root / "unsent") if "-" in each.name):
            stage, _, key = note.name.partition("-")
            manifest = self.claim(stage, key).manifest
            if manifest is not None:
                try:
                    replace_there = note.read_text(encoding="ascii") == "replace"
                except FileNotFoundError:
                    continue  # another process has just sent it
                if self.damage(stage, key):  # marked: who needs it makes it again, and sends that
                    note.unlink(missing_ok=True)
                    continue
                self._share(manifest, note, replace_there=replace_there)
                sent += 1
            elif not is_locked(self._lock_file(key)):  # else it is being built just now
                note.unlink(missing_ok=True)
        return sent

    def push(self, ref: Ref, *, verify: bool = False) -> bool:
        """Send an artifact that is here to the remote unless it is there; returns whether it was sent.

        Parameters
        ----------
        ref
            Of the artifact.
        verify
            Re-hash what is there, and send ours where it is damaged.

        Raises
        ------
        MissingArtifactError
            When ours is not here, or damaged.
        """
        assert self.remote is not None
        manifest = self.manifest(ref)
        there = self.remote.look_up(ref.stage, ref.key).manifest
        damaged = verify and there is not None and bool(self.remote.verify(ref.stage, ref.key))
        if there is not None and self.remote.holds(there) and not damaged:
            return False
        self.check_whole(ref, "was not sent")
        send = self.remote.repair if damaged else self.remote.commit
        send(manifest, self.folder(ref.stage, ref.key))
        return True

    def check_whole(self, ref: Ref, consequence: str) -> None:
        """Re-hash an artifact whose files are to be passed on.

        Raises
        ------
        MissingArtifactError
            When some are not what its manifest says, which is marked. `consequence` ends "is damaged here and …".
        """
        faults = self.damage(ref.stage, ref.key)
        if faults:
            raise MissingArtifactError(
                f"Artifact {ref.short} is damaged here and {consequence}: {'; '.join(faults)}. "
                "The next run that needs it makes it again."
            )

    def pull(self, stage: str, key: str) -> bool:
        """Copy an artifact from the remote unless it is here; returns whether it was copied.

        Raises
        ------
        MissingArtifactError
            When the remote does not have it, or has it damaged.
        """
        if self.claim(stage, key).manifest is not None:
            return False
        make_writable_folder(self.root, "The cache folder")
        with self._build_lock(key):
            if self.look_up(stage, key).manifest is not None:
                return False
            found = self._pull(stage, key)
        if found.manifest is None:
            raise MissingArtifactError(f"Artifact {Ref(stage, key).short} cannot be pulled: {found.reason}.")
        return True

    # --- listing -----------------------------------------------------------------------------------------------------

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all readable artifacts here (of one stage), in the order of their keys."""
        return self.local.manifests(stage)

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield (stage, key) of every artifact folder here, readable or not."""
        return self.local.folders()

    def find(self, prefix: str) -> Manifest:
        """Return the one artifact whose key begins with `prefix` (`KEY`, or `STAGE/KEY`).

        Raises
        ------
        MissingArtifactError
            When none or several do.
        """
        stage, _, key = prefix.rpartition("/")
        matches = [m for m in self.manifests(stage or None) if m.key.startswith(key)]
        if len(matches) != 1:
            listed = ", ".join(m.ref.short for m in matches[:5])
            raise MissingArtifactError(
                f"{len(matches)} artifacts have a key that begins with {prefix!r}"
                + (f" ({listed}); give more digits." if matches else "; `covercal cache ls` lists them.")
            )
        return matches[0]

    def verify(self, stage: str, key: str) -> list[str]:
        """Return the damage and the strangers of an artifact, every file re-hashed; empty when all is well."""
        return self.local.verify(stage, key)

    def damage(self, stage: str, key: str) -> list[str]:
        """Return what of an artifact is not as it was made; it is marked, so that the next run rebuilds it."""
        return self.local.damage(stage, key)

    def strangers(self, stage: str, key: str) -> list[str]:
        """Return one line per file in an artifact's folder that is none of the artifact's; it does no harm there."""
        return self.local.strangers(stage, key)


def _manifest_of(staged: Path, request: Request, info: dict[str, Any], started: float) -> Manifest:
    """Flush and hash what was built, and return its manifest."""
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in flush_and_hash(staged).items()}
    check_files(files)
    return Manifest(
        stage=request.stage,
        version=request.version,
        key=request.key,
        digest=content_digest({name: str(each["sha256"]) for name, each in files.items()}),
        material=dict(request.material),
        inputs=[asdict(each) for each in request.inputs],
        files=files,
        info=info,
        libraries=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )


def _outcome(manifest: Manifest, decision: Decision, reason: str, started: float) -> Outcome:
    return Outcome(manifest.ref, decision, reason, round(time.perf_counter() - started, 3), manifest.info)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _known(manifest: Manifest) -> Known:
    inputs = [(each["stage"], each["key"], each["digest"]) for each in manifest.inputs]
    return Known(manifest.version, manifest.material, inputs)


def _wanted(request: Request) -> Known:
    return Known(request.version, request.material, [(r.stage, r.key, r.digest) for r in request.inputs])
