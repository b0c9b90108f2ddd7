"""Who is who: models, tokenizers and texts by content, found without loading them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covercal.errors import InputError
from covercal.model_files import locate_model
from covercal.pool import source_files
from covercal.recipe import DivergenceText, Model, PerplexityText, TextSource
from storage.artifacts import ArtifactStore
from storage.keys import FileHashes, content_digest, hash_tagged
from storage.manifest import Ref


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model by the content of its weights.

    Attributes
    ----------
    name
        What people call it.
    weights, tokenizer
        sha256 over the files that decide its outputs, and its tokens.
    folder, gguf
        Where it lies; `gguf` is empty for a safetensors folder.
    dtype
        Dtype of the weights as they are stored.
    trust_remote_code
        Whether Python code that comes with it may run.
    """

    name: str
    weights: str
    tokenizer: str
    folder: str
    gguf: str
    dtype: str
    trust_remote_code: bool

    def key_material(self) -> dict[str, str]:
        """Return the weights' fingerprint."""
        return {"weights": self.weights}

    def check_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        """Raise when the files are no longer those that were fingerprinted; an `unpacked` GGUF file is not read again.

        Raises
        ------
        InputError
            Naming the model.
        """
        if not (self.gguf and unpacked) and self._now(store).weights != self.weights:
            raise _changed(f"Model {self.name} in {self.folder}")

    def check_tokenizer_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        """As `check_unchanged`, of the tokenizer's files."""
        if not (self.gguf and unpacked) and self._now(store).tokenizer != self.tokenizer:
            raise _changed(f"The tokenizer of model {self.name} in {self.folder}")

    def _now(self, store: ArtifactStore) -> "ModelIdentity":
        source = str(Path(self.folder) / self.gguf)
        return identify_model(Model(source=source, trust_remote_code=self.trust_remote_code), store)


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """The tokenizer of a model, by the content of its files."""

    model: ModelIdentity

    def key_material(self) -> dict[str, str]:
        """Return the tokenizer's fingerprint."""
        return {"files": self.model.tokenizer}

    def check_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        """Raise when the files are no longer those that were fingerprinted, as those of the model."""
        self.model.check_tokenizer_unchanged(store, unpacked=unpacked)


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """A source of texts by its content."""

    source: TextSource
    content: str

    def key_material(self) -> dict[str, Any]:
        """Return the content's fingerprint and how rows are read; of a path only the name, which names domains."""
        fields = self.source.model_dump(include={"hub", "config", "split", "text", "domain", "rows"}, exclude_none=True)
        if self.source.path is not None:
            fields = {**fields, "name": Path(self.source.path).name}
            fields.pop("split", None)
        elif Path(str(self.source.hub)).is_dir():
            fields["hub"] = Path(str(self.source.hub)).name
        return {"content": self.content, **fields}

    def check_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        """Raise when the texts are no longer those that were fingerprinted; a commit of the hub never changes.

        Raises
        ------
        InputError
            Naming the source.
        """
        if not _is_on_hub(self.source) and identify_text(self.source, store).content != self.content:
            raise _changed(f"Text source {self.source.path or self.source.hub}")


def _changed(what: str) -> InputError:
    return InputError(f"{what} was changed while it was read; nothing of it was kept, run again.")


def _is_on_hub(source: TextSource) -> bool:
    return source.hub is not None and not Path(source.hub).is_dir()


def file_hashes(store: ArtifactStore) -> FileHashes:
    """Return the store's memory of file hashes."""
    return FileHashes(store.root / "hashes")


def identify_model(model: Model, store: ArtifactStore) -> ModelIdentity:
    """Find a model and fingerprint its files.

    Raises
    ------
    InputError
        When it is not there, or nothing that covercal can quantise.
    """
    files = locate_model(model)
    hashes = file_hashes(store)
    config = files.config()
    return ModelIdentity(
        name=files.name,
        weights=hashes.combined(files.weights, files.folder),
        tokenizer=hashes.combined(files.tokenizer, files.folder),
        folder=str(files.folder),
        gguf=files.gguf,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        trust_remote_code=model.trust_remote_code,
    )


def identify_text(source: TextSource, store: ArtifactStore) -> TextIdentity:
    """Fingerprint a source of texts: the content of local files, the commit of a hub data set, which is then read.

    Raises
    ------
    InputError
        When it is not there.
    """
    if _is_on_hub(source):
        commit = dataset_commit(source)
        return TextIdentity(source.model_copy(update={"revision": commit}), hash_tagged("hub", commit.encode()))
    root = Path(str(source.path or source.hub))
    files = sorted(p for p in root.rglob("*") if p.is_file()) if source.hub else source_files(source)
    hashes = file_hashes(store)
    base = root if root.is_dir() else root.parent
    return TextIdentity(source, content_digest({f.relative_to(base).as_posix(): hashes.sha256(f) for f in files}))


def identify_evaluation_text(text: DivergenceText | PerplexityText, store: ArtifactStore) -> TextIdentity:
    """Fingerprint an evaluation text."""
    if isinstance(text, PerplexityText):
        source = TextSource.model_validate({"path": text.path})
    else:
        source = TextSource.model_validate(text.model_dump(include=set(TextSource.model_fields)))
    return identify_text(source, store)


def model_folder(store: ArtifactStore, model: ModelIdentity, imported: Ref | None) -> Path:
    """Return the safetensors folder of a model: its own, or the one that a GGUF file was unpacked to."""
    return store.path(imported) if imported is not None else Path(model.folder)


def dataset_commit(source: TextSource) -> str:
    """Return the commit of a data set on the hub.

    Raises
    ------
    InputError
        When the hub does not tell it.
    """
    if source.revision and re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return str(HfApi().dataset_info(str(source.hub), revision=source.revision).sha)
    except (HfHubHTTPError, HFValidationError, OSError) as cause:
        raise InputError(
            f"Data set {source.hub!r} is no folder here and the hub did not tell its commit "
            f"({str(cause).splitlines()[0]}); offline, give `revision` as a full commit of a data set that is cached."
        ) from cause
