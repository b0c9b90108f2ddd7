"""Artifacts in an object store that a team shares: S3, Google Cloud Storage, Azure, or a shared folder.

`objects/STAGE/KK/KEY/MANIFEST.json` names a digest, and the files lie below `objects/STAGE/KK/KEY/DIGEST/`. Files are
sent first and the manifest last, by a put that fails when there is one: of two machines that send one key with
different bytes one wins, and their files never mix.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from storage.durable import fsync_path
from storage.errors import RemoteError, RemoteSettingsError
from storage.keys import canonical_json
from storage.manifest import MANIFEST, Lookup, Manifest, check_name, file_name, identity_faults, is_place, understood

if TYPE_CHECKING:
    from obstore import UpdateVersion

MARKER = "covercal-cache.json"
FORMAT = 1
CONNECT_SECONDS = 10
TIMEOUT_SECONDS = 60  # for one request, of at most one part
PART_BYTES = 8 * 1024 * 1024
RETRIES = 2
RETRY_SECONDS = 60  # to wait between the tries of one request, in all
PARALLEL_FILES = 8
DIGEST_DIGITS = 32
SCHEMES = ("s3", "gs", "az", "file")
SECRETS = (
    (re.compile(r"\?(?!xml)[^\s'\",)]*"), "?…"),  # a signed address carries its signature in the query
    (re.compile(r"//[^/@\s]+@"), "//…@"),
)
ROOT_CAUSES = (r'message: "([^"]+)"', r'error: "([^"]+)"', r"\b(TimedOut)\b", r"<Code>(\w+)</Code>")


class RemoteObjects:
    """Artifacts in an object store.

    Parameters
    ----------
    objects
        A store of `obstore`.
    place
        What people call it.
    writable
        Whether artifacts may be sent to it.
    """

    def __init__(self, objects: Any, place: str, *, writable: bool = False) -> None:
        self._objects = objects
        self._place = place
        self._checked = False
        self.writable = writable

    @property
    def place(self) -> str:
        """Return the address."""
        return self._place

    def check(self) -> None:
        """Make sure, once, that a cache is there: a missing bucket or mount would look like a cache with nothing in it.

        Raises
        ------
        RemoteSettingsError
            When there is no cache, or one of a later format.
        """
        if self._checked:
            return
        text = self._read(MARKER)
        if text is None:
            raise RemoteSettingsError(
                f"Remote {self.place} holds no covercal cache ({MARKER} is not there): the address is wrong, the "
                "folder is not mounted, or it was never set up. `covercal cache remote --create` sets one up."
            )
        try:
            found = json.loads(text)["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as cause:
            raise RemoteError(
                f"File {MARKER} of remote {self.place} is not readable ({cause}); --offline goes on without the remote."
            ) from None
        if found != FORMAT:
            raise RemoteSettingsError(f"Remote {self.place} has format {found}; this covercal reads format {FORMAT}.")
        self._checked = True

    def create(self) -> bool:
        """Set up an empty cache; returns whether there was none."""
        self._check_writable()
        with self._asking("set up a cache"):
            try:
                obstore.put(self._objects, MARKER, canonical_json({"format": FORMAT}), mode="create")
            except AlreadyExistsError:
                return False
        return True

    def look_up(self, stage: str, key: str) -> Lookup:
        """Return the manifest of an artifact; its files are checked when they are fetched."""
        self.check()
        text = self._read(f"{_folder(stage, key)}/{MANIFEST}")
        if text is None:
            self._checked = False  # is the cache still there, or did its mount go away?
            self.check()
            return Lookup(None, f"not in {self.place}")
        found = understood(text, stage, key)
        faults = identity_faults(found.manifest) if found.manifest is not None else [found.reason]
        if faults:
            return Lookup(None, f"{faults[0]} in {self.place}", damaged=True)
        return Lookup(found.manifest, f"in {self.place}")

    def commit(self, manifest: Manifest, folder: Path, *, replace: bool = False) -> Manifest:
        """Send files, then the manifest; the first that sends a key wins, unless `replace`.

        Returns the manifest that holds afterwards. What an earlier sender lost on the way is replaced in any case.
        """
        return self._commit(manifest, folder, lambda found: not replace and self.holds(found))

    def repair(self, manifest: Manifest, folder: Path) -> Manifest:
        """Send an artifact in place of a damaged one; who repaired it first wins: every file there is hashed before.

        Returns the manifest that holds afterwards.
        """
        return self._commit(manifest, folder, lambda found: not self._faults(found))

    def _commit(self, manifest: Manifest, folder: Path, stays: Callable[[Manifest], bool]) -> Manifest:
        """Send an artifact unless the one that is there `stays`; returns the manifest that holds afterwards."""
        self._check_writable()
        target = _folder(manifest.stage, manifest.key)
        there = self._version(f"{target}/{MANIFEST}")
        found = self.look_up(manifest.stage, manifest.key)
        if found.manifest is not None and stays(found.manifest):
            return found.manifest
        self._send_files(manifest, folder, f"{target}/{manifest.digest[:DIGEST_DIGITS]}")
        if self._put_manifest(f"{target}/{MANIFEST}", manifest, there):
            return manifest
        winner = self.look_up(manifest.stage, manifest.key)
        if winner.manifest is None:
            raise RemoteError(f"Remote {self.place} lost {manifest.ref.short} while it was sent: {winner.reason}.")
        return winner.manifest

    def _version(self, name: str) -> "UpdateVersion | None":
        """Return what tells an object from a later one of its name; None when it is not there."""
        with self._asking(f"read {name}"):
            try:
                meta = obstore.head(self._objects, name)
            except FileNotFoundError:
                return None
        version: UpdateVersion = {}
        if meta["e_tag"] is not None:
            version["e_tag"] = meta["e_tag"]
        if meta["version"] is not None:
            version["version"] = meta["version"]
        return version

    def _put_manifest(self, name: str, manifest: Manifest, there: "UpdateVersion | None") -> bool:
        """Put a manifest where there is none, or in place of the one of that version; returns whether it holds now."""
        with self._asking(f"send {manifest.ref.short}"):
            try:
                obstore.put(self._objects, name, manifest.to_bytes(), mode=there or "create")
            except (AlreadyExistsError, PreconditionError):
                return False
            except (NotImplementedError, NotSupportedError):  # a folder knows no put in place of one version
                if self._version(name) != there:
                    return False
                obstore.put(self._objects, name, manifest.to_bytes(), mode="overwrite")
                return self._read(name) == manifest.to_bytes()
        return True

    def _send_files(self, manifest: Manifest, folder: Path, target: str) -> None:
        def send(name: str) -> None:
            with self._asking(f"send file {file_name(manifest.stage, manifest.key, name)}"):
                obstore.put(self._objects, f"{target}/{name}", folder / name, chunk_size=PART_BYTES)

        with ThreadPoolExecutor(PARALLEL_FILES) as threads:
            list(threads.map(send, manifest.files))

    def holds(self, manifest: Manifest) -> bool:
        """Return whether all files of an artifact are there at their sizes."""
        return not self._missing(manifest)

    def _missing(self, manifest: Manifest) -> list[str]:
        """Return one line per file that is not there at its size."""
        sizes = self._sizes(f"{_folder(manifest.stage, manifest.key)}/{manifest.digest[:DIGEST_DIGITS]}/")
        return [
            f"file {file_name(manifest.stage, manifest.key, name)} is missing in {self.place}, or has another size"
            for name, each in manifest.files.items()
            if sizes.get(name) != each["size"]
        ]

    def fetch(self, manifest: Manifest, folder: Path) -> list[str]:
        """Copy an artifact's files, flushed to the disk; return one line per file that is not as the manifest says."""
        source = f"{_folder(manifest.stage, manifest.key)}/{manifest.digest[:DIGEST_DIGITS]}"

        def fetch_file(name: str) -> str:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            full = file_name(manifest.stage, manifest.key, name)
            with path.open("wb") as stream:
                digest = self._copy(f"{source}/{name}", stream, int(manifest.files[name]["size"]))
            if digest is None:
                return f"file {full} is missing in {self.place}"
            fsync_path(path)
            same = digest == manifest.files[name]["sha256"]
            return "" if same else f"file {full} does not match its sha256 in {self.place}"

        with ThreadPoolExecutor(PARALLEL_FILES) as threads:
            return [fault for fault in threads.map(fetch_file, manifest.files) if fault]

    def _copy(self, name: str, stream: Any, size: int) -> str | None:
        """Copy one object part by part and return its sha256, empty for another size; None when it is not there."""
        digest = hashlib.sha256()
        with self._asking(f"read {name}"):
            try:
                if obstore.head(self._objects, name)["size"] != size:
                    return ""
            except FileNotFoundError:
                return None
        for start in range(0, size, PART_BYTES):
            with self._asking(f"read {name}"):
                part = obstore.get_range(self._objects, name, start=start, length=min(PART_BYTES, size - start))
            digest.update(part)
            stream.write(part)
        return digest.hexdigest()

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all readable artifacts (of one stage), in the order of their keys."""
        for each, key in self.folders():
            if stage in (None, each):
                found = self.look_up(each, key)
                if found.manifest is not None:
                    yield found.manifest

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield (stage, key) of everything that has a manifest, readable or not."""
        self.check()
        found = set()
        for name in self._sizes("objects/"):
            parts = name.split("/")
            if len(parts) == 4 and parts[3] == MANIFEST and is_place(parts[0], parts[1], parts[2]):
                found.add((parts[0], parts[2]))
        yield from sorted(found)

    def verify(self, stage: str, key: str) -> list[str]:
        """Return what is wrong with an artifact after re-hashing every file; empty when all is well."""
        found = self.look_up(stage, key)
        return [found.reason] if found.manifest is None else self._faults(found.manifest)

    def _faults(self, manifest: Manifest) -> list[str]:
        faults = self._missing(manifest)
        source = f"{_folder(manifest.stage, manifest.key)}/{manifest.digest[:DIGEST_DIGITS]}"
        with Path(os.devnull).open("wb") as nowhere:
            for name, each in manifest.files.items():
                digest = self._copy(f"{source}/{name}", nowhere, int(each["size"]))
                if digest and digest != each["sha256"]:
                    full = file_name(manifest.stage, manifest.key, name)
                    faults.append(f"file {full} does not match its sha256 in {self.place}")
        return faults

    def send_record(self, name: str, text: bytes) -> None:
        """Send a run record."""
        self._check_writable()
        self.check()
        with self._asking(f"send run {name}"):
            obstore.put(self._objects, f"runs/{name}.json", text)

    def records(self) -> dict[str, bytes]:
        """Return the run records that were sent here, by name, the oldest first."""
        self.check()
        names = sorted(name.removesuffix(".json") for name in self._sizes("runs/") if name.endswith(".json"))
        return {name: text for name in names if (text := self._read(f"runs/{name}.json")) is not None}

    def _sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of all objects below `prefix` by name relative to it."""
        with self._asking(f"list {prefix}"):
            listed = [each for chunk in obstore.list(self._objects, prefix.rstrip("/")) for each in chunk]
        return {each["path"].removeprefix(prefix): int(each["size"]) for each in listed}

    def _read(self, name: str) -> bytes | None:
        """Return an object's bytes; None when it is not there."""
        with self._asking(f"read {name}"):
            try:
                return bytes(obstore.get(self._objects, name).bytes())
            except FileNotFoundError:
                return None

    def _check_writable(self) -> None:
        if not self.writable:
            raise RemoteSettingsError(
                f"Remote {self.place} is read-only here; COVERCAL_REMOTE_WRITE=1 lets this user send to it."
            )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn every fault but a missing object, which the caller knows, into a `RemoteError` that names its cause."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as cause:
            raise RemoteError(
                f"Remote {self.place} refuses to {what}: {_why(cause)}. Check the credentials (reading needs "
                "the right to list, too). Nothing was recomputed; --offline goes on without the remote."
            ) from None  # a cause may carry a signed address
        except (BaseError, FileNotFoundError, OSError, ValueError) as cause:
            raise RemoteError(
                f"Remote {self.place} failed to {what}: {_why(cause)}. Nothing was recomputed; what is finished "
                "is kept in the local cache, and --offline goes on without the remote."
            ) from None


