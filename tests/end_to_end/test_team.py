"""A team's server on the loopback: PostgreSQL, Redis, Prefect's server and services, workers, a browser.

The tests stand in an order: a run whose worker is lost begins again only after the server has not heard of it for a
while, and the others fill that while.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.deploy import DEPLOYMENTS
from tests import tiny
from tests.browser import launched, screenshots
from tests.end_to_end.conftest import SAMPLES, SHARD, Lost
from tests.end_to_end.services import PASSWORD, REPORTS, free_port, kill, process, until
from tests.end_to_end.team import Team, contents, records

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="session")
def _begin_with_the_lost_workers(lost: dict[str, Lost]) -> None:
    """Let the server's time to miss them begin first."""


def test_a_wrong_password_is_refused_with_a_sentence(team: Team) -> None:
    wrong = {"PREFECT_API_AUTH_STRING": "covercal:wrong"}
    done = team.server.run("flows.cli", "deploy", check=False, **wrong)
    assert done.returncode == 1
    assert "refuses: 401 Unauthorized" in done.stderr
    assert "PREFECT_API_AUTH_STRING" in done.stderr
    assert "Traceback" not in done.stderr


def test_deployments_have_forms_and_schedules_that_are_off(team: Team) -> None:
    for name in DEPLOYMENTS:
        flow = name.partition("/")[0]
        found = team.deployment(flow)
        assert found["entrypoint"] == f"flows.entrypoints.{flow}"
        assert {"covercal", flow} == set(found["tags"])
        assert found["parameters"] == {"recipe": str(team.server.folder / "recipe.yaml")}
        assert not any(schedule["active"] for schedule in found["schedules"])
        assert all(each["description"] for each in found["parameter_openapi_schema"]["properties"].values())
    form = team.deployment("quantize")["parameter_openapi_schema"]["properties"]
    choices = [option.get("enum", []) for option in form["selector"]["anyOf"]]
    assert any("coverage" in each and "random" in each for each in choices)
    assert team.deployment("quantize")["schedules"][0]["schedule"]["cron"] == "0 2 * * *"


def automations(team: Team) -> list[dict[str, Any]]:
    found = [each for each in team.server.post("/automations/filter", {}) if each["name"].startswith("covercal")]
    return sorted(found, key=lambda each: each["name"])


def test_a_schedule_that_is_switched_on_stays_on_until_it_is_switched_off(team: Team) -> None:
    recipe = team.server.folder / "recipe.yaml"
    before = automations(team)
    assert team.deploy(recipe, "--nightly")["nightly"]
    assert team.deploy(recipe)["nightly"]
    assert not team.deploy(recipe, "--no-nightly")["nightly"]
    assert len(before) == 2
    assert automations(team) == before  # to write them again would make them forget which runs they wait for


