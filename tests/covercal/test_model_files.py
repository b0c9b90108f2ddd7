import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covercal.errors import InputError
from covercal.model_files import ModelFiles, left_out, loader_of, locate_model
from covercal.recipe import Model
from tests import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny model, not to be changed."""
    return tiny.save_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def locate(source: Path | str) -> ModelFiles:
    return locate_model(Model(source=str(source)))


def complaint(source: Path | str) -> str:
    """Return what is said of a wrong model."""
    with pytest.raises(InputError) as caught:
        locate(source)
    return str(caught.value)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_found_with_its_weights_and_its_tokenizer(folder: Path) -> None:
    found = locate(folder)
    assert (found.folder, found.gguf, found.name) == (folder, "", "model")
    assert names(found.weights) == ["config.json", "generation_config.json", WEIGHTS]
    assert names(found.tokenizer) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_configuration_is_the_models_own(folder: Path) -> None:
    assert locate(folder).config() == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
def test_every_decoder_architecture_is_taken(folder: Path, architecture: str) -> None:
    change_config(folder, architectures=[type(tiny.tiny_model(architecture)).__name__])
    assert locate(folder).folder == folder


def test_a_model_of_several_weight_files_is_found_with_all_of_them(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny.tiny_model().save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert names(locate(folder).weights) == ["config.json", "generation_config.json", *shards]


def test_pickles_beside_safetensors_are_left_out(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin" not in names(locate(folder).weights)


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"model.source {folder} has no config.json" in complaint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_model_of_pickles_only_is_refused_and_told_to_convert(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    said = complaint(folder)
    assert f"model.source {folder} holds its weights as pickle ({name})" in said
    assert "convert it to safetensors" in said


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert f"model.source {folder} has no *.safetensors file" in complaint(folder)


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"model.source {folder} has no tokenizer files (tokenizer.json or tokenizer.model)" in complaint(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["MarianForCausalLM"], "is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["BertModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
    ids=lambda fields: fields["architectures"][0],
)
def test_a_model_that_is_no_decoder_is_refused_by_its_architecture(folder: Path, fields: dict[str, Any]) -> None:
    change_config(folder, **fields)
    said = complaint(folder)
    assert f"{folder} is a {fields['architectures'][0]}, not a decoder" in said
    assert "ForCausalLM" in said


def test_a_model_that_reads_images_too_is_one_when_it_has_a_language_model(folder: Path) -> None:
    for kind, name, loader in (
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForCausalLM"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "AutoModelForCausalLM"),
        ("llava", "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
        ("mistral4", "Mistral4ForCausalLM", "AutoModelForImageTextToText"),  # a text model, which is known there only
    ):
        change_config(folder, architectures=[name], model_type=kind, text_config={})
        found = locate_model(Model(source=str(folder)))
        assert (found.folder, loader_of(found.config())) == (folder, loader)
    change_config(folder, architectures=["ClvpForConditionalGeneration"], model_type="clvp")
    assert "is a ClvpForConditionalGeneration, not a decoder" in complaint(folder)


def test_it_is_told_when_only_the_language_model_is_kept() -> None:
    qwen = {"architectures": ["Qwen3_5ForConditionalGeneration"]}
    assert left_out(qwen, "Qwen3_5ForCausalLM").startswith("of Qwen3_5ForConditionalGeneration only the language model")
    for config, loaded in (
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHead"),
        ({"architectures": None}, "LlamaForCausalLM"),
    ):
        assert left_out(config, loaded) == ""


def test_what_prepares_images_is_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    assert "has no tokenizer files" in complaint(folder)


@pytest.mark.parametrize("architectures", [None, []])
def test_a_model_without_an_architecture_is_refused(folder: Path, architectures: Any) -> None:
    change_config(folder, architectures=architectures)
    assert "model without an architecture, not a decoder" in complaint(folder)


def test_a_model_that_is_quantised_already_is_refused_with_its_method(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    said = complaint(folder)
    assert f"model.source {folder} is quantised already (awq)" in said
    assert "give the original model" in said


@pytest.mark.parametrize("content", ["{", "", "[]", "3", "null"])
def test_a_configuration_that_is_no_json_object_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    said = complaint(folder)
    assert str(folder / "config.json") in said
    assert "JSON" in said


# --- damaged weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 10, 1000, 100_000])
def test_weights_cut_short_are_refused_with_both_sizes(folder: Path, missing: int) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing])
    assert f"{path} is cut short: {len(whole) - missing} bytes instead of {len(whole)}" in complaint(folder)


@pytest.mark.parametrize("size", [0, 3, 8, 100])
def test_weights_cut_within_their_header_are_refused_with_the_size(folder: Path, size: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is cut short: its header does not fit in {size} bytes" in complaint(folder)


def test_a_pointer_in_place_of_the_weights_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n")
    assert f"{path} is cut short" in complaint(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: b"\xff" + header[1:],
        lambda header: b"\0" + header[1:],
        lambda header: b"[]".ljust(len(header)),
        lambda header: header.replace(b"data_offsets", b"data_offsetz"),
    ],
    ids=["not UTF-8", "not JSON", "not an object", "no offsets"],
)
def test_weights_whose_header_is_damaged_are_refused_by_name(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:8] + damage(whole[8:end]) + whole[end:])
    assert str(path) in complaint(folder)


def test_one_damaged_file_of_several_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny.tiny_model().save_pretrained(folder, max_shard_size="100KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last} is cut short" in complaint(folder)


def test_a_weight_file_that_the_index_names_and_is_not_there_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny.tiny_model().save_pretrained(folder, max_shard_size="100KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    assert last.name in complaint(folder)


def test_weights_that_transformers_does_not_read_are_no_weights(folder: Path) -> None:
    (folder / "model.fp16.safetensors").write_bytes(b"another form")
    assert names(locate(folder).weights) == ["config.json", "generation_config.json", WEIGHTS]
    (folder / WEIGHTS).unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in complaint(folder)
    assert "but model.fp16.safetensors" in complaint(folder)


def test_an_index_that_places_no_weight_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert names(locate(folder).weights)[-1] == WEIGHTS  # which transformers prefers to an index
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    assert "has no `weight_map`" in complaint(folder)


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_a_model_that_is_quantised_already_is_refused_wherever_it_says_so(folder: Path, place: str) -> None:
    said = {"quant_method": "fp8"}
    change_config(folder, **{place: {"quantization_config": said} if place == "text_config" else said})
    assert "is quantised already (fp8); give the original model" in complaint(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_that_no_configuration_tells_of_are_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / WEIGHTS, {"format": "pt"})
    assert f"holds {name} as {'I8' if dtype == torch.int8 else 'F8_E4M3'}: the model is quantised" in complaint(folder)


def test_every_file_that_decides_tokens_is_found(folder: Path) -> None:
    (folder / "tekken.json").write_text("{}")
    (folder / "own.tiktoken").write_text("IQ== 0")
    assert {"tekken.json", "own.tiktoken"} <= set(names(locate(folder).tokenizer))
    (folder / "own.tiktoken").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert names(locate(folder).tokenizer) == ["tekken.json"]


# --- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_its_own_weights_and_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tiny-q4.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert locate(path) == ModelFiles("tiny-q4", tmp_path, "tiny-q4.gguf", (path,), (path,))


def test_code_of_another_repository_is_refused_where_it_would_be_run(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModel": "org/base--m.Body", "AutoModelForCausalLM": "m.Model"})
    assert locate_model(Model(source=str(folder), trust_remote_code=True)).folder == folder
    change_config(folder, auto_map={"AutoModelForCausalLM": "org/base--m.Model"})
    assert locate(folder).folder == folder
    with pytest.raises(InputError, match=r"takes AutoModelForCausalLM from another repository \(org/base--m\.Model\)"):
        locate_model(Model(source=str(folder), trust_remote_code=True))


def test_a_part_of_a_gguf_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "is one of 3 parts of a GGUF model; put them together" in complaint(tmp_path / "big-00001-of-00003.gguf")
    whole = (tmp_path / "big-00001-of-00003.gguf").rename(tmp_path / "big-00001-of-00001.gguf")
    assert locate(whole).gguf == whole.name


def test_a_gguf_file_has_no_configuration_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert locate(tmp_path / "tiny.gguf").config() == {}


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGML\x03\0\0\0", b"<html>"])
def test_a_file_that_is_gguf_by_name_only_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    said = complaint(path)
    assert f"model.source {path} does not begin as a GGUF file does" in said
    assert "cut short" in said


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"there is no GGUF file {tmp_path / 'none.gguf'}" in complaint(tmp_path / "none.gguf")


def test_another_kind_of_file_is_told_what_would_be_right(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"pickle")
    said = complaint(path)
    assert f"model.source {path} is a file" in said
    assert ".gguf file or a hub id" in said


# --- hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["covercal-tests/there-is-no-such-model", "models/of/mine", "my model"])
def test_a_hub_id_that_cannot_be_had_is_named(source: str) -> None:
    said = complaint(source)
    assert f"model.source {source!r} is no folder and no GGUF file here" in said
    assert "the hub gave no model of that name" in said


def test_a_model_in_the_hubs_cache_is_found_by_its_id(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789" * 4
    cached = tmp_path / "models--owner--tiny"
    shutil.copytree(original, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = locate("owner/tiny")
    assert (found.name, found.folder) == ("owner/tiny", cached / "snapshots" / commit)


def test_models_are_found_without_importing_torch(folder: Path) -> None:
    code = (
        "import sys; from covercal.model_files import locate_model; from covercal.recipe import Model; "
        "locate_model(Model(source=sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
