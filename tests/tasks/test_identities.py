import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from covercal.errors import InputError
from covercal.recipe import DivergenceText, Model, PerplexityText, TextSource
from storage.artifacts import ArtifactStore
from tasks.cached import key_material
from tasks.identities import (
    ModelIdentity,
    TextIdentity,
    TokenizerIdentity,
    identify_evaluation_text,
    identify_model,
    identify_text,
    model_folder,
)
from tests import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny model, not to be changed."""
    return tiny.save_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def model_of(source: Path, store: ArtifactStore) -> ModelIdentity:
    return identify_model(Model(source=str(source)), store)


def text_of(store: ArtifactStore, **fields: Any) -> TextIdentity:
    return identify_text(TextSource(**fields), store)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes of a file, its size and time of change kept."""
    status = path.stat()
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- models --------------------------------------------------------------------------------------------------------


def test_a_model_is_the_same_in_another_folder_of_another_name(
    original: Path, tmp_path: Path, store: ArtifactStore
) -> None:
    moved = Path(shutil.copytree(original, tmp_path / "elsewhere" / "renamed"))
    here, there = model_of(original, store), model_of(moved, store)
    assert key_material(here) == key_material(there)
    assert key_material(TokenizerIdentity(here)) == key_material(TokenizerIdentity(there))


def test_the_time_of_its_files_does_not_change_a_model(folder: Path, store: ArtifactStore) -> None:
    before = model_of(folder, store)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert model_of(folder, store) == before


def test_other_weights_are_another_model(folder: Path, store: ArtifactStore) -> None:
    before = model_of(folder, store)
    tiny.tiny_model(seed=1).save_pretrained(folder)
    assert model_of(folder, store).key_material() != before.key_material()


def test_one_changed_byte_of_the_weights_is_noticed_whatever_its_size_and_time(
    folder: Path, store: ArtifactStore
) -> None:
    path = folder / "model.safetensors"
    os.utime(path, (1, 1))
    before = model_of(folder, store)
    last = path.read_bytes()[-8:]
    rewrite(path, last, bytes([last[0] ^ 1, *last[1:]]))
    assert model_of(folder, store).weights != before.weights


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_another_configuration_is_another_model(folder: Path, store: ArtifactStore, name: str) -> None:
    before = model_of(folder, store)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    assert model_of(folder, store).weights != before.weights


def test_files_that_do_not_decide_the_outputs_do_not_change_a_model(folder: Path, store: ArtifactStore) -> None:
    before = model_of(folder, store)
    (folder / "README.md").write_text("A model.")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert model_of(folder, store) == before


def test_another_tokenizer_changes_the_tokenizer_and_not_the_weights(folder: Path, store: ArtifactStore) -> None:
    before = model_of(folder, store)
    rewrite(folder / "tokenizer.json", b'"<s>"', b'"[s]"')
    after = model_of(folder, store)
    assert TokenizerIdentity(after).key_material() != TokenizerIdentity(before).key_material()
    assert after.key_material() == before.key_material()


def test_models_with_one_tokenizer_share_its_identity(folder: Path, original: Path, store: ArtifactStore) -> None:
    tiny.tiny_model(seed=1).save_pretrained(folder)
    first, second = (TokenizerIdentity(model_of(place, store)) for place in (original, folder))
    assert key_material(first) == key_material(second)
    assert first.model.weights != second.model.weights


def test_a_model_keeps_its_name_and_place_for_display_and_loading(folder: Path, store: ArtifactStore) -> None:
    found = model_of(folder, store)
    assert (found.name, found.folder, found.gguf) == ("model", str(folder), "")
    assert model_folder(store, found, None) == folder


def test_nothing_of_a_models_place_is_in_its_key_material(folder: Path, store: ArtifactStore) -> None:
    found = model_of(folder, store)
    assert str(folder.parent) not in json.dumps([key_material(found), key_material(TokenizerIdentity(found))])


@pytest.mark.parametrize(("field", "dtype"), [("dtype", "bfloat16"), ("torch_dtype", "float16")])
def test_the_stored_dtype_is_what_the_configuration_says(
    folder: Path, store: ArtifactStore, field: str, dtype: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, field: dtype}))
    assert model_of(folder, store).dtype == dtype


def test_a_gguf_file_is_the_same_model_in_another_folder(tmp_path: Path, store: ArtifactStore) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tiny.gguf").write_bytes(b"GGUF and more")
    first, second = (model_of(tmp_path / place / "tiny.gguf", store) for place in ("a", "b"))
    assert key_material(first) == key_material(second)
    assert (first.gguf, first.folder) == ("tiny.gguf", str(tmp_path / "a"))


def test_another_gguf_content_is_another_model(tmp_path: Path, store: ArtifactStore) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF one")
    before = model_of(path, store)
    path.write_bytes(b"GGUF two")
    assert model_of(path, store).key_material() != before.key_material()


