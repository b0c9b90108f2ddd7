"""Deploying and serving, as far as it goes without a server; the rest is in tests/end_to_end."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from covercal.errors import CovercalError, InputError
from flows import deploy, serve
from tests.end_to_end.services import free_port, until

WriteRecipe = Callable[..., Path]


def test_without_a_server_there_is_nowhere_to_deploy_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "configured_server", lambda: "")
    with pytest.raises(InputError, match="PREFECT_API_URL names no server"):
        deploy.deploy()


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "deploy"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"The Prefect server at {environment['PREFECT_API_URL']} does not answer" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("own", "deployed"), [("", "webhook/covercal"), ("mail/team", "mail/team")])
def test_failed_runs_are_told_to_the_webhook_unless_the_environment_names_a_block(
    monkeypatch: pytest.MonkeyPatch, own: str, deployed: str
) -> None:
    asked: dict[str, str] = {}
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setenv("COVERCAL_NOTIFY", own)
    monkeypatch.setattr(deploy.subprocess, "run", lambda command, env, **_: asked.update(env) or done)
    deploy._prefect_deploy("", notified=True)
    assert asked["COVERCAL_NOTIFY"] == deployed


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CovercalError, match=f"Port {port} is in use"), serve.local_server(port, Console()):
            pass


def test_what_cannot_be_served_is_named_before_anything_starts(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    one = write_recipe()
    (tmp_path / "other").mkdir()
    two = tmp_path / "other" / one.name
    two.write_text(one.read_text())
    console = Console()
    with pytest.raises(InputError, match="There is no recipe file"):
        serve.serve([tmp_path / "nowhere"], console, cron=None, port=1)
    with pytest.raises(InputError, match="Two recipes are called recipe"):
        serve.serve([one, two], console, cron=None, port=1)
    command = [sys.executable, "-m", "flows.cli", "serve", str(one), "--cron", "at night", "--port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--cron 'at night' is no time" in done.stderr


@pytest.fixture
def serving(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`covercal serve` with one recipe; yields the address of its API."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "cache"))
    port = free_port()
    recipe = write_recipe(evaluation={"divergence": []})
    command = [sys.executable, "-m", "flows.cli", "serve", str(recipe), "--cron", "0 2 * * *", "--port", str(port)]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & ignores Ctrl-C
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=hears) as process:
        try:
            yield f"http://127.0.0.1:{port}/api"
            process.send_signal(signal.SIGINT)  # as Ctrl-C does
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()  # or the end of `with` would wait for it for ever
    assert b"Traceback" not in said, said.decode()
    assert b"temporary server" not in said, "Prefect did not learn of the server that was started"
    with socket.socket() as tried:
        assert tried.connect_ex(("127.0.0.1", port)) != 0, "the server that was started is still there"


@pytest.mark.slow
def test_one_machine_schedules_and_runs_with_nothing_else_to_set_up(serving: str) -> None:
    def deployment() -> str:
        try:
            answer = httpx.get(f"{serving}/deployments/name/quantize/recipe", timeout=5)
        except httpx.HTTPError:
            return ""
        return json.dumps(answer.json()) if answer.is_success else ""

    found = json.loads(until(deployment, "the deployment is there", 120))
    assert found["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    assert found["entrypoint"] == "flows.entrypoints.quantize"
    time.sleep(1)
    run = httpx.post(f"{serving}/deployments/{found['id']}/create_flow_run", json={"state": {"type": "SCHEDULED"}})
    run.raise_for_status()

    def ended() -> str:
        state = httpx.get(f"{serving}/flow_runs/{run.json()['id']}", timeout=10).json()["state"]
        return f"{state['name']} {state['message']}" if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else ""

    assert until(ended, "the run ends", 120).startswith("Completed")
