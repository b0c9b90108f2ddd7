"""A quantised checkpoint in a form of compressed-tensors that transformers loads by itself, or dense."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.dynamic_module_utils import custom_object_save

from covercal.decoder import DTYPES, Decoder, stays_wide
from covercal.errors import QuantizationError
from covercal.experts import checkpoint_names, has_experts, is_linear, keeps_together, put_together, skeleton_of
from covercal.model_files import ELSEWHERE
from covercal.quantization import QuantizedBlock, QuantizedLinear, dequantized
from covercal.quantization_settings import Dtype, Quantization
from covercal.transposed import turned_weights

INDEX = "model.safetensors.index.json"
RECORD = "covercal.json"
WORD = 32  # bits; codes are packed into such
FLATTENING = frozenset({"opt"})  # types of models that hand their linears (tokens, channels) without sequences
Format = Literal["pack-quantized", "int-quantized", "dense"]


def checkpoint_format(settings: Quantization, model: PreTrainedModel) -> tuple[Format, str]:
    """Return how weights are kept, and when it is dense, why.

    Packed codes are the default. Quantised activations need `int-quantized`. What neither can hold is kept dense: the
    same values in the checkpoint's dtype, without its smaller size.
    """
    if settings.salient.share:
        return "dense", "salient weights have a grid of their own, which no packed format has"
    if settings.activations.kind != "none":
        return "int-quantized", ""
    if turned_weights(model):
        return "dense", "files of this model keep weights (inputs, outputs), which no packed format does"
    if takes_apart(model):
        return "dense", "transformers reads no packed weights of a model whose files keep several linears in one"
    if has_experts(model) and not settings.symmetric:
        return "dense", "transformers reads packed experts on symmetric grids only"
    if has_experts(model) and keeps_together(model, checkpoint_names(model)):
        return (
            "dense",
            "checkpoints of this model hold all experts of a layer in one tensor, which no packed format has",
        )
    if not settings.symmetric and any(
        is_linear(m) and m.out_features <= WORD // settings.bits for m in model.modules()
    ):
        return "dense", "compressed-tensors cannot unpack the zero points of a linear with so few outputs"
    return "pack-quantized", ""


def takes_apart(model: PreTrainedModel) -> bool:
    """Return whether transformers makes several weights of one in files, which it cannot with quantised ones beside.

    Its converters then read many tensors (codes, scales) of one and make many, which most of their operations refuse.
    """
    return any(
        len(converter.target_patterns) > 1 and all(source.endswith(".weight") for source in converter.source_patterns)
        for converter in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(converter, WeightConverter)
    )


def check_format(settings: Quantization, model: PreTrainedModel) -> None:
    """Raise when no format that transformers reads can hold what the settings make of a model.

    Raises
    ------
    QuantizationError
        For quantised activations of a model with experts, with transposed weights, or that `takes_apart` what files
        hold, and dynamic ones of a model whose linears read matrices.
    """
    if settings.activations.kind != "none" and (takes_apart(model) or turned_weights(model)):
        why = "transposed" if turned_weights(model) else "several in one tensor"
        raise QuantizationError(
            f"quantization.activations: {settings.activations.kind} cannot be kept for a model of type "
            f"{model.config.model_type}: its files keep the weights of linears {why}, and transformers reads no "
            "quantised ones of such a model; use activations: none."
        )
    if settings.activations.kind != "none" and has_experts(model):
        raise QuantizationError(
            f"quantization.activations: {settings.activations.kind} cannot be kept for a model with experts: "
            "transformers reads experts without the scales of their inputs; use activations: none."
        )
    if settings.activations.kind == "dynamic" and model.config.model_type in FLATTENING:
        raise QuantizationError(
            f"quantization.activations: dynamic cannot be kept for a model of type {model.config.model_type}: its "
            "linears read a matrix, of which compressed-tensors takes every number for a token; use activations: "
            "static or none."
        )


@dataclass(slots=True)
class CheckpointWriter:
    """Writes a checkpoint block by block, one safetensors shard each, so that no more than one block is held.

    Attributes
    ----------
    decoder
        The original model: gives names, configuration and what is around the blocks.
    settings, storage_dtype
        The grid, and the dtype of everything that is not a code.
    """

    decoder: Decoder
    settings: Quantization
    storage_dtype: Dtype
    format: Format = field(init=False)
    why_dense: str = field(init=False)
    _names: dict[str, str] = field(init=False)
    _turned: frozenset[str] = field(init=False)  # weights that files keep transposed
    _skeleton: PreTrainedModel | None = field(init=False)  # only of a dense one with experts
    _stays_wide: Callable[[str], bool] = field(init=False)

    def __post_init__(self) -> None:
        self.format, self.why_dense = checkpoint_format(self.settings, self.decoder.model)
        self._names = checkpoint_names(self.decoder.model)
        self._turned = turned_weights(self.decoder.model)
        self._stays_wide = stays_wide(self.decoder.model, self.storage_dtype)
        together = self.format == "dense" and has_experts(self.decoder.model)
        self._skeleton = skeleton_of(self.decoder.model) if together else None

    def shard_name(self, index: int) -> str:
        """Return the file name of a block's shard; one more follows the last block."""
        return f"model-{index + 1:05d}-of-{len(self.decoder.blocks) + 1:05d}.safetensors"

    def write_block(self, block: QuantizedBlock, folder: Path) -> None:
        """Write the shard of one block into `folder`."""
        tensors, codes = dict(block.others), dict[str, Tensor]()
        for linear in block.linears:
            if self.format == "dense":
                tensors[f"{linear.name}.weight"] = dequantized(linear, DTYPES[self.storage_dtype])
            else:
                codes |= self._coded(linear)
        self._save(tensors, codes, folder / self.shard_name(block.index))

    def finish(self, folder: Path, quantized: Iterable[str], record: Mapping[str, Any]) -> None:
        """Write all that is not in a block, the index, the configuration and `covercal.json`.

        Parameters
        ----------
        folder
            Holds the shards of all blocks.
        quantized
            Names of the quantised linears.
        record
            How the checkpoint came to be.
        """
        with self.decoder.around(head=True):
            self._save(self._around(), {}, folder / self.shard_name(len(self.decoder.blocks)))
        places: dict[str, str] = {}
        total = 0
        for index in range(len(self.decoder.blocks) + 1):
            name = self.shard_name(index)
            sizes = tensor_sizes(folder / name)
            places |= dict.fromkeys(sizes, name)
            total += sum(sizes.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        self._write_config(folder, set(quantized))
        _write_json(folder / RECORD, {**record, "format": self.format, "why_dense": self.why_dense})

    def _coded(self, linear: QuantizedLinear) -> dict[str, Tensor]:
        """Return what takes the place of a linear's weight, by names in a checkpoint."""
        weight = self._names.get(f"{linear.name}.weight", f"{linear.name}.weight")
        make = integer_tensors if self.format == "int-quantized" else packed_tensors
        return make(replace(linear, name=weight.removesuffix(".weight")), self.settings)

    def _around(self) -> dict[str, Tensor]:
        """Return the state outside the blocks by name, without names that are tied to an earlier one."""
        inside = f"{self.decoder.blocks_path}."
        kept: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in self.decoder.model.state_dict().items():
            if name.startswith(inside):
                continue
            place = (tensor.data_ptr(), tensor.shape)
            if place not in seen:
                seen.add(place)
                kept[name] = tensor
        return kept

    def _save(self, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor], path: Path) -> None:
        """Write tensors by their names in the model, and codes by theirs in a checkpoint."""
        stored = {name: self._in_storage_dtype(name, each) for name, each in tensors.items()}
        stored |= {name: stored[name].T for name in self._turned & stored.keys()}
        if self._skeleton is not None:
            stored = put_together(self._skeleton, stored)
        else:
            stored = {self._names.get(name, name): each for name, each in stored.items()}
        stored |= {name: self._in_storage_dtype(name, each) for name, each in codes.items()}
        names = sorted(stored)  # let go one after the other: no second copy of the block is held
        save_file({n: stored.pop(n).detach().cpu().contiguous().clone() for n in names}, path, {"format": "pt"})

    def _in_storage_dtype(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if self._stays_wide(name) else DTYPES[self.storage_dtype])

    def _write_config(self, folder: Path, quantized: set[str]) -> None:
        model = self.decoder.model
        config = copy.deepcopy(model.config)
        if self.format != "dense":
            config.quantization_config = quantization_config(model, self.settings, quantized, self.format)
        config.dtype = self.storage_dtype
        config.architectures = [type(model).__name__]
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
            config.auto_map = {name: each for name, each in config.auto_map.items() if ELSEWHERE not in str(each)}
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of every tensor of a safetensors file by name, from its header."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {n: each["data_offsets"][1] - each["data_offsets"][0] for n, each in header.items() if n != "__metadata__"}