def _folder(stage: str, key: str) -> str:
    check_name(stage, key)
    return f"objects/{stage}/{key[:2]}/{key}"


def _why(cause: BaseException) -> str:
    """Return the telling parts of an error of obstore, without secrets: its first line, and what lies at its root."""
    text = str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    parts = [lines[0] if lines else type(cause).__name__]
    for cause_of in ROOT_CAUSES:
        parts += [each for each in re.findall(cause_of, text) if each not in parts[0]]
    shown = "; ".join(dict.fromkeys(parts))
    for pattern, replacement in SECRETS:
        shown = pattern.sub(replacement, shown)
    return shown.removesuffix(".")


def open_remote(address: str, *, writable: bool = False, timeout: float = TIMEOUT_SECONDS) -> RemoteObjects:
    """Open the remote cache at an address; nothing is asked of it yet.

    Parameters
    ----------
    address
        `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///folder`, or the path of a shared
        folder. Credentials, accounts and endpoints come from the environment in the way of each service (for S3
        `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …; for Azure `AZURE_STORAGE_ACCOUNT_NAME`, …), never from the address.
    writable
        Whether artifacts may be sent to it.
    timeout
        Seconds after which one request (of at most 8 MiB) has failed.

    Raises
    ------
    RemoteSettingsError
        When the address is none, or carries a secret.
    """
    try:
        parts = urlsplit(address)
        credentials = parts.username or parts.password
    except ValueError as cause:
        raise RemoteSettingsError(f"COVERCAL_REMOTE is no address ({cause}).") from None
    known = ", ".join(f"{each}://" for each in SCHEMES)
    if parts.scheme and (credentials or parts.query or parts.fragment):
        raise RemoteSettingsError(
            f"COVERCAL_REMOTE must hold no credentials, no ? and no #; {parts.scheme}:// reads its credentials from "
            "the environment."
        )
    if parts.scheme in ("", "file"):
        return _open_folder(unquote(parts.path) if parts.scheme else address, parts.netloc, writable=writable)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise RemoteSettingsError(f"COVERCAL_REMOTE is no address of a cache: it begins with {known} or is a folder.")
    try:
        objects = from_url(
            address,
            client_options=_client_options(os.environ, timeout),
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=(RETRIES + 1) * timeout + RETRY_SECONDS),
            },
        )
    except (BaseError, ValueError) as cause:
        raise RemoteSettingsError(f"Remote {address} cannot be opened: {_why(cause)}.") from None
    return RemoteObjects(objects, address.rstrip("/"), writable=writable)


def _open_folder(path: str, host: str, *, writable: bool) -> RemoteObjects:
    if host or not path:
        raise RemoteSettingsError("COVERCAL_REMOTE is no folder: write file:///folder, or the folder's path.")
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise RemoteSettingsError(f"Remote folder {folder} is not there; is it mounted?")
    return RemoteObjects(LocalStore(folder), str(folder), writable=writable)


def _client_options(environment: Mapping[str, str], timeout: float) -> Any:
    """Return the options of the HTTP client; plain HTTP only when an endpoint was named that speaks it."""
    endpoints = [environment.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")]
    return {
        "allow_http": any(each.startswith("http://") for each in endpoints),
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, timeout)),
        "timeout": timedelta(seconds=timeout),
    }
