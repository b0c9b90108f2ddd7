"""What the scripts that round one linear with a peer share; they run inside the peer's own environment.

Every `linear_X.py` is called `python benchmarks/peers/linear_X.py JOB`, JOB being a JSON object:

    {"input": FILE.safetensors, "bits": 4, "group_size": 128, "output": FILE.safetensors, "threads": 2, "rounds": 3}

`input` holds `weight` (rows, columns) and `gram` (columns, columns), float32. The script writes `weight` as what the
codes stand for, float32, and ends with one line of JSON on stdout: the seconds of every round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def read_job() -> dict[str, Any]:
    """Read the only argument and set the number of threads; has to run before torch is imported."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job["threads"]))
    return job


def run(job: dict[str, Any], quantise: Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]) -> None:
    """Time what `quantise` returns for copies of the weight and the Gram matrix, round by round."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(job["threads"])
    given = load_file(job["input"])
    seconds = []
    with torch.inference_mode():
        for _ in range(job["rounds"]):
            prepared = quantise(given["weight"].clone(), given["gram"].clone())
            started = time.perf_counter()
            found = prepared()
            seconds.append(time.perf_counter() - started)
    save_file({"weight": found.float().contiguous().clone()}, job["output"])
    sys.stdout.write("\n" + json.dumps({"seconds": seconds}) + "\n")