def checkpoint_bytes(decoder: Decoder, settings: Quantization, storage_dtype: Dtype) -> int:
    """Return about how many bytes a checkpoint will have: packed codes, 16-bit scales, and the rest as it is stored."""
    shapes = decoder.linear_shapes
    width = torch.empty((), dtype=DTYPES[storage_dtype]).element_size()
    weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    rest = (sum(p.numel() for p in decoder.model.parameters()) - weights) * width
    form, _ = checkpoint_format(settings, decoder.model)
    if form == "dense":
        return int(rest + weights * width)
    code_bytes = 1.0 if form == "int-quantized" else settings.bits / 8
    groups = sum(outputs * inputs / (settings.group_size or inputs) for outputs, inputs in shapes.values())
    return int(rest + weights * code_bytes + groups * (width + code_bytes))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def packed_tensors(linear: QuantizedLinear, settings: Quantization) -> dict[str, Tensor]:
    """Return a linear's tensors by name: packed codes, scale, shape, and packed zero points when asymmetric.

    Codes and zero points are shifted to the signed range that the format counts in.
    """
    middle = 2 ** (settings.bits - 1)
    codes = (linear.codes.to(torch.int16) - middle).to(torch.int8)
    tensors = {
        f"{linear.name}.weight_packed": pack_to_int32(codes, settings.bits),
        f"{linear.name}.weight_scale": linear.scale,
        f"{linear.name}.weight_shape": torch.tensor(linear.codes.shape),
    }
    if not settings.symmetric:
        zero = (linear.zero.to(torch.int16) - middle).to(torch.int8)
        tensors[f"{linear.name}.weight_zero_point"] = pack_to_int32(zero, settings.bits, packed_dim=0)
    return tensors