def test_a_model_that_is_not_there_is_an_input_error(tmp_path: Path, store: ArtifactStore) -> None:
    with pytest.raises(InputError, match=r"no GGUF file .*none\.gguf"):
        model_of(tmp_path / "none.gguf", store)


# --- texts ---------------------------------------------------------------------------------------------------------


def test_a_text_is_the_same_in_another_folder(tmp_path: Path, store: ArtifactStore) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        tiny.write_texts(tmp_path / place / "pool.jsonl", range(3))
    first, second = (text_of(store, path=str(tmp_path / place / "pool.jsonl")) for place in ("a", "b"))
    assert key_material(first) == key_material(second)


def test_a_file_of_another_name_is_another_text_because_it_names_the_domain(
    tmp_path: Path, store: ArtifactStore
) -> None:
    first, second = (
        text_of(store, path=str(tiny.write_texts(tmp_path / name, range(3)))) for name in ("law.jsonl", "news.jsonl")
    )
    assert key_material(first) != key_material(second)


def test_the_time_of_a_file_does_not_change_a_text(tmp_path: Path, store: ArtifactStore) -> None:
    path = tiny.write_texts(tmp_path / "pool.jsonl", range(3))
    before = text_of(store, path=str(path))
    os.utime(path, (1, 1))
    assert text_of(store, path=str(path)) == before


def test_one_changed_letter_is_noticed_whatever_the_files_size_and_time(tmp_path: Path, store: ArtifactStore) -> None:
    path = tiny.write_texts(tmp_path / "pool.jsonl", range(3))
    os.utime(path, (1, 1))
    before = text_of(store, path=str(path))
    rewrite(path, b"cat", b"bat")
    assert text_of(store, path=str(path)).content != before.content


@pytest.mark.parametrize("field", [{"text": "body"}, {"domain": "domain"}, {"rows": 2}])
def test_how_rows_are_read_is_part_of_a_text(tmp_path: Path, store: ArtifactStore, field: dict[str, Any]) -> None:
    path = str(tiny.write_texts(tmp_path / "pool.jsonl", range(3)))
    assert key_material(text_of(store, path=path, **field)) != key_material(text_of(store, path=path))


def test_what_only_a_hub_data_set_reads_is_no_part_of_a_files_text(tmp_path: Path, store: ArtifactStore) -> None:
    path = str(tiny.write_texts(tmp_path / "pool.jsonl", range(3)))
    assert key_material(text_of(store, path=path, split="test")) == key_material(text_of(store, path=path))


def folder_of_texts(root: Path) -> Path:
    for name in ("law/a.txt", "law/b.txt", "top.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    return root


def test_a_folder_of_texts_is_the_same_elsewhere_under_its_own_name(tmp_path: Path, store: ArtifactStore) -> None:
    first, second = (text_of(store, path=str(folder_of_texts(tmp_path / p / "corpus"))) for p in ("a", "b"))
    assert key_material(first) == key_material(second)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "law" / "a.txt").write_text("another"),
        lambda root: (root / "law" / "a.txt").unlink(),
        lambda root: (root / "law" / "c.txt").write_text("more"),
        lambda root: (root / "law" / "a.txt").rename(root / "a.txt"),
    ],
    ids=["changed", "removed", "added", "moved to another domain"],
)
def test_a_change_to_any_text_of_a_folder_is_noticed(tmp_path: Path, store: ArtifactStore, change: Any) -> None:
    root = folder_of_texts(tmp_path / "corpus")
    before = text_of(store, path=str(root))
    change(root)
    assert text_of(store, path=str(root)).content != before.content


def test_files_of_a_folder_that_are_no_texts_do_not_count(tmp_path: Path, store: ArtifactStore) -> None:
    root = folder_of_texts(tmp_path / "corpus")
    before = text_of(store, path=str(root))
    (root / "picture.png").write_bytes(b"\x89PNG")
    assert text_of(store, path=str(root)) == before


def test_a_missing_text_is_an_input_error_that_names_it(tmp_path: Path, store: ArtifactStore) -> None:
    with pytest.raises(InputError, match=r"There is no file or folder .*none\.jsonl"):
        text_of(store, path=str(tmp_path / "none.jsonl"))


# --- data sets -----------------------------------------------------------------------------------------------------


def data_set(folder: Path, seeds: range = range(3)) -> str:
    folder.mkdir(parents=True)
    tiny.write_texts(folder / "train.jsonl", seeds)
    return str(folder)


def test_a_data_set_in_a_folder_is_identified_by_its_content(tmp_path: Path, store: ArtifactStore) -> None:
    hub = data_set(tmp_path / "texts")
    before = text_of(store, hub=hub)
    assert text_of(store, hub=hub) == before
    tiny.write_texts(tmp_path / "texts" / "train.jsonl", range(4))
    assert text_of(store, hub=hub).content != before.content


