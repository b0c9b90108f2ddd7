"""What is deployed: prefect.yaml, compose file, Dockerfile and .env.example agree with the code and each other."""

import re
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from flows.deploy import DEPLOYMENTS, LOST_AFTER, POOL, SCHEDULED, TAG
from flows.notify import DEPLOYED_NOTIFY, NOTIFY
from tasks.settings import KNOWN

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deployments" / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
ONCE = {"bucket", "deploy"}  # they end; others wait for that
WITHOUT_PORT = {"services"}  # it ends when one of its loops does, and is started again


@pytest.fixture(scope="module")
def deployed() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((files("deployments") / "prefect.yaml").read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
    return value


def test_every_deployment_is_of_a_flow_that_its_entrypoint_names(deployed: dict[str, Any]) -> None:
    found = []
    for each in deployed["deployments"]:
        flow = load_flow_from_entrypoint(each["entrypoint"])
        assert isinstance(flow, Flow)
        found.append(f"{flow.name}/{each['name']}")
        assert set(each["tags"]) == {TAG, flow.name}
        assert set(each["parameters"]) <= set(flow.parameters.properties)
        assert each["work_pool"]["name"] == POOL
    assert tuple(found) == DEPLOYMENTS
    assert SCHEDULED in found


def test_no_schedule_is_on_and_no_code_is_fetched(deployed: dict[str, Any]) -> None:
    schedules = [schedule for each in deployed["deployments"] for schedule in each["schedules"]]
    assert len(schedules) == 2
    assert not any(each["active"] for each in schedules)
    assert deployed["pull"] == []


def test_a_run_is_missed_after_three_heartbeats_and_not_after_two(deployed: dict[str, Any]) -> None:
    for each in deployed["deployments"]:
        beat = timedelta(seconds=int(each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]))
        assert 3 * beat < LOST_AFTER < 4 * beat


def test_prefect_is_the_version_that_the_tests_ran_with(deployed: dict[str, Any]) -> None:
    assert f"prefect=={deployed['prefect-version']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_images_are_pinned_and_ports_are_on_the_loopback(services: dict[str, Any]) -> None:
    for name, each in services.items():
        tag = each["image"].partition(":")[2]
        assert re.search(r"\d", tag), f"{name}: {each['image']} moves"
        assert "latest" not in tag
        assert all(port.startswith("127.0.0.1:") for port in each.get("ports", [])), name
        assert each.get("network_mode") is None


def test_what_stays_is_checked_and_restarted(services: dict[str, Any]) -> None:
    for name, each in services.items():
        if name in ONCE:
            continue
        assert each["restart"] == "unless-stopped"
        assert name in WITHOUT_PORT or "test" in each["healthcheck"], name


def test_workers_wait_for_the_deployments_and_these_for_the_server(services: dict[str, Any]) -> None:
    for name in ("worker", "worker-gpu"):
        assert services[name]["depends_on"] == {"deploy": {"condition": "service_completed_successfully"}}
        assert services[name]["profiles"] == [name.partition("-")[2] or "cpu"]
    assert services["deploy"]["depends_on"]["server"] == {"condition": "service_healthy"}
    assert set(services["server"]["depends_on"]) == {"postgres", "redis"}


def test_volumes_and_networks_are_declared(services: dict[str, Any]) -> None:
    value = yaml.safe_load(COMPOSE)
    named = {volume.partition(":")[0] for each in services.values() for volume in each.get("volumes", [])}
    assert {name for name in named if not name.startswith((".", "$"))} == set(value["volumes"])
    assert {name for each in services.values() for name in each["networks"]} == set(value["networks"])


def test_secrets_come_from_the_environment_alone_and_the_example_has_none() -> None:
    needed = set(re.findall(r"\$\{(\w+):\?", COMPOSE))
    assert needed == {"POSTGRES_PASSWORD", "PREFECT_AUTH", "S3_USER", "S3_PASSWORD"}
    optional = set(re.findall(r"\$\{(\w+):-", COMPOSE))
    lines = dict(re.findall(r"^#? ?([A-Z_0-9]+)=(\S*)", EXAMPLE, flags=re.M))
    assert needed <= set(lines)
    assert optional - set(lines) <= {"PREFECT_PORT", "REPORTS_PORT"}
    assert [name for name, value in lines.items() if "PASSWORD" in name and value] == []
    assert [name for name in sorted(needed) if lines[name]] == ["S3_USER"]  # the rest is refused until it is filled in


def test_no_deployment_overrides_a_setting_of_a_worker(deployed: dict[str, Any]) -> None:
    known = {each.variable for each in KNOWN.values()}
    for each in deployed["deployments"]:
        told = each["work_pool"]["job_variables"]["env"]
        assert not known & set(told)
        assert told[DEPLOYED_NOTIFY] == "{{ $COVERCAL_NOTIFY }}"


def test_what_workers_are_told_are_settings_that_there_are(services: dict[str, Any]) -> None:
    known = {each.variable for each in KNOWN.values()}
    told = {name for name in services["worker"]["environment"] if name.startswith("COVERCAL")}
    assert NOTIFY in told <= known


def test_images_run_as_nobody_and_keep_no_cache() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    final = [stage for stage in stages if re.match(r"base AS (server|worker)\n", stage)]
    assert len(final) == 2
    assert all("USER 1000:1000" in stage for stage in final)
    installs = re.findall(r"pip install[^&\n]*", DOCKERFILE)
    assert len(installs) == 4
    assert all("--no-cache-dir" in each for each in installs)
    assert [each for each in installs if "--constraint" not in each and "constraints.txt" not in each] == installs[-1:]
    assert "--no-deps" in installs[-1]


def test_every_package_of_the_project_is_in_the_image() -> None:
    for package in ("covercal", "storage", "tasks", "flows", "deployments"):
        assert f"COPY {package} {package}\n" in DOCKERFILE
        assert f"!{package}\n" in (ROOT / ".dockerignore").read_text()
