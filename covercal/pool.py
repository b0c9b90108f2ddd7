"""Texts to token sequences: read, drop duplicates, tokenise once, join within a domain, one seeded order."""

import gzip
import hashlib
import heapq
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from covercal.errors import InputError
from covercal.recipe import TextSource

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".json.gz", ".ndjson.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", *TEXT_SUFFIXES)
BYTES_PER_TOKEN = 4  # only guesses when a text is visited first
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
    """What reading and packing met.

    Attributes
    ----------
    documents
        Texts read.
    duplicates, empty
        Texts dropped as equal to an earlier one, or without a token.
    too_short
        Texts that fill no sample by themselves, where each has to.
    repeated
        Samples dropped as equal to an earlier one, token by token.
    left_over
        By domain, texts that are in no sample: all that was left did not fill one.
    domains
        Samples by domain.
    """

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    too_short: int = 0
    repeated: int = 0
    left_over: dict[str, int] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> str:
        """Return what was dropped in words, empty when nothing was."""
        left = _several(sum(self.left_over.values()), "text that fills no sample", "texts that fill no sample")
        words = [
            _several(self.duplicates, "duplicate"),
            _several(self.repeated, "sample equal to another", "samples equal to another"),
            _several(self.too_short, "text too short for a sample", "texts too short for a sample"),
            f"{left} ({', '.join(self.left_over)})" if left else "",
        ]
        return ", ".join(filter(None, words))


def _several(count: int, one: str, many: str = "") -> str:
    """Return `3 texts`, `1 text`, or nothing for none."""
    return f"{count} {one if count == 1 else many or one + 's'}" if count else ""


def sequences_digest(digests: Iterable[str]) -> str:
    """Return one digest of several samples, in their order, from their own digests."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


def source_files(source: TextSource) -> list[Path]:
    """Return the files of a local source.

    Raises
    ------
    InputError
        When the path does not exist, holds no text, or is or holds a file whose name is no text.
    """
    path = Path(str(source.path))
    if not _is_unicode(path.name):
        raise InputError(f"The name of text source {path.name!a} is not UTF-8; rename it.")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
        if not files:
            raise InputError(f"Folder {path} holds no text file ({', '.join(TEXT_SUFFIXES)}).")
        for file in files:
            if not _is_unicode(str(file.relative_to(path))):
                raise InputError(f"Folder {path} holds a file whose name is not UTF-8, {file.name!a}; rename it.")
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
    name, suffix = path.name, next(filter(path.name.endswith, SUFFIXES), None)
    if suffix is None:
        raise InputError(f"{path}: a source is {', '.join(SUFFIXES)} or a folder of texts.")
    stem = name.removesuffix(suffix)
    if suffix in TEXT_SUFFIXES:
        yield Document(_read_text(path), stem, name)
    else:
        rows = _json_rows(path) if suffix in JSON_SUFFIXES else _parquet_rows(path, source)
        yield from _from_rows(rows, source, name, stem)


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
        for wanted, value in ((source.text, text), (source.domain, str(domain))):
            if not _is_unicode(value):
                raise InputError(
                    f"{name}, row {index}: field `{wanted}` holds half a character (a lone surrogate), no text."
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
                        raise InputError(f"{path}, line {index}: a row must be a JSON object, one a line (JSON lines).")
                    yield row
    except json.JSONDecodeError as cause:
        raise InputError(
            f"{path}, line {index}: not valid JSON ({cause.msg}); each line must be a JSON object of its own "
            "(JSON lines). Is the file cut short?"
        ) from cause
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        raise InputError(f"{path} is cut short or damaged after line {index} ({cause}); fetch it again.") from cause
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not UTF-8 text after line {index} ({cause.reason}).") from cause
    except (ValueError, RecursionError) as cause:
        raise InputError(
            f"{path}, line {index}: a number is too long or brackets lie too deep to be read; leave that field out."
        ) from cause


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
        return path.read_text(encoding="utf-8-sig")
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
    when that is full it becomes a sample. Sequences are never padded, and never cross domains. One whose tokens
    another sample has already, as texts that begin with the same page give them, is dropped and counted.

    Parameters
    ----------
    documents
        The texts.
    tokenizer
        Gives token ids; each sample begins with its special first tokens (BOS), if it has any. Special tokens that
        a text spells out, as texts made with a chat template do, stay special; first tokens are not put twice.
    lengths
        Tokens of a sample; several lengths take turns within a domain: next comes the one that it has fewest of.
    packing
        `join` fills a sequence with several texts, a blank line between them; `separate` takes each sample
        from one text, of the lengths that it fills, and drops (and counts) what is too short for all of them.
    seed
        Of the order.
    counts
        `too_short` grows with every text that gave nothing, `repeated` with every sample that was there before;
        `left_over` is filled when the texts are at their end.

    Raises
    ------
    InputError
        When a length leaves no room beside the special first tokens.
    """
    prefix = special_prefix(tokenizer)
    _check_room(min(lengths), prefix)
    separator = tokenizer.encode(SEPARATOR, add_special_tokens=False) if packing == "join" else []
    visits = _Visits(documents, float(np.mean(lengths)) - len(prefix), np.random.default_rng(seed))
    streams: dict[int, Tokens] = {}
    untouched: set[int] = set()
    open_sequences: dict[str, _OpenSequence] = {}
    given: defaultdict[str, Counter[int]] = defaultdict(Counter)
    seen: set[str] = set()
    for index in visits:
        document = documents[index]
        if index not in streams:
            streams[index] = _text_tokens(document.text, tokenizer, prefix)
            counts.empty += not streams[index].size
            visits.plan(index, streams[index].size)
            untouched.add(index)
        if not streams[index].size:
            continue
        reach = max(lengths) if packing == "join" else len(prefix) + streams[index].size
        turn = _turn(lengths, given[document.domain], reach)
        if turn is None:
            counts.too_short += index in untouched
            streams[index] = streams[index][:0]
            continue
        wanted = lengths[turn]
        sequence = open_sequences.setdefault(document.domain, _OpenSequence(prefix))
        streams[index] = sequence.add(streams[index], wanted, index, separator)
        if len(sequence) == wanted:
            untouched.difference_update(sequence.texts)
            sample = Sample(sequence.tokens(), document.domain, tuple(documents[i].origin for i in sequence.texts))
            sequence.clear()
            if (digest := sample.digest) in seen:
                counts.repeated += 1
            else:
                seen.add(digest)
                given[document.domain][turn] += 1
                yield sample
        if streams[index].size:
            visits.again(index)
    for sequence in open_sequences.values():
        for index in untouched.intersection(sequence.texts):
            domain = documents[index].domain
            counts.left_over[domain] = counts.left_over.get(domain, 0) + 1


