"""Activation capture against the plain forward pass of the same tokens without head, batch by batch in turns.

`python -m benchmarks.capture [--tokens 65536] [--rounds 3] [--output FILE]`

Also its greatest resident memory, all tokens shard by shard as the cached step does it, beside that of a process that
loads the model and runs one batch.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.real_model import in_a_process, peak_memory, real_model_folder, report
from covercal.decoder import Decoder, batches, load_decoder, token_tensor
from covercal.evaluation import Tokens
from covercal.pool import Counts, pack, unique_documents
from covercal.recipe import TextSource
from covercal.statistics import BATCH_TOKENS, capture
from tasks.cached import open_store

LENGTH = 256
SHARD = 64


def real_sequences(folder: Path, tokens: int) -> list[Tokens]:
    from transformers import AutoTokenizer

    source = TextSource(path=str(open_store().root / "demo" / "pool.jsonl"), domain="domain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = unique_documents([source], counts := Counts())
    packed = pack(documents, tokenizer, (LENGTH,), packing="join", seed=0, counts=counts)
    return [sample.tokens for sample, _ in zip(packed, range(tokens // LENGTH), strict=False)]


@torch.inference_mode()
def plain_forward(decoder: Decoder, sequences: list[Tokens]) -> None:
    for members in batches(sequences, BATCH_TOKENS):
        decoder.body(input_ids=token_tensor([sequences[m] for m in members], decoder.device), use_cache=False)


def seconds(function: object, *arguments: object, **keywords: object) -> float:
    started = time.perf_counter()
    function(*arguments, **keywords)  # type: ignore[operator]
    return time.perf_counter() - started


def round_of(decoder: Decoder, sequences: list[Tokens], number: int) -> tuple[float, float]:
    """Return the seconds of both sides over all batches; which goes first changes from batch to batch."""
    plain = captured = 0.0
    for place, members in enumerate(batches(sequences, BATCH_TOKENS)):
        batch = [sequences[m] for m in members]
        names = [str(m) for m in members]
        for side in (0, 1) if (place + number) % 2 else (1, 0):
            if side:
                captured += seconds(capture, decoder, batch, names)
            else:
                plain += seconds(plain_forward, decoder, batch)
    return plain, captured


def peak(what: str, tokens: int) -> int:
    """Return the greatest resident memory, in bytes, of a process that runs one batch, or captures all tokens."""
    return int(in_a_process("capture", "--peak", what, "--tokens", str(tokens)))


def take_memory(what: str, tokens: int) -> None:
    """Do it, and print the peak."""
    folder = real_model_folder()
    decoder = load_decoder(folder, "float32", torch.device("cpu"))
    sequences = real_sequences(folder, tokens)
    if what == "batch":
        plain_forward(decoder, sequences[: BATCH_TOKENS // LENGTH])
    else:
        for start in range(0, len(sequences), SHARD):
            shard = sequences[start : start + SHARD]
            capture(decoder, shard, list(map(str, range(len(shard)))))
    print(json.dumps(peak_memory()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", choices=["batch", "capture"], help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.peak:
        take_memory(wanted.peak, wanted.tokens)
        return
    folder = real_model_folder()
    decoder = load_decoder(folder, "float32", torch.device("cpu"))
    sequences = real_sequences(folder, wanted.tokens)
    plain_forward(decoder, sequences[:4])
    capture(decoder, sequences[:4], list("0123"))
    pairs = [round_of(decoder, sequences, number) for number in range(wanted.rounds)]
    ratios = [captured / plain for plain, captured in pairs]
    memory = {what: peak(what, wanted.tokens) for what in ("batch", "capture")}
    value = {
        "tokens": wanted.tokens,
        "peak_bytes": memory,
        "plain_seconds": [round(p, 3) for p, _ in pairs],
        "capture_seconds": [round(c, 3) for _, c in pairs],
        "ratio_median": round(median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }
    rows = [[f"{p:.2f}", f"{c:.2f}", f"{c / p:.3f}"] for p, c in pairs]
    rows.append(["", "median", f"{value['ratio_median']:.3f} (to reach: at most 1.10)"])
    sizes = [f"{memory[what] / 1e9:.2f} GB" for what in ("batch", "capture")]
    rows.append([*sizes, f"{memory['capture'] / memory['batch']:.2f} peak memory (to reach: at most 1.2)"])
    report(
        f"capture of {wanted.tokens} tokens, float32",
        ["plain forward, s", "capture, s", "ratio"],
        rows,
        value,
        wanted.output,
    )


if __name__ == "__main__":
    main()
