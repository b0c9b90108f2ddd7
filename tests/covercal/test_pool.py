import gzip
import hashlib
import json
import os
import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from covercal.errors import InputError
from covercal.pool import (
    SEPARATOR,
    Counts,
    Document,
    Sample,
    pack,
    read_documents,
    sequences_digest,
    source_files,
    spread_over_domains,
    unique_documents,
    windows,
)
from covercal.recipe import TextSource
from tests import tiny

PAD, BOS = 0, 1
ROWS = [
    {"text": "a cat sleeps", "domain": "animals", "id": 7},
    {"text": "two plus two\nis four", "domain": "numbers", "id": 8},
    {"text": "def é():\u2028 return 'x'", "domain": "code", "id": 9},
]


def lines(rows: Iterable[Any]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(folder: Path) -> TextSource:
    (folder / "rows.jsonl").write_text(lines(ROWS), encoding="utf-8")
    return TextSource(path=str(folder / "rows.jsonl"), domain="domain")


def write_gzip(folder: Path) -> TextSource:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    return TextSource(path=str(folder / "rows.jsonl.gz"), domain="domain")


def write_parquet(folder: Path) -> TextSource:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return TextSource(path=str(folder / "rows.parquet"), domain="domain")


def write_hub(folder: Path) -> TextSource:
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_text(lines(ROWS[:2]), encoding="utf-8")
    (folder / "rows" / "b.jsonl").write_text(lines(ROWS[2:]), encoding="utf-8")
    return TextSource(hub=str(folder / "rows"), domain="domain")


FORMATS: list[Callable[[Path], TextSource]] = [write_jsonl, write_gzip, write_parquet, write_hub]


@pytest.fixture(autouse=True)
def _own_data_set_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def complaint(source: TextSource) -> str:
    """Return what is said of a wrong source."""
    with pytest.raises(InputError) as caught:
        list(read_documents(source))
    return str(caught.value)


def file_source(path: Path, content: str | bytes, **fields: Any) -> TextSource:
    """Write a file and return it as a source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return TextSource(path=str(path), **fields)


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_texts_and_domains_in_order(
    write: Callable[[Path], TextSource], tmp_path: Path
) -> None:
    found = [(document.text, document.domain) for document in read_documents(write(tmp_path))]
    assert found == [(row["text"], row["domain"]) for row in ROWS]


@pytest.mark.parametrize("write", FORMATS)
def test_without_a_domain_field_the_domain_is_the_name_of_the_source(
    write: Callable[[Path], TextSource], tmp_path: Path
) -> None:
    source = write(tmp_path).model_copy(update={"domain": None})
    assert {document.domain for document in read_documents(source)} == {"rows"}


@pytest.mark.parametrize("write", FORMATS)
def test_at_most_the_asked_rows_are_read(write: Callable[[Path], TextSource], tmp_path: Path) -> None:
    source = write(tmp_path).model_copy(update={"rows": 2})
    assert [document.text for document in read_documents(source)] == [row["text"] for row in ROWS[:2]]


@pytest.mark.parametrize("write", FORMATS)
def test_each_text_says_which_row_it_is(write: Callable[[Path], TextSource], tmp_path: Path) -> None:
    rows = [document.origin.rsplit(":", 1)[1] for document in read_documents(write(tmp_path))]
    assert rows == ["0", "1", "2"]


@pytest.mark.parametrize("write", FORMATS)
def test_another_field_can_hold_the_text(write: Callable[[Path], TextSource], tmp_path: Path) -> None:
    source = write(tmp_path).model_copy(update={"text": "domain"})
    assert [document.text for document in read_documents(source)] == [row["domain"] for row in ROWS]


@pytest.mark.parametrize("write", FORMATS)
def test_a_domain_that_is_a_number_becomes_its_name(write: Callable[[Path], TextSource], tmp_path: Path) -> None:
    source = write(tmp_path).model_copy(update={"domain": "id"})
    assert [document.domain for document in read_documents(source)] == ["7", "8", "9"]


def test_blank_lines_between_rows_are_skipped(tmp_path: Path) -> None:
    source = file_source(tmp_path / "rows.jsonl", '\n{"text": "a"}\n\n  \n{"text": "b"}')
    assert [document.text for document in read_documents(source)] == ["a", "b"]


@pytest.mark.parametrize("name", ["book.txt", "book.md", "book.rst", "book.text", "book.en.txt"])
def test_a_text_file_is_one_text_of_the_domain_of_its_name(tmp_path: Path, name: str) -> None:
    source = file_source(tmp_path / name, "first line\n\nsecond é\n")
    assert list(read_documents(source)) == [Document("first line\n\nsecond é\n", name.rpartition(".")[0], name)]


@pytest.mark.parametrize("suffix", [".json", ".ndjson", ".jsonl", ".json.gz", ".ndjson.gz", ".jsonl.gz", ".parquet"])
def test_of_a_files_name_only_the_suffix_is_no_part_of_the_domain(tmp_path: Path, suffix: str) -> None:
    write = write_gzip if suffix.endswith(".gz") else write_parquet if suffix == ".parquet" else write_jsonl
    path = Path(str(write(tmp_path).path)).rename(tmp_path / f"wiki.en.0-of-8{suffix}")
    assert {document.domain for document in read_documents(TextSource(path=str(path)))} == {"wiki.en.0-of-8"}


def test_a_folder_gives_its_text_files_by_name_with_the_sub_folder_as_domain(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for name in ("top.txt", "law/b.md", "law/a.txt", "law/old/c.txt"):
        file_source(root / name, f"text of {name}")
    found = [(d.domain, d.origin, d.text) for d in read_documents(TextSource(path=str(root)))]
    assert found == [
        ("law", "law/a.txt", "text of law/a.txt"),
        ("law", "law/b.md", "text of law/b.md"),
        ("law/old", "law/old/c.txt", "text of law/old/c.txt"),
        ("corpus", "top.txt", "text of top.txt"),
    ]


def test_files_of_a_folder_that_are_no_texts_are_left_out(tmp_path: Path) -> None:
    file_source(tmp_path / "corpus" / "picture.png", b"\x89PNG\xff")
    file_source(tmp_path / "corpus" / "a.txt", "a")
    assert [document.origin for document in read_documents(TextSource(path=str(tmp_path / "corpus")))] == ["a.txt"]


def test_a_file_of_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt")).write_text("words")
    with pytest.raises(InputError, match=r"holds a file whose name is not UTF-8, 'a\\udcff.txt'; rename it"):
        source_files(TextSource(path=str(tmp_path)))


def test_a_source_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl"))
    path.write_text('{"text": "words"}')
    with pytest.raises(InputError, match=r"text source 'a\\udcff.jsonl' is not UTF-8; rename it"):
        source_files(TextSource(path=str(path)))


def test_rows_of_a_folder_are_its_files(tmp_path: Path) -> None:
    for name in "abc":
        file_source(tmp_path / "corpus" / f"{name}.txt", name)
    source = TextSource(path=str(tmp_path / "corpus"), rows=2)
    assert [document.text for document in read_documents(source)] == ["a", "b"]


# --- what cannot be read -------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(TextSource(path=str(tmp_path / "none.jsonl"))) == (
        f"There is no file or folder {tmp_path / 'none.jsonl'}."
    )


def test_a_folder_without_texts_is_named_with_what_counts_as_text(tmp_path: Path) -> None:
    source = file_source(tmp_path / "corpus" / "a.csv", "x").model_copy(update={"path": str(tmp_path / "corpus")})
    assert f"Folder {tmp_path / 'corpus'} holds no text file (.txt, .md" in complaint(source)


def test_an_unknown_kind_of_file_is_told_the_known_ones(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "rows.csv", "text\na\n"))
    assert str(tmp_path / "rows.csv") in said
    assert ".jsonl.gz, .parquet" in said


def test_a_broken_json_line_is_named_by_its_number(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": \n{"text": "c"}\n'))
    assert f"{tmp_path / 'rows.jsonl'}, line 4: not valid JSON" in said


def test_json_that_is_not_one_object_a_line_is_told_to_be(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "rows.json", '[\n  {"text": "a"}\n]\n'))
    assert f"{tmp_path / 'rows.json'}, line 1: not valid JSON" in said
    assert "each line must be a JSON object of its own (JSON lines)" in said


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "brackets"])
def test_a_field_that_no_json_reader_takes_is_named_by_its_line(tmp_path: Path, value: str) -> None:
    said = complaint(file_source(tmp_path / "rows.jsonl", f'{{"text": "a"}}\n{{"text": "b", "more": {value}}}\n'))
    assert f"{tmp_path / 'rows.jsonl'}, line 2: a number is too long or brackets lie too deep" in said


@pytest.mark.parametrize("row", ["[1]", '"text"', "3", "null"])
def test_a_row_that_is_no_object_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    said = complaint(file_source(tmp_path / "rows.jsonl", f'{{"text": "a"}}\n{row}\n'))
    assert f"{tmp_path / 'rows.jsonl'}, line 2: a row must be a JSON object" in said


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_a_gzip_file_cut_short_anywhere_is_refused_by_name(tmp_path: Path, share: float) -> None:
    whole = gzip.compress(lines({"text": tiny.text(seed, "code")} for seed in range(300)).encode())
    said = complaint(file_source(tmp_path / "rows.jsonl.gz", whole[: max(1, int(share * len(whole)) - 1)]))
    assert str(tmp_path / "rows.jsonl.gz") in said
    assert "cut short" in said


def test_a_gzip_file_whose_bytes_changed_is_refused_by_name(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(lines(ROWS).encode()))
    content[-6] ^= 0xFF  # in the check sum
    said = complaint(file_source(tmp_path / "rows.jsonl.gz", bytes(content)))
    assert f"{tmp_path / 'rows.jsonl.gz'} is cut short or damaged" in said


def test_a_file_that_is_gzip_by_name_only_is_refused_by_name(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "rows.jsonl.gz", lines(ROWS)))
    assert f"{tmp_path / 'rows.jsonl.gz'} is cut short or damaged" in said


@pytest.mark.parametrize("write", FORMATS)
def test_a_missing_text_field_is_named_with_the_fields_that_are_there(
    write: Callable[[Path], TextSource], tmp_path: Path
) -> None:
    said = complaint(write(tmp_path).model_copy(update={"text": "body"}))
    assert "row 0: there is no field `body`; the row has: text, domain, id." in said
    assert "rows" in said.split(",")[0]


@pytest.mark.parametrize("write", FORMATS)
def test_a_missing_domain_field_is_named_with_the_fields_that_are_there(
    write: Callable[[Path], TextSource], tmp_path: Path
) -> None:
    said = complaint(write(tmp_path).model_copy(update={"domain": "topic"}))
    assert "row 0: there is no field `topic`; the row has: text, domain, id." in said


def test_a_field_that_only_some_rows_lack_is_named_with_its_row(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "rows.jsonl", '{"text": "a"}\n{"txt": "b"}\n'))
    assert "rows.jsonl, row 1: there is no field `text`; the row has: txt." in said


@pytest.mark.parametrize("write", FORMATS)
def test_a_field_that_holds_no_text_is_named_with_what_it_holds(
    write: Callable[[Path], TextSource], tmp_path: Path
) -> None:
    said = complaint(write(tmp_path).model_copy(update={"text": "id"}))
    assert "row 0: field `id` holds int, not text." in said


@pytest.mark.parametrize("pack_file", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_json_lines_that_are_not_utf_8_are_refused_by_file(tmp_path: Path, pack_file: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("rows.jsonl.gz" if pack_file is gzip.compress else "rows.jsonl")
    said = complaint(file_source(path, pack_file('{"text": "ok"}\n{"text": "\xe9"}\n'.encode("latin-1"))))
    assert f"{path} is not UTF-8 text" in said


def test_a_text_file_that_is_not_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    said = complaint(file_source(tmp_path / "book.txt", b"abc \xff def"))
    assert f"{tmp_path / 'book.txt'} is not UTF-8 text (invalid start byte at byte 4)" in said


def test_a_file_of_a_folder_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    file_source(tmp_path / "corpus" / "a.txt", "fine")
    file_source(tmp_path / "corpus" / "b.txt", b"\xff\xfe")
    assert f"{tmp_path / 'corpus' / 'b.txt'} is not UTF-8 text" in complaint(TextSource(path=str(tmp_path / "corpus")))


@pytest.mark.parametrize("field", ["text", "domain"])
def test_a_text_or_a_domain_with_half_a_character_is_refused_by_row(tmp_path: Path, field: str) -> None:
    rows = [{"text": "fine", "domain": "fine"}, {"text": "fine", "domain": "fine"} | {field: "half \ud83d of it"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    said = complaint(file_source(tmp_path / "rows.jsonl", content, domain="domain"))
    assert f"rows.jsonl, row 1: field `{field}` holds half a character" in said


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_parquet_file_cut_short_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = Path(str(write_parquet(tmp_path).path))
    content = path.read_bytes()
    said = complaint(file_source(path, content[: int(share * len(content))]))
    assert f"{path} cannot be read as Parquet" in said
    assert "cut short" in said


def test_an_unknown_split_of_a_data_set_names_those_that_are_there(tmp_path: Path) -> None:
    said = complaint(write_hub(tmp_path).model_copy(update={"split": "test"}))
    assert f"Data set '{tmp_path / 'rows'}' cannot be loaded" in said
    assert "train" in said


def test_a_data_set_that_is_nowhere_is_named() -> None:
    said = complaint(TextSource(hub="covercal-tests/there-is-no-such-data-set"))
    assert "Data set 'covercal-tests/there-is-no-such-data-set' cannot be loaded" in said


@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "first rows"])
def test_a_broken_file_of_a_data_set_is_refused_by_its_name(tmp_path: Path, rows: int | None) -> None:
    file_source(tmp_path / "broken" / "a.jsonl", '{"text": "a"}\n{"text": \n')
    assert f"Data set '{tmp_path / 'broken'}' cannot be loaded" in complaint(
        TextSource(hub=str(tmp_path / "broken"), rows=rows)
    )


# --- duplicates ----------------------------------------------------------------------------------------------------


def unique(*texts_by_source: Sequence[str]) -> tuple[list[str], Counts]:
    """Return the texts that are kept of several sources, and the counts."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            file_source(Path(folder) / f"{index}.jsonl", lines({"text": text} for text in texts))
            for index, texts in enumerate(texts_by_source)
        ]
        return [document.text for document in unique_documents(sources, counts)], counts


