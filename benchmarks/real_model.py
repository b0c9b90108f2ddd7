"""What the benchmarks share: the demonstration's real model as a folder, and a report as table and JSON."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from covercal.recipe import Model
from flows.demo import prepare
from flows.execution import Direct, Recorder
from storage.artifacts import ArtifactStore
from tasks.cached import open_store
from tasks.identities import identify_model
from tasks.model import import_model


def real_model_folder(store: ArtifactStore | None = None) -> Path:
    """Return SmolLM2-135M-Instruct, dequantised Q4_1, as a safetensors folder; fetched on first use."""
    store = store or open_store()
    recipe = prepare(store.root, Console(stderr=True))
    gguf = recipe.parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    identity = identify_model(Model(source=str(gguf)), store)
    return store.path(Direct(store, Recorder()).run("model", import_model, model=identity))


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def peak_memory() -> int:
    """Return the greatest resident memory of this process in bytes (`ru_maxrss` may be that of its parent)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def in_a_process(module: str, *arguments: str, **environment: str) -> Any:
    """Run a benchmark's own part in a process of its own; returns the JSON of its last line."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(title: str, columns: list[str], rows: list[list[Any]], value: dict[str, Any], output: Path | None) -> None:
    """Print a table, and write `value` as JSON where `output` says."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)
    text = json.dumps(value | {"machine": machine()}, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")
