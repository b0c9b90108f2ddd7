"""What people do with a server: deploy, trigger, look."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tiny
from tests.end_to_end.services import Server, until

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Team:
    """A server, and recipes over one tiny model."""

    server: Server

    def write_recipe(self, name: str, **changes: Any) -> Path:
        path = self.server.folder / f"{name}.yaml"
        files = self.server.folder / "files"
        files.mkdir(exist_ok=True)
        path.write_text(json.dumps(tiny.recipe_value(files, **changes)), encoding="utf-8")
        return path

    def deploy(self, recipe: Path, *options: str) -> dict[str, Any]:
        done = self.server.run("flows.cli", "deploy", str(recipe), "--json", *options)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def deployment(self, flow: str) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get(f"/deployments/name/{flow}/covercal")
        return found

    def trigger(self, flow: str, **parameters: Any) -> str:
        """Ask the API for a run, as the dashboard does; return its id."""
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.server.post(f"/deployments/{self.deployment(flow)['id']}/create_flow_run", body)["id"])

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get(f"/flow_runs/{run}")
        return found

    def state(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.run(run)["state"]
        return found

    def ended(self, run: str, seconds: float = 180.0) -> dict[str, Any]:
        """Return the state in which a run ended."""
        until(lambda: self.state(run)["type"] in ENDED, f"flow run {run} ends", seconds)
        return self.state(run)

    def task_states(self, run: str, count: int) -> dict[str, str]:
        """Return the state of every task run by its name; the server learns of them a moment after the run's end."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "limit": 200}

        def found() -> list[dict[str, Any]]:
            runs: list[dict[str, Any]] = self.server.post("/task_runs/filter", body)
            return runs if sum(each["state_type"] in ENDED for each in runs) >= count else []

        return {each["name"]: each["state_name"] for each in until(found, f"{count} task runs end", 60)}

    def artifacts(self, run: str) -> dict[str, Any]:
        """Return the artifacts of a run by key; progress has none."""
        found = self.server.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200})
        return {each["key"]: each for each in found if each["key"]}


def contents(cache: Path, *without: str) -> dict[str, str]:
    """Return the sha256 of every file of every artifact, but for manifests: they say when and how long."""
    return {
        str(path.relative_to(cache / "objects")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((cache / "objects").rglob("*"))
        if path.is_file()
        and path.name != "MANIFEST.json"
        and path.relative_to(cache / "objects").parts[0] not in without
    }


def records(cache: Path) -> list[dict[str, Any]]:
    """Return the run records of a cache, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted((cache / "runs").glob("*.json"))]
