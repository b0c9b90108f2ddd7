import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers.processors import TemplateProcessing

from covercal.errors import InputError
from covercal.pool import Counts, pack, sequences_digest, unique_documents
from covercal.recipe import DivergenceText, Model, PerplexityText, TextSource
from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Outcome, Ref
from storage.tables import read_table
from tasks.capture import pool_shards
from tasks.identities import TokenizerIdentity, identify_model, identify_text
from tasks.pool import (
    SAMPLES,
    DivergenceSettings,
    PerplexitySettings,
    make_pool,
    make_texts,
    sample_columns,
    sample_tokens,
    text_settings,
)
from tests import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and texts, not to be changed."""
    folder = tmp_path_factory.mktemp("files")
    tiny.recipe_value(folder)
    return folder


def pool_inputs(store: ArtifactStore, folder: Path, **changed: Any) -> dict[str, Any]:
    source = TextSource(path=str(folder / "pool.jsonl"), domain="domain")
    return {
        "sources": (identify_text(source, store),),
        "tokenizer": TokenizerIdentity(identify_model(Model(source=str(folder / "model")), store)),
        "imported": None,
        "lengths": (32,),
        "packing": "join",
        "samples": 16,
        "seed": 0,
    } | changed


def pool(store: ArtifactStore, folder: Path, **changed: Any) -> Outcome:
    return make_pool.run(store, "pool", pool_inputs(store, folder, **changed))


def texts(store: ArtifactStore, folder: Path, settings: Any, **fields: Any) -> Outcome:
    fields = {"path": str(folder / "heldout.jsonl"), "domain": "domain"} | fields
    inputs = {
        "source": identify_text(TextSource(**fields), store),
        "tokenizer": TokenizerIdentity(identify_model(Model(source=str(folder / "model")), store)),
        "imported": None,
        "settings": settings,
    }
    return make_texts.run(store, "texts", inputs)


def digests(store: ArtifactStore, ref: Ref) -> list[str]:
    return [str(each) for each in sample_columns(store, ref, "digest")["digest"]]


def source(store: ArtifactStore, path: Path, rows: list[str], **fields: Any) -> Any:
    path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows), encoding="utf-8")
    return identify_text(TextSource(path=str(path), **fields), store)


# --- the pool ------------------------------------------------------------------------------------------------------


def test_a_pool_holds_as_many_samples_as_asked_of_the_asked_length(store: ArtifactStore, files: Path) -> None:
    tokens = sample_tokens(store, pool(store, files).ref)
    assert [each.size for each in tokens] == [32] * 16


def test_the_columns_of_a_pool_have_their_names_and_types(store: ArtifactStore, files: Path) -> None:
    table = read_table(store.path(pool(store, files).ref) / SAMPLES)
    assert {field.name: field.type for field in table.schema} == {
        "sample": pa.int32(),
        "domain": pa.string(),
        "origins": pa.list_(pa.string()),
        "length": pa.int32(),
        "digest": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "text": pa.string(),
    }


def test_samples_are_numbered_in_their_order(store: ArtifactStore, files: Path) -> None:
    assert sample_columns(store, pool(store, files).ref, "sample")["sample"] == list(range(16))


def test_a_digest_is_that_of_the_tokens_beside_it(store: ArtifactStore, files: Path) -> None:
    columns = sample_columns(store, pool(store, files).ref, "digest", "tokens")
    for digest, tokens in zip(columns["digest"], columns["tokens"], strict=True):
        assert digest == hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).hexdigest()


def test_a_text_is_the_tokens_beside_it_decoded(store: ArtifactStore, files: Path) -> None:
    columns = sample_columns(store, pool(store, files).ref, "text", "tokens")
    assert columns["text"] == [tiny.tiny_tokenizer().decode(tokens) for tokens in columns["tokens"]]


def test_a_text_is_without_the_first_tokens_that_readers_put_again(
    store: ArtifactStore, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_first = tiny.tiny_tokenizer()
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with_first.backend_tokenizer.post_processor = processor
    monkeypatch.setattr("tasks.pool.load_tokenizer", lambda *arguments: with_first)
    columns = sample_columns(store, pool(store, files).ref, "text", "tokens")
    assert {tokens[0] for tokens in columns["tokens"]} == {1}
    assert not any("<s>" in text for text in columns["text"])
    assert columns["text"] == [with_first.decode(tokens[1:]) for tokens in columns["tokens"]]


def test_a_text_that_is_changed_while_it_is_read_makes_no_pool(
    store: ArtifactStore, files: Path, tmp_path: Path
) -> None:
    rows = [tiny.text(seed, "code") for seed in range(20)]
    read = source(store, tmp_path / "texts.jsonl", rows)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": tiny.text(0, "animals", 900), "domain": "code"}))
    with pytest.raises(InputError, match=r"texts.jsonl was changed while it was read; nothing of it was kept"):
        pool(store, files, sources=(read,), samples=4)
    assert list(store.manifests("pool")) == []


def test_the_words_of_a_sample_are_those_of_its_domain(store: ArtifactStore, files: Path) -> None:
    columns = sample_columns(store, pool(store, files).ref, "text", "domain")
    for text, domain in zip(columns["text"], columns["domain"], strict=True):
        whole_words = text.split()[1:-1]  # a sample may begin and end within a word
        assert set(whole_words) <= set(tiny.DOMAINS[domain].split())


def test_origins_name_the_rows_that_the_tokens_come_from(store: ArtifactStore, files: Path) -> None:
    columns = sample_columns(store, pool(store, files).ref, "origins", "domain")
    rows = (files / "pool.jsonl").read_text().splitlines()
    for origins, domain in zip(columns["origins"], columns["domain"], strict=True):
        assert origins
        assert all(f'"domain": "{domain}"' in rows[int(origin.removeprefix("pool.jsonl:"))] for origin in origins)


@pytest.mark.parametrize("lengths", [(32,), (16, 48, 20)])
@pytest.mark.parametrize("packing", ["join", "separate"])
def test_tokens_come_back_as_they_were_packed(
    store: ArtifactStore, files: Path, lengths: tuple[int, ...], packing: str
) -> None:
    documents = unique_documents([TextSource(path=str(files / "pool.jsonl"), domain="domain")], Counts())
    every = pack(documents, tiny.tiny_tokenizer(), lengths, packing=packing, seed=3, counts=Counts())
    expected = [next(every).tokens.tolist() for _ in range(16)]
    ref = pool(store, files, lengths=lengths, packing=packing, seed=3).ref
    found = sample_tokens(store, ref)
    assert [each.tolist() for each in found] == expected
    assert {each.dtype for each in found} == {np.dtype(np.int32)}
    assert sample_columns(store, ref, "length")["length"] == [len(each) for each in expected]


def test_a_larger_pool_begins_with_the_samples_of_a_smaller_one(store: ArtifactStore, files: Path) -> None:
    small, large = (digests(store, pool(store, files, samples=count).ref) for count in (20, 40))
    assert large[:20] == small


def test_another_seed_gives_another_pool(store: ArtifactStore, files: Path) -> None:
    orders = {tuple(digests(store, pool(store, files, seed=seed).ref)) for seed in range(3)}
    assert len(orders) == 3


def test_two_stores_make_the_same_bytes_of_one_pool(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    other = ArtifactStore(tmp_path / "other")
    first, second = pool(store, files), pool(other, files)
    assert (first.decision, second.decision) == (Decision.BUILT, Decision.BUILT)
    assert first.ref == second.ref


def test_a_pool_of_moved_texts_and_a_moved_model_hits(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    first = pool(store, files)
    moved = Path(shutil.copytree(files, tmp_path / "moved"))
    second = pool(store, moved)
    assert second.decision is Decision.HIT
    assert second.ref == first.ref


@pytest.mark.parametrize(
    "changed", [{"lengths": (16,)}, {"lengths": (32, 16)}, {"packing": "separate"}, {"samples": 8}, {"seed": 1}]
)
def test_every_setting_of_a_pool_is_in_its_key(store: ArtifactStore, files: Path, changed: dict[str, Any]) -> None:
    keys = {make_pool.request(pool_inputs(store, files, **each)).key for each in ({}, changed)}
    assert len(keys) == 2


def test_the_order_of_sources_is_in_the_key(store: ArtifactStore, files: Path) -> None:
    sources = tuple(
        identify_text(TextSource(path=str(files / name), domain="domain"), store)
        for name in ("pool.jsonl", "heldout.jsonl")
    )
    keys = {make_pool.request(pool_inputs(store, files, sources=each)).key for each in (sources, sources[::-1])}
    assert len(keys) == 2


def test_the_manifest_counts_what_was_read_and_dropped(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    more = source(store, tmp_path / "more.jsonl", ["", "a cat", "a cat ", tiny.text(0, "code"), " "])
    first = pool_inputs(store, files)["sources"]
    info = pool(store, files, sources=(*first, more)).info
    assert info == {
        "documents": 120 + 5,
        "duplicates": 2,
        "empty": 2,
        "too_short": 0,
        "repeated": 0,
        "left_over": {},
        "domains": info["domains"],
    }


def test_the_manifest_counts_the_samples_of_each_domain(store: ArtifactStore, files: Path) -> None:
    made = pool(store, files)
    assert made.info["domains"] == Counter(sample_columns(store, made.ref, "domain")["domain"])
    assert sum(made.info["domains"].values()) == 16


# --- too little text -----------------------------------------------------------------------------------------------


def test_too_few_texts_are_an_error_with_all_counts(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    rows = [tiny.text(0, "code"), tiny.text(1, "code"), tiny.text(0, "code"), ""]
    few = source(store, tmp_path / "few.jsonl", rows)
    there = sum(len(tiny.tiny_tokenizer().encode(row)) for row in rows[:2]) + len(tiny.tiny_tokenizer().encode("\n\n"))
    with pytest.raises(InputError) as caught:
        pool(store, files, sources=(few,), samples=500)
    said = str(caught.value)
    assert f"The texts give {there // 32} samples of 32 tokens, and pool.samples asks for 500" in said
    assert "4 texts read, 1 duplicates and 1 empty ones dropped" in said
    assert "Lower pool.samples or pool.sequence_length, or add texts" in said


def test_texts_too_short_to_stand_alone_are_counted_and_joining_is_offered(
    store: ArtifactStore, files: Path, tmp_path: Path
) -> None:
    rows = [tiny.text(seed, "code", words=3) for seed in range(5)]
    few = source(store, tmp_path / "few.jsonl", rows)
    with pytest.raises(InputError) as caught:
        pool(store, files, sources=(few,), packing="separate", samples=1)
    said = str(caught.value)
    assert "The texts give 0 samples" in said
    assert "5 texts were too short (pool.packing: join would use them)" in said


def test_mixed_lengths_are_named_from_the_shortest_to_the_longest(store: ArtifactStore, files: Path) -> None:
    with pytest.raises(InputError, match=r"samples of 8 to 64 tokens, and pool\.samples asks for 99999"):
        pool(store, files, lengths=(64, 8), samples=99999)


def test_an_empty_pool_names_its_sources(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    empty = [source(store, tmp_path / name, rows) for name, rows in (("a.jsonl", []), ("b.jsonl", ["", " "]))]
    with pytest.raises(InputError) as caught:
        pool(store, files, sources=tuple(empty))
    said = str(caught.value)
    assert "The pool is empty" in said
    assert str(tmp_path / "a.jsonl") in said
    assert str(tmp_path / "b.jsonl") in said


def test_a_pool_that_cannot_be_filled_leaves_nothing_behind(store: ArtifactStore, files: Path) -> None:
    with pytest.raises(InputError):
        pool(store, files, samples=99999)
    assert list(store.folders()) == []


# --- shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 16, 64])
def test_shards_cover_a_pool_once_in_order(store: ArtifactStore, files: Path, size: int) -> None:
    shards = pool_shards(store, pool(store, files).ref, size)
    assert [sample for shard in shards for sample in range(shard.start, shard.stop)] == list(range(16))
    assert all(shard.stop - shard.start == size for shard in shards[:-1])


def test_a_shard_is_known_by_the_tokens_of_its_samples(store: ArtifactStore, files: Path) -> None:
    ref = pool(store, files).ref
    every = digests(store, ref)
    for shard in pool_shards(store, ref, 5):
        assert shard.key_material() == {"tokens": sequences_digest(every[shard.start : shard.stop])}


def test_the_shards_of_a_doubled_pool_begin_with_those_of_the_single_one(store: ArtifactStore, files: Path) -> None:
    single, doubled = (pool_shards(store, pool(store, files, samples=count).ref, 8) for count in (16, 32))
    assert doubled[:2] == single
    assert len(doubled) == 4


# --- evaluation texts ----------------------------------------------------------------------------------------------


def test_the_settings_of_a_text_are_what_cuts_its_sequences() -> None:
    assert text_settings(PerplexityText(path="a", window=8, limit=3)) == PerplexitySettings(8, 3)
    assert text_settings(DivergenceText(path="a", window=8, limit=3)) == DivergenceSettings(8, 3)


def test_windows_of_a_book_are_its_tokens_in_order(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(tiny.text(0, "code", words=200))
    ref = texts(store, files, PerplexitySettings(24, None), path=str(book), domain=None).ref
    joined = np.concatenate(sample_tokens(store, ref)).tolist()
    expected = tiny.tiny_tokenizer().encode(book.read_text())
    assert joined == expected[: len(expected) // 24 * 24]


def test_rows_of_a_text_for_perplexity_are_joined_by_blank_lines(store: ArtifactStore, files: Path) -> None:
    ref = texts(store, files, PerplexitySettings(24, None), rows=4).ref
    rows = [tiny.text(seed, domain) for seed in (1000, 1001) for domain in tiny.DOMAINS][:4]
    expected = tiny.tiny_tokenizer().encode("\n\n".join(rows))
    assert np.concatenate(sample_tokens(store, ref)).tolist() == expected[: len(expected) // 24 * 24]


def test_a_limit_of_windows_takes_the_first(store: ArtifactStore, files: Path) -> None:
    few, all_ = (digests(store, texts(store, files, PerplexitySettings(24, limit)).ref) for limit in (3, None))
    assert few == all_[:3]


def test_sequences_for_divergence_are_spread_evenly_over_the_domains(store: ArtifactStore, files: Path) -> None:
    made = texts(store, files, DivergenceSettings(32, 7))
    counts = Counter(sample_columns(store, made.ref, "domain")["domain"])
    assert sorted(counts.values()) == [2, 2, 3]
    assert made.info["domains"] == counts


def test_no_more_of_a_text_for_divergence_is_tokenised_than_its_limit_needs(
    store: ArtifactStore, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    encoder = tiny.tiny_tokenizer()
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda text, **how: asked.add(text) or encode(text, **how))
    monkeypatch.setattr("tasks.pool.load_tokenizer", lambda *arguments: encoder)
    made = texts(store, files, DivergenceSettings(32, 3))
    assert made.info["documents"] == len((files / "heldout.jsonl").read_text().splitlines()) == 30
    assert len(asked) < 15


def test_a_larger_limit_keeps_the_sequences_for_divergence(store: ArtifactStore, files: Path) -> None:
    few, more = (set(digests(store, texts(store, files, DivergenceSettings(32, limit)).ref)) for limit in (6, 12))
    assert few < more


@pytest.mark.parametrize("settings", [PerplexitySettings(10_000_000, None), DivergenceSettings(10_000_000, 3)])
def test_a_text_shorter_than_one_window_is_an_error_that_names_it(
    store: ArtifactStore, files: Path, settings: Any
) -> None:
    with pytest.raises(InputError) as caught:
        texts(store, files, settings)
    said = str(caught.value)
    assert f"Evaluation text {files / 'heldout.jsonl'} is shorter than one window of 10000000 tokens" in said
    assert "smaller `window`" in said


def test_perplexity_and_divergence_of_one_text_are_two_artifacts(store: ArtifactStore, files: Path) -> None:
    first = texts(store, files, PerplexitySettings(32, 3)).ref
    second = texts(store, files, DivergenceSettings(32, 3)).ref
    assert first.key != second.key


def test_a_perplexity_text_keeps_its_repeated_rows(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    rows = [tiny.text(1, "animals"), tiny.text(2, "animals"), tiny.text(1, "animals")]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows), encoding="utf-8")
    made = texts(store, files, PerplexitySettings(16, None), path=str(tmp_path / "rows.jsonl"), domain=None)
    expected = tiny.tiny_tokenizer().encode("\n\n".join(rows), add_special_tokens=False)
    tokens = np.concatenate(sample_tokens(store, made.ref))
    assert tokens.tolist() == expected[: tokens.size]
    assert len(expected) - tokens.size < 16