def test_a_schedule_keeps_the_time_that_somebody_gave_it(team: Team) -> None:
    found = team.deployment("quantize")
    place = f"/deployments/{found['id']}/schedules/{found['schedules'][0]['id']}"
    usual = {"cron": "0 2 * * *", "timezone": "UTC"}
    team.server.patch(place, {"schedule": {"cron": "30 4 * * 1", "timezone": "Europe/Berlin"}})
    team.deploy(team.server.folder / "recipe.yaml", "--nightly")
    (schedule,) = team.deployment("quantize")["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (True, "30 4 * * 1")
    assert schedule["schedule"]["timezone"] == "Europe/Berlin"
    team.server.patch(place, {"schedule": usual})
    team.deploy(team.server.folder / "recipe.yaml", "--no-nightly")


def test_a_form_that_is_filled_in_wrongly_is_refused_at_once(team: Team) -> None:
    import httpx

    with pytest.raises(httpx.HTTPStatusError, match="409"):
        team.trigger("quantize", selector="coverige")


@pytest.fixture(scope="session")
def twice(team: Team, worker: subprocess.Popen) -> tuple[str, str]:
    """Two runs of one recipe, one after the other."""
    runs = []
    for _ in range(2):
        runs.append(team.trigger("quantize"))
        assert team.ended(runs[-1])["name"] == "Completed", team.state(runs[-1])["message"]
    return runs[0], runs[1]


def test_a_run_that_is_triggered_again_finds_every_stage_cached(team: Team, twice: tuple[str, str]) -> None:
    first = team.task_states(twice[0], 30)
    assert set(first.values()) == {"Completed"}
    assert team.task_states(twice[1], len(first)) == dict.fromkeys(first, "Cached")
    for run in twice:
        assert team.run(run)["name"] == "quantize model · covercal w4 g16 · coverage@4"


def test_a_run_shows_its_verdict_its_decisions_and_its_figures(team: Team, twice: tuple[str, str]) -> None:
    shown = team.artifacts(twice[1])
    assert {"summary", "stages", "result"} < set(shown)
    assert "| on | measure | original |" in shown["summary"]["data"]
    record = [each for each in records(team.server.folder / "cache") if each["recipe"]["pool"]["samples"] == 16][1]
    address = f"{REPORTS}/{record['run']}/report.html"
    assert f"[{address}]({address})" in shown["summary"]["data"]
    assert address in shown["report"]["data"]
    assert (team.server.folder / "cache" / "reports" / record["run"] / "report.html").is_file()
    stages = json.loads(shown["stages"]["data"])
    assert {row["decision"] for row in stages} == {"hit"}
    assert all(row["reason"] for row in stages)
    assert sum(each["type"] == "image" for each in shown.values()) == 3


PREFECTS_OWN = "/ico/undefined.svg"  # the one file that its page of a flow run asks for and does not have


def test_the_dashboard_shows_the_run_its_verdict_and_its_figures(team: Team, twice: tuple[str, str]) -> None:
    shown = team.artifacts(twice[0])
    home = team.server.url.removesuffix("/api")
    with launched() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(f"{home}/login")
        page.fill("input[type=password]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url(f"{home}/dashboard**")
        errors: list[str] = []
        beyond: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(f"{message.text} {message.location}") if message.type == "error" else None,
        )
        page.on("request", lambda request: None if home in request.url else beyond.append(request.url))
        page.goto(f"{home}/runs")
        page.get_by_text("quantize model · covercal w4 g16 · coverage@4").first.wait_for()
        page.screenshot(path=screenshots() / "dashboard-runs.png")
        page.goto(f"{home}/runs/flow-run/{twice[1]}")
        page.get_by_text("Finished in state Cached('hit: in the store'").first.wait_for()
        page.screenshot(path=screenshots() / "dashboard-run.png")
        page.goto(f"{home}/artifacts/artifact/{shown['summary']['id']}")
        page.get_by_text("KL to the original").first.wait_for()
        page.screenshot(path=screenshots() / "dashboard-summary.png", full_page=True)
        figures = [each for each in shown.values() if each["type"] == "image"]
        for each in figures:
            page.goto(f"{home}/artifacts/artifact/{each['id']}")
            picture = page.locator("img[src^='data:image/png']").first
            picture.wait_for()
            assert picture.evaluate("image => image.complete && image.naturalWidth") > 300
            page.screenshot(path=screenshots() / f"dashboard-{each['key']}.png")
        page.goto(f"{home}/deployments/deployment/{team.deployment('quantize')['id']}/run")
        page.get_by_text("Who chooses the calibration samples").first.wait_for()
        page.screenshot(path=screenshots() / "dashboard-form.png", full_page=True)
    assert [each for each in errors if PREFECTS_OWN not in each] == []
    assert [url for url in beyond if not url.startswith(("data:", "blob:", home.replace("http", "ws")))] == []


def test_a_recipe_that_is_wrong_fails_with_its_sentence_before_any_work(team: Team, worker: subprocess.Popen) -> None:
    path = team.write_recipe("wrong", quantization={"group_size": 7})
    state = team.ended(team.trigger("quantize", recipe=str(path)))
    assert state["name"] == "Failed"
    assert "group_size 7 does not divide" in state["message"]


@contextmanager
def listening() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Receive what a webhook is sent."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_run_below_its_bar_fails_is_told_to_a_webhook_and_keeps_what_it_found(
    team: Team, worker: subprocess.Popen
) -> None:
    path = team.write_recipe("barred", require={"divergence": {"max": 0.0001}})
    with listening() as (address, received):
        team.deploy(team.server.folder / "recipe.yaml", "--webhook", address)
        run = team.trigger("quantize", recipe=str(path))
        state = team.ended(run)
        until(lambda: received, "the webhook is called", 30)
    assert state["name"] == "Failed"
    assert "misses what its recipe requires: the KL to the original" in state["message"]
    assert "summary" in team.artifacts(run)
    (told,) = received
    assert told["message"] == state["message"]
    assert told["text"].startswith("covercal: quantize model · covercal w4 g16 · coverage@4 failed. The run misses")
    assert told["url"].endswith(run)


