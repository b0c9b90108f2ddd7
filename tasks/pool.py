"""Stages `pool` and `texts`: token sequences to choose from, and to be judged on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from covercal.errors import InputError, TooFewSamplesError
from covercal.pool import (
    Counts,
    Sample,
    pack,
    read_documents,
    special_prefix,
    spread_over_domains,
    unique_documents,
    windows,
)
from covercal.recipe import DivergenceText, PerplexityText
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table, write_table
from tasks.cached import Build, cached
from tasks.identities import TextIdentity, TokenizerIdentity
from tasks.model import load_tokenizer

SAMPLES = "samples.parquet"


@dataclass(frozen=True, slots=True)
class DivergenceSettings:
    """How held-out sequences are cut."""

    window: int
    limit: int
    order: str = "spread over domains"


@dataclass(frozen=True, slots=True)
class PerplexitySettings:
    """How the windows of one text are cut; `limit` None means all."""

    window: int
    limit: int | None
    order: str = "as written"


@cached(
    "pool",
    version=3,
    ignored=("imported",),
    names={
        "sources": "pool.sources",
        "lengths": "pool.sequence_length",
        "packing": "pool.packing",
        "samples": "pool.samples",
        "seed": "pool.seed",
    },
)
def make_pool(
    build: Build,
    *,
    sources: tuple[TextIdentity, ...],
    tokenizer: TokenizerIdentity,
    imported: Ref | None,
    lengths: tuple[int, ...],
    packing: str,
    samples: int | None,
    seed: int,
) -> dict[str, Any]:
    """Read, tokenise and pack the candidate samples; all that the texts give when `samples` is None."""
    counts = Counts()
    documents = unique_documents([each.source for each in sources], counts)
    if not documents:
        names = ", ".join(each.source.name for each in sources)
        raise TooFewSamplesError(f"The pool is empty: pool.sources ({names}) hold no text.", "no text in it")
    encoder = load_tokenizer(build.store, tokenizer.model, imported)
    advance = build.progress(samples or 0, "samples")
    packed = []
    for sample in islice(pack(documents, encoder, lengths, packing=packing, seed=seed, counts=counts), samples):
        packed.append(sample)
        counts.domains[sample.domain] = counts.domains.get(sample.domain, 0) + 1
        advance(1)
    if len(packed) < (samples or 1):
        raise _too_few(len(packed), samples or 1, lengths, packing, counts)
    write_samples(build, packed, encoder)
    return asdict(counts)


@cached("texts", version=4, ignored=("imported",), names={"source": "evaluation.text", "settings": "evaluation"})
def make_texts(
    build: Build,
    *,
    source: TextIdentity,
    tokenizer: TokenizerIdentity,
    imported: Ref | None,
    settings: DivergenceSettings | PerplexitySettings,
) -> dict[str, Any]:
    """Tokenise an evaluation text: windows in their order, or sequences spread over the domains.

    Of the latter, the counts are of all texts for what was read, and up to the last sequence that was needed for what
    was packed.
    """
    counts = Counts()
    encoder = load_tokenizer(build.store, tokenizer.model, imported)
    if isinstance(settings, PerplexitySettings):  # the whole text as it is: repeated and empty rows belong to it
        text = "\n\n".join(document.text for document in read_documents(source.source))
        chosen = windows(text, encoder, settings.window, settings.limit, source.source.name.rsplit("/", 1)[-1])
    else:
        documents = unique_documents([source.source], counts)
        every = pack(documents, encoder, (settings.window,), packing="join", seed=0, counts=counts)
        chosen = spread_over_domains(every, settings.limit, {each.domain for each in documents})
    if not chosen:
        raise InputError(
            f"Evaluation text {source.source.name} is shorter than one window of {settings.window} tokens; "
            "give a longer text or a smaller `window`."
        )
    for sample in chosen:
        counts.domains[sample.domain] = counts.domains.get(sample.domain, 0) + 1
    write_samples(build, chosen, encoder)
    return asdict(counts)


def text_settings(text: DivergenceText | PerplexityText) -> DivergenceSettings | PerplexitySettings:
    """Return the part of a recipe's evaluation text that decides its sequences."""
    if isinstance(text, PerplexityText):
        return PerplexitySettings(text.window, text.limit)
    return DivergenceSettings(text.window, text.limit)


def write_samples(build: Build, samples: Sequence[Sample], tokenizer: Any) -> None:
    """Write samples as Parquet: sample, domain, origins, length, digest, tokens, text (without the first tokens)."""
    tokens = [sample.tokens for sample in samples]
    first = len(special_prefix(tokenizer))
    columns = {
        "sample": pa.array(range(len(samples)), pa.int32()),
        "domain": pa.array([s.domain for s in samples]),
        "origins": pa.array([list(s.origins) for s in samples], pa.list_(pa.string())),
        "length": pa.array([len(t) for t in tokens], pa.int32()),
        "digest": pa.array([s.digest for s in samples]),
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "text": pa.array([tokenizer.decode(t[first:].tolist()) for t in tokens]),
    }
    write_table(build.folder / SAMPLES, columns)


def sample_columns(store: ArtifactStore, ref: Ref, *names: str) -> dict[str, list[Any]]:
    """Return columns of a pool (or of evaluation texts) as lists."""
    table = read_table(store.path(ref) / SAMPLES, names)
    return {name: table[name].to_pylist() for name in names}


def sample_tokens(store: ArtifactStore, ref: Ref) -> list[npt.NDArray[np.int32]]:
    """Return the token ids of every sample, int32 (length,) each."""
    column = read_table(store.path(ref) / SAMPLES, ["tokens"])["tokens"].combine_chunks()
    values = column.values.to_numpy()
    offsets = column.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(offsets)]


def _too_few(found: int, wanted: int, lengths: tuple[int, ...], packing: str, counts: Counts) -> TooFewSamplesError:
    size = f"{lengths[0]} tokens" if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)} tokens"
    short = (
        f"; {counts.too_short} texts were too short (pool.packing: join would use them)"
        if packing == "separate"
        else ""
    )
    same = f", {counts.repeated} samples equal to another dropped" if counts.repeated else ""
    gone = f"{counts.duplicates} duplicates and {counts.empty} empty ones dropped"
    read = f"{counts.documents} texts read, {gone}{same}{short}"
    return TooFewSamplesError(
        f"The texts give {found} samples of {size}, and pool.samples asks for {wanted}: {read}. "
        "Lower pool.samples or pool.sequence_length, or add texts.",
        read,
    )