def test_a_data_set_in_a_folder_is_the_same_elsewhere_under_its_own_name(tmp_path: Path, store: ArtifactStore) -> None:
    first, second = (text_of(store, hub=data_set(tmp_path / place / "texts")) for place in ("a", "b"))
    assert key_material(first) == key_material(second)


@pytest.mark.parametrize("field", [{"split": "test"}, {"config": "small"}])
def test_which_part_of_a_data_set_is_read_is_part_of_the_text(
    tmp_path: Path, store: ArtifactStore, field: dict[str, Any]
) -> None:
    hub = data_set(tmp_path / "texts")
    assert key_material(text_of(store, hub=hub, **field)) != key_material(text_of(store, hub=hub))


def test_a_data_set_on_the_hub_is_identified_by_its_commit(store: ArtifactStore) -> None:
    first, again, other = (text_of(store, hub="owner/texts", revision=digit * 40) for digit in "112")
    assert key_material(first) == key_material(again)
    assert key_material(first) != key_material(other)


def test_two_data_sets_are_never_the_same_text(store: ArtifactStore) -> None:
    first, second = (text_of(store, hub=hub, revision="1" * 40) for hub in ("owner/texts", "owner/other"))
    assert key_material(first) != key_material(second)


def test_a_data_set_whose_commit_cannot_be_asked_for_is_told_to_name_it(store: ArtifactStore) -> None:
    with pytest.raises(InputError) as caught:
        text_of(store, hub="covercal-tests/texts", revision="main")
    said = str(caught.value)
    assert "Data set 'covercal-tests/texts' is no folder here" in said
    assert "give `revision` as a full commit" in said


# --- evaluation texts ----------------------------------------------------------------------------------------------


def test_windows_and_limits_are_no_part_of_an_evaluation_texts_identity(tmp_path: Path, store: ArtifactStore) -> None:
    path = str(tiny.write_texts(tmp_path / "heldout.jsonl", range(3)))
    identities = [
        identify_evaluation_text(text, store)
        for text in (
            DivergenceText(path=path, domain="domain"),
            DivergenceText(path=path, domain="domain", window=8, limit=2),
        )
    ]
    assert identities[0] == identities[1]


def test_an_evaluation_text_is_the_same_as_the_same_source_of_a_pool(tmp_path: Path, store: ArtifactStore) -> None:
    path = str(tiny.write_texts(tmp_path / "heldout.jsonl", range(3)))
    wanted = {"path": path, "domain": "domain", "rows": 2}
    assert identify_evaluation_text(DivergenceText(**wanted), store) == text_of(store, **wanted)


def test_a_text_for_perplexity_is_identified_by_its_file(tmp_path: Path, store: ArtifactStore) -> None:
    path = tmp_path / "book.txt"
    path.write_text("once upon a time")
    assert identify_evaluation_text(PerplexityText(path=str(path)), store) == text_of(store, path=str(path))


# --- changed while they are read -----------------------------------------------------------------------------------


def test_weights_that_changed_are_told_and_a_tokenizer_that_did_is_of_no_matter_to_them(
    folder: Path, store: ArtifactStore
) -> None:
    model = model_of(folder, store)
    model.check_unchanged(store, unpacked=False)
    (folder / "tokenizer_config.json").write_text("{}")
    model.check_unchanged(store, unpacked=False)
    with pytest.raises(InputError, match=r"The tokenizer of model model in .* was changed while it was read"):
        TokenizerIdentity(model).check_unchanged(store, unpacked=False)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(InputError, match=r"Model model in .* was changed while it was read; nothing of it was kept"):
        model.check_unchanged(store, unpacked=False)


def test_a_gguf_file_that_was_unpacked_is_not_looked_at_again(tmp_path: Path, store: ArtifactStore) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    model = model_of(path, store)
    path.write_bytes(b"GGUF and others")
    for identity in (model, TokenizerIdentity(model)):
        identity.check_unchanged(store, unpacked=True)
        with pytest.raises(InputError, match="was changed while it was read"):
            identity.check_unchanged(store, unpacked=False)


def test_a_text_that_changed_is_told(tmp_path: Path, store: ArtifactStore) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words")
    text = text_of(store, path=str(path))
    text.check_unchanged(store, unpacked=False)
    path.write_text("other")
    with pytest.raises(InputError, match=r"Text source .*a.txt was changed while it was read"):
        text.check_unchanged(store, unpacked=True)


def test_a_data_set_of_the_hub_is_read_at_the_commit_that_its_key_names(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.identities.dataset_commit", lambda source: "c" * 40)
    text = text_of(store, hub="owner/name", revision="main")
    assert text.source.revision == "c" * 40
    monkeypatch.setattr("tasks.identities.dataset_commit", None)  # calling it would fail
    text.check_unchanged(store, unpacked=False)
