"""Stage `model`: a GGUF file unpacked to a safetensors folder once; and loaded models, shared within a process."""

import filecmp
import functools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covercal.errors import InputError
from covercal.model_files import weight_files
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from tasks.cached import Build, cached
from tasks.identities import ModelIdentity, model_folder

if TYPE_CHECKING:
    from covercal.decoder import Decoder
    from covercal.quantization_settings import Dtype

_loaded: dict[tuple[Any, ...], "Decoder"] = {}
_judged: dict[tuple[str, str, str], "Decoder"] = {}
_loading = threading.Lock()
OWN_CLASS = re.compile(r"\w+\.\w+|None")  # of a module beside the configuration


@cached("model", version=2)
def import_model(build: Build, *, model: ModelIdentity) -> dict[str, Any]:
    """Dequantise a GGUF file to float32 safetensors, with its configuration and tokenizer."""
    with _parsed_once():
        return _unpack(build, model)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let a GGUF file be parsed once; transformers does it for tokenizer, configuration and weights, seconds each."""
    import gguf

    reader = gguf.GGUFReader
    parsed = functools.cache(reader)
    gguf.GGUFReader = lambda path, *rest, **named: parsed(str(path), *rest, **named)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _unpack(build: Build, model: ModelIdentity) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    advance = build.progress(3, "parts")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder, gguf_file=model.gguf, trust_remote_code=False)
        advance(1)
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model.folder,
            gguf_file=model.gguf,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, RuntimeError) as cause:
        raise InputError(
            f"model.source {Path(model.folder) / model.gguf} cannot be read as a GGUF model: "
            f"{str(cause).splitlines()[0] if str(cause) else type(cause).__name__}; is the file cut short?"
        ) from cause
    for name in sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise InputError(f"model.source {Path(model.folder) / model.gguf} lacks the weight {name}.")
    advance(1)
    wanted = sum(p.numel() * p.element_size() for p in loaded.parameters())
    build.store.require_space(wanted, f"The unpacked model {model.name}")
    del loaded.config.quantization_config
    loaded.hf_quantizer = None
    loaded.config._name_or_path = model.name
    loaded.save_pretrained(build.folder)
    tokenizer.save_pretrained(build.folder)
    advance(1)
    return {"dequantised_from": gguf_type(Path(model.folder) / model.gguf)}


def gguf_type(path: Path) -> str:
    """Return how most weights of a GGUF file are stored, such as `Q4_1`."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(path).get_field("general.file_type")
    names = {int(each): each.name for each in LlamaFileType}
    return "GGUF" if field is None else names.get(int(field.contents()), "GGUF").removeprefix("MOSTLY_")


def original_decoder(
    store: ArtifactStore, model: ModelIdentity, imported: Ref | None, dtype: "Dtype", device: str
) -> "Decoder":
    """Return the original model, loaded at most once per process; callers must not change it."""
    return _shared_decoder(store, model, imported, dtype, device, streamed=False)


def streamed_decoder(
    store: ArtifactStore, model: ModelIdentity, imported: Ref | None, dtype: "Dtype", device: str
) -> "Decoder":
    """Return the original model, its blocks' weights read only when they are asked for; callers must not change it.

    It is for models that hardly fit: a checkpoint that was judged before is let go.
    """
    with _loading:
        _judged.clear()
    return _shared_decoder(store, model, imported, dtype, device, streamed=True)


def _shared_decoder(
    store: ArtifactStore, model: ModelIdentity, imported: Ref | None, dtype: "Dtype", device: str, *, streamed: bool
) -> "Decoder":
    from covercal.decoder import load_decoder, pick_device

    quiet_transformers()
    where = pick_device(device)
    folder = model_folder(store, model, imported)
    # blocks are read from the folder later, and what was read while its files were changed is not the model's
    key = (model.weights, str(folder), _stamps(folder), dtype, str(where), streamed)
    with _loading:
        if key not in _loaded:
            for other in [each for each in _loaded if each[-1] == streamed or not each[-1]]:
                del _loaded[other]  # at most one model is held whole
            trusted = trusts(model, imported)
            _loaded[key] = load_decoder(folder, dtype, where, trust_remote_code=trusted, streamed=streamed)
        return _loaded[key]


def _stamps(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, number, size and time of change of the files that a model is read from."""
    files = (folder / "config.json", *weight_files(folder))
    found = ((each.name, each.stat()) for each in files if each.exists())  # else told where it is read
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def checkpoint_decoder(
    store: ArtifactStore, checkpoint: Ref, model: ModelIdentity, dtype: "Dtype", device: str
) -> "Decoder":
    """Return a checkpoint loaded the way its users will load it; the last one is kept: several steps judge it.

    Parameters
    ----------
    model
        That it was made of.
    """
    from covercal.decoder import load_decoder, pick_device

    quiet_transformers()
    where = pick_device(device)
    key = (checkpoint.digest, dtype, str(where))
    with _loading:
        if key not in _judged:
            _judged.clear()
            folder = store.path(checkpoint)
            _judged[key] = load_decoder(folder, dtype, where, trust_remote_code=trusts_copy(model, folder))
        return _judged[key]


def trusts(model: ModelIdentity, imported: Ref | None) -> bool:
    """Return whether code in the model's folder may run: never that of an artifact, which brings none along."""
    return model.trust_remote_code and imported is None


def trusts_copy(model: ModelIdentity, folder: Path) -> bool:
    """Return whether code in a checkpoint may run: only what is, byte for byte, the code of a model that is trusted.

    Its configurations may name no code elsewhere, which transformers would fetch, or read from another folder.
    """
    own = Path(model.folder)
    code = [path.relative_to(folder) for path in folder.rglob("*.py")]
    return (
        bool(code)
        and trusts(model, None)
        and all((own / each).is_file() and filecmp.cmp(own / each, folder / each, shallow=False) for each in code)
        and all(OWN_CLASS.fullmatch(name) for path in folder.glob("*config*.json") for name in _classes_in(path))
    )


def _classes_in(path: Path) -> Iterator[str]:
    """Yield the names of the classes that a JSON file wants loaded from code, wherever in it."""
    values: list[Any] = [json.loads(path.read_bytes())]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
            named = value.get("auto_map")
            for each in named.values() if isinstance(named, dict) else ():
                yield from map(str, each if isinstance(each, list) else [each])
        elif isinstance(value, list):
            values.extend(value)


def load_tokenizer(store: ArtifactStore, model: ModelIdentity, imported: Ref | None) -> Any:
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer

    quiet_transformers()
    return AutoTokenizer.from_pretrained(
        model_folder(store, model, imported), trust_remote_code=trusts(model, imported), local_files_only=True
    )


def quiet_transformers() -> None:
    """Keep the libraries' own bars and warnings out of the display: steps report their progress themselves.

    A text longer than the model's context, for one, is cut into samples; no warning is needed.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
