"""What the scripts of this folder share: they run inside a peer's own environment and import nothing of this project.

Every `in_X.py` is called `python benchmarks/peers/in_X.py JOB`, JOB being a JSON object:

    {"method": "gptq", "model": FOLDER, "tokens": FILE.npy, "bits": 4, "group_size": 64,
     "output": FILE.safetensors, "threads": 2}

`model` is a Hugging Face folder (llama), `tokens` int32 (samples, length): the calibration data as it is. The script
quantises the model with the peer, writes every parameter as a dense float32 tensor under its original name (what the
quantised weights stand for) and ends with one line of JSON on stdout; everything else goes to stderr. A failure ends
with the traceback and a code that is not 0.

`read_job` has to run before torch or a peer's library is imported, as these read the environment then. This is why
the heavy imports stand inside functions here and in the scripts.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
OUTSIDE = "lm_head"


@dataclass(frozen=True)
class Job:
    """What is asked of a script, and where its last line goes."""

    method: str
    model: Path
    tokens: Path
    bits: int
    group_size: int
    output: Path
    threads: int
    answers: TextIO


@dataclass(frozen=True)
class Measured:
    """What the quantisation alone gave, how long it took, and the process's greatest resident memory so far."""

    result: Any
    seconds: float
    peak_bytes: int


def read_job(methods: Iterable[str], environment: dict[str, str] | None = None) -> Job:
    """Read the only argument, keep stdout for the last line, and prepare the environment for the imports to come.

    `environment` holds variables of the peer's own.
    """
    asked = json.loads(sys.argv[1])
    if asked["method"] not in (known := list(methods)):
        raise ValueError(f"method {asked['method']!r} is not one of {known}")
    threads = int(asked["threads"])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    os.environ |= dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= environment or {}
    paths = {name: Path(asked[name]).resolve() for name in ("model", "tokens", "output")}
    numbers = {name: int(asked[name]) for name in ("bits", "group_size")}
    return Job(method=asked["method"], **paths, **numbers, threads=threads, answers=_kept_stdout())


def _kept_stdout() -> TextIO:
    """Send all that is printed from now on, by C libraries too, to stderr, and return what was stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def read_tokens(job: Job) -> torch.Tensor:
    """Set torch's threads and return the calibration tokens, int64 (samples, length)."""
    import numpy as np
    import torch

    torch.set_num_threads(job.threads)
    tokens = torch.from_numpy(np.load(job.tokens).astype(np.int64))
    longest = json.loads((job.model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    if tokens.ndim != 2 or tokens.shape[1] > longest:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not (samples, length) of up to {longest} tokens")
    return tokens


def measured(quantise: Callable[[], Any]) -> Measured:
    """Run and time the quantisation."""
    started = time.perf_counter()
    result = quantise()
    seconds = time.perf_counter() - started
    return Measured(result, seconds, peak_memory())


def peak_memory() -> int:
    """Return this process's greatest resident memory in bytes.

    Linux hands `ru_maxrss` of the process that starts another on to the new one, so what the kernel says about this
    program's own memory comes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_blocks(name: str) -> bool:
    """Say whether a module lies in a decoder block."""
    return name.startswith("model.layers.")


def write_tensors(job: Job, tensors: dict[str, torch.Tensor]) -> None:
    """Write the model's parameters as float32, after seeing that they are the ones of the model's folder."""
    import torch
    from safetensors.torch import save_file

    expected = _shapes(job.model)
    dense = {name: tensor.detach().to(torch.float32).contiguous().clone() for name, tensor in tensors.items()}
    if json.loads((job.model / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False):
        for parameters in (expected, dense):
            parameters.pop(f"{OUTSIDE}.weight", None)
    found = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"the quantised model's parameters are not those of {job.model}: {odd[:5]}")
    save_file(dense, job.output)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    return shapes


def answer(job: Job, done: Measured, dtype: str, packages: Iterable[str], settings: str) -> None:
    """Write the last line."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    last = {
        "seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "dtype": dtype,
        "versions": versions,
        "settings": settings,
    }
    print(json.dumps(last), file=job.answers, flush=True)
