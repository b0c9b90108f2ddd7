"""Round one linear with llm-compressor's own function; see `linear` for the job and the answer.

Timed: its ranges (min-max of every group) and `quantize_weight` with activation order and static groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import DAMPING
from linear import read_job, run

if TYPE_CHECKING:
    import torch


def quantiser(job: dict[str, Any]) -> Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    bits, size = job["bits"], job["group_size"]
    asked = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=size, actorder="static"
    )

    def prepared(weight: torch.Tensor, gram: torch.Tensor) -> Callable[[], torch.Tensor]:
        def quantise() -> torch.Tensor:
            groups = weight.reshape(len(weight), -1, size)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), asked)
            found = quantize_weight(
                weight[None], gram[None], scale[None], zero[None], None, asked, blocksize=128, percdamp=DAMPING
            )
            return found[0][0]

        return quantise

    return prepared


if __name__ == "__main__":
    job = read_job()
    run(job, quantiser(job))
