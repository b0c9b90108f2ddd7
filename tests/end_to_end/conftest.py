import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end import services
from tests.end_to_end.services import Server
from tests.end_to_end.team import Team

SHARD = 4
SAMPLES = 320
NONE = {"divergence": []}
MANIFESTS = "objects/statistics/*/*/MANIFEST.json"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The whole of what a team runs, for all tests of this folder."""
    if not services.installed():
        pytest.skip(services.NEEDED)
    folder = Path(tempfile.mkdtemp(prefix="covercal-team-"))
    folder.chmod(0o755)
    with services.prefect_server(folder) as found:
        yield found
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def team(server: Server) -> Team:
    """The server with covercal deployed on it."""
    team = Team(server)
    team.deploy(team.write_recipe("recipe"), "--at-once", "4")
    return team


@dataclass(frozen=True)
class Lost:
    """A run whose worker was lost in the middle of capture.

    Attributes
    ----------
    run
        Its id.
    seed
        That of its pool, which tells its artifacts and its record from others.
    finished
        When each shard that was finished then was written, by its manifest.
    """

    run: str
    seed: int
    finished: dict[Path, int]


@pytest.fixture(scope="session")
def lost(team: Team) -> dict[str, Lost]:
    """Kill two workers in the middle of capture: one with its whole machine, and one alone."""
    return {
        "machine": lose(team, seed=11, alone=False),
        "worker": lose(team, seed=12, alone=True),
    }


def lose(team: Team, seed: int, *, alone: bool) -> Lost:
    pool = {"samples": SAMPLES, "seed": seed}
    recipe = team.write_recipe(f"lost-{seed}", pool=pool, statistics={"shard_samples": SHARD}, evaluation=NONE)
    cache = team.server.folder / "cache"
    before = set(cache.glob(MANIFESTS))
    with team.server.worker(f"worker-{seed}") as worker:
        run = team.trigger("quantize", recipe=str(recipe))
        services.until(lambda: len(set(cache.glob(MANIFESTS)) - before) > 5, "capture is under way")
        services.kill(worker, alone=alone)
    services.until(lambda: alone is False or team.state(run)["name"] != "Running", "the run's process ends")
    finished = {path: path.stat().st_mtime_ns for path in set(cache.glob(MANIFESTS)) - before}
    assert 5 < len(finished) < SAMPLES // SHARD
    return Lost(run, seed, finished)


@pytest.fixture(scope="session")
def worker(team: Team, lost: dict[str, Lost]) -> Iterator[subprocess.Popen]:
    """A worker that stays."""
    with team.server.worker("worker") as running:
        yield running
