"""Round one linear with GPTQModel's own class; see `linear` for the job and the answer.

Timed: `GPTQ.quantize`, ranges included, with activation order and static groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import chdir
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common import DAMPING
from linear import read_job, run

if TYPE_CHECKING:
    import torch

SAMPLES = 64  # what it is told that the Gram matrix was summed over; with none it would not be used


def quantiser(job: dict[str, Any]) -> Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]:
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = {"desc_act": True, "static_groups": True, "act_group_aware": False, "damp_percent": DAMPING}
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=False, device="cpu", **settings)

    def prepared(weight: torch.Tensor, gram: torch.Tensor) -> Callable[[], torch.Tensor]:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        rounding = GPTQ(linear, config)
        rounding.quantizer.configure(perchannel=True)
        rounding.H, rounding.nsamples = gram, SAMPLES
        return lambda: rounding.quantize()[0]

    return prepared


if __name__ == "__main__":
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    job = read_job()
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, chdir(scratch):
        run(job, quantiser(job))
