"""Quantise a model with auto-round; see `common` for the job and the answer.

`python benchmarks/peers/in_autoround.py JOB` in an environment with `auto-round`; methods:

- "autoround": its default, 200 iterations over each block;
- "autoround-0": `iters=0`, for asymmetric weights min-max rounding to nearest that looks at no data;
- "autoround-0-neuqi": `iters=0` with `enable_neuqi`, the optimised rounding to nearest that it has for asymmetric
  weights (a search for scale and zero point, weighted by the calibration data's activations), off by default;
- "awq": its AWQ followed by rounding to nearest.

The model that comes back holds fake-quantised weights in the dtype computed in, scales and zero points beside them.
What is written are the packed integers' values: the number of steps, found by rounding, times the scale in float32.
"""

from __future__ import annotations

from contextlib import chdir
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common import Job, Measured, answer, in_blocks, measured, read_job, read_tokens, write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("auto-round", "torch", "transformers")
ASKED = {
    "autoround": "SignRound, 200 iterations, batches of 8, blocks compiled anew by torch.compile within the time",
    "autoround-0": "iters=0: rounding to nearest, min-max, no data",
    "autoround-0-neuqi": "iters=0, enable_neuqi: rounding to nearest after a search for scale and zero point",
    "awq": "AWQ (duo scaling, 20 grid points, no clipping, samples not cut) followed by rounding to nearest, min-max",
}
DATA = "given-tokens"
NEVER = "[a token that is not in the data]"


def main() -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        # Compiled code of earlier runs would make the time depend on what ran before.
        job = read_job(ASKED, {"AR_DISABLE_DATASET_SUBPROCESS": "1", "TORCHINDUCTOR_CACHE_DIR": scratch})
        tokens = read_tokens(job)
        with chdir(scratch):
            quantiser = prepared(job, tokens)
            done = measured(lambda: quantiser.quantize()[0])
        write(job, done)


def prepared(job: Job, tokens: torch.Tensor) -> Any:
    """Return auto-round's object that quantises the model, loaded."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    register(tokens)
    return AutoRound(
        AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        tokenizer(job),
        scheme=f"W{job.bits}A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        dataset=DATA,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        device_map="cpu",
        low_cpu_mem_usage=False,  # else it writes finished blocks to disk and reads them again
        **algorithm(job),
    )


def algorithm(job: Job) -> dict[str, Any]:
    from auto_round import AWQConfig, RTNConfig

    return {
        "autoround": {},
        "autoround-0": {"iters": 0},
        "autoround-0-neuqi": {"alg_configs": RTNConfig(enable_neuqi=True)},
        "awq": {"alg_configs": AWQConfig(awq_seqlen=0)},  # by default it cuts samples to 512 tokens
    }[job.method]


def register(tokens: torch.Tensor) -> None:
    """Make the tokens a data set that auto-round knows by name.

    Batches given directly would have the last token of each sample masked in the attention.
    """
    import torch
    from auto_round.calib_dataset import register_dataset
    from datasets import Dataset

    repeated = (tokens == tokens[:, -1:]).sum(1) > tokens.shape[1] // 2
    if repeated.any():
        raise ValueError(
            f"auto-round would leave out {int(repeated.sum())} samples that mostly repeat their last token"
        )
    given = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    register_dataset(DATA)(lambda *_, **__: Dataset.from_dict(given))


def tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a padding token that the data cannot hold: auto-round takes no account of padding."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(job.model)
    loaded.add_special_tokens({"pad_token": NEVER})
    return loaded


def write(job: Job, done: Measured) -> None:
    write_tensors(job, dense(job, done.result))
    settings = (
        f"{ASKED[job.method]}; {job.bits}-bit integers, asymmetric, groups of {job.group_size}, "
        "Linear layers of the decoder blocks, half-precision scales, auto-round's own dtype"
    )
    answer(job, done, str(done.result.dtype).removeprefix("torch."), PACKAGES, settings)


def dense(job: Job, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters, those of quantised layers as what their integers stand for."""
    import torch

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if in_blocks(name) and isinstance(module, torch.nn.Linear):
            scale = module.scale.float().repeat_interleave(job.group_size, 1)
            weight = torch.round(module.weight.detach().float() / scale) * scale
            torch.testing.assert_close(weight.to(module.weight.dtype), module.weight.detach())
            parameters[f"{name}.weight"] = weight
    return parameters


if __name__ == "__main__":
    main()