def test_repeated_texts_are_dropped_and_counted() -> None:
    kept, counts = unique(["a", "b", "a", "a"])
    assert kept == ["a", "b"]
    assert counts.duplicates == 2


def test_texts_that_differ_in_white_space_at_the_ends_are_the_same() -> None:
    kept, counts = unique(["a b", " a b\n", "a  b"])
    assert kept == ["a b", "a  b"]
    assert counts.duplicates == 1


def test_a_text_that_another_source_had_is_dropped() -> None:
    kept, counts = unique(["a", "b"], ["b", "c"])
    assert kept == ["a", "b", "c"]
    assert counts.duplicates == 1


def test_empty_texts_are_dropped_and_counted_apart_from_duplicates() -> None:
    kept, counts = unique(["", " \n", "a", ""])
    assert kept == ["a"]
    assert (counts.empty, counts.duplicates) == (3, 0)


_few_texts = st.lists(st.text("ab \n", max_size=3), max_size=12)


@given(_few_texts, _few_texts)
@settings(deadline=None, max_examples=50)
def test_the_first_of_each_text_is_kept_and_everything_is_counted(first: list[str], second: list[str]) -> None:
    kept, counts = unique(first, second)
    firsts = {text.strip(): text for text in reversed([*first, *second]) if text.strip()}
    assert sorted(kept) == sorted(firsts.values())
    assert counts.documents == len(first) + len(second) == len(kept) + counts.duplicates + counts.empty


