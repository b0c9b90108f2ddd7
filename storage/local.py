"""Artifacts in a local folder: `objects/STAGE/KK/KEY/`, committed by rename."""

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.durable import file_names, flush_folders, fsync_path, move_into_place, subfolders, write_durably
from storage.errors import StorageError
from storage.keys import file_sha256, file_stamp
from storage.manifest import (
    DAMAGED,
    MANIFEST,
    Lookup,
    Manifest,
    check_name,
    file_name,
    identity_faults,
    is_place,
    is_stage,
    understood,
)

REMEMBERED = 4096  # manifests that a process keeps parsed, so that a plan of many shards parses each once


class LocalObjects:
    """Artifacts below `root/objects`.

    Parameters
    ----------
    root
        The cache folder; `root/staging` takes what is replaced until it is deleted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"

    @property
    def place(self) -> str:
        """Return the folder."""
        return str(self.root)

    def folder(self, stage: str, key: str) -> Path:
        """Return where an artifact lies or would lie."""
        check_name(stage, key)
        return self.objects / stage / key[:2] / key

    def look_up(self, stage: str, key: str) -> Lookup:
        """Return the manifest of a whole artifact: every file there, at its size, and not marked as damaged."""
        folder = self.folder(stage, key)
        with _reading(folder):
            found = self._look(folder, stage, key)
            mark = _mark(folder) if found.manifest is not None else ""
        return Lookup(None, mark, damaged=True) if mark else found

    def _look(self, folder: Path, stage: str, key: str) -> Lookup:
        try:
            text = (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if os.path.lexists(self.objects) and not self.objects.is_dir():
                raise NotADirectoryError(f"{self.objects} is no folder; is its disk mounted?") from None
            if not folder.is_dir():
                return Lookup(None, "not in the store")
            try:
                text = (folder / MANIFEST).read_bytes()  # it may have come into place just now
            except FileNotFoundError:
                return Lookup(None, f"file {file_name(stage, key, MANIFEST)} is missing", damaged=True)
        found = understood(text, stage, key)
        if found.manifest is None:
            return found
        for name, each in found.manifest.files.items():
            full = file_name(stage, key, name)
            try:
                size = (folder / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return Lookup(None, f"file {full} is missing", damaged=True)
            if size != each["size"]:
                return Lookup(None, f"file {full} has {size} bytes, not {each['size']}", damaged=True)
        return found

    def commit(self, manifest: Manifest, folder: Path, *, replace: bool = False) -> Manifest:
        """Write the manifest beside the files of `folder`, which are flushed already, and rename it into place.

        The caller holds the build lock of the key. What stands there and is not whole is replaced in any case.
        """
        if not replace:
            found = self.look_up(manifest.stage, manifest.key)
            if found.manifest is not None:
                return found.manifest
        flush_folders(folder)
        write_durably(folder / MANIFEST, manifest.to_bytes())
        fsync_path(folder)
        try:
            move_into_place(folder, self.folder(manifest.stage, manifest.key), self.root / "staging")
        except (NotADirectoryError, FileExistsError, PermissionError) as cause:
            raise StorageError(f"Cannot put {manifest.ref.short} into {self.objects}: {cause.strerror}.") from cause
        return manifest

    def fetch(self, manifest: Manifest, folder: Path) -> list[str]:
        """Copy the files; return one line per file that is not as the manifest says."""
        source = self.folder(manifest.stage, manifest.key)
        faults = []
        for name, each in manifest.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            full = file_name(manifest.stage, manifest.key, name)
            try:
                shutil.copyfile(source / name, target)
            except (FileNotFoundError, NotADirectoryError):
                faults.append(f"file {full} is missing")
                continue
            except OSError as cause:
                raise StorageError(f"Cannot copy {source / name}: {cause.strerror or cause}.") from cause
            if file_sha256(target) != each["sha256"]:
                faults.append(f"file {full} does not match its sha256")
            fsync_path(target)
        return faults

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all readable artifacts (of one stage), in the order of their keys."""
        for each, key in self._folders(stage):
            manifest = self._readable(each, key)
            if manifest is not None:
                yield manifest

    def _readable(self, stage: str, key: str) -> Manifest | None:
        """Return a manifest without looking for the files; `verify` and look-ups name those that cannot be read."""
        path = self.folder(stage, key) / MANIFEST
        try:
            return _manifest_at(path, stage, key, tuple(file_stamp(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as cause:
            raise StorageError(f"Cannot read {path}: {cause.strerror or cause}.") from cause

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield (stage, key) of every artifact folder, readable or not."""
        return self._folders(None)

    def _folders(self, wanted: str | None) -> Iterator[tuple[str, str]]:
        for path in self.contents(wanted):
            stage, prefix, key = path.parts[-3:]
            if is_place(stage, prefix, key):
                yield stage, key

    def contents(self, wanted: str | None = None) -> Iterator[Path]:
        """Yield every folder that lies where artifacts (of one stage) do, in the order of their keys."""
        for stage in subfolders(self.objects):
            if is_stage(stage.name) and wanted in (None, stage.name):
                for prefix in subfolders(stage):
                    yield from subfolders(prefix)

    def verify(self, stage: str, key: str) -> list[str]:
        """Return the damage and the strangers of an artifact, every file re-hashed; empty when all is well."""
        return self.damage(stage, key) + self.strangers(stage, key)

    def damage(self, stage: str, key: str) -> list[str]:
        """Return what of an artifact is not as it was made, every file re-hashed.

        What is found is marked (or the mark of an earlier time is taken away), so that the next run rebuilds it.
        """
        folder = self.folder(stage, key)
        with _reading(folder):
            found = self._look(folder, stage, key)
            manifest = found.manifest or self._readable(stage, key)
            faults = [found.reason] if manifest is None else _content_faults(folder, manifest)
            replaced = self._look(folder, stage, key) != found
        if replaced:
            return self.damage(stage, key)
        if manifest is not None:
            _set_mark(folder, faults)
        return faults

    def strangers(self, stage: str, key: str) -> list[str]:
        """Return one line per file in an artifact's folder that is none of the artifact's; it does no harm there."""
        folder = self.folder(stage, key)
        manifest = self._readable(stage, key)
        with _reading(folder):
            return [] if manifest is None else _strangers(folder, manifest)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise StorageError(f"Cannot read {cause.filename or folder}: {cause.strerror or cause}.") from cause


@functools.lru_cache(REMEMBERED)
def _manifest_at(path: Path, stage: str, key: str, stamp: tuple[int, ...]) -> Manifest | None:
    """Return the manifest in a file as it is at this stamp; None when it cannot be understood."""
    return understood(path.read_bytes(), stage, key).manifest


def _content_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name, each in manifest.files.items():
        full = file_name(manifest.stage, manifest.key, name)
        try:
            size = (folder / name).stat().st_size
            if size != each["size"]:
                faults.append(f"file {full} has {size} bytes, not {each['size']}")
            elif file_sha256(folder / name) != each["sha256"]:
                faults.append(f"file {full} does not match its sha256")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            faults.append(f"file {full} is missing")
    return faults + identity_faults(manifest)


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    try:
        names = file_names(folder)
    except FileNotFoundError:
        return []  # the artifact is just being deleted
    except ValueError as cause:
        return [f"in {manifest.ref.short}, {cause}"]
    strangers = set(names) - set(manifest.files) - {MANIFEST, DAMAGED}
    return [f"file {file_name(manifest.stage, manifest.key, n)} is not in the manifest" for n in sorted(strangers)]


def _mark(folder: Path) -> str:
    try:
        return (folder / DAMAGED).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _set_mark(folder: Path, faults: list[str]) -> None:
    mark = folder / DAMAGED
    try:
        if faults:
            write_durably(mark, ("; ".join(faults) + " (found by verify)").encode())
        else:
            mark.unlink(missing_ok=True)
    except OSError:
        return  # a folder that this user cannot write stays as it is; who verified it reads the faults
