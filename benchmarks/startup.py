"""What starting takes: `covercal --help`, and `covercal plan` of a recipe that has run.

`python -m benchmarks.startup [--rounds 9] [--recipe FILE] [--output FILE]`

The recipe is the demonstration's, which has to have run in `COVERCAL_CACHE` (`covercal demo`). The limit is a Python
that does nothing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.real_model import report
from tasks.cached import open_store

TO_REACH = {"covercal --help": 0.5, "covercal plan": 2.0}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    recipe = given.recipe or open_store().root / "demo" / "recipe.yaml"
    own = [str(Path(sys.executable).with_name("covercal"))]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "covercal --help": [*own, "--help"],
        "covercal plan": [*own, "plan", str(recipe)],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(given.rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    rows = [
        [name, f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f})", str(TO_REACH.get(name, ""))]
        for name, found in times.items()
    ]
    report("Start-up", ["command", "median (least to most)", "to reach, s"], rows, {"seconds": times}, given.output)


if __name__ == "__main__":
    main()
