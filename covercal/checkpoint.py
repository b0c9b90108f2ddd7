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
from covercal.quantization import LinearReport, QuantizedBlock, QuantizedLinear
from covercal.recipe import Dtype, Quantization

INDEX = "model.safetensors.index.json"
RECORD = "covercal.json"


@dataclass(slots=True)
class CheckpointWriter:
    """Writes a checkpoint block by block, one safetensors shard each, so that no more than one block is held.

    Attributes
    ----------
    folder
        An empty folder.
    decoder
        The original model: gives names, configuration and what is not quantised.
    settings, storage_dtype
        The grid, and the dtype of everything that is not a code.
    """

    folder: Path
    decoder: Decoder
    settings: Quantization
    storage_dtype: Dtype

    def write(self, blocks: Iterable[QuantizedBlock], record: Mapping[str, Any]) -> list[LinearReport]:
        """Write all shards, the index, the configuration and `covercal.json`; return the reports of the linears."""
        reports: list[LinearReport] = []
        quantized: set[str] = set()
        places: dict[str, str] = {}
        total = 0
        shards = len(self.decoder.blocks) + 1
        rest = self._unquantized()
        for block in blocks:
            prefix = f"{self.decoder.blocks_path}.{block.index}."
            tensors = {name: rest.pop(name) for name in [n for n in rest if n.startswith(prefix)]}
            for linear in block.linears:
                del tensors[f"{linear.name}.weight"]
                tensors.update(packed_tensors(linear, self.settings))
                quantized.add(linear.name)
            total += self._save(tensors, block.index + 1, shards, places)
            reports.extend(block.reports)
        total += self._save(rest, shards, shards, places)
        self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        self._write_config(quantized)
        self._write_json(RECORD, record)
        return reports

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

    def _save(self, tensors: Mapping[str, Tensor], number: int, shards: int, places: dict[str, str]) -> int:
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        stored = {key: self._stored(tensor) for key, tensor in sorted(tensors.items())}
        save_file(stored, self.folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(stored, name))
        return sum(tensor.nbytes for tensor in stored.values())

    def _stored(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(DTYPES[self.storage_dtype])
        return tensor.detach().cpu().contiguous().clone()

    def _write_config(self, quantized: set[str]) -> None:
        model = self.decoder.model
        config = copy.deepcopy(model.config)
        config.quantization_config = quantization_config(model, self.settings, quantized)
        config.dtype = self.storage_dtype
        config.architectures = [type(model).__name__]
        config.save_pretrained(self.folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(self.folder)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")


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
