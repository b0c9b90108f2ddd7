"""Blocks are streamed: quantising more of them takes no more memory. The full-size figures are in docs/methods.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import write_checkpoint

ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
}
BLOCKS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, BLOCKS, SHAPE)
    return folder


def measured(folder: Path, run: int, method: str) -> dict[str, float]:
    options = ["--folder", str(folder), "--run", str(run), "--tokens", "256", "--dtype", "float32", "--method", method]
    command = [sys.executable, "-m", "benchmarks.memory", "--child", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_more_blocks_take_less_than_four_blocks_more_memory(checkpoint: Path) -> None:
    few, many = measured(checkpoint, BLOCKS - 10, "coreq"), measured(checkpoint, BLOCKS, "coreq")
    assert many["peak"] - few["peak"] < 4 * many["block"]  # the allocator's pieces differ by two from run to run
