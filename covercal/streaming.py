"""A model's weights read from its safetensors files one block at a time, converted as transformers would."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from covercal.errors import InputError
from covercal.model_files import loader_of, weight_files

COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def loader_for(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that makes a configuration's language model: see `loader_of`."""
    return getattr(transformers, loader_of(config.to_dict()) or "AutoModelForCausalLM")


def body_of(model: PreTrainedModel, blocks_path: str) -> nn.Module:
    """Return a model without its language-model head."""
    body: nn.Module = model.get_decoder()
    blocks = model.get_submodule(blocks_path)
    if all(module is not blocks for module in body.modules()):  # some models call their head the decoder
        body = model.base_model
    return body if body is not model else model.get_submodule(blocks_path.rpartition(".")[0])  # Llama 4


def empty_model(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model of a folder's configuration, without weights (on the meta device) but with computed buffers."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = loader_for(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


class StreamedWeights:
    """Reads the blocks of a model, and what is around them, when they are asked for.

    Parameters
    ----------
    folder
        Holds the safetensors files.
    model
        From `empty_model`.
    blocks_path
        Name of its list of blocks.
    device
        Where weights are put.

    Attributes
    ----------
    unknown
        Names of tensors in the files that the model does not have, but for those that it computes.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, blocks_path: str, device: torch.device) -> None:
        self._model, self._path, self.device = model, blocks_path, device
        self._mapping = get_model_conversion_mapping(model)
        self._blocks: dict[int, dict[str, Path]] = {}
        self._rest: dict[str, Path] = {}
        self._targets: dict[str, str] = {}  # what a tensor of the files is called in the model
        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        names = model.state_dict()
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
            for key in keys:
                target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
                index = self._block_of(target)
                (self._rest if index is None else self._blocks.setdefault(index, {}))[key] = path
                self._targets[key] = target
        foreign = (key for key, target in self._targets.items() if target not in names)
        self.unknown = tuple(sorted(key for key in foreign if not key.endswith(COMPUTED)))

    @contextmanager
    def rest(self, *, head: bool) -> Iterator[None]:
        """Have what is outside the blocks in the model for a while; without its language-model head if that is apart.

        Raises
        ------
        InputError
            When the files lack one of its weights.
        """
        inside = f"{self._path}."
        outside = [(name, p) for name, p in self._model.named_parameters() if not name.startswith(inside)]
        body = {id(parameter) for parameter in body_of(self._model, self._path).parameters()}
        apart = set() if head else {name for name, parameter in outside if id(parameter) not in body}
        missing = self._load({key: path for key, path in self._rest.items() if self._targets[key] not in apart})
        with torch.inference_mode(mode=False):  # a bias of a tied head is padded in place
            self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
        names = {name for name, _ in outside} - apart
        _check_loaded((n, p) for n, p in self._model.named_parameters() if n in names)
        try:
            yield
        finally:
            for name, empty in outside:
                _place(self._model, name, empty)
            with torch.inference_mode(mode=False):
                self._model.tie_weights()

    def block(self, index: int) -> nn.Module:
        """Return a block with its weights, which the caller owns; the model's own block stays empty.

        Raises
        ------
        InputError
            When the files lack one of its weights, or have it in another shape.
        """
        empty = self._model.get_submodule(f"{self._path}.{index}")
        kept = dict(empty.named_parameters())
        loaded = copy.deepcopy(empty)
        self._load(self._blocks.get(index, {}))
        _check_loaded((f"{self._path}.{index}.{name}", p) for name, p in empty.named_parameters())
        for name, parameter in list(empty.named_parameters()):
            # a copy: what lies in a mapped file stays in memory as long as any weight of the file does
            _place(loaded, name, nn.Parameter(parameter.data.clone(), requires_grad=False))
            _place(empty, name, kept[name])
        for name, buffer in empty.named_buffers():  # a kept one was read, too
            _place(loaded, name, buffer.clone())
        block: nn.Module = loaded.to(self.device).eval().requires_grad_(False)
        return block

    def _block_of(self, name: str) -> int | None:
        inside = f"{self._path}."
        number = name.removeprefix(inside).split(".", 1)[0]
        return int(number) if name.startswith(inside) and number.isdecimal() else None

    def _load(self, places: dict[str, Path]) -> set[str]:
        """Load some tensors of the files into the model; returns what is missing of the whole model then."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(places.values())}
            slices = {key: files[path].get_slice(key) for key, path in places.items()}
            settings = LoadStateDictConfig(
                device_map={"": str(self.device)},
                dtype=self._model.dtype,
                dtype_plan=self._model._get_dtype_plan(self._model.dtype),
                weight_mapping=self._mapping,
            )
            info, _ = convert_and_load_state_dict_in_model(self._model, slices, settings)
        for name, found, wanted in sorted(info.mismatched_keys):
            raise InputError(f"The weight {name} has shape {tuple(found)} in the model's files, not {tuple(wanted)}.")
        for name, fault in info.conversion_errors.items():
            raise InputError(f"The weight {name} of the model's files cannot be converted: {fault}")
        self._model.requires_grad_(False)
        missing: set[str] = info.missing_keys
        return missing


def _check_loaded(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in parameters:
        if parameter.is_meta:
            raise InputError(f"The model's files lack the weight {name}.")


def _place(module: nn.Module, name: str, parameter: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, parameter)