def _check_room(length: int, prefix: list[int]) -> None:
    if length <= len(prefix):
        raise InputError(f"A sample of {length} tokens has no room beside {len(prefix)} special first tokens.")


def _turn(lengths: Sequence[int], given: Mapping[int, int], reach: int) -> int | None:
    """Return the place of the first length that was given least often, of those up to `reach`; None when none is."""
    return min((place for place, length in enumerate(lengths) if length <= reach), key=given.__getitem__, default=None)


class _Visits:
    """The seeded order in which texts are visited: each about once for every sample that it can give.

    A text's visits are spread evenly over the order. How many there are is guessed from its bytes until it is
    tokenised; then the later ones are drawn anew for its tokens.

    Parameters
    ----------
    documents
        The texts.
    room
        Tokens that a sample takes of them.
    generator
        Of the order.
    """

    def __init__(self, documents: Sequence[Document], room: float, generator: np.random.Generator) -> None:
        self._room, self._generator = room, generator
        self._planned: dict[int, int] = {}
        self._now = 0.0
        self._heap: list[tuple[float, int]] = []
        for index, (document, chance) in enumerate(zip(documents, generator.random(len(documents)), strict=True)):
            pieces = max(1, math.ceil(len(document.text.encode()) / (BYTES_PER_TOKEN * room)))
            self._heap.append((float(1 - (1 - chance) ** (1 / pieces)), index))  # the first of so many times
        heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[int]:
        while self._heap:
            self._now, index = heapq.heappop(self._heap)
            self._planned[index] = self._planned.get(index, 0) - 1
            yield index

    def plan(self, index: int, tokens: int) -> None:
        """Spread the later visits of a text that was met for the first time over what is left of the order."""
        self._planned[index] = max(0, math.ceil(tokens / self._room) - 1)
        for time in self._now + (1 - self._now) * self._generator.random(self._planned[index]):
            heapq.heappush(self._heap, (float(time), index))

    def again(self, index: int) -> None:
        """Queue a text behind everything that is planned, unless it has a visit before it."""
        if self._planned[index] <= 0:
            heapq.heappush(self._heap, (math.floor(self._now) + 1 + self._generator.random(), index))


def _text_tokens(text: str, tokenizer: Tokenizer, prefix: list[int]) -> Tokens:
    """Return the tokens of a text, int32 (length,), without the special first tokens that it may spell out itself."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if prefix and tokens[: len(prefix)] == prefix:
        tokens = tokens[len(prefix) :]
    return np.asarray(tokens, dtype=np.int32)


def special_prefix(tokenizer: Tokenizer) -> list[int]:
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
        self.texts: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self) -> Tokens:
        return np.asarray(self._tokens, dtype=np.int32)

    def add(self, stream: Tokens, wanted: int, text: int, separator: list[int]) -> Tokens:
        """Append what fits of `stream`, after a separator when the sequence holds another text; return the rest."""
        if self.texts:
            self._tokens.extend(separator[: wanted - len(self._tokens)])
        room = wanted - len(self._tokens)
        if room > 0:
            self._tokens.extend(stream[:room].tolist())
            self.texts.append(text)
        return stream[max(room, 0) :]


# --- evaluation texts ----------------------------------------------------------------------------------------------


def spread_over_domains(samples: Iterable[Sample], limit: int, domains: Collection[str]) -> list[Sample]:
    """Return up to `limit` samples, as evenly over the domains as the texts allow, in their order.

    Samples are taken until each of `domains`, which are all that there are, has given its share.
    """
    share = math.ceil(limit / max(1, len(domains)))
    queues: dict[str, list[Sample]] = {domain: [] for domain in sorted(domains)}
    lacking = len(queues)
    for sample in samples:
        queues[sample.domain].append(sample)
        lacking -= len(queues[sample.domain]) == share
        if not lacking:
            break
    return [sample for row in zip_longest(*queues.values()) for sample in row if sample is not None][:limit]


def windows(text: str, tokenizer: Tokenizer, window: int, limit: int | None, domain: str) -> list[Sample]:
    """Return the consecutive, non-overlapping windows of one text; what does not fill a window is left out.

    Raises
    ------
    InputError
        When a window leaves no room beside the special first tokens.
    """
    prefix = special_prefix(tokenizer)
    _check_room(window, prefix)
    stream = _text_tokens(text, tokenizer, prefix)
    step = window - len(prefix)
    starts = range(0, stream.size - step + 1, step)[:limit]
    return [
        Sample(np.concatenate([np.asarray(prefix, dtype=np.int32), stream[s : s + step]]), domain, (f"{domain}:{s}",))
        for s in starts
    ]
