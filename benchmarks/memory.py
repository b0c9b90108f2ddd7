"""Peak memory of quantising a checkpoint of Llama-7B's shape, block by block.

`python -m benchmarks.memory [--blocks 32] [--run 2] [--tokens 512] [--dtype bfloat16] [--method gptq ...]
[--folder FOLDER]`

Writes a checkpoint with random weights (13 GB in bfloat16 with 32 blocks), then quantises its first blocks in a process
of its own. The peak of that process is set beside its limit: two blocks as they are computed, the activations, and
1.5 GB for the interpreter, the embeddings, and one site's Gram matrix with its factor.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.real_model import peak_memory, report

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
ALLOWANCE = 1.5e9
SEQUENCE = 256


def write_checkpoint(folder: Path, blocks: int, shape: dict[str, int]) -> None:
    """Write a Llama of a shape with random bfloat16 weights, one shard a block."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **shape, num_hidden_layers=blocks, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for index in range(-1, blocks):
        inside = f"model.layers.{index}."
        mine = {n: s for n, s in names.items() if (n.startswith(inside) if index >= 0 else "layers." not in n)}
        file = f"model-{index + 2:05d}-of-{blocks + 1:05d}.safetensors"
        tensors = {}
        for name, size in mine.items():
            values = torch.empty(size, dtype=torch.bfloat16)
            tensors[name] = values.normal_(0, 0.02, generator=generator) if len(size) > 1 else values.fill_(1.0)
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def quantise(folder: Path, run: int, tokens: int, dtype: str, method: str) -> dict[str, float]:
    """Quantise the first blocks of a checkpoint, and return this process's peak and what it is to be set beside."""
    import torch

    from covercal.calibration import Memory
    from covercal.checkpoint import CheckpointWriter
    from covercal.decoder import load_decoder
    from covercal.quantization import quantize_blocks
    from covercal.quantization_settings import Quantization

    decoder = load_decoder(folder, dtype, torch.device("cpu"), streamed=True)
    generator = np.random.default_rng(0)
    vocabulary = decoder.model.config.vocab_size
    sequences = [
        generator.integers(0, vocabulary, SEQUENCE).astype(np.int32) for _ in range(max(1, tokens // SEQUENCE))
    ]
    settings = Quantization(method=method, bits=4, group_size=128)
    output = folder / "quantized"
    output.mkdir(exist_ok=True)
    writer = CheckpointWriter(decoder, settings, "bfloat16")
    started = time.perf_counter()
    memory = Memory(None, None)
    for block in quantize_blocks(decoder, sequences, settings, "bfloat16", memory=memory):
        writer.write_block(block, output)
        index = block.index
        del block  # or it is held while the next one is made
        if index + 1 == run:
            break
    seconds = time.perf_counter() - started
    item = decoder.model.dtype.itemsize
    config = decoder.model.config
    block_bytes = item * sum(p.numel() for p in decoder.blocks[0].parameters())
    kept = sum(linear.out_features for linear in decoder.blocks[0].modules() if isinstance(linear, torch.nn.Linear))
    compares = settings.target.kind != "weights"
    kept += 3 * config.hidden_size + config.intermediate_size if compares else 0  # what the original's sites read
    activations = item * tokens * ((2 if compares else 1) * config.hidden_size + kept)
    return {
        "peak": peak_memory(),
        "block": block_bytes,
        "activations": activations,
        "seconds": seconds / run,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--run", type=int, default=2, help="blocks to quantise")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", nargs="+", default=["gptq"])
    parser.add_argument("--shape", default="{}", help="JSON: other widths than Llama-7B's")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint there; it is used again when it is whole")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(quantise(given.folder, given.run, given.tokens, given.dtype, given.method[0])))
        return
    folder = given.folder or Path(tempfile.mkdtemp(prefix="covercal-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "model.safetensors.index.json").is_file():
            write_checkpoint(folder, given.blocks, SHAPE | json.loads(given.shape))
        found = {}
        for method in given.method:
            options = ["--run", str(given.run), "--tokens", str(given.tokens), "--dtype", given.dtype]
            command = [sys.executable, "-m", "benchmarks.memory", "--child", "--folder", str(folder), *options]
            done = subprocess.run([*command, "--method", method], capture_output=True, text=True, check=True)
            found[method] = json.loads(done.stdout.splitlines()[-1])
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for method, value in found.items():
        limit = 2 * value["block"] + value["activations"] + ALLOWANCE
        parts = [value["block"], value["activations"], value["peak"], limit]
        ratio = f"{value['peak'] / limit:.2f}"
        rows.append([method, given.dtype, *(f"{part / 1e9:.2f}" for part in parts), ratio, f"{value['seconds']:.0f}"])
    columns = ["method", "dtype", "block, GB", "activations, GB", "peak, GB", "limit, GB", "peak / limit", "s a block"]
    title = f"Quantising {given.run} of the blocks of a checkpoint of {size / 1e9:.1f} GB, {given.tokens} tokens"
    report(title, columns, rows, {"found": found, "checkpoint_bytes": size}, given.output)


if __name__ == "__main__":
    main()
