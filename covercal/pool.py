"""Texts to token sequences: read, drop duplicates, tokenise once, join within a domain, one seeded order."""

import gzip
import hashlib
import heapq
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from covercal.errors import InputError
from covercal.recipe import TextSource

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
CHARACTERS_PER_TOKEN = 4  # only spreads the pieces of long texts over the order; exactness is not needed
SEPARATOR = "\n\n"

Tokens = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """What the pool needs of a tokenizer (a transformers tokenizer has it)."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...


@dataclass(frozen=True, slots=True)
class Document:
    """One text as its source holds it."""

    text: str
    domain: str
    origin: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One token sequence.

    Attributes
    ----------
    tokens
        int32 (length,).
    domain
        The domain of every text in it.
    origins
        Where the texts come from, `source:row`, in order.
    """

    tokens: Tokens
    domain: str
    origins: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Return sha256 over the tokens (little-endian int32)."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


@dataclass(slots=True)
class Counts:
    """What reading and packing met."""

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    too_short: int = 0
    domains: dict[str, int] = field(default_factory=dict)


def sequences_digest(digests: Iterable[str]) -> str:
    """Return one digest of several samples, in their order, from their own digests."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


def source_files(source: TextSource) -> list[Path]:
    """Return the files of a local source.

    Raises
    ------
    InputError
        When the path does not exist or holds no text.
    """
    path = Path(str(source.path))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
        if not files:
            raise InputError(f"Folder {path} holds no text file ({', '.join(TEXT_SUFFIXES)}).")
        return files
    if not path.is_file():
        raise InputError(f"There is no file or folder {path}.")
    return [path]


def read_documents(source: TextSource) -> Iterator[Document]:
    """Yield the texts of a source in its own order.

    Raises
    ------
    InputError
        When a file cannot be read, a row is no JSON, or a field is missing; names file, row and field.
    """
    if source.hub is not None:
        name = Path(source.hub).name if Path(source.hub).is_dir() else source.hub
        yield from _from_rows(_hub_rows(source), source, name, default_domain=name.rsplit("/", 1)[-1])
        return
    path = Path(str(source.path))
    if path.is_dir():
        for file in islice(source_files(source), source.rows):
            folder = file.parent.relative_to(path).as_posix()
            yield Document(_read_text(file), path.name if folder == "." else folder, file.relative_to(path).as_posix())
        return
    source_files(source)
    name, stem = path.name, path.name.split(".")[0]
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".json")):
        yield from _from_rows(_json_rows(path), source, name, stem)
    elif name.endswith(".parquet"):
        yield from _from_rows(_parquet_rows(path, source), source, name, stem)
    elif path.suffix in TEXT_SUFFIXES:
        yield Document(_read_text(path), stem, name)
    else:
        raise InputError(
            f"{path}: a source is .jsonl, .jsonl.gz, .parquet, {', '.join(TEXT_SUFFIXES)} or a folder of texts."
        )


def _from_rows(
    rows: Iterable[Mapping[str, Any]], source: TextSource, name: str, default_domain: str
) -> Iterator[Document]:
    for index, row in enumerate(islice(rows, source.rows)):
        text = _field(row, source.text, name, index)
        domain = _field(row, source.domain, name, index) if source.domain else default_domain
        if domain is None:
            raise InputError(f"{name}, row {index}: field `{source.domain}` is empty; every text needs a domain.")
        if not isinstance(text, str):
            raise InputError(f"{name}, row {index}: field `{source.text}` holds {type(text).__name__}, not text.")
        if not _is_unicode(text):
            raise InputError(
                f"{name}, row {index}: the text holds half a character (a lone surrogate), which is no text."
            )
        yield Document(text, str(domain), f"{name}:{index}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _field(row: Mapping[str, Any], wanted: str, name: str, index: int) -> Any:
    if wanted not in row:
        raise InputError(f"{name}, row {index}: there is no field `{wanted}`; the row has: {', '.join(map(str, row))}.")
    return row[wanted]


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    index = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            for index, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}, line {index}: a row must be a JSON object.")
                    yield row
    except json.JSONDecodeError as cause:
        raise InputError(f"{path}, line {index}: not valid JSON ({cause.msg}); is the file cut short?") from cause
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        raise InputError(f"{path} is cut short or damaged after line {index} ({cause}); fetch it again.") from cause
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not UTF-8 text after line {index} ({cause.reason}).") from cause


def _parquet_rows(path: Path, source: TextSource) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        present = dict.fromkeys(file.schema_arrow.names)
        for field in filter(None, (source.text, source.domain)):
            _field(present, field, path.name, 0)
        for batch in file.iter_batches(columns=[f for f in (source.text, source.domain) if f]):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as cause:
        raise InputError(f"{path} cannot be read as Parquet ({cause}); is it cut short?") from cause


def _hub_rows(source: TextSource) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(
            str(source.hub),
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.rows is not None,
        )
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as cause:
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise InputError(f"Data set {source.hub!r} cannot be loaded: {line}") from cause


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not UTF-8 text ({cause.reason} at byte {cause.start}).") from cause


def unique_documents(sources: Sequence[TextSource], counts: Counts) -> list[Document]:
    """Return the documents of all sources without empty and repeated texts, which are counted.

    Two texts are the same when they are equal after white space at the ends is removed.
    """
    seen: set[bytes] = set()
    kept = []
    for source in sources:
        for document in read_documents(source):
            counts.documents += 1
            stripped = document.text.strip()
            mark = hashlib.sha256(stripped.encode()).digest()
            if not stripped:
                counts.empty += 1
            elif mark in seen:
                counts.duplicates += 1
            else:
                seen.add(mark)
                kept.append(document)
    return kept


# --- packing -------------------------------------------------------------------------------------------------------


def pack(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    packing: str,
    seed: int,
    counts: Counts,
) -> Iterator[Sample]:
    """Yield samples in one seeded order, for as long as the texts last.

    The order does not depend on how many samples are taken, so a smaller pool is a prefix of a larger one, and
    only the texts that are needed are tokenised. Texts are visited in random order; a long text is visited once
    per sample that it can give, spread over the order. Each visit adds tokens to its domain's open sequence;
    when that is full it becomes a sample. Sequences are never padded, and never cross domains.

    Parameters
    ----------
    documents
        The texts.
    tokenizer
        Gives token ids; each sample begins with its special first tokens (BOS), if it has any.
    lengths
        Tokens of a sample; several lengths take turns within a domain.
    packing
        `join` fills a sequence with several texts, a blank line between them; `separate` takes each sample
        from one text and drops (and counts) what is too short.
    seed
        Of the order.
    counts
        `too_short` grows with every text that gave nothing.

    Raises
    ------
    InputError
        When a length leaves no room beside the special first tokens.
    """
    generator = np.random.default_rng(seed)
    prefix = _special_prefix(tokenizer)
    if min(lengths) <= len(prefix):
        raise InputError(f"A sample of {min(lengths)} tokens has no room beside {len(prefix)} special first tokens.")
    separator = tokenizer.encode(SEPARATOR, add_special_tokens=False) if packing == "join" else []
    visits = _visits(documents, float(np.mean(lengths)), generator)
    streams: dict[int, Tokens] = {}
    untouched: set[int] = set()
    open_sequences: dict[str, _OpenSequence] = {}
    given: defaultdict[str, int] = defaultdict(int)
    while visits:
        when, index, piece = heapq.heappop(visits)
        document = documents[index]
        if index not in streams:
            streams[index] = np.asarray(tokenizer.encode(document.text, add_special_tokens=False), dtype=np.int32)
            untouched.add(index)
        elif not streams[index].size:
            continue
        sequence = open_sequences.setdefault(document.domain, _OpenSequence(prefix))
        wanted = lengths[given[document.domain] % len(lengths)]
        if packing == "separate":
            sequence.clear()
            if len(prefix) + streams[index].size < wanted:
                counts.too_short += index in untouched
                streams[index] = streams[index][:0]
                continue
        untouched.discard(index)
        streams[index] = sequence.add(streams[index], wanted, document.origin, separator)
        if len(sequence) == wanted:
            given[document.domain] += 1
            yield Sample(sequence.tokens(), document.domain, tuple(sequence.origins))
            sequence.clear()
        if streams[index].size and piece < 0:  # the last planned visit left some: queue behind everything else
            heapq.heappush(visits, (math.floor(when) + 1 + generator.random(), index, piece))


def _visits(
    documents: Sequence[Document], length: float, generator: np.random.Generator
) -> list[tuple[float, int, int]]:
    """Return a heap of (time, document, visits left); a text has about one visit for each sample it can give."""
    heap: list[tuple[float, int, int]] = []
    for index, document in enumerate(documents):
        pieces = max(1, math.ceil(len(document.text) / (CHARACTERS_PER_TOKEN * length)))
        times = np.sort(generator.random(pieces))
        heap.extend((float(time), index, pieces - 2 - place) for place, time in enumerate(times))
    heapq.heapify(heap)
    return heap


def _special_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text (BOS), if any."""
    plain, special = (tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
    start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return special[:start]


class _OpenSequence:
    """The sequence of one domain that is being filled."""

    def __init__(self, prefix: list[int]) -> None:
        self._prefix = prefix
        self.clear()

    def clear(self) -> None:
        self._tokens: list[int] = list(self._prefix)
        self.origins: list[str] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self) -> Tokens:
        return np.asarray(self._tokens, dtype=np.int32)

    def add(self, stream: Tokens, wanted: int, origin: str, separator: list[int]) -> Tokens:
        """Append what fits of `stream`, after a separator when the sequence holds another text; return the rest."""
        if self.origins:
            self._tokens.extend(separator[: wanted - len(self._tokens)])
        room = wanted - len(self._tokens)
        if room > 0:
            self._tokens.extend(stream[:room].tolist())
            self.origins.append(origin)
        return stream[max(room, 0) :]


# --- evaluation texts ----------------------------------------------------------------------------------------------


def spread_over_domains(samples: Iterable[Sample], limit: int) -> list[Sample]:
    """Return up to `limit` samples, as evenly over the domains as the texts allow, in their order."""
    by_domain: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_domain[sample.domain].append(sample)
    chosen: list[Sample] = []
    queues = [by_domain[name] for name in sorted(by_domain)]
    depth = 0
    while len(chosen) < limit and any(depth < len(queue) for queue in queues):
        chosen.extend(queue[depth] for queue in queues if depth < len(queue))
        depth += 1
    return chosen[:limit]


def windows(text: str, tokenizer: Tokenizer, window: int, limit: int | None, domain: str) -> list[Sample]:
    """Return the consecutive, non-overlapping windows of one text; what does not fill a window is left out."""
    prefix = _special_prefix(tokenizer)
    stream = np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    step = window - len(prefix)
    starts = range(0, stream.size - step + 1, step)[:limit]
    return [
        Sample(np.concatenate([np.asarray(prefix, dtype=np.int32), stream[s : s + step]]), domain, (f"{domain}:{s}",))
        for s in starts
    ]