# --- packing -------------------------------------------------------------------------------------------------------


@cache
def tokenizer(first: bool = False) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer, or one that puts BOS `first`."""
    made = tiny.tiny_tokenizer()
    if first:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Return the ids of a text by the tokenizer alone."""
    return tuple(tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids)


def corpus(count: int, words: int = 60) -> list[Document]:
    """Return `count` texts of each domain."""
    return [
        Document(tiny.text(seed, domain, words), domain, f"{domain}:{seed}")
        for seed in range(count)
        for domain in tiny.DOMAINS
    ]


def packed(
    documents: Sequence[Document],
    lengths: Sequence[int],
    *,
    packing: str = "join",
    seed: int = 0,
    first: bool = False,
    counts: Counts | None = None,
) -> list[Sample]:
    """Return all samples that the texts give."""
    counts = Counts() if counts is None else counts
    return list(pack(documents, tokenizer(first), lengths, packing=packing, seed=seed, counts=counts))


def packed_without_repeats(documents: Sequence[Document], lengths: Sequence[int], **how: Any) -> list[Sample]:
    """Return all samples that the texts give, of texts whose samples all differ."""
    counts = Counts()
    samples = packed(documents, lengths, counts=counts, **how)
    assume(not counts.repeated)
    return samples


def read_back(documents: Sequence[Document], samples: Sequence[Sample], *, first: bool = False) -> dict[str, int]:
    """Take samples apart into the pieces of the texts they name, and return how far each text was used.

    Raises when a sample holds any token that is not the next one of its text, a separator, or the one BOS.
    """
    tokens = {document.origin: token_ids(document.text) for document in documents}
    used = dict.fromkeys(tokens, 0)
    for sample in samples:
        expected = [BOS] if first else []
        for place, origin in enumerate(sample.origins):
            if place:
                expected.extend(token_ids(SEPARATOR))
            piece = tokens[origin][used[origin] :][: sample.tokens.size - len(expected)]
            used[origin] += len(piece)
            expected.extend(piece)
        rest = sample.tokens.size - len(expected)
        expected.extend(token_ids(SEPARATOR)[:rest])  # a separator may be the last thing that fits
        assert sample.tokens.tolist() == expected
    return used


