"""The faults of `docs/reliability.md`, injected into real runs: fewer kills and files than there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = {
    "SIGKILL at a random moment": 20,
    "8 processes ask for one key at once": 20,
    "every file of every artifact: one bit flipped": 10,
    "every file of every artifact: cut short": 10,
    "every file of every artifact: deleted": 10,
    "every file of a remote cache: one bit flipped": 10,
    "disk full in the middle of a write": 5,
    "store moved": 4,
    "remote down": 3,
    "two users push the same key": 20,
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the injection found; in a process of its own, since it forks."""
    output = tmp_path_factory.mktemp("faults") / "found.json"
    arguments = ["--kills", "20", "--rounds", "20", "--every", "8", "--output", str(output)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert output.exists(), ended.stdout + ended.stderr
    found: list[dict[str, Any]] = json.loads(output.read_text())["findings"]
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_what_must_hold_under_a_fault_holds(findings: list[dict[str, Any]], fault: str) -> None:
    (found,) = [each for each in findings if each["fault"].startswith(fault)]
    assert found["broken"] == []
    assert found["times"] >= FAULTS[fault]


def test_no_fault_goes_unasked(findings: list[dict[str, Any]]) -> None:
    assert len(findings) == len(FAULTS)
