"""What tests of the walk over blocks share: everything that a walk gives, to the bit, and the model it stands for."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from covercal.activations import quantize_inputs
from covercal.calibration import IN_MEMORY, round_parameters
from covercal.checkpoint import CheckpointWriter
from covercal.decoder import Decoder, Site, stays_wide, token_tensor
from covercal.evaluation import Tokens
from covercal.gram import SiteStatistics
from covercal.pool_gram import PoolSite, sum_pool, symmetric
from covercal.quantization import LinearReport, QuantizedBlock, QuantizedLinear, dequantized, quantize_blocks
from covercal.quantization_settings import Dtype, Quantization
from tests.tiny import random_tokens

CPU = torch.device("cpu")
POOL = random_tokens(24, 16, 7)


def bits_of(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def linear_bits(linear: QuantizedLinear) -> tuple[Any, ...]:
    """Return all of a quantised linear to the bit."""
    parts = [linear.codes, linear.scale, linear.zero, *(linear.salient or ())]
    parts += [] if linear.input_scale is None else [linear.input_scale]
    return linear.name, linear.widened, *map(bits_of, parts)


def comparable(blocks: Sequence[QuantizedBlock]) -> list[tuple[Any, ...]]:
    """Return all of some blocks, to the bit, but the time that they took."""
    return [
        (
            block.index,
            [linear_bits(linear) for linear in block.linears],
            [repr(asdict(replace(report, seconds=0))) for report in block.reports],  # NaN is not equal to itself
            {name: bits_of(value) for name, value in block.others.items()},
            [bits_of(hidden) for stream in block.leaving for hidden in stream],
        )
        for block in blocks
    ]


def linears_of(blocks: Sequence[QuantizedBlock]) -> dict[str, QuantizedLinear]:
    return {linear.name: linear for block in blocks for linear in block.linears}


def reports_of(blocks: Sequence[QuantizedBlock]) -> dict[str, LinearReport]:
    return {report.name: report for block in blocks for report in block.reports}


def quantized_model(
    model: PreTrainedModel, blocks: Sequence[QuantizedBlock], settings: Quantization, storage: Dtype
) -> PreTrainedModel:
    """Return a copy of a float32 model, experts apart, with the weights, norms and inputs of quantised blocks."""
    changed = copy.deepcopy(model)
    round_parameters(changed, storage, stays_wide(model, storage))
    parameters = dict(changed.named_parameters())
    for block in blocks:
        for name, value in block.others.items():
            if name in parameters:
                parameters[name].data = value.float()
        for linear in block.linears:
            parameters[f"{linear.name}.weight"].data = dequantized(linear, torch.float32)
            if settings.activations.kind != "none":
                step = None if linear.input_scale is None else linear.input_scale.float()
                quantize_inputs(changed.get_submodule(linear.name), step, settings.activations.bits)
    return changed


def write_checkpoint(
    folder: Path, decoder: Decoder, samples: Sequence[Tokens], settings: Quantization, storage: Dtype = "bfloat16"
) -> tuple[CheckpointWriter, list[QuantizedBlock]]:
    """Quantise a model on some samples, or from `POOL`'s Gram matrices, and write all but its tokenizer."""
    pool = SummedPool(decoder) if settings.reads_pool_gram else None
    blocks = list(quantize_blocks(decoder, samples, settings, storage, pool=pool))
    writer = CheckpointWriter(decoder, settings, storage)
    folder.mkdir(exist_ok=True)
    for block in blocks:
        writer.write_block(block, folder)
    writer.finish(folder, list(linears_of(blocks)), {})
    return writer, blocks


def logits(model: nn.Module) -> Tensor:
    tokens = token_tensor(random_tokens(3, 20, 9), CPU)
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return found.float()


class SummedPool:
    """What is cached of `POOL`, summed here; no static ranges are read."""

    def __init__(self, decoder: Decoder, *, energy: float = 0.0) -> None:
        self.sites: dict[tuple[int, int], PoolSite] = {}
        self.energy = energy
        for block in sum_pool(decoder, [POOL], lambda _: None, by_sequence=False, spread=False, memory=IN_MEMORY):
            self.sites |= {(block.index, order): site for order, site in block.sites.items()}

    def statistics(self, site: Site) -> SiteStatistics:
        kept = self.sites[site.block, site.order]
        return SiteStatistics(
            gram=symmetric(kept.gram, site.channels, torch.float64, CPU),
            magnitude=torch.from_numpy(kept.magnitude),
            peak=torch.from_numpy(kept.peak),
            pool_energy=torch.full((site.channels,), self.energy).double() if self.energy else None,
            sequences=kept.sequences,
            tokens=kept.tokens,
            weight=kept.weight,
        )

    def input_scale(self, site: Site, scale: Tensor | None) -> float:
        raise AssertionError("no static ranges are read")