_lengths = st.lists(st.integers(3, 50), min_size=1, max_size=3)
_seeds = st.integers(0, 2**32)


@st.composite
def documents_of_all_sizes(draw: st.DrawFn) -> list[Document]:
    """Return up to 12 texts of three domains, from one word to many."""
    kinds = st.tuples(st.sampled_from(sorted(tiny.DOMAINS)), st.integers(1, 5) | st.integers(1, 150))
    chosen = draw(st.lists(kinds, min_size=1, max_size=12))
    return [Document(tiny.text(i, d, words), d, f"{d}:{i}") for i, (d, words) in enumerate(chosen)]


packing_property = settings(deadline=None, max_examples=60)


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_lengths_are_exact_and_take_turns_within_a_domain(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    found = defaultdict(list)
    for sample in packed(documents, lengths, seed=seed, first=first):
        found[sample.domain].append(sample.tokens.size)
    for sizes in found.values():
        assert sizes == list(islice(cycle(lengths), len(sizes)))


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_a_separate_sample_has_the_length_that_its_domain_has_fewest_of_among_those_that_its_text_fills(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    left = {document.origin: len(token_ids(document.text)) for document in documents}
    given_samples = {document.domain: [0] * len(lengths) for document in documents}
    for sample in packed_without_repeats(documents, lengths, packing="separate", seed=seed, first=first):
        (origin,), had = sample.origins, given_samples[sample.domain]
        filled = [place for place, length in enumerate(lengths) if length - first <= left[origin]]
        place = min(filled, key=lambda place: (had[place], place))
        assert sample.tokens.size == lengths[place]
        had[place] += 1
        left[origin] -= lengths[place] - first
    assert all(rest < min(lengths) - first for rest in left.values())


@pytest.mark.parametrize("more", [1, -1], ids=["longer last", "longer first"])
def test_a_length_that_no_text_fills_costs_no_separate_sample(more: int) -> None:
    documents = corpus(20)
    lengths = [16, 1 + max(len(token_ids(document.text)) for document in documents)][::more]
    counts = Counts()
    samples = packed(documents, lengths, packing="separate", counts=counts)
    assert {sample.digest for sample in samples} == {s.digest for s in packed(documents, [16], packing="separate")}
    assert counts.too_short == 0


@given(documents_of_all_sizes(), _lengths, _seeds)
@packing_property
def test_a_sample_holds_texts_of_its_own_domain_only(documents: list[Document], lengths: list[int], seed: int) -> None:
    domains = {document.origin: document.domain for document in documents}
    for sample in packed(documents, lengths, seed=seed):
        assert {domains[origin] for origin in sample.origins} == {sample.domain}


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_joined_samples_are_made_of_the_texts_own_tokens_in_order(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    read_back(documents, packed_without_repeats(documents, lengths, seed=seed, first=first), first=first)


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_joining_loses_nothing_but_the_last_unfinished_sequence_of_a_domain(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    samples = packed_without_repeats(documents, lengths, seed=seed, first=first)
    used = read_back(documents, samples, first=first)
    given_samples = Counter(sample.domain for sample in samples)
    for domain in {document.domain for document in documents}:
        left = sum(
            len(token_ids(document.text)) - used[document.origin] for document in documents if document.domain == domain
        )
        assert left < lengths[given_samples[domain] % len(lengths)]


@given(documents_of_all_sizes(), _lengths, _seeds, st.sampled_from(["join", "separate"]), st.booleans())
@packing_property
def test_no_sample_is_padded(
    documents: list[Document], lengths: list[int], seed: int, packing: str, first: bool
) -> None:
    for sample in packed(documents, lengths, packing=packing, seed=seed, first=first):
        assert PAD not in sample.tokens


@given(documents_of_all_sizes(), _lengths, _seeds, st.sampled_from(["join", "separate"]))
@packing_property
def test_a_tokenizer_with_bos_puts_it_at_the_start_of_every_sample_and_nowhere_else(
    documents: list[Document], lengths: list[int], seed: int, packing: str
) -> None:
    for sample in packed(documents, lengths, packing=packing, seed=seed, first=True):
        assert np.flatnonzero(sample.tokens == BOS).tolist() == [0]


def test_special_tokens_after_a_text_are_left_out() -> None:
    closing = tiny.tiny_tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    found = list(pack(corpus(2), closing, [32], packing="join", seed=0, counts=Counts()))
    assert [sample.digest for sample in found] == [sample.digest for sample in packed(corpus(2), [32])]


@given(documents_of_all_sizes(), st.integers(3, 50), _seeds, st.booleans())
@packing_property
def test_separate_samples_are_consecutive_pieces_of_one_text_each(
    documents: list[Document], length: int, seed: int, first: bool
) -> None:
    samples = packed_without_repeats(documents, [length], packing="separate", seed=seed, first=first)
    assert all(len(sample.origins) == 1 for sample in samples)
    read_back(documents, samples, first=first)


@given(documents_of_all_sizes(), st.integers(3, 50), _seeds, st.booleans())
@packing_property
def test_a_separate_text_gives_as_many_samples_as_fit_into_it(
    documents: list[Document], length: int, seed: int, first: bool
) -> None:
    samples = packed_without_repeats(documents, [length], packing="separate", seed=seed, first=first)
    given_samples = Counter(sample.origins[0] for sample in samples)
    for document in documents:
        assert given_samples[document.origin] == len(token_ids(document.text)) // (length - first)


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_a_text_too_short_for_a_separate_sample_is_counted_once(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    counts = Counts()
    packed(documents, lengths, packing="separate", seed=seed, first=first, counts=counts)
    assert counts.too_short == sum(len(token_ids(document.text)) < min(lengths) - first for document in documents)


@given(documents_of_all_sizes(), _lengths, _seeds, st.sampled_from(["join", "separate"]))
@packing_property
def test_the_same_seed_gives_the_same_order(
    documents: list[Document], lengths: list[int], seed: int, packing: str
) -> None:
    first = packed(documents, lengths, seed=seed, packing=packing)
    again = packed(documents, lengths, seed=seed, packing=packing)
    assert [(s.digest, s.domain, s.origins) for s in first] == [(s.digest, s.domain, s.origins) for s in again]


@pytest.mark.parametrize("packing", ["join", "separate"])
def test_another_seed_gives_another_order(packing: str) -> None:
    documents = corpus(20)
    orders = {tuple(s.origins for s in packed(documents, [32], seed=seed, packing=packing)) for seed in range(5)}
    assert len(orders) == 5


def test_separate_samples_of_another_seed_are_the_same_set() -> None:
    documents = corpus(20)
    sets = [{s.digest for s in packed(documents, [32], seed=seed, packing="separate")} for seed in range(3)]
    assert sets[0] == sets[1] == sets[2]


def test_a_long_text_is_spread_evenly_between_the_others() -> None:
    long = Document(tiny.text(0, "code", 3000), "code", "long")
    short = [Document(tiny.text(seed, "code", 25), "code", str(seed)) for seed in range(1, 200)]
    origins = [sample.origins[0] for sample in packed([long, *short], [64], packing="separate")]
    last_short = max(place for place, origin in enumerate(origins) if origin != "long")
    quarters = Counter(4 * place // (last_short + 1) for place in range(last_short) if origins[place] == "long")
    fair = quarters.total() / 4
    assert fair > 8
    assert all(0.5 * fair <= quarters[quarter] <= 1.5 * fair for quarter in range(4))


def test_only_the_texts_that_are_needed_are_tokenised() -> None:
    asked: list[str] = []

    class Counting:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            asked.append(text)
            return tokenizer().encode(text, add_special_tokens=add_special_tokens)

    documents = corpus(100)
    list(islice(pack(documents, Counting(), [32], packing="join", seed=0, counts=Counts()), 5))
    assert len(asked) < 20


def test_texts_that_are_shorter_than_a_sample_altogether_give_none() -> None:
    assert packed([Document("a cat", "animals", "0"), Document("the dog", "animals", "1")], [50]) == []


def test_samples_that_hold_the_same_tokens_are_given_once_and_counted() -> None:
    header = tiny.text(7, "code", 40)
    documents = [Document(f"{header} {tiny.text(seed, 'code', 3)}", "code", str(seed)) for seed in range(30)]
    counts = Counts()
    samples = packed(documents, [16], packing="separate", counts=counts)
    pieces = [ids[at : at + 16] for d in documents for ids in [token_ids(d.text)] for at in range(0, len(ids) - 15, 16)]
    assert sorted(tuple(s.tokens.tolist()) for s in samples) == sorted(set(pieces))
    assert counts.repeated == len(pieces) - len(set(pieces)) > 20


@given(documents_of_all_sizes(), _lengths, _seeds, st.sampled_from(["join", "separate"]), st.booleans())
@packing_property
def test_no_two_samples_hold_the_same_tokens(
    documents: list[Document], lengths: list[int], seed: int, packing: str, first: bool
) -> None:
    digests = [s.digest for s in packed(documents, lengths, packing=packing, seed=seed, first=first)]
    assert len(set(digests)) == len(digests)


@given(documents_of_all_sizes(), _lengths, _seeds, st.booleans())
@packing_property
def test_texts_that_are_in_no_joined_sample_are_counted_by_domain(
    documents: list[Document], lengths: list[int], seed: int, first: bool
) -> None:
    counts = Counts()
    samples = packed(documents, lengths, seed=seed, first=first, counts=counts)
    assume(not counts.repeated)
    used = {origin for sample in samples for origin in sample.origins}
    assert counts.left_over == Counter(d.domain for d in documents if d.origin not in used)


def test_a_text_that_spells_out_the_first_tokens_does_not_get_them_twice() -> None:
    plain, with_first = (
        [Document(f"{start}{tiny.text(seed, 'code', 40)}", "code", str(seed)) for seed in range(4)]
        for start in ("", "<s>")
    )
    for packing in ("join", "separate"):
        expected = [s.digest for s in packed(plain, [16], packing=packing, first=True)]
        assert [s.digest for s in packed(with_first, [16], packing=packing, first=True)] == expected


def test_special_tokens_within_a_text_stay_special() -> None:
    text = f"{tiny.text(0, 'code', 5)}</s>{tiny.text(1, 'code', 30)}"
    assert sum((2 in sample.tokens) for sample in packed([Document(text, "code", "0")], [16])) == 1


def test_texts_of_few_characters_a_token_come_as_often_as_others() -> None:
    class OneEach:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in (text if ord(text[0]) > 255 else text[::4])]

    generator = np.random.default_rng(0)
    letters = [("latin", 97, 4), ("han", 0x4E00, 1)]
    documents = [
        Document("".join(chr(first + k) for k in generator.integers(0, 26, 640 * wide)), name, f"{name}:{i}")
        for name, first, wide in letters
        for i in range(100)
    ]
    samples = list(islice(pack(documents, OneEach(), [64], packing="separate", seed=0, counts=Counts()), 400))
    share = sum(sample.domain == "han" for sample in samples) / 400
    assert 0.45 < share < 0.55


# --- digests -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_a_samples_digest_is_that_of_its_tokens_as_little_endian_numbers(tokens: list[int]) -> None:
    sample = Sample(np.asarray(tokens, dtype=np.int32), "a", ("b",))
    assert sample.digest == hashlib.sha256(struct.pack(f"<{len(tokens)}i", *tokens)).hexdigest()


def test_the_digest_of_a_sequence_of_samples_depends_on_their_order() -> None:
    digests = [Sample(tokens, "a", ()).digest for tokens in tiny.random_tokens(3, 8)]
    assert sequences_digest(digests) == sequences_digest(iter(digests))
    assert len({sequences_digest(order) for order in (digests, digests[::-1], digests[:2], digests * 2)}) == 4


# --- evaluation texts ----------------------------------------------------------------------------------------------


def numbered(domains: Iterable[str]) -> list[Sample]:
    """Return one sample for each name of a domain, its number as token."""
    return [Sample(np.asarray([n], dtype=np.int32), domain, (str(n),)) for n, domain in enumerate(domains)]


_domain_rows = st.lists(st.sampled_from("abcd"), max_size=30)


@given(_domain_rows, st.integers(1, 40))
def test_as_many_as_asked_are_chosen_while_there_are_any(domains: list[str], limit: int) -> None:
    chosen = [sample.origins for sample in spread_over_domains(numbered(domains), limit, set(domains))]
    assert len(chosen) == len(set(chosen)) == min(limit, len(domains))


@given(_domain_rows, st.integers(1, 40))
def test_domains_differ_by_at_most_one_while_their_texts_last(domains: list[str], limit: int) -> None:
    there = Counter(domains)
    chosen = Counter(sample.domain for sample in spread_over_domains(numbered(domains), limit, set(domains)))
    most = max(chosen.values(), default=0)
    for domain, available in there.items():
        assert chosen[domain] == available or chosen[domain] >= most - 1


@given(_domain_rows, st.integers(1, 40))
def test_of_each_domain_the_first_samples_are_chosen_in_their_order(domains: list[str], limit: int) -> None:
    samples = numbered(domains)
    chosen = spread_over_domains(iter(samples), limit, set(domains))
    for domain in set(domains):
        mine = [sample.origins for sample in chosen if sample.domain == domain]
        assert mine == [sample.origins for sample in samples if sample.domain == domain][: len(mine)]


@given(_domain_rows, st.integers(1, 40))
def test_samples_are_taken_until_each_domain_has_its_share_and_the_choice_is_that_of_all_samples(
    domains: list[str], limit: int
) -> None:
    samples = iter(numbered(domains))
    chosen = spread_over_domains(samples, limit, set(domains))
    taken = len(domains) - len(list(samples))
    share = -(-limit // max(1, len(set(domains))))
    whole = [n for n in range(len(domains)) if min(Counter(domains[: n + 1])[each] for each in set(domains)) >= share]
    assert taken == (whole[0] + 1 if whole else len(domains))
    every = spread_over_domains(numbered(domains), limit, {*domains, "without texts"})
    assert [sample.origins for sample in chosen] == [sample.origins for sample in every]


_window_texts = st.builds(tiny.text, st.integers(0, 50), st.sampled_from(sorted(tiny.DOMAINS)), st.integers(1, 200))


@given(_window_texts, st.integers(2, 60), st.booleans())
@settings(deadline=None)
def test_windows_cover_the_tokens_of_a_text_in_order_but_for_the_unfinished_rest(
    text: str, window: int, first: bool
) -> None:
    found = windows(text, tokenizer(first), window, None, "book")
    joined = [token for sample in found for token in sample.tokens[first:].tolist()]
    expected = token_ids(text)
    assert joined == list(expected[: len(joined)])
    assert 0 <= len(expected) - len(joined) < window - first


@given(_window_texts, st.integers(2, 60), st.booleans())
@settings(deadline=None)
def test_every_window_has_the_asked_length_with_bos_counted(text: str, window: int, first: bool) -> None:
    for sample in windows(text, tokenizer(first), window, None, "book"):
        assert sample.tokens.size == window
        assert (sample.tokens == BOS).sum() == (1 if first else 0) == (sample.tokens[0] == BOS)


@given(_window_texts, st.integers(2, 60), st.integers(1, 10))
@settings(deadline=None)
def test_a_limit_takes_the_first_windows(text: str, window: int, limit: int) -> None:
    every = windows(text, tokenizer(), window, None, "book")
    limited = windows(text, tokenizer(), window, limit, "book")
    assert [sample.digest for sample in limited] == [sample.digest for sample in every][:limit]


def test_a_window_without_room_beside_the_first_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="A sample of 1 tokens has no room beside 1 special first tokens"):
        windows(tiny.text(0, "code"), tokenizer(True), 1, None, "book")


def test_a_window_names_its_text_and_where_it_begins() -> None:
    found = windows(tiny.text(0, "code"), tokenizer(True), 33, 3, "book")
    assert [(sample.domain, sample.origins) for sample in found] == [
        ("book", ("book:0",)),
        ("book", ("book:32",)),
        ("book", ("book:64",)),
    ]


# --- found by reading ----------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffwords".encode())
    assert [d.text for d in read_documents(TextSource(path=str(tmp_path / "a.txt")))] == ["words"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n')
    (document,) = read_documents(TextSource(path=str(tmp_path / "rows.jsonl")))
    assert document.text == "first"


def test_a_domain_that_is_null_is_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "domain": null}\n')
    with pytest.raises(InputError, match="row 0: field `domain` is empty"):
        list(read_documents(TextSource(path=str(tmp_path / "rows.jsonl"), domain="domain")))
