"""The artifact store: look up, build once, commit, verify."""

import errno
import json
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from storage.errors import MissingArtifactError, StorageError
from storage.explain import explain_miss
from storage.keys import artifact_key, content_digest, file_sha256
from storage.local import build_lock, fsync_path, fsync_tree, make_writable_folder, move_into_place, write_durably

MANIFEST = "MANIFEST.json"
LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "zarr", "duckdb", "pyarrow", "compressed-tensors")
MANIFEST_FAULTS = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
BuildFolder = Callable[[Path], Mapping[str, Any] | None]
_KEY = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z][a-z_]*")


class Decision(StrEnum):
    """What the store did for one artifact, from the cheapest to the dearest."""

    HIT = "hit"
    PULLED = "pulled"
    WAITED = "waited"
    BUILT = "built"
    REBUILT = "rebuilt"


@dataclass(frozen=True, slots=True)
class Ref:
    """What passes between steps: the name of one artifact, never its content.

    Attributes
    ----------
    stage, key
        Where it is; the key is sha256 over what it was made from.
    digest
        sha256 over its files' content; empty for an artifact that is planned and not built yet.
    """

    stage: str
    key: str
    digest: str = ""

    @property
    def short(self) -> str:
        """Return the name people read: stage and the first 12 digits of the key."""
        return f"{self.stage}/{self.key[:12]}"