@contextmanager
def scheduled(team: Team, recipe: Path, count: int) -> Iterator[list[str]]:
    """Have the schedules of one deployment fall due at the same moment; yield the runs that they made."""
    path = f"/deployments/{team.deployment('quantize')['id']}/schedules"
    due = datetime.now(UTC) + timedelta(seconds=45)
    body = [
        {
            "schedule": {"interval": 86400, "anchor_date": due.isoformat()},
            "active": True,
            "parameters": {"recipe": str(recipe)},
            "slug": f"at-once-{number}",
        }
        for number in range(count)
    ]
    made = [each["id"] for each in team.server.post(path, body)]

    def runs() -> list[str]:
        until_due = {"expected_start_time": {"before_": (due + timedelta(minutes=1)).isoformat()}}
        found = team.server.post("/flow_runs/filter", {"flow_runs": until_due, "limit": 200})
        ours = [each["id"] for each in found if each["auto_scheduled"] and each["parameters"]["recipe"] == str(recipe)]
        return ours if len(ours) == count else []

    try:
        yield until(runs, "the scheduled runs are there", 90)
    finally:
        for each in made:
            team.server.delete(f"{path}/{each}")


def test_two_scheduled_runs_of_one_recipe_at_the_same_time_build_each_artifact_once(
    team: Team, worker: subprocess.Popen
) -> None:
    path = team.write_recipe("both", pool={"seed": 5, "samples": 64}, statistics={"shard_samples": 4})
    with scheduled(team, path, 2) as runs:
        assert {team.ended(run)["name"] for run in runs} == {"Completed"}
    both = [each for each in records(team.server.folder / "cache") if each["recipe"]["pool"]["seed"] == 5]
    assert len(both) == 2
    decisions: dict[str, list[str]] = {}
    for stage in both[0]["stages"] + both[1]["stages"]:
        if stage["stage"] != "report":  # its numbers hold the times
            decisions.setdefault(stage["key"], []).append(stage["decision"])
    assert len(decisions) > 30
    # One has built it, and the other found it, or waited for it; what does not depend on the pool was there before.
    assert all(each.count("built") <= 1 for each in decisions.values())
    assert sum("built" in each for each in decisions.values()) > 30


@pytest.fixture(scope="session")
def swept(team: Team, worker: subprocess.Popen) -> str:
    """A sweep that ran from its deployment."""
    run = team.trigger("sweep", recipe=str(team.write_recipe("grid", sweep={"selection.budget": [2, 4, 6]})))
    assert team.ended(run)["name"] == "Completed", team.state(run)["message"]
    return run


def test_a_sweep_runs_from_its_deployment(team: Team, swept: str) -> None:
    assert {"sweep", "rows", "cells"} < set(team.artifacts(swept))
    assert team.run(swept)["name"] == "sweep model · budget"


def test_an_audit_runs_from_its_deployment(team: Team, worker: subprocess.Popen) -> None:
    mine = tiny.write_texts(team.server.folder / "mine.jsonl", range(3))
    run = team.trigger("audit", calibration=str(mine))
    assert team.ended(run)["name"] == "Completed", team.state(run)["message"]
    assert {"audit", "stages"} <= set(team.artifacts(run))
    assert team.run(run)["name"] == f"audit model · {mine}"


