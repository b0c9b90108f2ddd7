"""Quantise a model with llm-compressor; see `common` for the job and the answer.

`python benchmarks/peers/in_llmcompressor.py JOB` in an environment with `llmcompressor`; methods "gptq" and "awq".

Both go through `oneshot` with its default (sequential) pipeline, one sample to a batch as by default. The scales and
zero points lie beside the weights: GPTQ leaves weights that are already on their grid, AWQ leaves scaled weights that
are rounded in every forward pass, and which are rounded here for writing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import DAMPING, OUTSIDE, Job, Measured, answer, in_blocks, measured, read_job, read_tokens, write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
ASKED = {
    "gptq": "GPTQModifier, damping 1%, activation order with static groups, blocks of 128 columns",
    "awq": "AWQModifier (duo scaling, 20 grid points, no clipping) followed by QuantizationModifier",
}


def main() -> None:
    job = read_job(ASKED)
    tokens = read_tokens(job)
    model = load(job)
    without_pinning()
    done = quantised(job, model, tokens)
    write_tensors(job, dense(job, model))
    settings = (
        f"{ASKED[job.method]}; {job.bits}-bit integers, asymmetric, min-max, groups of {job.group_size}, "
        "Linear layers of the decoder blocks"
    )
    answer(job, done, "float32", PACKAGES, settings)


def load(job: Job) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


def without_pinning() -> None:
    """Keep AWQ from pinning memory where no accelerator could make use of it: torch refuses to."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def recipe(job: Job) -> list[Any]:
    """Return the modifiers that the method consists of."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=job.group_size,
        observer="memoryless_minmax",
    )
    scheme = {
        "config_groups": {"blocks": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": [OUTSIDE],
    }
    if job.method == "gptq":
        return [GPTQModifier(**scheme, dampening_frac=DAMPING, actorder="static", block_size=128)]
    return [AWQModifier(), QuantizationModifier(**scheme)]


def quantised(job: Job, model: PreTrainedModel, tokens: torch.Tensor) -> Measured:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)  # asked for, although the data is tokens already
    data = DataLoader([{"input_ids": row} for row in tokens], batch_size=1)
    modifiers = recipe(job)
    return measured(lambda: oneshot(model=model, processor=tokenizer, dataset=data, recipe=modifiers))


def dense(job: Job, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters, those of quantised layers as what they stand for."""
    import torch
    from compressed_tensors.quantization import fake_quantize

    parameters = {name: value.detach() for name, value in model.named_parameters() if "weight_" not in name}
    for name, module in model.named_modules():
        if not (in_blocks(name) and isinstance(module, torch.nn.Linear)):
            continue
        weights = module.quantization_scheme.weights
        rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, weights)
        if job.method == "gptq":
            torch.testing.assert_close(module.weight.detach(), rounded)
        else:
            parameters[f"{name}.weight"] = rounded
    return parameters


if __name__ == "__main__":
    main()
