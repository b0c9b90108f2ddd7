"""What Prefect costs: a run of which everything is cached, by itself, against a running server, and with its own.

`python -m benchmarks.orchestration [--rounds 5] [--recipe FILE] [--output FILE]`

The chain is that of a tiny model, so that the store and Prefect are all there is to time. Two pools that differ in
their number of shards (and so of tasks) give the cost of one cached task. `--recipe` also times the command on a
recipe that has run in `COVERCAL_CACHE`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.real_model import report
from covercal.recipe import Recipe, load_recipe
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.report import conclude
from flows.serve import local_server
from tasks.cached import open_store
from tests import tiny

SHARDS = (8, 1)  # samples in a shard of a pool of 64
COMMAND = [sys.executable, "-m", "flows.cli", "run"]


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds of every round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def go_through(recipe: Recipe) -> int:
    """Run the chain in this process without Prefect; return the number of artifacts."""
    store, recorder = open_store(), Recorder()
    execution = Direct(store, recorder)
    conclude(
        recipe,
        run_chain(recipe, identify(recipe, store), execution, until="report"),
        execution,
        recorder.events,
        until="report",
    )
    return len(recorder.events)


def command(path: Path, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | variables
    done = subprocess.run([*COMMAND, str(path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cold_command(path: Path) -> None:
    """Run with one artifact to make, so that a server of its own is started; the figures are drawn again."""
    for report_folder in (open_store().root / "objects" / "report").iterdir():
        subprocess.run(["rm", "-r", str(report_folder)], check=True)
    command(path)


def spread(times: list[float]) -> str:
    return f"{median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, help="a recipe that has run in COVERCAL_CACHE")
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    own = os.environ.get("COVERCAL_CACHE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"COVERCAL_CACHE": str(folder / "cache"), "PREFECT_HOME": str(folder / "prefect")}
        os.environ |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
        os.environ.pop("PREFECT_API_URL", None)
        paths, tasks = [], []
        for shard in SHARDS:
            path = folder / f"shards-of-{shard}.yaml"
            value = tiny.recipe_value(folder / "files", pool={"samples": 64}, statistics={"shard_samples": shard})
            path.write_text(json.dumps(value), encoding="utf-8")
            tasks.append(go_through(load_recipe(path)))
            paths.append(path)
        times: dict[str, Any] = {"tasks": tasks}
        times["store alone"] = [timed(partial(go_through, load_recipe(path)), wanted.rounds) for path in paths]
        times["command, no server"] = timed(lambda: command(paths[0]), wanted.rounds)
        times["command, server of its own"] = timed(lambda: cold_command(paths[0]), wanted.rounds)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        with local_server(port, Console(stderr=True)):
            from flows.entrypoints import quantize

            recipes = [load_recipe(path).model_dump(mode="json") for path in paths]
            quantize(recipes[0])  # imports, and the first connections
            times["flow, running server"] = [timed(partial(quantize, each), wanted.rounds) for each in recipes]
            url = os.environ["PREFECT_API_URL"]
            times["command, running server"] = timed(lambda: command(paths[0], PREFECT_API_URL=url), wanted.rounds)
            if wanted.recipe is not None:
                os.environ["COVERCAL_CACHE"] = own or ""
                times["recipe, running server"] = timed(
                    lambda: command(wanted.recipe, PREFECT_API_URL=url, COVERCAL_CACHE=own or ""), wanted.rounds
                )
    show(times, wanted.output)


def slope(times: list[list[float]], tasks: list[int]) -> float:
    """Return the seconds that one more task costs."""
    few, many = (median(each) for each in times)
    return (many - few) / (tasks[1] - tasks[0])


def show(times: dict[str, Any], output: Path | None) -> None:
    tasks = times["tasks"]
    alone, flow = (slope(times[name], tasks) for name in ("store alone", "flow, running server"))
    rows = [
        ["chain in one process, no Prefect", tasks[0], spread(times["store alone"][0])],
        ["flow in one process, running server", tasks[0], spread(times["flow, running server"][0])],
        ["flow in one process, running server", tasks[1], spread(times["flow, running server"][1])],
        ["`covercal run`, no server: answered from the store", tasks[0], spread(times["command, no server"])],
        ["`covercal run`, running server", tasks[0], spread(times["command, running server"])],
        ["`covercal run`, server of its own, figures to draw", tasks[0], spread(times["command, server of its own"])],
        ["one cached task, no Prefect", "", f"{1000 * alone:.1f} ms"],
        ["one cached task, running server", "", f"{1000 * flow:.1f} ms"],
    ]
    if "recipe, running server" in times:
        rows.append(["`covercal run` of the recipe given, running server", "", spread(times["recipe, running server"])])
    value = {**times, "milliseconds_a_task": {"alone": 1000 * alone, "running server": 1000 * flow}}
    report("A run of which everything is cached", ["", "tasks", "seconds"], rows, value, output)


if __name__ == "__main__":
    main()
