"""What docker-compose.yml runs, as processes on the loopback: PostgreSQL, Redis, Prefect server, services, workers.

The programs are the distribution's own (`make test` installs them); every file lies in one temporary folder.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

REPORTS = "http://reports.invalid"
PASSWORD = "covercal:not-a-real-secret"
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
NEEDED = "PostgreSQL and Redis are not installed (Debian: apt-get install postgresql redis-server)"
START_SECONDS = 120.0
STOP_SECONDS = 20.0


def installed() -> bool:
    """Return whether the services' programs are there."""
    return POSTGRES is not None and shutil.which("redis-server") is not None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(reached: Callable[[], Any], what: str, seconds: float = START_SECONDS, every: float = 0.2) -> Any:
    """Return what `reached` returns once it is true."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if found := reached():
            return found
        time.sleep(every)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s")


@contextmanager
def process(
    command: list[str], log: Path, environment: Mapping[str, str], **options: Any
) -> Iterator[subprocess.Popen]:
    """Run a program in a process group of its own while this is open; what it says goes to `log`."""
    with log.open("ab") as stream:
        running = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True, **options
        )
    try:
        yield running
    finally:
        stop(running)


def stop(running: subprocess.Popen) -> None:
    """End a program, kindly first."""
    if running.poll() is None:
        running.terminate()
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            kill(running)


def kill(running: subprocess.Popen, *, alone: bool = False) -> None:
    """End a program and all that it started as a power cut would; or it `alone`, as the kernel does for its memory."""
    started = [] if alone else psutil.Process(running.pid).children(recursive=True)
    for each in [psutil.Process(running.pid), *started]:
        each.suspend()  # so that none can tell of the end of another
    for each in [psutil.Process(running.pid), *started]:
        each.kill()
    running.wait()


def _postgres_user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL; yield the address of an empty database."""
    assert POSTGRES is not None
    port, user = free_port(), _postgres_user()
    for parent in (*reversed(folder.parents), folder):  # the user `postgres` must reach it
        if parent.stat().st_uid == os.geteuid() and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o011)
    data = folder / "postgres"
    data.mkdir()
    if user:
        shutil.chown(data, "postgres", "postgres")
    quiet = {"stdout": subprocess.DEVNULL, "cwd": "/", **user}
    secret = folder / "secret"
    secret.write_text("prefect")
    secret.chmod(0o644)
    initdb = [POSTGRES / "initdb", "-D", data, "-U", "prefect", "--pwfile", secret, "--auth", "scram-sha-256", "-N"]
    subprocess.run([*map(str, initdb), "-E", "UTF8"], check=True, **quiet)
    command = [str(POSTGRES / "postgres"), "-D", str(data), "-p", str(port), "-k", str(data)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    environment = {**os.environ, "PGPASSWORD": "prefect"}
    with process(command, folder / "postgres.log", environment, cwd="/", **user):
        ready = [str(POSTGRES / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL starts")
        create = [str(POSTGRES / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"]
        subprocess.run(create, check=True, env=environment)
        yield f"postgresql+asyncpg://prefect:prefect@127.0.0.1:{port}/prefect"


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Run Redis; yield its port."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with process(command, folder / "redis.log", os.environ):

        def answers() -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", port)) == 0

        until(answers, "Redis starts")
        yield port


@dataclass(frozen=True)
class Server:
    """A Prefect server with its services in a process of their own.

    Attributes
    ----------
    url
        Of the API.
    environment
        Of whoever talks to it: address and password, and no cache but one below `folder`.
    folder
        Logs, and everything else.
    """

    url: str
    environment: dict[str, str]
    folder: Path

    @contextmanager
    def worker(self, name: str, **variables: str) -> Iterator[subprocess.Popen]:
        """Run a worker of the pool, which has joined when this opens."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "covercal", "--name", name]
        log = self.folder / f"{name}.log"
        with process([*command, "--limit", "2"], log, self.environment | variables, cwd=str(self.folder)) as running:
            until(
                lambda: "Worker 'Process" in log.read_text() or "started!" in log.read_text(), f"worker {name} starts"
            )
            yield running

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run `python -m …` as a client of the server."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def post(self, path: str, body: Any) -> Any:
        """Return what the API answers."""
        answer = httpx.post(self.url + path, json=body, auth=tuple(PASSWORD.split(":")), timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def patch(self, path: str, body: Any) -> None:
        """Ask the API to change something."""
        answer = httpx.patch(self.url + path, json=body, auth=tuple(PASSWORD.split(":")), timeout=30)
        answer.raise_for_status()

    def delete(self, path: str) -> None:
        """Ask the API to delete something."""
        httpx.delete(self.url + path, auth=tuple(PASSWORD.split(":")), timeout=30).raise_for_status()

    def get(self, path: str) -> Any:
        """Return what the API answers."""
        answer = httpx.get(self.url + path, auth=tuple(PASSWORD.split(":")), timeout=30)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def prefect_server(folder: Path) -> Iterator[Server]:
    """Run PostgreSQL, Redis, Prefect's server and Prefect's services, with the settings of docker-compose.yml."""
    with ExitStack() as opened:
        database, broker = opened.enter_context(postgres(folder)), opened.enter_context(redis(folder))
        port = free_port()
        client = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "COVERCAL"))},
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "COVERCAL_CACHE": str(folder / "cache"),
            "COVERCAL_REPORTS_URL": REPORTS,
            "COVERCAL_SETTINGS": str(folder / "settings.toml"),
        }
        (folder / "settings.toml").touch()
        own = client | {
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
            "PREFECT_REDIS_MESSAGING_PORT": str(broker),
            "PREFECT_SERVER_DOCKET_URL": f"redis://127.0.0.1:{broker}/1",
            "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_UI_V2_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        }
        start = [sys.executable, "-m", "prefect", "server"]
        serving = [*start, "start", "--host", "127.0.0.1", "--port", str(port), "--no-services"]
        opened.enter_context(process(serving, folder / "server.log", own))
        server = Server(f"http://127.0.0.1:{port}/api", client, folder)
        until(lambda: _healthy(server), "the Prefect server starts")
        opened.enter_context(process([*start, "services", "start"], folder / "services.log", own))
        yield server


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", auth=tuple(PASSWORD.split(":")), timeout=2).is_success
    except httpx.HTTPError:
        return False
