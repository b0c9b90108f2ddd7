"""Virtual environments of the libraries that benchmarks compare with, each made on first use, none ever imported."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from rich.console import Console

from tasks.cached import open_store

SCRIPTS = Path(__file__).parent / "peers"
OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # set for this project's processes by `flows`, not for others
TORCH = "torch==2.13.0"  # first: looser requests may fetch builds for accelerators
OURS = ["transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "safetensors==0.8.0", "numpy==2.4.6"]
GPTQMODEL_NEEDS = [
    *("tokenicer", "device-smi", "logbar", "threadpoolctl", "pypcre", "torchao", "kernels", "defuser", "maturin"),
    *("pillow", "protobuf", "random_word", "dill", "hf_transfer"),
]
STEPS: dict[str, list[list[str]]] = {
    "llmcompressor": [[TORCH], ["llmcompressor==0.14.0.1", TORCH]],
    "autoround": [
        [TORCH],
        ["auto-round==0.16.1", "transformers==5.23.0", "compressed-tensors==0.20.0", TORCH],
    ],
    "gptqmodel": [
        [TORCH],
        ["setuptools", "wheel", "ninja", "packaging", *OURS, TORCH],
        [*GPTQMODEL_NEEDS, TORCH],
        ["--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"],
    ],
}


def interpreter(peer: str, console: Console) -> Path:
    """Return the Python of a peer's environment, which is installed when it is not there or asks for other versions.

    It lies in the cache of artifacts, under `benchmarks/peers`.
    """
    folder = open_store().root / "benchmarks" / "peers" / peer
    python, mark = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps(STEPS[peer])
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for step in STEPS[peer]:
        console.print(f"  {peer}: {' '.join(step)}", highlight=False, markup=False, soft_wrap=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
        subprocess.run(command, check=True, stdout=sys.stderr)
    mark.write_text(wanted, encoding="utf-8")
    return python


def ask(python: Path, script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a script of `benchmarks/peers` on a job; returns its last line.

    Raises
    ------
    RuntimeError
        With the end of what it said, when it fails.
    """
    command = [str(python), str(SCRIPTS / script), json.dumps(job)]
    environment = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