@contextmanager
def dask_workers(
    folder: Path, caches: list[Path], environment: dict[str, str]
) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Run a Dask scheduler and one worker process for every cache; yield the scheduler's address, and the workers."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    with ExitStack() as opened:
        log = folder / "dask.log"
        opened.enter_context(process([*scheduler, "--no-dashboard"], log, environment))
        until(lambda: "Scheduler at" in log.read_text(), "the Dask scheduler starts")
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
        workers = []
        for cache in caches:
            own = environment | {"COVERCAL_CACHE": str(cache)}
            workers.append(opened.enter_context(process([*command, "--no-nanny"], log, own, cwd=str(folder))))
        until(lambda: log.read_text().count("Registered to:") >= len(caches), "the Dask workers start")
        yield address, workers


def test_two_dask_workers_with_a_cache_each_make_the_same_bytes_as_one_machine(
    team: Team, twice: tuple[str, str], tmp_path: Path
) -> None:
    """What one has made travels to the other through the remote that both send to."""
    caches = [tmp_path / "one", tmp_path / "two"]
    variables = {"COVERCAL_CACHE": str(tmp_path / "cache"), "COVERCAL_TASK_RUNNER": "dask"}
    variables |= {"COVERCAL_REMOTE": str(tmp_path / "remote"), "COVERCAL_REMOTE_WRITE": "1"}
    (tmp_path / "remote").mkdir()
    team.server.run("flows.cli", "cache", "remote", "--create", **variables)
    with dask_workers(tmp_path, caches, team.server.environment | variables) as (address, _):
        team.server.run(
            "flows.cli", "run", str(team.server.folder / "recipe.yaml"), COVERCAL_CLUSTER=address, **variables
        )
    here = contents(tmp_path / "cache", "report")
    assert len(here) > 30
    assert here.items() <= contents(team.server.folder / "cache", "report").items()
    for cache in caches:  # both had a shard to capture
        assert [name for name in contents(cache) if name.startswith("statistics/")]


def test_a_sweep_over_dask_makes_the_same_bytes_and_outlives_one_of_two_workers(
    team: Team, swept: str, tmp_path: Path
) -> None:
    variables = {"COVERCAL_CACHE": str(tmp_path / "cache"), "COVERCAL_TASK_RUNNER": "dask", "COVERCAL_WORKERS": "3"}
    environment = team.server.environment | variables
    with dask_workers(tmp_path, [tmp_path / "cache"] * 2, environment) as (address, workers):
        command = [sys.executable, "-m", "flows.cli", "sweep", str(team.server.folder / "grid.yaml")]
        with process(command, tmp_path / "sweep.log", environment | {"COVERCAL_CLUSTER": address}) as running:
            until(
                lambda: list((tmp_path / "cache").glob("objects/statistics/*/*/MANIFEST.json")), "capture is under way"
            )
            kill(workers[0])
            assert running.wait(200) == 0, (tmp_path / "sweep.log").read_text()
    here = contents(tmp_path / "cache")
    assert len([name for name in here if name.startswith("checkpoint/")]) > 12
    assert here.items() <= contents(team.server.folder / "cache").items()


@pytest.mark.parametrize("what", ["worker", "machine"])
def test_a_lost_run_goes_on_elsewhere_without_doing_a_shard_twice(
    team: Team, lost: dict[str, Lost], worker: subprocess.Popen, what: str
) -> None:
    """The worker's end is told to the server by the run's process; that of a machine by nobody."""
    missed = lost[what]
    until(lambda: team.run(missed.run)["run_count"] > 1, "the run begins again", 300)
    state = team.ended(missed.run)
    assert state["name"] == "Completed", state["message"]
    assert team.run(missed.run)["run_count"] == 2
    assert {path: path.stat().st_mtime_ns for path in missed.finished} == missed.finished
    kept = records(team.server.folder / "cache")
    record = [each for each in kept if each["recipe"]["pool"]["seed"] == missed.seed][-1]
    decisions = [each["decision"] for each in record["stages"] if each["stage"] == "statistics"]
    assert len(decisions) == SAMPLES // SHARD
    assert decisions.count("hit") == len(missed.finished)
