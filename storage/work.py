"""Finished parts of a long build, kept so that a build that was cut short goes on where it stopped."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.durable import file_names
from storage.keys import canonical_json, file_sha256

CONDITIONS = "CONDITIONS.json"
PART = "PART.json"


class WorkFolder:
    """Parts of one build by name, each whole or not there.

    A part is written beside its place, hashed, and renamed; who reads it checks the hashes. Nothing is flushed to the
    disk: a killed process loses nothing by that, and what a power cut damages is found and done again.

    Parameters
    ----------
    folder
        Where they lie; only the holder of the key's build lock may use it.
    conditions
        What has to be the same for the parts to be gone on from: versions of libraries, the device. Under others the
        same code may round differently, so that parts made under others are thrown away.
    check
        Raises when the files that parts are made from are no longer what the key says; the part is not kept then.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._check = check
        self._conditions = canonical_json(conditions)
        note = folder / CONDITIONS
        if folder.exists() and (not note.is_file() or note.read_bytes() != self._conditions):
            shutil.rmtree(folder)

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Yield an empty folder; what is in it at the end is the part, unless an error ends it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / CONDITIONS).exists():
            partial = self._folder / f"{CONDITIONS}.{uuid.uuid4().hex}"
            partial.write_bytes(self._conditions)
            partial.replace(self._folder / CONDITIONS)
        staged = self._folder / f".partial-{uuid.uuid4().hex}"
        staged.mkdir()
        try:
            yield staged
            self._check()
            hashes = {each: file_sha256(staged / each) for each in file_names(staged)}
            (staged / PART).write_bytes(canonical_json(hashes))
            shutil.rmtree(self._folder / name, ignore_errors=True)
            staged.rename(self._folder / name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def whole(self, name: str, files: Sequence[str]) -> Path | None:
        """Return the folder of a part whose `files` are there and unchanged; None for any other."""
        folder = self._folder / name
        try:
            hashes = json.loads((folder / PART).read_bytes())
            return folder if all(file_sha256(folder / each) == hashes[each] for each in files) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a part that cannot be read is not there, and is done again
