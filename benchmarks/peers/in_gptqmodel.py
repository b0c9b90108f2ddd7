"""Quantise a model with GPTQModel; see `common` for the job and the answer.

`python benchmarks/peers/in_gptqmodel.py JOB` in an environment with `gptqmodel`; methods "gptq" and "awq".

`quantize` packs the weights as it goes (scales in half precision), so packing lies within the measured time; the C++
extension that packs is built, at the first use on a machine, before. What is written is what the packed integers and
the half-precision scales stand for, multiplied in float32.
"""

from __future__ import annotations

from contextlib import chdir
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common import DAMPING, Job, Measured, answer, in_blocks, measured, read_job, read_tokens, write_tensors

if TYPE_CHECKING:
    import torch

PACKAGES = ("gptqmodel", "torch", "transformers")
# With "static_groups" the ranges are those of the groups in the file's order, found before anything is rounded, and
# with "desc_act" the columns are rounded in descending order of activation: the two together are what llm-compressor
# calls "static". "act_group_aware", the default, only reorders whole groups and the columns within each, and excludes
# "desc_act". The damping's default is 5%. The default format would leave zero points less one in the layers, which is
# undone only when a file is loaded.
GPTQ = {
    "desc_act": True,
    "static_groups": True,
    "act_group_aware": False,
    "damp_percent": DAMPING,
    "format": "gptq_v2",
}
AWQ = {"quant_method": "awq", "format": "gemm"}
ASKED = {
    "gptq": "GPTQ, damping 1%, activation order with static groups, true sequential; weights packed",
    "awq": "AWQ (duo scaling, its always present search for clipping), packed as gemm, whose kernel refuses float32",
}
WORKERS = "2"  # it refuses fewer, and takes one of its own accord on two cores
SHORTEST = 11  # shorter samples are left out by GPTQModel, whatever it is told


def main() -> None:
    job = read_job(ASKED, {"GPTQMODEL_CPU_WORKERS": WORKERS})
    tokens = read_tokens(job)
    if tokens.shape[1] < SHORTEST:
        raise ValueError(f"GPTQModel leaves out samples of fewer than {SHORTEST} tokens")
    model = load(job)
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, chdir(scratch):  # it leaves logs where it runs
        done = quantised(model, tokens)
    write_tensors(job, dense(job, model.model))
    settings = (
        f"{ASKED[job.method]}; {job.bits}-bit integers, asymmetric, groups of {job.group_size}, "
        "Linear layers of the decoder blocks, half-precision scales"
    )
    answer(job, done, str(dtype(job)).removeprefix("torch."), PACKAGES, settings)


def dtype(job: Job) -> torch.dtype:
    """Return what the model is computed in: AWQ's layers take no float32, and bfloat16 is the default on the CPU."""
    import torch

    return torch.float32 if job.method == "gptq" else torch.bfloat16


def load(job: Job) -> Any:
    from gptqmodel import GPTQModel, QuantizeConfig, extension

    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        device="cpu",
        offload_to_disk=False,
        **(GPTQ if job.method == "gptq" else AWQ),
    )
    extension.is_available("pack_block_cpu")  # builds it where it can be built; else packing is done in Python
    return GPTQModel.load(str(job.model), config, dtype=dtype(job))


def quantised(model: Any, tokens: torch.Tensor) -> Measured:
    import torch

    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    return measured(lambda: model.quantize(samples, batch_size=1, calibration_sort=None))


def dense(job: Job, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters, those of packed layers as what they stand for."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    parameters = dict(model.named_parameters())
    for name, module in model.named_modules():
        if not (in_blocks(name) and hasattr(module, "qweight")):
            continue
        module.scales = module.scales.float()  # what they are multiplied in
        if job.method == "gptq":
            weight = module.dequantize_weight()
        else:
            weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, job.bits, job.group_size)
        parameters[f"{name}.weight"] = weight.T
    return parameters


if __name__ == "__main__":
    main()