def integer_tensors(linear: QuantizedLinear, settings: Quantization) -> dict[str, Tensor]:
    """Return a linear's tensors by name: int8 codes, scale, zero points when asymmetric, and the step of its inputs."""
    middle = 2 ** (settings.bits - 1)
    tensors = {
        f"{linear.name}.weight": (linear.codes.to(torch.int16) - middle).to(torch.int8),
        f"{linear.name}.weight_scale": linear.scale,
    }
    if not settings.symmetric:
        tensors[f"{linear.name}.weight_zero_point"] = (linear.zero.to(torch.int16) - middle).to(torch.int8)
    if linear.input_scale is not None:
        tensors[f"{linear.name}.input_scale"] = linear.input_scale
    return tensors


def quantization_config(model: nn.Module, settings: Quantization, quantized: set[str], form: Format) -> dict[str, Any]:
    """Return the `quantization_config` of the checkpoint's `config.json`.

    `dequantize` lets transformers unpack packed weights while it loads them. Its other way, packed until the first
    forward pass, expects unpacked zero points in an asymmetric checkpoint (compressed-tensors 0.20 does not pack them
    when it prepares the empty model) and refuses the file; other readers do not know the field. With quantised
    activations the linears stay what compressed-tensors makes of them, which quantises their inputs.
    """
    weights = QuantizationArgs(
        num_bits=settings.bits,
        type="int",
        symmetric=settings.symmetric,
        strategy="channel" if settings.group_size is None else "group",
        group_size=settings.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=_inputs(settings), format=form)
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        quantization_status="compressed",
        ignore=ignored,
    )
    value: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return value | ({"dequantize": True} if form == "pack-quantized" else {})


def _inputs(settings: Quantization) -> QuantizationArgs | None:
    activations = settings.activations
    if activations.kind == "none":
        return None
    dynamic = activations.kind == "dynamic"
    return QuantizationArgs(
        num_bits=activations.bits,
        type="int",
        symmetric=True,
        strategy="token" if dynamic else "tensor",
        dynamic=dynamic,
    )
