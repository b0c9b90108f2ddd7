"""A quantised checkpoint in compressed-tensors' `pack-quantized` form, which transformers loads by itself."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor, nn

from covercal.decoder import DTYPES, Decoder
from covercal.quantization import QuantizedBlock, QuantizedLinear
from covercal.recipe import Dtype, Quantization

INDEX = "model.safetensors.index.json"
RECORD = "covercal.json"


@dataclass(slots=True)
class CheckpointWriter:
    """Writes a checkpoint block by block, one safetensors shard each, so that no more than one block is held.

    Attributes
    ----------
    decoder
        The original model: gives names, configuration and what is not quantised.
    settings, storage_dtype
        The grid, and the dtype of everything that is not a code.
    """

    decoder: Decoder
    settings: Quantization
    storage_dtype: Dtype

    def shard_name(self, index: int) -> str:
        """Return the file name of a block's shard; one more follows the last block."""
        return f"model-{index + 1:05d}-of-{len(self.decoder.blocks) + 1:05d}.safetensors"

    def write_block(self, block: QuantizedBlock, folder: Path) -> None:
        """Write the shard of one block into `folder`."""
        tensors = {n: t for n, t in self._unquantized().items() if n.startswith(self._prefix(block.index))}
        for linear in block.linears:
            del tensors[f"{linear.name}.weight"]
            tensors.update(packed_tensors(linear, self.settings))
        self._save(tensors, folder / self.shard_name(block.index))

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
        prefixes = tuple(self._prefix(index) for index in range(len(self.decoder.blocks)))
        rest = {n: t for n, t in self._unquantized().items() if not n.startswith(prefixes)}
        self._save(rest, folder / self.shard_name(len(self.decoder.blocks)))
        places: dict[str, str] = {}
        total = 0
        for index in range(len(self.decoder.blocks) + 1):
            name = self.shard_name(index)
            sizes = tensor_sizes(folder / name)
            places |= dict.fromkeys(sizes, name)
            total += sum(sizes.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        self._write_config(folder, set(quantized))
        _write_json(folder / RECORD, record)

    def _prefix(self, index: int) -> str:
        return f"{self.decoder.blocks_path}.{index}."

    def _unquantized(self) -> dict[str, Tensor]:
        """Return the model's state by name, without names that are tied to an earlier one."""
        kept: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in self.decoder.model.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape)
            if place not in seen:
                seen.add(place)
                kept[name] = tensor
        return kept

    def _save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        save_file({key: self._stored(tensor) for key, tensor in sorted(tensors.items())}, path, {"format": "pt"})

    def _stored(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(DTYPES[self.storage_dtype])
        return tensor.detach().cpu().contiguous().clone()

    def _write_config(self, folder: Path, quantized: set[str]) -> None:
        model = self.decoder.model
        config = copy.deepcopy(model.config)
        config.quantization_config = quantization_config(model, self.settings, quantized)
        config.dtype = self.storage_dtype
        config.architectures = [type(model).__name__]
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
    linears = [decoder.linear(site, name) for site in decoder.sites for name in site.linears]
    packed = {id(linear.weight) for linear in linears}
    width = torch.empty((), dtype=DTYPES[storage_dtype]).element_size()
    rest = sum(p.numel() * width for p in decoder.model.parameters() if id(p) not in packed)
    codes = sum(linear.weight.numel() * settings.bits / 8 for linear in linears)
    groups = sum(linear.weight.numel() / (settings.group_size or linear.in_features) for linear in linears)
    return int(rest + codes + groups * (width + settings.bits / 8))


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


def quantization_config(model: nn.Module, settings: Quantization, quantized: set[str]) -> dict[str, Any]:
    """Return the `quantization_config` of the checkpoint's `config.json`.

    `dequantize` lets transformers unpack the weights while it loads them. Its other way, packed until the first forward
    pass, expects unpacked zero points in an asymmetric checkpoint (compressed-tensors 0.20 does not pack them when it
    prepares the empty model) and refuses the file; other readers do not know the field.
    """
    weights = QuantizationArgs(
        num_bits=settings.bits,
        type="int",
        symmetric=settings.symmetric,
        strategy="channel" if settings.group_size is None else "group",
        group_size=settings.group_size,
    )
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized]
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=ignored,
    )
    value: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return value | {"dequantize": True}