@dataclass(frozen=True, slots=True)
class Request:
    """One artifact that is wanted: its stage, stage version, key material and the artifacts it reads."""

    stage: str
    version: int
    material: Mapping[str, Any]
    inputs: tuple[Ref, ...] = ()

    @property
    def key(self) -> str:
        """Return the artifact's key."""
        return artifact_key(self.stage, self.version, self.material)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `MANIFEST.json` says of an artifact; it is written last, so an artifact without one does not exist."""

    stage: str
    version: int
    key: str
    digest: str
    material: dict[str, Any]
    inputs: list[dict[str, str]]
    files: dict[str, dict[str, Any]]
    info: dict[str, Any]
    libraries: dict[str, str]
    created: str
    seconds: float

    @property
    def ref(self) -> Ref:
        """Return the reference to this artifact."""
        return Ref(self.stage, self.key, self.digest)

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(int(each["size"]) for each in self.files.values())


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the store knows of a request: the manifest of a hit, or the reason why there is none."""

    manifest: Manifest | None
    reason: str
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One artifact that is there now, how it came to be, and why."""

    ref: Ref
    decision: Decision
    reason: str
    seconds: float
    info: dict[str, Any] = field(default_factory=dict)


class ArtifactStore:
    """Artifacts on the local disk, found by key, built at most once, and never read half-written.

    Parameters
    ----------
    root
        The cache folder, with `objects/STAGE/KK/KEY/`, `staging/`, `work/`, `runs/` and `locks/`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

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

    def folder(self, stage: str, key: str) -> Path:
        """Return where an artifact lies or would lie.

        Raises
        ------
        StorageError
            When stage or key are not what this store names its folders by.
        """
        if not _STAGE.fullmatch(stage) or not _KEY.fullmatch(key):
            raise StorageError(
                f"{stage!r}/{key!r} names no artifact: a stage is lower-case letters, a key 64 hex digits."
            )
        return self.root / "objects" / stage / key[:2] / key

    def path(self, ref: Ref) -> Path:
        """Return the folder of an artifact that is in the store.

        Raises
        ------
        MissingArtifactError
            When it is not there, or damaged.
        """
        found = self.look_up(ref.stage, ref.key)
        if found.manifest is None:
            raise MissingArtifactError(f"Artifact {ref.short} cannot be read: {found.reason}.")
        return self.folder(ref.stage, ref.key)

    def manifest(self, ref: Ref) -> Manifest:
        """Return the manifest of an artifact that is in the store."""
        found = self.look_up(ref.stage, ref.key)
        if found.manifest is None:
            raise MissingArtifactError(f"Artifact {ref.short} cannot be read: {found.reason}.")
        return found.manifest

    def look_up(self, stage: str, key: str) -> Lookup:
        """Return the manifest of a whole artifact: every file there, at its size; or the reason for a miss."""
        folder = self.folder(stage, key)
        try:
            text = (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_dir():
                return Lookup(None, f"file {MANIFEST} is missing", damaged=True)
            return Lookup(None, "not in the store")
        except OSError as cause:
            raise StorageError(f"Cannot read {folder / MANIFEST}: {cause.strerror or cause}.") from cause
        try:
            manifest = _parse_manifest(text)
        except MANIFEST_FAULTS as cause:
            return Lookup(None, f"file {MANIFEST} is not readable ({cause})", damaged=True)
        if (manifest.stage, manifest.key) != (stage, key):
            return Lookup(None, f"file {MANIFEST} belongs to {manifest.ref.short}", damaged=True)
        fault = _first_size_fault(folder, manifest)
        return Lookup(None, fault, damaged=True) if fault else Lookup(manifest, "in the store")

    def explain(self, request: Request) -> str:
        """Return why `request` is not in the store, in terms of the nearest artifact of its stage."""
        others = [m for m in self.manifests(request.stage) if m.key != request.key]
        return explain_miss(
            request.version, dict(request.material), [(m.version, m.material, m.created) for m in others]
        )

    def build_once(self, request: Request, build: BuildFolder) -> Outcome:
        """Return the artifact of `request`, building it when it is not there; one build at a time per key.

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
            When the disk is full or the store is not writable, naming the cause. An error of `build` itself
            passes through, and nothing is committed.
        """
        started = time.perf_counter()
        found = self.look_up(request.stage, request.key)
        if found.manifest is not None:
            return _outcome(found.manifest, Decision.HIT, found.reason, started)
        make_writable_folder(self.root, "The cache folder")
        with build_lock(self.root / "locks" / f"{request.key}.lock") as waited:
            found = self.look_up(request.stage, request.key)
            if found.manifest is not None:
                decision = Decision.WAITED if waited else Decision.HIT
                return _outcome(found.manifest, decision, "built by another process", started)
            reason = found.reason if found.damaged else self.explain(request)
            manifest = self._build(request, build)
        return _outcome(manifest, Decision.REBUILT if found.damaged else Decision.BUILT, reason, started)

    def _build(self, request: Request, build: BuildFolder) -> Manifest:
        staged = self.root / "staging" / f"{request.key[:16]}-{uuid.uuid4().hex}"
        started = time.perf_counter()
        try:
            with self._named_fault(request):
                staged.mkdir(parents=True)
            with self._named_fault(request, DISK_FAULTS):  # any other OSError is the build's own
                info = dict(build(staged) or {})
            if (staged / MANIFEST).exists():
                raise ValueError(f"a build must not write {MANIFEST}; the store does")
            with self._named_fault(request):
                return self._commit(staged, request, info, started)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _commit(self, staged: Path, request: Request, info: dict[str, Any], started: float) -> Manifest:
        """Write the manifest, flush everything and rename the folder into place."""
        files = _describe(staged)
        manifest = Manifest(
            stage=request.stage,
            version=request.version,
            key=request.key,
            digest=content_digest({name: each["sha256"] for name, each in files.items()}),
            material=dict(request.material),
            inputs=[asdict(each) for each in request.inputs],
            files=files,
            info=info,
            libraries=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - started, 3),
        )
        fsync_tree(staged)
        write_durably(staged / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())
        fsync_path(staged)
        move_into_place(staged, self.folder(request.stage, request.key), self.root / "staging")
        return manifest

    @contextmanager
    def _named_fault(self, request: Request, errors: Container[int | None] | None = None) -> Iterator[None]:
        """Turn an OSError (one of `errors`, or any) into a `StorageError` that names the cause and the free space."""
        try:
            yield
        except OSError as cause:
            if errors is not None and cause.errno not in errors:
                raise
            free = shutil.disk_usage(self.root).free if self.root.exists() else 0
            raise StorageError(
                f"Cannot write artifact {request.stage}/{request.key[:12]} under {self.root}: "
                f"{cause.strerror or cause} ({free / 1e6:,.0f} MB free). "
                "Nothing was committed; run again when there is room."
            ) from cause

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all readable artifacts (of one stage), in the order of their keys."""
        objects = self.root / "objects"
        stages = [stage] if stage else sorted(p.name for p in objects.glob("*") if p.is_dir())
        for name in stages:
            for path in sorted((objects / name).glob(f"*/*/{MANIFEST}")):
                try:
                    yield _parse_manifest(path.read_bytes())
                except (*MANIFEST_FAULTS, FileNotFoundError):
                    continue  # `verify` and look-ups name damaged manifests; a listing shows what can be read

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield (stage, key) of every artifact folder, readable or not."""
        for path in sorted((self.root / "objects").glob("*/*/*")):
            if path.is_dir() and _KEY.fullmatch(path.name):
                yield path.parent.parent.name, path.name

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
        """Return what is wrong with an artifact after re-hashing every file; empty when all is well."""
        found = self.look_up(stage, key)
        if found.manifest is None:
            return [found.reason]
        folder = self.folder(stage, key)
        known = {name: each["sha256"] for name, each in found.manifest.files.items()}
        faults = [
            f"file {name} does not match its sha256" for name in known if file_sha256(folder / name) != known[name]
        ]
        if content_digest(known) != found.manifest.digest:
            faults.append(f"file {MANIFEST} lists files that do not give its digest")
        made_from = artifact_key(found.manifest.stage, found.manifest.version, found.manifest.material)
        if made_from != key:
            faults.append(f"file {MANIFEST} holds key material that does not give its key")
        extra = set(_file_names(folder)) - set(known) - {MANIFEST}
        return faults + [f"file {name} is not in the manifest" for name in sorted(extra)]


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change an artifact."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _outcome(manifest: Manifest, decision: Decision, reason: str, started: float) -> Outcome:
    return Outcome(manifest.ref, decision, reason, round(time.perf_counter() - started, 3), manifest.info)


def _parse_manifest(text: bytes) -> Manifest:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    manifest = Manifest(**value)
    if not _STAGE.fullmatch(manifest.stage) or not _KEY.fullmatch(manifest.key):
        raise ValueError("stage or key are malformed")
    for name, each in manifest.files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise ValueError(f"file name {name!r} leaves the artifact's folder")
        if "\0" in name or not _KEY.fullmatch(each["sha256"]) or int(each["size"]) < 0:
            raise ValueError(f"file {name!r} has no proper size and sha256")
    return manifest


def _first_size_fault(folder: Path, manifest: Manifest) -> str:
    for name, each in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"file {name} is missing"
        if size != each["size"]:
            return f"file {name} has {size} bytes, not {each['size']}"
    return ""


def _file_names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    names = _file_names(folder)
    return {n: {"size": (folder / n).stat().st_size, "sha256": file_sha256(folder / n)} for n in names}
