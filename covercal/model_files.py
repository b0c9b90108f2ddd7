"""Where a model's files are, without loading it: hub id, folder or GGUF file -> paths. Imports no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covercal.errors import InputError
from covercal.recipe import Model

WEIGHTS = "*.safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOT_READ = ["*/*", "consolidated*"]  # by transformers, though they are safetensors files of the model
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONFIGS = ("config.json", "generation_config.json")
PROCESSOR = (  # of what is no text
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    *PROCESSOR,
)
TIKTOKEN = "*.tiktoken"  # vocabularies of tokenizers that bring code along
ELSEWHERE = "--"  # between the repository and the name of a class whose code is not beside the configuration
LOADED = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
WIDE = ("F16", "BF16", "F32", "F64")  # what weights that are not quantised are stored as
READS_MORE = "ForConditionalGeneration"  # end of an architecture that reads images or sound beside text


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes
    ----------
    name
        What people call the model.
    folder
        Folder that holds all files.
    gguf
        Name of the GGUF file in it, or empty for a safetensors folder.
    weights, tokenizer
        The files that decide the model's outputs, and the tokens.
    """

    name: str
    folder: Path
    gguf: str
    weights: tuple[Path, ...]
    tokenizer: tuple[Path, ...]

    def config(self) -> dict[str, Any]:
        """Return `config.json` (empty for GGUF).

        Raises
        ------
        InputError
            When it is no JSON object.
        """
        return {} if self.gguf else _json_object(self.folder / "config.json")


def block_count(folder: Path) -> int:
    """Return how many blocks a model folder's configuration names.

    Raises
    ------
    InputError
        When it names no number.
    """
    config = _json_object(folder / "config.json")
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(values.get(name), int):
                return int(values[name])
    raise InputError(f"{folder / 'config.json'} does not say how many blocks the model has (num_hidden_layers).")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers reads in a folder: the single one, else those of the index."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return (folder / SINGLE,)
    return tuple(folder / name for name in _indexed(folder / INDEX))


def locate_model(model: Model) -> ModelFiles:
    """Find a model's files; a hub id is downloaded to the hub's own cache (safetensors only).

    Raises
    ------
    InputError
        When nothing is there, the weights are pickles only, or it is not a decoder.
    """
    path = Path(model.source)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        return _folder(path, path.name, model.trust_remote_code)
    if path.exists():
        raise InputError(f"model.source {path} is a file; give a folder with safetensors, a .gguf file or a hub id.")
    return _folder(_download(model), model.source, model.trust_remote_code)


def _gguf(path: Path) -> ModelFiles:
    if not path.is_file():
        raise InputError(f"model.source: there is no GGUF file {path}.")
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)
    if part and int(part[1]) > 1:
        raise InputError(
            f"model.source {path} is one of {int(part[1])} parts of a GGUF model; put them together first "
            "(llama-gguf-split --merge)."
        )
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(
                f"model.source {path} does not begin as a GGUF file does; is it cut short or another format?"
            )
    return ModelFiles(path.stem, path.parent, path.name, (path,), (path,))


def _folder(folder: Path, name: str, own_code: bool) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise InputError(f"model.source {folder} has no config.json; it is not a transformers model folder.")
    found = tuple(sorted(folder.glob(WEIGHTS)))
    if not found:
        pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        if pickles:
            raise InputError(
                f"model.source {folder} holds its weights as pickle ({pickles[0]}), which can run code when "
                "it is read; convert it to safetensors first."
            )
        raise InputError(f"model.source {folder} has no *.safetensors file.")
    check_shards(folder)
    weights = weight_files(folder)
    if not weights[0].is_file():
        raise InputError(
            f"model.source {folder} has neither {SINGLE} nor {INDEX}, of which transformers reads one, but "
            f"{found[0].name}; fetch the missing file."
        )
    tokenizer = tuple(p for name_ in TOKENIZER if (p := folder / name_).is_file())
    tokenizer += tuple(sorted(folder.glob(TIKTOKEN)))
    if all(p.name in PROCESSOR for p in tokenizer):
        raise InputError(f"model.source {folder} has no tokenizer files (tokenizer.json or tokenizer.model).")
    configs = (p for c in CONFIGS if (p := folder / c).is_file())
    code = sorted(folder.glob("*.py")) if own_code else []
    files = ModelFiles(name, folder, "", (*configs, *code, *weights), (*tokenizer, *code))
    _check_decoder(files)
    if own_code:
        _check_own_code(folder)
    for each in weights:
        _check_safetensors(each)
    return files


