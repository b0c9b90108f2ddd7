"""What every place for artifacts can do, whether a folder or an object store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from storage.manifest import Lookup, Manifest


class Backend(Protocol):
    """A place where artifacts lie.

    Every method raises `StorageError` when the place cannot be read or written; that is never told as a miss.
    """

    @property
    def place(self) -> str:
        """What people call it."""
        ...

    def look_up(self, stage: str, key: str) -> Lookup:
        """Return the manifest of an artifact, or the reason why there is none."""
        ...

    def commit(self, manifest: Manifest, folder: Path, *, replace: bool = False) -> Manifest:
        """Make the files of `folder` the artifact of `manifest`: all of it, or nothing.

        Without `replace`, an artifact that is there already wins. Returns the manifest that holds afterwards.
        """
        ...

    def fetch(self, manifest: Manifest, folder: Path) -> list[str]:
        """Copy an artifact's files into an empty folder; return one line per file that is not as the manifest says."""
        ...

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all readable artifacts (of one stage), in the order of their keys."""
        ...

    def folders(self) -> Iterator[tuple[str, str]]:
        """Yield (stage, key) of everything that lies where an artifact would, readable or not."""
        ...

    def verify(self, stage: str, key: str) -> list[str]:
        """Return what is wrong with an artifact after re-hashing every file; empty when all is well."""
        ...
