"""Keys and content digests: pure functions over canonical JSON and bytes, and a cache of file hashes."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RACY_SECONDS = 2.0  # a file changed this recently may change again within one timestamp tick


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no spaces, UTF-8, no NaN.

    Raises
    ------
    TypeError, ValueError
        When `value` holds something that is not plain JSON, or a NaN or infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def hash_tagged(tag: str, data: bytes) -> str:
    """Return the sha256 of `data` under a tag, so that two kinds of thing never share a hash."""
    return hashlib.sha256(tag.encode() + b"\0" + data).hexdigest()


def artifact_key(stage: str, version: int, material: Mapping[str, Any]) -> str:
    """Return the key of an artifact: sha256 over {stage, stage version, material} in canonical JSON."""
    return hash_tagged("artifact", canonical_json({"stage": stage, "version": version, "material": material}))


def content_digest(files: Mapping[str, str]) -> str:
    """Return the digest of an artifact's content from its files' sha256 by relative name."""
    return hash_tagged("content", canonical_json(dict(files)))


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class FileHashes:
    """sha256 of files, remembered by path, size, inode and change times so that a large file is read once.

    Attributes
    ----------
    folder
        Where one small JSON file per remembered path lies.
    """

    folder: Path

    def sha256(self, path: Path) -> str:
        """Return the sha256 of `path`; read the file only when it changed since the last time."""
        path = path.resolve()
        stamp = file_stamp(path)
        note = self.folder / f"{hash_tagged('path', os.fsencode(path))}.json"
        known = _read_note(note)
        if known is not None and known.get("stamp") == stamp:
            return str(known["sha256"])
        digest = file_sha256(path)
        if file_stamp(path) == stamp and _is_settled(stamp):
            _write_note(
                note, {"path": os.fsencode(path).decode(errors="backslashreplace"), "stamp": stamp, "sha256": digest}
            )
        return digest

    def combined(self, files: Iterable[Path], root: Path) -> str:
        """Return one digest of several files under `root`, by relative name and content."""
        return content_digest({f.relative_to(root).as_posix(): self.sha256(f) for f in sorted(files)})


def file_stamp(path: Path) -> list[int]:
    """Return size, inode, and times of change of a file: another stamp, another content."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_ctime_ns, status.st_mtime_ns]


def _is_settled(stamp: list[int]) -> bool:
    """Return whether any later change gives another stamp; the date of a file may lie ahead, for anyone can set it."""
    since_change, since_date = (time.time() - each / 1e9 for each in stamp[2:])
    return since_change > RACY_SECONDS and abs(since_date) > RACY_SECONDS


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None  # no note, or a torn one, is only a hash to compute again
    return value if isinstance(value, dict) and isinstance(value.get("sha256"), str) else None


def _write_note(note: Path, value: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{uuid.uuid4().hex}.partial")
        partial.write_bytes(canonical_json(value))
        partial.replace(note)
    except OSError:
        return  # a store that cannot be written still hits; the hash is computed again next time