def loader_of(config: Mapping[str, Any]) -> str:
    """Return the name of what in transformers makes the language model of a `config.json`; empty when nothing does.

    A causal language model where it knows one of that type, also as a part of a model that reads images; else, of such
    a model, the whole.
    """
    names, kind = config.get("architectures") or [], config.get("model_type")
    causal = _is_causal(names)
    if not causal and ("text_config" not in config or not names or not names[0].endswith(READS_MORE)):
        return ""
    from transformers.models.auto import modeling_auto as known

    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "AutoModelForCausalLM"
    if kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:  # some text models, too: Mistral 4
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM" if causal else ""


def _is_causal(names: Sequence[str]) -> bool:
    return any("CausalLM" in name or "LMHead" in name for name in names)


def left_out(config: Mapping[str, Any], loaded: str) -> str:
    """Return what of a model is not in a checkpoint of it, in a sentence; empty when nothing.

    Parameters
    ----------
    config
        Its `config.json`.
    loaded
        The class that transformers made of it.
    """
    named = str((config.get("architectures") or [loaded])[0])
    if named == loaded or not named.endswith(READS_MORE):
        return ""
    return f"of {named} only the language model is quantised and written, as a {loaded}: it reads no images."


def _check_decoder(files: ModelFiles) -> None:
    config = files.config()
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not (_is_causal(names) or loader_of(config)):  # which imports torch
        raise InputError(
            f"model.source {files.folder} is a {names[0] if names else 'model without an architecture'}, "
            "not a decoder; covercal quantises causal language models (an architecture that ends in ForCausalLM, or "
            "one that reads images, too)."
        )
    for inner in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(inner, dict) and inner.get(name):
                method = dict(inner[name]).get("quant_method", "unknown")
                raise InputError(
                    f"model.source {files.folder} is quantised already ({method}); give the original model."
                )


def _check_own_code(folder: Path) -> None:
    """Raise when code that the model needs lies in another repository: it would be no part of what is fingerprinted."""
    for name in ("config.json", "tokenizer_config.json"):
        found = _json_object(folder / name).get("auto_map") if (folder / name).is_file() else None
        classes = found if isinstance(found, dict) else {}
        for kind in LOADED:
            if ELSEWHERE in str(classes.get(kind)):
                raise InputError(
                    f"{folder / name} takes {kind} from another repository ({classes[kind]}); copy that code into the "
                    "folder, and name it there as MODULE.CLASS."
                )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as cause:
        raise InputError(f"{path} is not valid JSON: {cause}.") from cause
    if not isinstance(value, dict):
        raise InputError(f"{path} must be a JSON object.")
    return value


def check_shards(folder: Path) -> None:
    """Raise when the index of a sharded model names what is no safetensors file of its folder, or is not there."""
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():
        for name in _indexed(index):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"The index {index} names {name!r}, which is no safetensors file of that folder.")
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks {name}, which {INDEX} names; fetch the file.")


def _indexed(index: Path) -> list[str]:
    """Return the names of the files that the index of a sharded model lists."""
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"The index {index} has no `weight_map` that says in which file each weight is; fetch it again."
        )
    return sorted({str(name) for name in names.values()})


def _check_safetensors(path: Path) -> None:
    """Raise when a safetensors file is shorter than its own header says, or holds quantised weights."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path} is cut short: its header does not fit in {size} bytes; fetch the file again.")
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as cause:
        raise InputError(f"{path} has a damaged header ({cause}); fetch the file again.") from cause
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        fault = "is cut short" if size < wanted else "is too long"
        raise InputError(f"{path} {fault}: {size} bytes instead of {wanted}; fetch the file again.")
    for name, entry in header.items():
        if name.endswith(".weight") and not str(entry.get("dtype")).startswith(WIDE):
            raise InputError(
                f"{path} holds {name} as {entry.get('dtype')}: the model is quantised already; give the original model."
            )


def _download(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [WEIGHTS, *CONFIGS, *TOKENIZER, TIKTOKEN, INDEX]
    if model.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(
            snapshot_download(model.source, revision=model.revision, allow_patterns=patterns, ignore_patterns=NOT_READ)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise InputError(
            f"model.source {model.source!r} is no folder and no GGUF file here, and the hub gave no model of that "
            f"name: {str(cause).splitlines()[0]}"
        ) from cause
