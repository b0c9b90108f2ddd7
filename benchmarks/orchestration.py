"""What Prefect costs: a run of which everything is cached, by itself, against a running server, and with its own.

`python -m benchmarks.orchestration [--rounds 5] [--recipe FILE] [--output FILE]`

The chain is that of a tiny model, so that the store and Prefect are all there is to time. A round begins when the
server has written what the one before it made: its SQLite database refuses a run for two seconds otherwise. `--recipe`
also times the command on a recipe that has run in `COVERCAL_CACHE`.
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
from flows.record import Running
from flows.report import conclude
from flows.serve import local_server
from tasks.cached import open_store
from tests import tiny

SETTLE_SECONDS = 5
COMMAND = [sys.executable, "-m", "flows.cli", "run"]


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds of every round."""
    times = []
    for _ in range(rounds):
        time.sleep(SETTLE_SECONDS)
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


def flow_parts(recipe: Recipe, rounds: int) -> list[dict[str, float]]:
    """Run the flow in this process; return the seconds before, between and after the ends of its tasks."""
    from flows.entrypoints import keeping, quantize

    found = []
    for _ in range(rounds):
        time.sleep(SETTLE_SECONDS)
        ended: list[float] = []
        recorder = Recorder(on_event=lambda event, ended=ended: ended.append(time.perf_counter()))
        started = time.perf_counter()
        with keeping(Running(recipe, open_store(), "a benchmark", recorder)):
            quantize(recipe.model_dump(mode="json"))
        last = time.perf_counter()
        between = ended[-1] - ended[0]
        found.append(
            {
                "before": ended[0] - started,
                "between": between,
                "after": last - ended[-1],
                "whole": last - started,
                "task": between / (len(ended) - 1),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, help="a recipe that has run in COVERCAL_CACHE")
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    own = os.environ.get("COVERCAL_CACHE", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"COVERCAL_CACHE": str(folder / "cache"), "PREFECT_HOME": str(folder / "prefect")}
        os.environ |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "COVERCAL_OFFLINE": "1"}
        os.environ.pop("PREFECT_API_URL", None)
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(tiny.recipe_value(folder / "files", pool={"samples": 64})), encoding="utf-8")
        recipe = load_recipe(path)
        times: dict[str, Any] = {"tasks": go_through(recipe)}
        times["store alone"] = timed(partial(go_through, recipe), wanted.rounds)
        times["command, no server"] = timed(partial(command, path), wanted.rounds)
        times["command, server of its own"] = timed(partial(cold_command, path), wanted.rounds)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        with local_server(port, Console(stderr=True)):
            url = os.environ["PREFECT_API_URL"]
            flow_parts(recipe, 1)  # imports, and the first connections
            times["flow, running server"] = flow_parts(recipe, wanted.rounds)
            times["command, running server"] = timed(partial(command, path, PREFECT_API_URL=url), wanted.rounds)
            if wanted.recipe is not None:
                given = partial(command, wanted.recipe, PREFECT_API_URL=url, COVERCAL_CACHE=own)
                times["recipe, running server"] = timed(given, wanted.rounds)
    show(times, wanted.output)


def show(times: dict[str, Any], output: Path | None) -> None:
    tasks = times["tasks"]
    flow = {part: [each[part] for each in times["flow, running server"]] for part in times["flow, running server"][0]}
    alone = median(times["store alone"]) / tasks
    rows = [
        ["the chain, no Prefect", spread(times["store alone"])],
        ["the flow, running server", spread(flow["whole"])],
        ["  until the first task has ended", spread(flow["before"])],
        [f"  the other {tasks - 1} tasks", spread(flow["between"])],
        ["  figures and tables for the dashboard, the end", spread(flow["after"])],
        ["one cached task, no Prefect", f"{1000 * alone:.1f} ms"],
        ["one cached task, running server", f"{1000 * median(flow['task']):.1f} ms"],
        ["`covercal run`, no server: answered from the store", spread(times["command, no server"])],
        ["`covercal run`, running server", spread(times["command, running server"])],
        ["`covercal run`, server of its own, figures to draw", spread(times["command, server of its own"])],
    ]
    if "recipe, running server" in times:
        rows.append(["`covercal run` of the recipe given, running server", spread(times["recipe, running server"])])
    report(f"A run of {tasks} cached tasks", ["", "median (least to most)"], rows, times, output)


if __name__ == "__main__":
    main()
