"""What is said of an artifact: its reference, what it was made from, what its manifest lists."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Any

from storage.errors import StorageError
from storage.keys import artifact_key, canonical_json, content_digest

MANIFEST = "MANIFEST.json"
SEAL = "seal"
LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "zarr", "duckdb", "pyarrow", "compressed-tensors")
MANIFEST_FAULTS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
DAMAGED = "DAMAGED"  # a mark beside a manifest: what `verify` found
SHORT_KEY = 12  # digits of a key that people read
_KEY = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z][a-z_]*")
_ODD = re.compile(r"[\x00-\x1f\x7f]|#\d+$")  # object stores refuse control characters, and keep #1 to themselves


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
        return f"{self.stage}/{self.key[:SHORT_KEY]}"


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

    def to_bytes(self) -> bytes:
        """Return the text of `MANIFEST.json`."""
        value = {each.name: getattr(self, each.name) for each in fields(self)}
        value["info"] = json.loads(json.dumps(self.info, allow_nan=False))  # as a reader gets it: names are strings
        return sealed(value)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a place knows of an artifact: the manifest of a hit, or the reason why there is none."""

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


def sealed(value: Mapping[str, Any]) -> bytes:
    """Return JSON that holds the sha256 of all its other fields, so that no changed bit of it goes unnoticed."""
    body = {**value, SEAL: hashlib.sha256(canonical_json(value)).hexdigest()}
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode()


def is_key(text: str) -> bool:
    """Return whether `text` has the form of a key."""
    return _KEY.fullmatch(text) is not None


def is_stage(text: str) -> bool:
    """Return whether `text` has the form of a stage."""
    return _STAGE.fullmatch(text) is not None


def is_place(stage: str, prefix: str, key: str) -> bool:
    """Return whether `stage/prefix/key` is where an artifact lies."""
    return is_stage(stage) and is_key(key) and key[:2] == prefix


def check_name(stage: str, key: str) -> None:
    """Raise when stage or key are not what a store names its folders by.

    Raises
    ------
    StorageError
        Naming both.
    """
    if not _STAGE.fullmatch(stage) or not _KEY.fullmatch(key):
        raise StorageError(f"{stage!r}/{key!r} names no artifact: a stage is lower-case letters, a key 64 hex digits.")


def parse_manifest(text: bytes) -> Manifest:
    """Return the manifest that `text` is.

    Raises
    ------
    ValueError, TypeError, KeyError, AttributeError, OverflowError
        (`MANIFEST_FAULTS`) when it is none, or names a file outside the artifact's folder.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    value.pop(SEAL, None)
    if sealed(value) != text:
        raise ValueError("what it says does not match its seal")
    manifest = Manifest(**value)
    if not _STAGE.fullmatch(manifest.stage) or not _KEY.fullmatch(manifest.key):
        raise ValueError("stage or key are malformed")
    if [Ref(**each) for each in manifest.inputs] and not all(map(_is_reference, manifest.inputs)):
        raise ValueError("inputs are malformed")
    if not all(isinstance(each, dict) for each in (manifest.material, manifest.info, manifest.libraries)):
        raise ValueError("material, info or libraries are malformed")
    if not isinstance(manifest.created, str) or not isinstance(manifest.seconds, int | float):
        raise ValueError("created or seconds are malformed")
    check_files(manifest.files)
    return manifest


def _is_reference(value: Mapping[str, Any]) -> bool:
    return bool(_STAGE.fullmatch(value["stage"]) and _KEY.fullmatch(value["key"]) and isinstance(value["digest"], str))


def check_files(files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise when a file's name, size or hash cannot be that of an artifact's file.

    Raises
    ------
    ValueError
        Naming the file.
    """
    folders = {name[: match.start()] for name in files for match in re.finditer("/", name)}
    for name, each in files.items():
        if not _stays_inside(name):
            raise ValueError(f"file name {name!r} leaves the artifact's folder")
        if name in (MANIFEST, DAMAGED) or name in folders or _ODD.search(name):
            raise ValueError(f"no file of an artifact can have the name {name!r}")
        if not _KEY.fullmatch(each["sha256"]) or type(each["size"]) is not int or each["size"] < 0:
            raise ValueError(f"file {name!r} has no proper size and sha256")


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    clean = parts.as_posix() == name and name not in ("", ".")  # no "//", no "./", no trailing slash
    return clean and not parts.is_absolute() and ".." not in parts.parts and "\\" not in name and "\0" not in name


def understood(text: bytes, stage: str, key: str) -> Lookup:
    """Return what `text`, found where the manifest of an artifact lies, says of that artifact."""
    name = file_name(stage, key, MANIFEST)
    try:
        manifest = parse_manifest(text)
    except MANIFEST_FAULTS as cause:
        return Lookup(None, f"file {name} is not readable ({cause})", damaged=True)
    if (manifest.stage, manifest.key) != (stage, key):
        return Lookup(None, f"file {name} belongs to {manifest.ref.short}", damaged=True)
    return Lookup(manifest, "in the store")


def file_name(stage: str, key: str, name: str) -> str:
    """Return what people read of a file of an artifact, such as `statistics/0a1b2c3d4e5f/peak.zarr/c/0/0`."""
    return f"{Ref(stage, key).short}/{name}"


def identity_faults(manifest: Manifest) -> list[str]:
    """Return in what a manifest contradicts itself: its files give its digest, its key material its key."""
    faults = []
    name = file_name(manifest.stage, manifest.key, MANIFEST)
    if content_digest({n: each["sha256"] for n, each in manifest.files.items()}) != manifest.digest:
        faults.append(f"file {name} lists files that do not give its digest")
    if artifact_key(manifest.stage, manifest.version, manifest.material) != manifest.key:
        faults.append(f"file {name} holds key material that does not give its key")
    return faults


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change an artifact."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
