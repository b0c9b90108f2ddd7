"""Scheduling on one machine, with nothing else to set up."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from covercal.errors import CovercalError, InputError
from covercal.recipe import load_recipe
from flows.server import configured_server, set_prefect_defaults

HOST = "127.0.0.1"
START_SECONDS = 120
STOP_SECONDS = 20


def serve(recipes: Sequence[Path], console: Console, *, cron: str | None, port: int) -> None:
    """Keep a deployment for every recipe, and run what is due or asked for, one run after the other, until stopped.

    Without `PREFECT_API_URL` a server is started on this machine's loopback, and stopped at the end; its database is
    Prefect's own (in `PREFECT_HOME`), so that the next start goes on from it.

    Raises
    ------
    InputError
        When a recipe or the time is wrong, or two recipes would have one name.
    CovercalError
        When the server does not start.
    """
    _check_recipes(recipes)
    set_prefect_defaults()
    own = not configured_server()
    if own:
        os.environ["PREFECT_API_URL"] = _address(port)  # now: Prefect reads it once, when it is imported
    _check_cron(cron)
    with local_server(port, console) if own else nullcontext():
        _serve(recipes, console, cron)


def _address(port: int) -> str:
    return f"http://{HOST}:{port}/api"


def _check_recipes(recipes: Sequence[Path]) -> None:
    for recipe in recipes:
        load_recipe(recipe)
    names = [recipe.stem for recipe in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two recipes are called {twice}, and each is a deployment of its file's name; rename one.")


def _check_cron(cron: str | None) -> None:
    if cron is None:
        return
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as cause:
        raise InputError(
            f"--cron {cron!r} is no time; write minute, hour, day, month, weekday: '0 2 * * *'."
        ) from cause


def _serve(recipes: Sequence[Path], console: Console, cron: str | None) -> None:
    import prefect
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.entrypoints import quantize

    deployments: list[RunnerDeployment] = [
        quantize.to_deployment(  # type: ignore[misc]  # outside of an event loop it is the deployment itself
            name=recipe.stem,
            parameters={"recipe": str(recipe.absolute())},
            cron=cron,
            tags=["covercal", "quantize"],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for recipe in recipes
    ]
    for recipe in recipes:
        due = f"at {cron!r} (UTC)" if cron else "when asked"
        console.print(f"quantize/{recipe.stem:<24} {due}", highlight=False, markup=False)
        console.print(f"  now: prefect deployment run quantize/{recipe.stem}", highlight=False, markup=False)
    console.print(f"Dashboard    {configured_server().removesuffix('/api')}", highlight=False)
    console.print("Ctrl-C stops; schedules pause until the next start.", highlight=False)
    prefect.serve(*deployments, limit=1, print_starting_message=False)


@contextmanager
def local_server(port: int, console: Console) -> Iterator[None]:
    """Run a Prefect server on this machine's loopback, and make it that of this process, while this is open.

    Raises
    ------
    CovercalError
        When the port is in use, or the server does not start.
    """
    if not _is_free(port):
        raise CovercalError(f"Port {port} is in use; `--port` names another, PREFECT_API_URL a running server.")
    address = _address(port)
    console.print(f"starting a Prefect server at {address} …", highlight=False)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    # In a session of its own: Ctrl-C stops the runs first, and they have to say so to the server.
    process = subprocess.Popen([*command, "--log-level", "WARNING"], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        last = time.monotonic() + START_SECONDS
        while not _answers(f"{address}/health"):
            if process.poll() is not None:
                raise CovercalError("The Prefect server ended at once; `prefect server start` says why.")
            if time.monotonic() > last:
                raise CovercalError(f"The Prefect server did not start in {START_SECONDS} s.")
            time.sleep(0.5)
        os.environ["PREFECT_API_URL"] = address
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex((HOST, port)) != 0


def _answers(address: str) -> bool:
    import httpx

    try:
        return httpx.get(address, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
